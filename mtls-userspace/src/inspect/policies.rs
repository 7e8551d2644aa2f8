//! Policies of the snapshot in force, as rows.

use std::collections::HashMap;
use std::sync::Arc;

use crate::mesh::{Mesh, Workload};
use crate::observe::{Filter, Listing, PolicyRow};
use crate::policy::{Action, Listed, Mode, Says, Selectable, Warning};

pub(super) fn list(mesh: &Mesh, node: &str, filter: &Filter) -> Listing<PolicyRow> {
    let wanted = |policy: &&Listed| {
        let (namespace, name) = split(&policy.name);
        filter.wants(namespace, name)
    };
    let found: Vec<&Listed> = mesh.policies.listed().iter().filter(wanted).collect();
    let enrolled = mesh.workloads.iter().map(Arc::as_ref).filter(|workload| workload.enrolled);
    let selectable = Selectable::new(enrolled);
    let mut warnings: HashMap<(&str, &str), Vec<&Warning>> = HashMap::new();
    for warning in mesh.policies.warnings() {
        warnings.entry((warning.kind, &warning.policy)).or_default().push(warning);
    }
    filter.page(found, |policy| {
        let selected: Vec<&Workload> = policy.selected(&selectable).collect();
        let on_node = selected.iter().filter(|workload| workload.node.as_deref() == Some(node)).count();
        let about = warnings.get(&(policy.kind(), &*policy.name)).map(Vec::as_slice).unwrap_or_default();
        row(policy, about, (selected.len(), on_node))
    })
}

fn split(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or(("", name))
}

fn row(policy: &Listed, warnings: &[&Warning], (selects, selects_local): (usize, usize)) -> PolicyRow {
    let (namespace, name) = split(&policy.name);
    let ignored = warnings.iter().any(|warning| warning.problem.ignores_policy());
    let (mode, ports, action, rules) = match &policy.says {
        Says::Modes { mode, ports } => (*mode, Some(ports), None, 0),
        Says::Rules { action, count } => (None, None, Some(*action), *count),
    };
    let ports = ports.into_iter().flatten().filter_map(|(port, mode)| Some((*port, mode.as_ref()?)));
    let selector = policy.selector.iter().flat_map(|selector| selector.labels());
    PolicyRow {
        kind: policy.kind().to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        scope: policy.scope.as_str().to_owned(),
        selector: selector.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        mode: mode.as_ref().map(Mode::to_string),
        port_modes: ports.map(|(port, mode)| (port, mode.to_string())).collect(),
        action: action.map(|action| action_name(action).to_owned()),
        rules,
        state: match (ignored, policy.dry_run) {
            (true, _) => "ignored",
            (false, true) => "dry_run",
            (false, false) => "enforced",
        }
        .to_owned(),
        selects: if ignored { 0 } else { selects },
        selects_local: if ignored { 0 } else { selects_local },
        warnings: warnings.iter().map(|warning| warning.problem.to_string()).collect(),
    }
}

fn action_name(action: Action) -> &'static str {
    match action {
        Action::Allow => "ALLOW",
        Action::Deny => "DENY",
    }
}
