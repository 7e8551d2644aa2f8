//! haproxy in TCP mode.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::Result;

use super::{Leg, Proxy};

pub const PROXY: Proxy = Proxy { name: "haproxy", command };

fn command(program: &Path, leg: &Leg) -> Result<Vec<OsString>> {
    // haproxy wants chain and key in one file.
    let both = fs::read_to_string(&leg.credentials.chain)? + &fs::read_to_string(&leg.credentials.key)?;
    let pem = leg.write("both.pem", &both)?;
    let (pem, root) = (pem.display(), leg.root.display());
    let tls = format!("ssl crt {pem} ca-file {root} verify required ssl-min-ver TLSv1.3");
    let (accept, connect) = match leg.dials_tls() {
        true => (leg.accept.to_string(), format!("{} {tls}", leg.connect)),
        false => (format!("{} {tls}", leg.accept), leg.connect.to_string()),
    };
    let file = leg.write(
        "haproxy.cfg",
        &format!(
            "defaults\n  mode tcp\n  maxconn 10000\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
             listen way\n  bind {accept}\n  server other {connect}\n"
        ),
    )?;
    Ok(vec![program.into(), "-db".into(), "-f".into(), file.into()])
}
