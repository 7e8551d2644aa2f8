//! Objects and their history: writes in, consistent lists and what happened since a version out.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::kinds::{KINDS, Kind};

/// Changes of a kind that can be watched from; etcd keeps five minutes of them.
const HISTORY: usize = 50_000;

#[derive(Debug)]
pub(super) struct Store {
    revision: u64,
    objects: HashMap<&'static str, BTreeMap<Name, Arc<Stored>>>,
    history: HashMap<&'static str, VecDeque<Change>>,
    /// Versions before this one are forgotten.
    oldest: u64,
    pages: HashMap<String, Page>,
    undefined: HashSet<String>,
    names: u64,
}

/// Namespace (empty for what has none) and name.
pub(super) type Name = (String, String);

/// An object at one version.
#[derive(Debug)]
pub(super) struct Stored {
    pub name: Name,
    pub revision: u64,
    pub object: Value,
    /// As it is sent.
    pub json: String,
}

#[derive(Clone, Debug)]
pub(super) struct Change {
    pub revision: u64,
    /// `None`: it was made.
    pub before: Option<Arc<Stored>>,
    /// `None`: it was deleted.
    pub after: Option<Arc<Stored>>,
}

/// The rest of a list that was begun.
#[derive(Debug)]
struct Page {
    revision: u64,
    rest: Vec<Arc<Stored>>,
}

/// A list, or a part of one.
pub(super) struct Listed {
    pub revision: u64,
    pub items: Vec<Arc<Stored>>,
    pub next: Option<String>,
    pub remaining: usize,
}

/// Why a write is refused, as status and reason.
#[derive(Debug)]
pub(super) enum Refusal {
    NotFound,
    AlreadyExists,
    Conflict,
}

impl Default for Store {
    fn default() -> Self {
        let optional = KINDS.iter().filter(|kind| kind.plural == "clustertrustbundles");
        Self {
            revision: 1,
            objects: HashMap::new(),
            history: HashMap::new(),
            oldest: 0,
            pages: HashMap::new(),
            // A cluster has it only where somebody switched it on.
            undefined: optional.map(Kind::full_name).collect(),
            names: 0,
        }
    }
}

impl Store {
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn is_defined(&self, kind: &Kind) -> bool {
        !self.undefined.contains(&kind.full_name())
    }

    pub(super) fn define(&mut self, plural: &str, defined: bool) {
        if defined {
            self.undefined.remove(plural);
        } else {
            self.undefined.insert(plural.into());
            let kind = KINDS.iter().find(|kind| kind.full_name() == plural);
            if let Some(kind) = kind {
                self.objects.remove(kind.plural);
            }
        }
    }

    pub(super) fn forget_history(&mut self) {
        self.revision += 1;
        self.oldest = self.revision;
        self.history.clear();
        self.pages.clear();
    }

    pub(super) fn get(&self, kind: &Kind, name: &Name) -> Option<Arc<Stored>> {
        self.objects.get(kind.plural)?.get(name).cloned()
    }

    pub(super) fn list(&mut self, kind: &Kind, limit: usize, wanted: impl Fn(&Stored) -> bool) -> Listed {
        let all = self.objects.get(kind.plural).into_iter().flat_map(BTreeMap::values);
        let items: Vec<_> = all.filter(|stored| wanted(stored)).cloned().collect();
        self.page(Page { revision: self.revision, rest: items }, limit)
    }

    /// `None`: the rest of that list is forgotten.
    pub(super) fn next_page(&mut self, token: &str, limit: usize) -> Option<Listed> {
        let page = self.pages.remove(token)?;
        Some(self.page(page, limit))
    }

    fn page(&mut self, Page { revision, mut rest }: Page, limit: usize) -> Listed {
        if limit == 0 || rest.len() <= limit {
            return Listed { revision, items: rest, next: None, remaining: 0 };
        }
        let later = rest.split_off(limit);
        let remaining = later.len();
        self.names += 1;
        let token = format!("page-{}", self.names);
        self.pages.insert(token.clone(), Page { revision, rest: later });
        Listed { revision, items: rest, next: Some(token), remaining }
    }

    /// What happened after a version; `None` if that is forgotten.
    pub(super) fn since(&self, kind: &Kind, revision: u64) -> Option<Vec<Change>> {
        if revision < self.oldest {
            return None;
        }
        let history = self.history.get(kind.plural);
        let from = history.map_or(0, |all| all.partition_point(|change| change.revision <= revision));
        Some(history.into_iter().flat_map(|all| all.range(from..)).cloned().collect())
    }

    pub(super) fn create(&mut self, kind: &'static Kind, mut object: Value) -> Result<Arc<Stored>, Refusal> {
        self.names += 1;
        let metadata = metadata(&mut object);
        if let (None, Some(prefix)) =
            (metadata.get("name"), metadata.get("generateName").and_then(Value::as_str))
        {
            let name = format!("{prefix}{:05x}", self.names);
            metadata.insert("name".into(), name.into());
        }
        let name = name_of(kind, &object);
        if self.get(kind, &name).is_some() {
            return Err(Refusal::AlreadyExists);
        }
        Ok(self.put(kind, name, object, None))
    }

    /// Replaces an object, or one of its subresources.
    pub(super) fn replace(
        &mut self,
        kind: &'static Kind,
        name: &Name,
        mut object: Value,
        subresource: Option<&str>,
    ) -> Result<Arc<Stored>, Refusal> {
        let before = self.get(kind, name).ok_or(Refusal::NotFound)?;
        let based_on = object["metadata"]["resourceVersion"].as_str().filter(|version| !version.is_empty());
        if based_on.is_some_and(|version| version != before.revision.to_string()) {
            return Err(Refusal::Conflict);
        }
        if subresource.is_some() {
            let status = object["status"].take();
            object = before.object.clone();
            object["status"] = status;
        } else if kind.has_status {
            object["status"] = before.object["status"].clone();
        }
        Ok(self.put(kind, name.clone(), object, Some(before)))
    }

    pub(super) fn merge(
        &mut self,
        kind: &'static Kind,
        name: &Name,
        patch: &Value,
        subresource: Option<&str>,
    ) -> Result<Arc<Stored>, Refusal> {
        let before = self.get(kind, name).ok_or(Refusal::NotFound)?;
        let mut object = before.object.clone();
        merge(&mut object, patch);
        if subresource.is_none() && kind.has_status {
            object["status"] = before.object["status"].clone();
        }
        Ok(self.put(kind, name.clone(), object, Some(before)))
    }

    pub(super) fn delete(&mut self, kind: &'static Kind, name: &Name) -> Result<Arc<Stored>, Refusal> {
        let objects = self.objects.entry(kind.plural).or_default();
        let before = objects.remove(name).ok_or(Refusal::NotFound)?;
        self.revision += 1;
        let mut last = before.object.clone();
        last["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let last = Arc::new(Stored {
            json: last.to_string(),
            object: last,
            revision: self.revision,
            ..Stored::copy(&before)
        });
        self.note(kind, Change { revision: self.revision, before: Some(last.clone()), after: None });
        Ok(last)
    }

    fn put(
        &mut self,
        kind: &'static Kind,
        name: Name,
        mut object: Value,
        before: Option<Arc<Stored>>,
    ) -> Arc<Stored> {
        self.revision += 1;
        object["apiVersion"] = kind.api_version().into();
        object["kind"] = kind.kind.into();
        let kept = before.as_ref().map(|before| &before.object["metadata"]);
        let metadata = metadata(&mut object);
        metadata.insert("resourceVersion".into(), self.revision.to_string().into());
        for (field, new) in [
            ("uid", Value::from(format!("00000000-0000-4000-8000-{:012x}", self.revision))),
            ("creationTimestamp", Value::from(now())),
        ] {
            let value = kept.map(|kept| kept[field].clone()).filter(|value| !value.is_null());
            let given = metadata.get(field).filter(|value| !value.is_null()).cloned();
            metadata.insert(field.into(), value.or(given).unwrap_or(new));
        }
        if kind.namespaced {
            metadata.insert("namespace".into(), name.0.clone().into());
        }
        let stored = Arc::new(Stored {
            name: name.clone(),
            revision: self.revision,
            json: object.to_string(),
            object,
        });
        self.objects.entry(kind.plural).or_default().insert(name, stored.clone());
        self.note(kind, Change { revision: self.revision, before, after: Some(stored.clone()) });
        stored
    }

    fn note(&mut self, kind: &Kind, change: Change) {
        let history = self.history.entry(kind.plural).or_default();
        history.push_back(change);
        if history.len() > HISTORY {
            history.pop_front();
        }
    }

    /// Creates an object or replaces it whole, status and all.
    pub(super) fn apply(&mut self, object: &Value) -> Result<Value> {
        let (kind, name) = identify(object)?;
        let before = self.get(kind, &name);
        Ok(self.put(kind, name, object.clone(), before).object.clone())
    }

    pub(super) fn delete_like(&mut self, object: &Value) -> Result<()> {
        let (kind, name) = identify(object)?;
        match self.delete(kind, &name) {
            Ok(_) => Ok(()),
            Err(_) => bail!("there is no {} {}/{} to delete", kind.kind, name.0, name.1),
        }
    }

    pub(super) fn get_like(&self, object: &Value) -> Option<Value> {
        let (kind, name) = identify(object).ok()?;
        Some(self.get(kind, &name)?.object.clone())
    }

    pub(super) fn all(&self, plural: &str) -> Vec<Value> {
        let kind = KINDS.iter().find(|kind| kind.full_name() == plural);
        let objects = kind.and_then(|kind| self.objects.get(kind.plural));
        objects.into_iter().flat_map(BTreeMap::values).map(|stored| stored.object.clone()).collect()
    }
}

impl Stored {
    fn copy(other: &Self) -> Self {
        Self {
            name: other.name.clone(),
            revision: other.revision,
            object: other.object.clone(),
            json: other.json.clone(),
        }
    }
}

fn identify(object: &Value) -> Result<(&'static Kind, Name)> {
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    let kind = Kind::by_name(text("apiVersion"), text("kind"))
        .with_context(|| format!("the test's API server doesn't know this kind: {object}"))?;
    Ok((kind, name_of(kind, object)))
}

fn name_of(kind: &Kind, object: &Value) -> Name {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    let namespace = match (kind.namespaced, text("namespace")) {
        (false, _) => String::new(),
        (true, namespace) if namespace.is_empty() => "default".into(),
        (true, namespace) => namespace,
    };
    (namespace, text("name"))
}

fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    object["metadata"].as_object_mut().expect("made an object above")
}

/// RFC 7396.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    let Value::Object(object) = into else { return };
    for (field, value) in fields {
        if value.is_null() {
            object.remove(field);
        } else {
            merge(object.entry(field.clone()).or_insert(Value::Null), value);
        }
    }
}

fn now() -> String {
    let now = time::OffsetDateTime::now_utc();
    let format = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    now.format(&format).unwrap_or_default()
}
