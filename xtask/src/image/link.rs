//! The static binary: this source in, an executable that needs no library of whatever machine it runs on out.
//!
//! The agent copies itself into the node's directory of CNI plugins, so what it links to would have to be there too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::Arch;
use crate::{build, call, cargo, setup, step};

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
    let mut command = Compiler::of(arch)?.cargo();
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
    // Where it was built is nobody's business, and would make each machine's build another one.
    let workspace = build::workspace().canonicalize()?;
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))).context("no home directory")?;
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={}=/mtls", workspace.display()),
        format!("--remap-path-prefix={}=/cargo", home.display()),
    ];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    executable(&mut command)
}

/// Who can compile for a kind of processor.
#[derive(Debug)]
enum Compiler {
    Rustup,
    /// Debian's, whose libraries for other processors are packages.
    Debian,
}

impl Compiler {
    fn of(arch: Arch) -> Result<Self> {
        let has = |rustc: &str| {
            let sysroot = output(Command::new(rustc).args(["--print", "sysroot"])).unwrap_or_default();
            Path::new(&sysroot).join("lib/rustlib").join(arch.target()).join("lib").is_dir()
        };
        let links = arch == Arch::Amd64 || setup::find(CROSS_CC).is_some();
        if links && has("rustc") {
            return Ok(Self::Rustup);
        }
        if links && has("/usr/bin/rustc") {
            return Ok(Self::Debian);
        }
        bail!(
            "nothing here builds for {target}: `apt-get install gcc-aarch64-linux-gnu`, then `rustup target add {target}`, \
             or `dpkg --add-architecture arm64 && apt-get update && apt-get install libstd-rust-web-dev:arm64`",
            target = arch.target()
        )
    }

    fn cargo(&self) -> Command {
        let mut command = match self {
            Self::Rustup => cargo(),
            Self::Debian => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", "/usr/bin/rustc").env_remove("RUSTUP_TOOLCHAIN");
                command
            }
        };
        command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", CROSS_CC);
        command
    }
}

const CROSS_CC: &str = "aarch64-linux-gnu-gcc";

/// Removes symbols, with the tool for the file's own processor.
pub fn strip(binary: &Path, arch: Arch) -> Result<()> {
    let native = cfg!(target_arch = "x86_64") == (arch == Arch::Amd64);
    let strip = if native { "strip" } else { "aarch64-linux-gnu-strip" };
    call(Command::new(strip).arg("--strip-all").arg(binary))
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
