//! PostgreSQL and pgbench.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Session, as_user, await_listening, data_dir, ip_in, program};
use crate::{Lab, MARKER, Pod, Running};

pub struct Postgres {
    _server: Running,
    address: SocketAddr,
}

impl Postgres {
    pub const NEEDS: [&'static str; 4] = ["postgres", "initdb", "psql", "pgbench"];
    pub const PORT: u16 = 5432;

    pub fn start(lab: &Lab, pod: &Pod) -> Result<Self> {
        let dir = data_dir(lab, pod, "postgres", Some("postgres"))?;
        let mut init = as_user(pod, "postgres", &program("initdb")?);
        init.arg("-D").arg(&dir).args(["--no-sync", "-A", "trust", "--no-instructions", "-E", "UTF8"]);
        Running::start(init)?.finish()?.success().context("initdb")?;
        let rules = dir.join("pg_hba.conf");
        std::fs::write(
            &rules,
            "local all all trust\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n",
        )?;
        let mut command = as_user(pod, "postgres", &program("postgres")?);
        command.arg("-D").arg(&dir).arg("-k").arg(&dir);
        for setting in ["listen_addresses=*", "fsync=off", "max_connections=50", "shared_buffers=16MB"] {
            command.args(["-c", setting]);
        }
        let mut server = Running::start(command)?.stopped_by(Signal::SIGQUIT);
        let address = await_listening(pod, Self::PORT, &mut server)?;
        let postgres = Self { _server: server, address };
        postgres.pgbench(pod, &["-i", "-s", "1", "-q"])?;
        postgres.query(pod, &format!("create table notes as select '{MARKER}'::text as note"))?;
        Ok(postgres)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Transactions on several connections, then a question about ourselves.
    pub fn transactions(&self, client: &Pod) -> Result<Session> {
        let out = self.pgbench(client, &["-c", "4", "-j", "1", "-T", "2", "-n"])?;
        let count = out
            .lines()
            .find_map(|line| line.strip_prefix("number of transactions actually processed: "))
            .with_context(|| format!("pgbench said:\n{out}"))?;
        ensure!(out.contains("number of failed transactions: 0 "), "transactions failed:\n{out}");
        let note = self.query(client, "select note from notes")?;
        ensure!(note.trim() == MARKER, "the table says {note:?}");
        let seen =
            self.query(client, "select client_addr from pg_stat_activity where pid = pg_backend_pid()")?;
        Ok(Session {
            what: "PostgreSQL, pgbench",
            done: format!("{count} transactions"),
            client_seen: ip_in(&seen)?,
        })
    }

    pub fn query(&self, client: &Pod, sql: &str) -> Result<String> {
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        let args = ["-h", &host, "-p", &port, "-U", "postgres", "-X", "-A", "-t", "-c", sql];
        Ok(client.run("psql", &args)?.success()?.stdout)
    }

    fn pgbench(&self, client: &Pod, args: &[&str]) -> Result<String> {
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        let place = ["-h", &host, "-p", &port, "-U", "postgres"];
        let finished =
            client.run("pgbench", &[args, &place, &["postgres"]].concat())?.success().context("pgbench")?;
        Ok(finished.stdout)
    }
}
