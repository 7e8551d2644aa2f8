//! MariaDB: a protocol in which the server speaks first.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Session, await_listening, data_dir, ip_in, program};
use crate::{Lab, MARKER, Pod, Running};

pub struct MariaDb {
    _server: Running,
    address: SocketAddr,
}

impl MariaDb {
    pub const NEEDS: [&'static str; 4] = ["mariadbd", "mariadb-install-db", "mariadb", "mariadb-slap"];
    pub const PORT: u16 = 3306;

    pub fn start(lab: &Lab, pod: &Pod) -> Result<Self> {
        let dir = data_dir(lab, pod, "mariadb", Some("mysql"))?;
        let data = dir.join("data");
        let mut install = pod.command(program("mariadb-install-db")?);
        install.args([
            "--no-defaults",
            "--user=mysql",
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
        ]);
        install.arg(format!("--datadir={}", data.display()));
        Running::start(install)?.finish()?.success().context("mariadb-install-db")?;
        let first = dir.join("first.sql");
        std::fs::write(
            &first,
            format!(
                "CREATE DATABASE lab;\nCREATE USER 'lab'@'%' IDENTIFIED BY 'lab';\nGRANT ALL ON *.* TO 'lab'@'%';\n\
                 CREATE TABLE lab.notes AS SELECT '{MARKER}' AS note;\n"
            ),
        )?;
        let mut command = pod.command(program("mariadbd")?);
        command.args([
            "--no-defaults",
            "--user=mysql",
            "--bind-address=*",
            "--skip-name-resolve",
            "--skip-log-bin",
        ]);
        command.args(["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"]);
        command.arg(format!("--port={}", Self::PORT)).arg(format!("--datadir={}", data.display()));
        command.arg(format!("--socket={}", dir.join("socket").display()));
        command.arg(format!("--pid-file={}", dir.join("pid").display()));
        command.arg(format!("--init-file={}", first.display()));
        let mut server = Running::start(command)?.stopped_by(Signal::SIGTERM);
        let address = await_listening(pod, Self::PORT, &mut server)?;
        Ok(Self { _server: server, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Queries on several connections, each opened anew, then a question about ourselves.
    pub fn queries(&self, client: &Pod) -> Result<Session> {
        let (host, port) = self.flags();
        let mut args = vec!["--no-defaults", "-ulab", "-plab", &host, &port, "--skip-ssl"];
        args.extend(["--create-schema=lab", "--concurrency=4", "--number-of-queries=2000"]);
        args.extend(["--query=SELECT note FROM notes", "--detach=50"]);
        client.run("mariadb-slap", &args)?.success().context("mariadb-slap")?;
        let note = self.query(client, "SELECT note FROM lab.notes")?;
        ensure!(note.trim() == MARKER, "the table says {note:?}");
        let seen =
            self.query(client, "SELECT host FROM information_schema.processlist WHERE id = CONNECTION_ID()")?;
        Ok(Session {
            what: "MariaDB, server speaks first",
            done: "2000 queries".into(),
            client_seen: ip_in(&seen)?,
        })
    }

    pub fn query(&self, client: &Pod, sql: &str) -> Result<String> {
        let (host, port) = self.flags();
        let args = ["--no-defaults", "-ulab", "-plab", &host, &port, "--skip-ssl", "-N", "-B", "-e", sql];
        Ok(client.run("mariadb", &args)?.success()?.stdout)
    }

    fn flags(&self) -> (String, String) {
        (format!("-h{}", self.address.ip()), format!("-P{}", self.address.port()))
    }
}
