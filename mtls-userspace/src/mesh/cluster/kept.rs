//! The objects of one kind, kept as they come and go: a list replaces what it does not repeat, and an object's end
//! ends only that object, not one made anew under its name.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::mesh::objects::Key;

/// Tells an object from another of its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Uid(u64);

impl Uid {
    pub(super) fn of(metadata: &ObjectMeta) -> Self {
        let mut hasher = DefaultHasher::new();
        metadata.uid.hash(&mut hasher);
        Self(hasher.finish())
    }
}

#[derive(Debug)]
pub(super) struct Kept<T> {
    objects: HashMap<Key, (Uid, T)>,
    /// While a list is read: what it has not repeated yet.
    unseen: Option<HashSet<Key>>,
    /// Whether there was a complete list, ever.
    pub complete: bool,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { objects: HashMap::new(), unseen: None, complete: false }
    }
}

impl<T> Kept<T> {
    pub(super) fn begin(&mut self) {
        self.unseen = Some(self.objects.keys().cloned().collect());
    }

    /// What goes because the list did not have it.
    pub(super) fn end(&mut self) -> Vec<(Key, T)> {
        self.complete = true;
        let unseen = self.unseen.take().unwrap_or_default();
        unseen
            .into_iter()
            .filter_map(|key| self.objects.remove(&key).map(|(_, value)| (key, value)))
            .collect()
    }

    /// Notes that an object is there, whatever it is now. Its last good version stays only if it is the same object.
    pub(super) fn seen(&mut self, key: &Key, uid: Uid) -> Option<T> {
        if let Some(unseen) = &mut self.unseen {
            unseen.remove(key);
        }
        let is_other = self.objects.get(key).is_some_and(|(known, _)| *known != uid);
        if is_other { self.objects.remove(key).map(|(_, value)| value) } else { None }
    }

    /// Returns what was there before.
    pub(super) fn put(&mut self, key: Key, uid: Uid, value: T) -> Option<T> {
        self.objects.insert(key, (uid, value)).map(|(_, value)| value)
    }

    /// `None` if the object is not there, or is another by now.
    pub(super) fn remove(&mut self, key: &Key, uid: Uid) -> Option<T> {
        let is_same = self.objects.get(key).is_some_and(|(known, _)| *known == uid);
        if is_same { self.objects.remove(key).map(|(_, value)| value) } else { None }
    }

    pub(super) fn get(&self, key: &Key) -> Option<&T> {
        self.objects.get(key).map(|(_, value)| value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &T)> + Clone {
        self.objects.iter().map(|(key, (_, value))| (key, value))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&Key, &mut T)> {
        self.objects.iter_mut().map(|(key, (_, value))| (key, value))
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> + Clone {
        self.objects.values().map(|(_, value)| value)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key { namespace: "shop".into(), name: name.into() }
    }

    #[test]
    fn a_list_replaces_what_it_does_not_repeat() {
        let mut kept = Kept::default();
        for (name, value) in [("a", 1), ("b", 2)] {
            kept.put(key(name), Uid(value), value);
        }
        kept.begin();
        assert_eq!(kept.seen(&key("b"), Uid(2)), None);
        kept.seen(&key("c"), Uid(3));
        kept.put(key("c"), Uid(3), 3);
        assert_eq!(kept.values().count(), 3, "until the list is complete nothing goes");
        assert_eq!(kept.end(), [(key("a"), 1)]);
        assert!(kept.complete && kept.get(&key("b")).is_some() && kept.get(&key("c")).is_some());
    }

    #[test]
    fn a_list_that_breaks_off_removes_nothing() {
        let mut kept = Kept::default();
        kept.put(key("a"), Uid(1), 1);
        kept.begin();
        kept.begin();
        kept.seen(&key("a"), Uid(1));
        assert!(kept.end().is_empty());
    }

    #[test]
    fn the_end_of_an_object_does_not_end_its_successor() {
        let mut kept = Kept::default();
        kept.put(key("a"), Uid(1), 1);
        assert_eq!(kept.seen(&key("a"), Uid(2)), Some(1));
        kept.put(key("a"), Uid(2), 2);
        assert_eq!(kept.remove(&key("a"), Uid(1)), None);
        assert_eq!(kept.get(&key("a")), Some(&2));
        assert_eq!(kept.remove(&key("a"), Uid(2)), Some(2));
    }
}
