//! Compiling the test programs, once per content and way of linking.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// How a test program is linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Linkage {
    /// As the compiler does by default: glibc, position-independent.
    Dynamic,
    /// glibc, statically, at fixed addresses.
    Static,
    /// glibc, statically, position-independent.
    StaticPie,
    /// glibc, dynamically, at fixed addresses.
    NoPie,
    /// musl, dynamically.
    Musl,
    /// musl, statically.
    MuslStatic,
}

impl Linkage {
    fn compiler(self) -> &'static str {
        if matches!(self, Self::Musl | Self::MuslStatic) { "musl-gcc" } else { "gcc" }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Dynamic | Self::Musl => &[],
            Self::Static => &["-static", "-no-pie"],
            Self::StaticPie => &["-static-pie"],
            Self::NoPie => &["-no-pie", "-fno-pie"],
            Self::MuslStatic => &["-static"],
        }
    }
}

/// A test program and how it is linked.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// The source's name in `programs/`, without extension.
    pub name: &'static str,
    /// How it is linked.
    pub linkage: Linkage,
}

/// The target directory's profile folder, e.g. `target/debug`: this executable lies in it, or, if it is a test, in its `deps`.
pub fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("the path of this executable");
    let folder = exe.parent().expect("an executable in target/*");
    if folder.ends_with("deps") { folder.parent().expect("target/*") } else { folder }.to_path_buf()
}

/// The binary under test.
pub fn slipstream() -> PathBuf {
    let path = std::env::var_os("SLIPSTREAM_BIN")
        .map_or_else(|| profile_dir().join("slipstream"), PathBuf::from);
    assert!(
        path.is_file(),
        "no binary to test at {}: cargo build -p slipstream, or set SLIPSTREAM_BIN",
        path.display()
    );
    path
}

/// The steps before the commit at which a session can be made to fail, as the binary lists them.
pub fn fail_points() -> Vec<String> {
    let output = Command::new(slipstream()).arg("fail-points").output().expect("slipstream");
    assert!(
        output.status.success(),
        "slipstream fail-points: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

fn sources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/programs"))
}

/// The names of all test programs.
pub fn all() -> Vec<String> {
    let entries = std::fs::read_dir(sources()).expect("the folder of test programs");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let mut names: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

/// Whether a program can be found on the search path.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

impl Build {
    /// The usual way.
    pub const fn dynamic(name: &'static str) -> Self {
        Self { name, linkage: Linkage::Dynamic }
    }

    /// What is missing to build this, if anything.
    pub fn missing(self) -> Option<String> {
        let compiler = self.linkage.compiler();
        (!on_path(compiler)).then(|| {
            format!(
                "no {compiler} (package {})",
                if compiler == "gcc" { "gcc" } else { "musl-tools" }
            )
        })
    }

    /// The executable, compiled now if it is not there yet.
    pub fn executable(self) -> PathBuf {
        let source = sources().join(format!("{}.c", self.name));
        let directory = profile_dir().join("test-programs");
        std::fs::create_dir_all(&directory).expect("the folder of compiled test programs");
        let executable =
            directory.join(format!("{}-{:?}-{:016x}", self.name, self.linkage, digest(&source)));
        if executable.exists() {
            return executable;
        }
        // Compiled under a name of this thread's own, for several tests may want it at once.
        let fresh = directory.join(format!(
            "{}.{}.{:?}",
            self.name,
            std::process::id(),
            std::thread::current().id()
        ));
        let output = Command::new(self.linkage.compiler())
            .args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"])
            .args(self.linkage.flags())
            .arg("-o")
            .args([&fresh, &source])
            .output()
            .unwrap_or_else(|error| panic!("running {}: {error}", self.linkage.compiler()));
        assert!(
            output.status.success(),
            "{}: {}",
            source.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        // Never replaced: another test may be running it.
        match std::fs::hard_link(&fresh, &executable) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                panic!("putting {} in place: {error}", executable.display())
            }
            _ => std::fs::remove_file(&fresh).expect("removing a compiler's output"),
        }
        executable
    }
}

/// Of the source and every header, so that no stale program is ever run.
fn digest(source: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    std::fs::read(source)
        .unwrap_or_else(|error| panic!("{}: {error}", source.display()))
        .hash(&mut hasher);
    for header in ["common.h", "caps.h", "drain.h", "oracle.c"] {
        std::fs::read(sources().join(header)).expect("a header").hash(&mut hasher);
    }
    hasher.finish()
}
