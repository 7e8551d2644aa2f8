//! Which workloads a policy selects, and an index that finds the policies of a workload by its labels.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Deserialize;

use super::Invalid;
use crate::mesh::Workload;

/// `selector.matchLabels`, sorted; never empty.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Selector(Arc<[Label]>);

/// Key and value.
type Label = (Box<str>, Box<str>);

impl Selector {
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels().all(|(key, value)| labels.get(key).is_some_and(|has| has == value))
    }

    pub fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }
}

/// The selector as it is written. An empty one selects like none at all, as in Istio.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct WrittenSelector {
    match_labels: Option<BTreeMap<String, String>>,
}

impl WrittenSelector {
    pub(super) fn checked(self) -> Result<Option<Selector>, Invalid> {
        let labels = self.match_labels.unwrap_or_default();
        if let Some((key, value)) = labels.iter().find(|(k, v)| k.contains('*') || v.contains('*')) {
            return Err(Invalid::LabelWildcard { label: format!("{key}: {value}") });
        }
        let labels = labels.into_iter().map(|(key, value)| (key.into(), value.into()));
        let labels: Arc<[Label]> = labels.collect();
        Ok(if labels.is_empty() { None } else { Some(Selector(labels)) })
    }
}

/// Values filed under selectors. Finding those of a workload costs one look-up per label of the workload, however
/// many selectors there are.
#[derive(Debug)]
pub(super) struct BySelector<T> {
    /// By the selector's rarest label: key, then value.
    filed: HashMap<String, HashMap<String, Vec<(Selector, T)>>>,
}

impl<T> Default for BySelector<T> {
    fn default() -> Self {
        Self { filed: HashMap::new() }
    }
}

impl<T> BySelector<T> {
    pub(super) fn new(values: HashMap<Selector, T>) -> Self {
        let mut uses: HashMap<(String, String), usize> = HashMap::new();
        for selector in values.keys() {
            for (key, value) in selector.labels() {
                *uses.entry((key.to_owned(), value.to_owned())).or_default() += 1;
            }
        }
        let mut filed: HashMap<String, HashMap<String, Vec<(Selector, T)>>> = HashMap::new();
        for (selector, filed_value) in values {
            let rarest = selector
                .labels()
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .min_by_key(|label| uses.get(label).copied());
            let (key, value) = rarest.unwrap_or_default();
            filed.entry(key).or_default().entry(value).or_default().push((selector, filed_value));
        }
        filed.values_mut().flat_map(HashMap::values_mut).for_each(Vec::shrink_to_fit);
        Self { filed }
    }

    pub(super) fn selecting<'a, 'l>(
        &'a self,
        labels: &'l BTreeMap<String, String>,
    ) -> impl Iterator<Item = &'a T> + use<'a, 'l, T> {
        labels
            .iter()
            .filter(|_| !self.filed.is_empty())
            .filter_map(|(key, value)| self.filed.get(key)?.get(value))
            .flatten()
            .filter(|(selector, _)| selector.selects(labels))
            .map(|(_, filed)| filed)
    }
}

/// Workloads by namespace and label, so that thousands of selectors can be checked without asking every workload.
pub struct Selectable<'a> {
    by_namespace: HashMap<&'a str, Vec<&'a Workload>>,
    by_label: HashMap<(&'a str, &'a str), Vec<&'a Workload>>,
}

impl<'a> Selectable<'a> {
    pub fn new(workloads: impl Iterator<Item = &'a Workload>) -> Self {
        let mut index = Self { by_namespace: HashMap::new(), by_label: HashMap::new() };
        for workload in workloads {
            index.by_namespace.entry(&workload.namespace).or_default().push(workload);
            for (key, value) in workload.labels.iter() {
                index.by_label.entry((key, value)).or_default().push(workload);
            }
        }
        index
    }

    /// Workloads in `namespace` (in any, if none is given) that `selector` (any, if none is given) selects.
    pub(super) fn selected(
        &self,
        namespace: Option<&str>,
        selector: Option<&Selector>,
    ) -> impl Iterator<Item = &'a Workload> {
        let candidates: Vec<&'a Workload> = match (selector, namespace) {
            (Some(selector), _) => selector
                .labels()
                .map(|label| self.by_label.get(&label).map(Vec::as_slice).unwrap_or_default())
                .min_by_key(|found| found.len())
                .unwrap_or_default()
                .iter()
                .copied()
                .filter(|w| namespace.is_none_or(|n| *w.namespace == *n) && selector.selects(&w.labels))
                .collect(),
            (None, Some(namespace)) => self.by_namespace.get(namespace).cloned().unwrap_or_default(),
            (None, None) => self.by_namespace.values().flatten().copied().collect(),
        };
        candidates.into_iter()
    }
}
