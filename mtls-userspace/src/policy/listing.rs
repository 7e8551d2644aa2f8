//! Policies as they were read, for those who ask what is in force. Decides nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::schema::{Action, AuthorizationPolicy, PeerAuthentication, is_dry_run};
use super::selector::{Selectable, Selector};
use super::{Mode, name_of};
use crate::mesh::Workload;

#[derive(Debug)]
pub struct Listed {
    /// `namespace/name`.
    pub name: Arc<str>,
    pub scope: Scope,
    pub selector: Option<Selector>,
    pub says: Says,
    pub dry_run: bool,
    /// Where it selects; everywhere if absent.
    within: Option<Box<str>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    Mesh,
    Namespace,
    Workload,
}

impl Scope {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Namespace => "namespace",
            Self::Workload => "workload",
        }
    }
}

#[derive(Debug)]
pub enum Says {
    /// Of a PeerAuthentication; `None` inherits.
    Modes { mode: Option<Mode>, ports: BTreeMap<u16, Option<Mode>> },
    /// Of an AuthorizationPolicy.
    Rules { action: Action, count: usize },
}

impl Listed {
    /// `PeerAuthentication` or `AuthorizationPolicy`, as warnings have it.
    pub fn kind(&self) -> &'static str {
        match self.says {
            Says::Modes { .. } => "PeerAuthentication",
            Says::Rules { .. } => "AuthorizationPolicy",
        }
    }

    /// The workloads it is meant for.
    pub fn selected<'a>(&self, workloads: &Selectable<'a>) -> impl Iterator<Item = &'a Workload> {
        workloads.selected(self.within.as_deref(), self.selector.as_ref())
    }
}

pub(super) fn all<'a>(
    peer_authentications: impl Iterator<Item = &'a PeerAuthentication>,
    authorization_policies: impl Iterator<Item = &'a AuthorizationPolicy>,
    root_namespace: &str,
) -> Vec<Listed> {
    let listed = |metadata: &_, selector: Option<&Selector>, says| {
        let name = name_of(metadata);
        let namespace = name.split('/').next().unwrap_or_default();
        let within = (namespace != root_namespace).then(|| namespace.into());
        let scope = match (selector, &within) {
            (Some(_), _) => Scope::Workload,
            (None, Some(_)) => Scope::Namespace,
            (None, None) => Scope::Mesh,
        };
        Listed { scope, selector: selector.cloned(), says, dry_run: is_dry_run(metadata), within, name }
    };
    let modes = peer_authentications.map(|policy| {
        let says = Says::Modes { mode: policy.spec.mode, ports: policy.spec.ports.clone() };
        listed(&policy.metadata, policy.spec.selector.as_ref(), says)
    });
    let rules = authorization_policies.map(|policy| {
        let says = Says::Rules { action: policy.spec.action, count: policy.spec.rules.len() };
        listed(&policy.metadata, policy.spec.selector.as_ref(), says)
    });
    let mut all: Vec<Listed> = modes.chain(rules).collect();
    all.sort_by(|a, b| (&a.name, a.kind()).cmp(&(&b.name, b.kind())));
    all
}
