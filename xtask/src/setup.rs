//! Installs what the other commands need: a look at the machine in, missing Debian packages and tools installed out.
//!
//! Quick when nothing is missing. Never starts, stops or reconfigures a service: packages that would start one are
//! kept from it while they are installed, and one that runs already is left alone.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{call, cargo, kubernetes, promtool, step, toolchain};

/// A file or program that shows whether something is there, and the package that brings it.
struct Need {
    what: &'static str,
    package: &'static str,
    why: &'static str,
}

const NEEDS: [Need; 19] = [
    Need { what: "cc", package: "build-essential", why: "a C compiler, for the cryptographic library" },
    Need { what: "ip", package: "iproute2", why: "the lab's network namespaces" },
    Need { what: "setpriv", package: "util-linux", why: "servers that refuse to run as root" },
    Need { what: "curl", package: "curl", why: "the lab's HTTP client" },
    Need { what: "openssl", package: "openssl", why: "the lab's other opinion about TLS" },
    Need { what: "nginx", package: "nginx-light", why: "an application of the lab" },
    Need { what: "wrk", package: "wrk", why: "load for nginx" },
    Need { what: "initdb", package: "postgresql", why: "an application of the lab" },
    Need { what: "psql", package: "postgresql-client", why: "load for PostgreSQL" },
    Need { what: "redis-server", package: "redis-server", why: "an application of the lab" },
    Need { what: "redis-benchmark", package: "redis-tools", why: "load for Redis" },
    Need { what: "mariadbd", package: "mariadb-server", why: "an application of the lab" },
    Need { what: "mariadb-slap", package: "mariadb-client", why: "load for MariaDB" },
    Need { what: "chromium", package: "chromium", why: "a browser for the status page" },
    Need {
        what: "runc",
        package: "runc",
        why: "what runs an agent with a DaemonSet's privileges and no others",
    },
    Need {
        what: "/usr/share/containers/seccomp.json",
        package: "golang-github-containers-common",
        why: "the system calls that container engines permit",
    },
    Need { what: "umoci", package: "umoci", why: "another opinion about images" },
    Need { what: "shellcheck", package: "shellcheck", why: "another opinion about scripts" },
    Need { what: "chromedriver", package: "chromium-driver", why: "what tells the browser what to do" },
];

/// A compiled `core` for the BPF target, for machines without rustup's nightly and rust-src.
const BPF_TOOLCHAIN: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];
/// What bpf-linker is built with.
const LLVM: [&str; 4] = ["llvm-22-dev", "libpolly-22-dev", "libzstd-dev", "zlib1g-dev"];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const BPF_LINKER: &str = "0.13.0";

/// Whether Debian's policy lets a package start a service; invoke-rc.d asks it.
const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_ASIDE: &str = "/usr/sbin/policy-rc.d.before-mtls-setup";

pub fn run() -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| find(need.what).is_none()).collect();
    let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    if toolchain::compiler().is_none() {
        packages.extend(BPF_TOOLCHAIN);
    }
    let needs_linker = toolchain::linker().is_none();
    if needs_linker {
        packages.extend(LLVM);
    }
    if !packages.is_empty() {
        for need in &missing {
            println!("missing: {}, {}", need.what, need.why);
        }
        install(&packages)?;
    }
    if needs_linker {
        step("building bpf-linker, about a minute");
        let mut install = cargo();
        install.env("LLVM_PREFIX", LLVM_PREFIX).args(["install", "bpf-linker", "--version", BPF_LINKER]);
        call(install.args(["--no-default-features", "--features", "llvm-22"]))?;
    }
    promtool::install()?;
    kubernetes::install()?;
    add_components()
}

/// Installs the packages of those programs that are missing: (program, package).
pub fn packages(needs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> =
        needs.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

/// Installs packages, missing or not.
pub fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let rather = [&BPF_TOOLCHAIN[..], &LLVM[..]].concat().join(" ");
    require_debian(&list).with_context(|| {
        format!(
            "for the kernel half, instead of {rather}: `rustup toolchain install nightly --component rust-src` and \
             `cargo install bpf-linker`"
        )
    })?;
    ensure!(is_root(), "installing needs root: apt-get install {list}");
    step(&format!("installing {list}"));
    let _quiet = NoServices::begin()?;
    apt(&["update"])?;
    apt(&[&["install", "-y", "--no-install-recommends"], packages].concat())
}

/// An error unless this machine's packages are Debian's.
pub fn require_debian(list: &str) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let debian = find("apt-get").is_some() && release.lines().any(|line| line == "ID=debian");
    ensure!(debian, "this is not Debian: install what Debian calls {list}");
    Ok(())
}

pub fn apt(args: &[&str]) -> Result<()> {
    call(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").arg("-qq").args(args))
}

/// While this lives, no package starts a service.
struct NoServices;

impl NoServices {
    fn begin() -> Result<Self> {
        let (policy, aside) = (Path::new(POLICY), Path::new(POLICY_ASIDE));
        // One that lies aside is from a set-up that was killed; what stands in its place is ours.
        if policy.exists() && !aside.exists() {
            fs::rename(policy, aside).with_context(|| format!("put {POLICY} aside"))?;
        }
        fs::write(policy, "#!/bin/sh\nexit 101\n").with_context(|| format!("write {POLICY}"))?;
        fs::set_permissions(policy, fs::Permissions::from_mode(0o755))?;
        Ok(Self)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        let restored = match Path::new(POLICY_ASIDE).exists() {
            true => fs::rename(POLICY_ASIDE, POLICY),
            false => fs::remove_file(POLICY),
        };
        if let Err(error) = restored {
            eprintln!(
                "cannot restore {POLICY}: {error}; services of packages installed later will not start"
            );
        }
    }
}

/// clippy and rustfmt, which rustup's minimal profile leaves out.
fn add_components() -> Result<()> {
    let missing: Vec<&str> = [("cargo-clippy", "clippy"), ("cargo-fmt", "rustfmt")]
        .into_iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    ensure!(
        find("rustup").is_some(),
        "{} missing: install Rust by rustup (https://rustup.rs)",
        missing.join(", ")
    );
    step("adding to the Rust toolchain what the linter needs");
    call(Command::new("rustup").args(["component", "add"]).args(missing))
}

/// Finds a program where Debian, PostgreSQL and rustup put programs.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.extend(env::home_dir().map(|home| home.join(".cargo/bin")));
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    dirs.extend(versions.map(|version| version.path().join("bin")));
    dirs.into_iter().map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // Whoever runs us owns our entry in /proc.
    fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}
