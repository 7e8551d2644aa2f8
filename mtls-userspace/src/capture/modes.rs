//! Modes as the kernel enforces them, and how to get from some to others without a moment of laxness. Pure.

use std::collections::{BTreeMap, BTreeSet};

use mtls_common::mode;

use crate::policy::{Mode, PortModes};

/// What the kernel holds for one pod. Without a default everything is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct KernelModes {
    pub default: u32,
    pub ports: BTreeMap<u16, u32>,
}

/// One write to the kernel's map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Default(u32),
    Set(u16, u32),
    Unset(u16),
}

impl Default for KernelModes {
    fn default() -> Self {
        Self { default: mode::STRICT, ports: BTreeMap::new() }
    }
}

impl KernelModes {
    pub fn of(&self, port: u16) -> u32 {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }

    pub fn apply(&mut self, step: Step) {
        match step {
            Step::Default(mode) => self.default = mode,
            Step::Set(port, mode) => drop(self.ports.insert(port, mode)),
            Step::Unset(port) => drop(self.ports.remove(&port)),
        }
    }

    /// Writes that lead to `target`. After each, no port is laxer than it was before and will be after all of them.
    pub fn steps_to(&self, target: &KernelModes) -> Vec<Step> {
        if self == target {
            return Vec::new();
        }
        let ports: BTreeSet<u16> = self.ports.keys().chain(target.ports.keys()).copied().collect();
        let mut steps = Vec::new();
        for &port in &ports {
            let stricter = self.of(port).max(target.of(port));
            if self.ports.get(&port) != Some(&stricter) {
                steps.push(Step::Set(port, stricter));
            }
        }
        steps.push(Step::Default(target.default));
        for &port in &ports {
            let stricter = self.of(port).max(target.of(port));
            match target.ports.get(&port) {
                Some(&mode) if mode == stricter => {}
                Some(&mode) => steps.push(Step::Set(port, mode)),
                None => steps.push(Step::Unset(port)),
            }
        }
        steps
    }
}

impl From<&PortModes> for KernelModes {
    fn from(modes: &PortModes) -> Self {
        Self {
            default: kernel_mode(modes.default, modes.judged),
            // Port zero is the kernel's key of the default, and no port of TCP.
            ports: modes
                .ports
                .iter()
                .filter(|(port, _)| **port != 0)
                .map(|(port, mode)| (*port, kernel_mode(*mode, modes.judged)))
                .collect(),
        }
    }
}

/// `judged`: an authorization policy has a say, so that plaintext goes to the agent before the application sees it.
fn kernel_mode(mode: Mode, judged: bool) -> u32 {
    match mode {
        Mode::Strict => mode::STRICT,
        Mode::Permissive | Mode::Disable if judged => mode::PROXY,
        Mode::Permissive | Mode::Disable => mode::PERMISSIVE,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn modes() -> impl Strategy<Value = KernelModes> {
        let mode = mode::PERMISSIVE..=mode::STRICT;
        (mode.clone(), prop::collection::btree_map(1u16..12, mode, 0..6))
            .prop_map(|(default, ports)| KernelModes { default, ports })
    }

    proptest! {
        #[test]
        fn no_port_is_laxer_in_between(from in modes(), to in modes()) {
            let mut at = from.clone();
            for step in from.steps_to(&to) {
                at.apply(step);
                for port in 1..16 {
                    prop_assert!(at.of(port) >= from.of(port).min(to.of(port)), "port {port} after {step:?}");
                }
            }
            prop_assert_eq!(at, to);
        }

        #[test]
        fn no_change_writes_nothing(modes in modes()) {
            prop_assert_eq!(modes.steps_to(&modes), []);
        }
    }

    #[test]
    fn a_pod_without_modes_is_strict() {
        assert_eq!(KernelModes::default().of(80), mode::STRICT);
    }

    #[test]
    fn judged_plaintext_goes_to_the_agent_and_strict_stays_strict() {
        let modes = PortModes {
            default: Mode::Permissive,
            ports: BTreeMap::from([(80, Mode::Strict)]),
            judged: true,
        };
        let modes = KernelModes::from(&modes);
        assert_eq!((modes.of(80), modes.of(81)), (mode::STRICT, mode::PROXY));
    }

    #[test]
    fn a_strict_port_of_a_permissive_pod_stays_strict() {
        let modes = PortModes {
            default: Mode::Permissive,
            ports: BTreeMap::from([(80, Mode::Strict)]),
            judged: false,
        };
        let modes = KernelModes::from(&modes);
        assert_eq!((modes.of(80), modes.of(81)), (mode::STRICT, mode::PERMISSIVE));
    }
}
