// Goroutines, channels, timers and a busy garbage collector over a few hundred MB of checked data.
package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

func digest(i int) [32]byte { return sha256.Sum256([]byte(fmt.Sprint(i))) }

func main() {
	flag := os.Args[1]
	held := make(map[int]*[32]byte)
	for i := 0; i < 400_000; i++ {
		sum := digest(i)
		held[i] = &sum
	}
	blocks := make([][]byte, 64)
	for i := range blocks {
		sum := digest(i)
		blocks[i] = make([]byte, 1<<20)
		for at := range blocks[i] {
			blocks[i][at] = sum[at%32]
		}
	}
	var stop atomic.Bool
	var failures, backwards atomic.Int64
	var group sync.WaitGroup
	numbers := make(chan int)
	for worker := 0; worker < 8; worker++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for number := range numbers {
				if *held[number] != digest(number) {
					failures.Add(1)
				}
				_ = make([]byte, 10_000)
			}
		}()
	}
	ticker := time.NewTicker(5 * time.Millisecond)
	group.Add(1)
	go func() {
		defer group.Done()
		// Not the time that the tick carries: a thread that is held up between taking it and sending it
		// sends it after the next one, which another thread took.
		for last := time.Now(); !stop.Load(); {
			<-ticker.C
			now := time.Now()
			if now.Before(last) {
				backwards.Add(1)
			}
			last = now
			runtime.Gosched()
		}
	}()
	fmt.Println("ready")
	for number, sent := 0, 0; ; number, sent = (number*21+1)%400_000, sent+1 {
		numbers <- number
		if sent%512 == 0 {
			if _, err := os.Stat(flag); err == nil {
				break
			}
		}
	}
	stop.Store(true)
	close(numbers)
	group.Wait()
	runtime.GC()
	for i, sum := range held {
		if *sum != digest(i) {
			failures.Add(1)
		}
	}
	for i, block := range blocks {
		sum := digest(i)
		for at := range block {
			if block[at] != sum[at%32] {
				failures.Add(1)
				break
			}
		}
	}
	if failures.Load()+backwards.Load() != 0 {
		fmt.Println("FAIL:", failures.Load(), "differences,", backwards.Load(), "steps of the clock back")
		os.Exit(1)
	}
	fmt.Println("OK")
}
