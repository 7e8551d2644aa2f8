//! Equal values once in memory: a mesh of ten thousand pods has a hundred namespaces, and the pods of one Deployment
//! carry the same labels.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Deref;
use std::sync::Arc;

use crate::identity::{InvalidSpiffeId, SpiffeId, TrustDomain};

/// A pod's labels, shared with the pods that carry the same.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Labels(Arc<BTreeMap<String, String>>);

impl Deref for Labels {
    type Target = BTreeMap<String, String>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl FromIterator<(String, String)> for Labels {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(labels: I) -> Self {
        Self(Arc::new(labels.into_iter().collect()))
    }
}

impl From<BTreeMap<String, String>> for Labels {
    fn from(labels: BTreeMap<String, String>) -> Self {
        Self(Arc::new(labels))
    }
}

/// Hands out the value that is there already, if an equal one is.
#[derive(Debug, Default)]
pub(super) struct Interner {
    texts: HashSet<Arc<str>>,
    labels: HashSet<Labels>,
    /// By namespace and service account.
    identities: HashMap<Arc<str>, HashMap<Arc<str>, SpiffeId>>,
    /// How much there was after the last sweep.
    swept: usize,
}

impl Interner {
    pub(super) fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.texts.insert(new.clone());
        new
    }

    pub(super) fn labels(&mut self, labels: BTreeMap<String, String>) -> Labels {
        let labels = Labels::from(labels);
        if let Some(known) = self.labels.get(&labels) {
            return known.clone();
        }
        self.labels.insert(labels.clone());
        labels
    }

    pub(super) fn identity(
        &mut self,
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<SpiffeId, InvalidSpiffeId> {
        let known = self.identities.get(namespace).and_then(|accounts| accounts.get(service_account));
        if let Some(known) = known {
            return Ok(known.clone());
        }
        let identity = SpiffeId::new(trust_domain, namespace, service_account)?;
        let accounts = self.identities.entry(identity.namespace().clone()).or_default();
        accounts.insert(identity.service_account().clone(), identity.clone());
        Ok(identity)
    }

    /// Sweeps when what is held has doubled since the last time: pods come and go for weeks without another list.
    pub(super) fn sweep_if_grown(&mut self) {
        if self.texts.len() + self.labels.len() > 2 * self.swept + 1024 {
            self.sweep();
        }
    }

    /// Lets go of what nobody else holds any more.
    fn sweep(&mut self) {
        self.labels.retain(|labels| Arc::strong_count(&labels.0) > 1);
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        for accounts in self.identities.values_mut() {
            accounts.retain(|_, identity| identity.is_shared());
        }
        self.identities.retain(|_, accounts| !accounts.is_empty());
        self.swept = self.texts.len() + self.labels.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_unused_ones_go() {
        let mut interner = Interner::default();
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let (a, b) = (interner.text("node-a"), interner.text("node-a"));
        assert!(Arc::ptr_eq(&a, &b));
        let labels = || BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let (c, d) = (interner.labels(labels()), interner.labels(labels()));
        assert!(Arc::ptr_eq(&c.0, &d.0));
        let id = interner.identity(&domain, "shop", "web").unwrap();
        drop((b, d, interner.identity(&domain, "shop", "other").unwrap()));
        interner.sweep();
        assert_eq!((interner.texts.len(), interner.labels.len()), (1, 1));
        assert_eq!(interner.identities["shop"].len(), 1);
        drop((a, c, id));
        interner.sweep();
        assert!(interner.texts.is_empty() && interner.labels.is_empty() && interner.identities.is_empty());
    }
}
