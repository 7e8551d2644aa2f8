//! The table at the end: what was observed in, rows for a person and the claims that do not hold out.

use std::fmt;
use std::net::IpAddr;

use mtls_tests::apps::Session;

#[derive(Default)]
pub struct Table {
    pub flows: Vec<Flow>,
    /// Mode of the server, and what happened to the intruder or what is wrong.
    pub intruder: Vec<(&'static str, Result<String, String>)>,
}

/// What everybody says of one session.
pub struct Flow {
    pub session: Session,
    pub same_node: bool,
    /// From the agent's access log: the client's, the server's.
    pub identities: [String; 2],
    pub expected_identities: [String; 2],
    pub cipher: String,
    /// Application bytes, both ways.
    pub bytes: u64,
    pub connections: usize,
    pub wire: Result<String, String>,
    pub expected_client: IpAddr,
}

impl Flow {
    pub fn path(&self) -> &'static str {
        if self.same_node { "same node" } else { "cross-node" }
    }

    pub fn summary(&self) -> String {
        let connections = if self.connections == 1 { "connection" } else { "connections" };
        format!("{}, {} over {} {connections}", self.session.what, self.session.done, self.connections)
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let name = format!("{}, {}", self.session.what, self.path());
        if let Err(problem) = &self.wire {
            problems.push(format!("{name}: on the wire: {problem}"));
        }
        if self.session.client_seen != self.expected_client {
            let (seen, real) = (self.session.client_seen, self.expected_client);
            problems.push(format!("{name}: the server believes its client is {seen}, not {real}"));
        }
        if self.identities != self.expected_identities {
            problems.push(format!(
                "{name}: identities are {:?}, not {:?}",
                self.identities, self.expected_identities
            ));
        }
        if self.bytes == 0 {
            problems.push(format!("{name}: the agent counted no bytes"));
        }
        if self.same_node != (self.cipher == "none") {
            problems.push(format!("{name}: the cipher is {}", self.cipher));
        }
        problems
    }
}

impl Table {
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.flows.iter().flat_map(Flow::problems).collect();
        for (mode, outcome) in &self.intruder {
            if let Err(problem) = outcome {
                problems.push(format!("intruder, {mode}: {problem}"));
            }
        }
        problems
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["application", "path", "client → server", "cipher", "bytes", "server saw", "capture saw"];
        let mut rows = vec![head.map(str::to_owned)];
        for flow in &self.flows {
            let wire = match &flow.wire {
                Ok(seen) => seen.clone(),
                Err(problem) => format!("✗ {problem}"),
            };
            rows.push([
                flow.session.what.to_owned(),
                flow.path().to_owned(),
                format!("{} → {}", short(&flow.identities[0]), short(&flow.identities[1])),
                flow.cipher.trim_start_matches("TLS13_").replace("none", "–"),
                human(flow.bytes),
                flow.session.client_seen.to_string(),
                wire,
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 7] = std::array::from_fn(width);
        for (position, row) in rows.iter().enumerate() {
            let cells: Vec<String> =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
            if position == 0 {
                writeln!(f, "{}", widths.map(|width| "─".repeat(width)).join("  "))?;
            }
        }
        writeln!(f)?;
        for (mode, outcome) in &self.intruder {
            match outcome {
                Ok(what) => writeln!(f, "intruder → web, mode {mode:10}  {what}")?,
                Err(problem) => writeln!(f, "intruder → web, mode {mode:10}  ✗ {problem}")?,
            }
        }
        write!(
            f,
            "\nclient → server: the identities both sides proved, short for spiffe://cluster.local/ns/<namespace>/sa/\
             <account>.\nserver saw: the client's address in the server's own records (access log, pg_stat_activity,\n\
             CLIENT LIST, processlist). capture saw: every packet between the nodes and at the server pod's port, judged\n\
             while it passed; the marker is a string that every application sends."
        )
    }
}

/// `shop/web` for `spiffe://cluster.local/ns/shop/sa/web`.
fn short(identity: &str) -> String {
    match identity.split('/').collect::<Vec<_>>()[..] {
        ["spiffe:", "", _, "ns", namespace, "sa", account] => format!("{namespace}/{account}"),
        _ => identity.to_owned(),
    }
}

fn human(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{} kB", bytes / 1000),
        _ => format!("{} MB", bytes / 1_000_000),
    }
}
