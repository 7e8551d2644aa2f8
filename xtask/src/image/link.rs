//! The static binary: this source in, an executable that needs no library of whatever machine it runs on out.
//!
//! The agent copies itself into the node's directory of CNI plugins, so what it links to would have to be there too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Arch;
use crate::{build, call, cargo, setup, step, toolchain};

/// Links the development build once more, statically, and puts it beside the ordinary one as `mtls-static`.
pub fn beside_the_dynamic_one() -> Result<PathBuf> {
    step("linking mtls statically");
    let mut command = cargo();
    command.current_dir(build::workspace()).args(["rustc", "--package", "mtls-userspace", "--bin", "mtls"]);
    command.args(["--message-format=json-render-diagnostics", "--", "-C", "target-feature=+crt-static"]);
    let built = executable(&mut command)?;
    let binary = built.with_file_name("mtls-static");
    copy(&built, &binary)?;
    // Cargo put the static one in the ordinary one's place.
    call(cargo().current_dir(build::workspace()).args(["build", "--quiet", "--workspace", "--bins"]))?;
    Ok(binary)
}

/// Builds as for a release. In a directory of its own: everything is compiled with other flags than in a release build
/// by hand.
pub fn release(arch: Arch) -> Result<PathBuf> {
    step("building mtls for the image");
    let target = arch.target();
    let mut command = Found::here(arch).compiler(arch)?.cargo(arch);
    command.current_dir(build::workspace()).args([
        "build",
        "--locked",
        "--release",
        "--workspace",
        "--bin",
        "mtls",
    ]);
    command.args(["--target", target, "--message-format=json-render-diagnostics"]);
    command.arg("--target-dir").arg(build::workspace().join("target/image/build"));
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    // The linker would make a number of what is stripped afterwards.
    flags.push("-Clink-arg=-Wl,--build-id=none".to_owned());
    let places = toolchain::remapped_paths();
    // What is written in C, too.
    let in_c: Vec<String> =
        places.iter().map(|flag| flag.replace("--remap-path-prefix", "-ffile-prefix-map")).collect();
    flags.extend(places);
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env("CFLAGS", in_c.join(" "));
    command.envs(allocator(arch));
    executable(&mut command)
}

/// What jemalloc would otherwise ask the machine that builds, so that each kind of processor made an image of its own.
fn allocator(arch: Arch) -> [(&'static str, &'static str); 3] {
    // A process gets 48 bits of addresses at most unless it asks for more, whatever the processor has.
    let address_bits = ("JEMALLOC_SYS_WITH_LG_VADDR", "48");
    // It serves smaller pages than it was made for, and refuses larger ones: arm64 kernels have up to 64 KiB.
    let page = match arch {
        Arch::Amd64 => "12",
        Arch::Arm64 => "16",
    };
    [address_bits, ("JEMALLOC_SYS_WITH_LG_PAGE", page), ("JEMALLOC_SYS_WITH_LG_HUGEPAGE", "21")]
}

/// Who can compile for a kind of processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Compiler {
    Rustup,
    /// Debian's, whose libraries for other processors are packages.
    Debian,
}

/// What this machine has to build for a kind of processor with.
#[derive(Clone, Copy, Debug)]
struct Found {
    linker: bool,
    /// Of the compiler that cargo uses.
    library: bool,
    /// Of Debian's compiler.
    debian_library: bool,
}

impl Found {
    fn here(arch: Arch) -> Self {
        let has = |rustc: &str| {
            let sysroot = output(Command::new(rustc).args(["--print", "sysroot"])).unwrap_or_default();
            Path::new(&sysroot).join("lib/rustlib").join(arch.target()).join("lib").is_dir()
        };
        let linker = arch.is_native() || setup::find(&tool(arch, "gcc")).is_some();
        Self { linker, library: has("rustc"), debian_library: has(DEBIAN_RUSTC) }
    }

    /// Everything that is missing, with the commands that bring it.
    fn compiler(self, arch: Arch) -> Result<Compiler> {
        let (target, debian) = (arch.target(), arch.name());
        let mut missing = Vec::new();
        if !self.linker {
            missing.push(format!(
                "a linker and a static C library for {debian}: apt-get install gcc-{} libc6-dev-{debian}-cross",
                arch.triple().replace('_', "-")
            ));
        }
        if !self.library && !self.debian_library {
            missing.push(format!(
                "Rust's library for {debian}: rustup target add {target}\n  or, with Debian's compiler: dpkg \
                 --add-architecture {debian} && apt-get update && apt-get install rustc-web cargo-web \
                 libstd-rust-web-dev:{debian}"
            ));
        }
        ensure!(missing.is_empty(), "nothing here builds for {target}; missing:\n  {}", missing.join("\n  "));
        Ok(if self.library { Compiler::Rustup } else { Compiler::Debian })
    }
}

impl Compiler {
    fn cargo(self, arch: Arch) -> Command {
        let mut command = match self {
            Self::Rustup => cargo(),
            Self::Debian => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", DEBIAN_RUSTC).env_remove("RUSTUP_TOOLCHAIN");
                command
            }
        };
        if !arch.is_native() {
            let linker = format!("CARGO_TARGET_{}_LINKER", arch.target().replace('-', "_").to_uppercase());
            command.env(linker, tool(arch, "gcc"));
        }
        command
    }
}

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// A tool of the C compiler's, for the processor.
fn tool(arch: Arch, name: &str) -> String {
    if arch.is_native() { name.to_owned() } else { format!("{}-{name}", arch.triple()) }
}

/// Removes symbols, with the tool for the file's own processor.
pub fn strip(binary: &Path, arch: Arch) -> Result<()> {
    call(Command::new(tool(arch, "strip")).arg("--strip-all").arg(binary))
}

fn executable(command: &mut Command) -> Result<PathBuf> {
    let output = command.stderr(Stdio::inherit()).output().context("running cargo")?;
    ensure!(output.status.success(), "building mtls failed");
    build::executable(&String::from_utf8(output.stdout).context("cargo's messages")?)
        .context("cargo named no executable")
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::null()).output()?;
    ensure!(output.status.success(), "{:?} failed", command.get_program());
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_file(to)?;
    }
    fs::copy(from, to).map(drop).with_context(|| format!("copy {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_missing_for_another_processor_is_named_with_its_remedy() {
        let everything = Found { linker: true, library: true, debian_library: true };
        assert_eq!(everything.compiler(Arch::Arm64).unwrap(), Compiler::Rustup);
        let debian = Found { library: false, ..everything };
        assert_eq!(debian.compiler(Arch::Arm64).unwrap(), Compiler::Debian);
        let said = |found: Found, arch| found.compiler(arch).unwrap_err().to_string();
        let linker = ["apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"];
        let library = ["rustup target add aarch64-unknown-linux-gnu", "libstd-rust-web-dev:arm64"];
        let no_linker = Found { linker: false, ..everything };
        let no_library = Found { debian_library: false, ..debian };
        for (found, missing, there) in
            [(no_linker, &linker[..], &library[..]), (no_library, &library, &linker)]
        {
            let said = said(found, Arch::Arm64);
            assert!(missing.iter().all(|part| said.contains(part)), "{said}");
            assert!(!there.iter().any(|part| said.contains(part)), "{said}");
        }
        let nothing = said(Found { linker: false, ..no_library }, Arch::Arm64);
        assert!(linker.iter().chain(&library).all(|part| nothing.contains(part)), "{nothing}");
        let amd64 = said(Found { linker: false, ..no_library }, Arch::Amd64);
        assert!(amd64.contains("gcc-x86-64-linux-gnu libc6-dev-amd64-cross"), "{amd64}");
    }
}
