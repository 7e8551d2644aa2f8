//! Two relays, one beside the client and one beside the server, joined by a technique. The client dials its relay itself:
//! nothing is captured, so that what is compared is the technique.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Result, bail};

use super::{Carrier, Path};
use crate::capture::{OUTBOUND_PORT, TUNNEL_PORT};
use crate::compare::place::{Lab, PORT, Pair, Process, SERVER, until};
use crate::compare::technique::{self, Technique};

struct Relayed(&'static dyn Technique);

pub(super) fn paths() -> Vec<Box<dyn Path>> {
    technique::ALL.iter().map(|technique| Box::new(Relayed(*technique)) as Box<dyn Path>).collect()
}

impl Path for Relayed {
    fn name(&self) -> String {
        format!("relay, {}", self.0.name())
    }

    fn about(&self) -> String {
        self.0.about().into()
    }

    fn start(&self, _: &Lab) -> Result<Carrier> {
        if let Some(why) = self.0.obstacle() {
            bail!(why);
        }
        let pair = Pair::make(None, None)?;
        let dial = SocketAddr::from((Ipv4Addr::LOCALHOST, OUTBOUND_PORT));
        let (near, far) = (pair.client.netns(), pair.server.netns());
        let (near, far) = (near.to_string_lossy(), far.to_string_lossy());
        let (tunnel, server) =
            (SocketAddr::from((SERVER, TUNNEL_PORT)).to_string(), (Ipv4Addr::LOCALHOST, PORT));
        let server = SocketAddr::from(server).to_string();
        let mut relays = Process::start(pair.client.mtls(&[
            "lab",
            "carry",
            self.0.name(),
            "--near",
            &near,
            "--far",
            &far,
            "--listen",
            &dial.to_string(),
            "--tunnel",
            &tunnel,
            "--server",
            &server,
        ])?)?;
        until("the relays listen", || {
            relays.alive()?;
            let connect = || std::net::TcpStream::connect(dial).is_ok();
            Ok(pair.client.within(connect)?.then_some(()))
        })?;
        Ok(Carrier { processes: vec![relays], _silent: Vec::new(), pair, dial, by_processes: !self.0.in_kernel() })
    }
}
