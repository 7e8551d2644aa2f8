//! The BPF toolchain: what this machine has in, how to build with it or what is missing out.
//!
//! A nightly Rust with its library's source builds `core` for the BPF target itself. Debian's compiler for the web comes
//! with a built one. Both need bpf-linker.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build;

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const TARGET: &str = "bpfel-unknown-none";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compiler {
    /// rustup's nightly with rust-src.
    Nightly,
    /// Debian's rustc-web, with a `core` for BPF.
    Debian,
}

/// Something to install, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Missing {
    pub what: &'static str,
    pub command: &'static str,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.command)
    }
}

const NIGHTLY: Missing = Missing {
    what: "Rust nightly with rust-src",
    command: "rustup toolchain install nightly --component rust-src",
};
const DEBIAN: Missing = Missing {
    what: "or Debian's Rust with a core library for BPF",
    command: "apt-get install rustc-web cargo-web libstd-rust-web-dev-bpf",
};
const LINKER_FOR_NIGHTLY: Missing = Missing { what: "bpf-linker", command: "cargo install bpf-linker" };
const LLVM_FOR_DEBIAN: Missing = Missing {
    what: "LLVM's development files, to build bpf-linker",
    command: "apt-get install llvm-22-dev libpolly-22-dev libzstd-dev zlib1g-dev",
};
const LINKER_FOR_DEBIAN: Missing = Missing {
    what: "bpf-linker",
    command: "LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --no-default-features --features llvm-22",
};

/// The compiler to build the kernel half with; nightly first.
pub fn compiler() -> Option<Compiler> {
    if has_nightly() {
        Some(Compiler::Nightly)
    } else if has_debian() {
        Some(Compiler::Debian)
    } else {
        None
    }
}

/// Everything that has to be installed before the kernel half can be built; with no compiler at all, two ways to one.
pub fn missing() -> Vec<Missing> {
    let mut missing = match compiler() {
        Some(_) => Vec::new(),
        None => vec![NIGHTLY, DEBIAN],
    };
    if linker().is_none() {
        match compiler() {
            Some(Compiler::Nightly) => missing.push(LINKER_FOR_NIGHTLY),
            Some(Compiler::Debian) | None => {
                if !Path::new("/usr/lib/llvm-22/bin/llvm-config").exists() {
                    missing.push(LLVM_FOR_DEBIAN);
                }
                missing.push(LINKER_FOR_DEBIAN);
            }
        }
    }
    missing
}

/// bpf-linker on the path, or where cargo installs.
pub fn linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo =
        env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let directories = env::split_paths(&path).chain(cargo.map(|home| home.join("bin")));
    directories.map(|directory| directory.join("bpf-linker")).find(|linker| linker.is_file())
}

impl Compiler {
    /// `cargo build` for the BPF target, to be given the rest of its arguments.
    pub fn build(self) -> Command {
        let mut command = match self {
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
                command
            }
            Self::Debian => {
                let mut command = Command::new(DEBIAN_CARGO);
                // aya-ebpf needs asm_experimental_arch, which is a nightly feature.
                command.arg("build").env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        if self == Self::Nightly {
            command.env_remove("RUSTC");
        }
        // What the build of this very program set, or a user for ordinary builds, is wrong for this one: RUSTFLAGS
        // would replace those that the kernel half's own configuration gives.
        for variable in [
            "RUSTUP_TOOLCHAIN",
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "RUSTC_WRAPPER",
        ] {
            command.env_remove(variable);
        }
        if let Some(directory) = linker().as_deref().and_then(Path::parent) {
            let path = env::var_os("PATH").unwrap_or_default();
            let directories = [directory.to_path_buf()].into_iter().chain(env::split_paths(&path));
            if let Ok(path) = env::join_paths(directories) {
                command.env("PATH", path);
            }
        }
        command.args(["--release", "--target", TARGET]);
        // Added to those that the kernel half's own configuration gives.
        let flags: Vec<String> = remapped_paths().iter().map(|flag| format!("{flag:?}")).collect();
        command.arg("--config").arg(format!("target.{TARGET}.rustflags=[{}]", flags.join(", ")));
        if let Ok(own) = env::current_exe() {
            command.env("RUSTC_WRAPPER", own).env(WRAPPING, "1");
        }
        command
    }
}

/// Flags by which where it was built is nobody's business, and does not make each machine's build another one.
pub fn remapped_paths() -> Vec<String> {
    let workspace = build::workspace().canonicalize().ok();
    let cargo =
        env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let places = [(workspace, "/mtls"), (cargo, "/cargo")];
    let flag =
        |(from, to): (Option<PathBuf>, &str)| Some(format!("--remap-path-prefix={}={to}", from?.display()));
    places.into_iter().filter_map(flag).collect()
}

/// Says that this program stands in the compiler's place.
const WRAPPING: &str = "MTLS_WRAPS_RUSTC";

/// Calls the compiler, if that is what this program was called for: cargo names a crate of ours after its directory,
/// when that is not below the workspace's own, and by this name all symbols of the kernel half.
pub fn wrap() -> Option<std::io::Error> {
    use std::os::unix::process::CommandExt;
    env::var_os(WRAPPING)?;
    let mut args = env::args_os().skip(1);
    let rustc = args.next()?;
    let args: Vec<OsString> = args.collect();
    let named = args.iter().skip_while(|arg| *arg != "--crate-name").nth(1).and_then(|name| name.to_str());
    let named = named.filter(|name| name.starts_with("mtls_")).map(|name| format!("metadata={name}"));
    let is_metadata = |arg: &OsString| arg.to_str().is_some_and(|arg| arg.starts_with("metadata="));
    let args = args.iter().map(|arg| match &named {
        Some(named) if is_metadata(arg) => OsString::from(named),
        _ => arg.clone(),
    });
    Some(Command::new(rustc).args(args).env_remove(WRAPPING).exec())
}

fn has_nightly() -> bool {
    let sysroot = sysroot(Command::new("rustup").args(["run", "nightly", "rustc"]));
    sysroot.is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists())
}

fn has_debian() -> bool {
    let Some(sysroot) = sysroot(&mut Command::new(DEBIAN_RUSTC)) else { return false };
    let libraries = fs::read_dir(sysroot.join("lib/rustlib").join(TARGET).join("lib"));
    let has_core = libraries
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"));
    has_core && Path::new(DEBIAN_CARGO).exists()
}

fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}
