//! Real applications: a pod in, a server in it; a client pod in, what a session between them was like out.
//!
//! All are run as they come from the distribution, with nothing that knows of a mesh.

mod files;
mod grpc;
mod mariadb;
mod nginx;
mod postgres;
mod redis;

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::User;

use crate::{Lab, Pod, Running, eventually};

pub use files::Files;
pub use grpc::Grpc;
pub use mariadb::MariaDb;
pub use nginx::Nginx;
pub use postgres::Postgres;
pub use redis::Redis;

/// What a session between a client and a server was like.
#[derive(Clone, Debug)]
pub struct Session {
    /// What ran, in a newcomer's words.
    pub what: &'static str,
    /// Requests, queries, messages or bytes: what the client counted.
    pub done: String,
    /// Whom the server itself says it served.
    pub client_seen: IpAddr,
}

/// A directory below the lab's that belongs to a user, so that servers which refuse to be root can write.
fn data_dir(lab: &Lab, pod: &Pod, what: &str, user: Option<&str>) -> Result<PathBuf> {
    let dir = lab.dir().join(format!("{what}-{}", pod.name()));
    std::fs::create_dir_all(&dir)?;
    // The lab's own directory has to be passable for others.
    std::fs::set_permissions(lab.dir(), std::fs::Permissions::from_mode(0o755))?;
    if let Some(name) = user {
        let user = User::from_name(name)?.with_context(|| format!("no user {name} (cargo xtask setup)"))?;
        chown(&dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(dir)
}

/// A command in a pod as another user.
fn as_user(pod: &Pod, user: &str, program: &Path) -> Command {
    let mut command = pod.command("setpriv");
    command.args(["--reuid", user, "--regid", user, "--init-groups", "--"]).arg(program);
    command
}

fn program(name: &str) -> Result<PathBuf> {
    crate::requirements::find(name).with_context(|| format!("{name} is not installed (cargo xtask setup)"))
}

/// Waits until something answers at a pod's own address.
fn await_listening(pod: &Pod, port: u16, server: &mut Running) -> Result<SocketAddr> {
    let address = pod.addr(port);
    let up = eventually(Duration::from_secs(30), || {
        let up = pod.netns().within(|| TcpStream::connect(address)).is_ok();
        (up || !server.alive()).then_some(up)
    });
    if up != Some(true) {
        // It may have said why.
        let said = server.line_within("a reason", Duration::from_millis(200), |_| None::<()>);
        bail!("nothing listens at {address}: {:#}", said.err().context("no error")?);
    }
    Ok(address)
}

/// The address in `10.0.0.1`, `10.0.0.1:80` or `[fd00::1]:80`, v4-mapped or not.
fn ip_in(text: &str) -> Result<IpAddr> {
    let text = text.trim();
    let ip = text.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    ip.map(|ip: IpAddr| ip.to_canonical()).with_context(|| format!("no address: {text:?}"))
}
