//! Plain TCP across the veth pair: what everything else is compared with.

use anyhow::Result;

use super::{Carrier, Path};
use crate::compare::PLAIN;
use crate::compare::place::{Lab, PORT, Pair, SERVER};

struct Plain;

pub(super) fn paths() -> Vec<Box<dyn Path>> {
    vec![Box::new(Plain)]
}

impl Path for Plain {
    fn name(&self) -> String {
        PLAIN.into()
    }

    fn about(&self) -> String {
        "client to server across a veth pair, nothing between them".into()
    }

    fn start(&self, _: &Lab) -> Result<Carrier> {
        let pair = Pair::make(None, None)?;
        Ok(Carrier {
            processes: Vec::new(),
            _silent: Vec::new(),
            pair,
            dial: (SERVER, PORT).into(),
            by_processes: false,
        })
    }
}
