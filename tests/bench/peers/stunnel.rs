//! stunnel: a thread per connection.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;

use super::{Leg, Proxy};

pub const PROXY: Proxy = Proxy { name: "stunnel", command };

fn command(program: &Path, leg: &Leg) -> Result<Vec<OsString>> {
    let client = if leg.dials_tls() { "yes" } else { "no" };
    let file = leg.write(
        "stunnel.conf",
        &format!(
            "foreground = yes\npid =\ndebug = 3\n\
             [way]\nclient = {client}\naccept = {}\nconnect = {}\ncert = {}\nkey = {}\nCAfile = {}\n\
             verifyChain = yes\nsslVersionMin = TLSv1.3\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n",
            leg.accept,
            leg.connect,
            leg.credentials.chain.display(),
            leg.credentials.key.display(),
            leg.root.display()
        ),
    )?;
    Ok(vec![program.into(), file.into()])
}
