import java.io.File;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicLong;

/** A collector with guard pages, compiled code and many mappings, over checked data. */
public class Check {
    static long mix(long x) {
        x += 0x9e3779b97f4a7c15L;
        x = (x ^ (x >>> 30)) * 0xbf58476d1ce4e5b9L;
        return x ^ (x >>> 27);
    }

    public static void main(String[] arguments) throws Exception {
        File flag = new File(arguments[0]);
        HashMap<Integer, long[]> held = new HashMap<>();
        for (int i = 0; i < 20000; i++) {
            long[] block = new long[500];
            for (int at = 0; at < block.length; at++) block[at] = mix(i * 1000L + at);
            held.put(i, block);
        }
        AtomicBoolean stop = new AtomicBoolean();
        AtomicLong failures = new AtomicLong();
        ArrayList<Thread> threads = new ArrayList<>();
        for (int worker = 0; worker < 4; worker++) {
            final int first = worker * 5000;
            Thread thread = new Thread(() -> {
                int number = first;
                while (!stop.get()) {
                    number = (number * 21 + 1) % 20000;
                    long[] copy = held.get(number).clone();
                    for (int at = 0; at < copy.length; at++)
                        if (copy[at] != mix(number * 1000L + at)) failures.incrementAndGet();
                }
            });
            thread.start();
            threads.add(thread);
        }
        System.out.println("ready");
        while (!flag.exists()) Thread.sleep(5);
        stop.set(true);
        for (Thread thread : threads) thread.join();
        System.gc();
        held.forEach((number, block) -> {
            for (int at = 0; at < block.length; at++)
                if (block[at] != mix(number * 1000L + at)) failures.incrementAndGet();
        });
        System.out.println(failures.get() == 0 ? "OK" : "FAIL: " + failures.get() + " differences");
    }
}
