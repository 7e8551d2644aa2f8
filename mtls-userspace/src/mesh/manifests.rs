//! Manifests: files of YAML or JSON in, [`Objects`] out. An error names file, document, object and field.
//!
//! Never guesses: a known kind with an unknown version, an unknown field of a policy, or a second object of the same
//! name is an error. Kinds the mesh has no use for are passed over.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use aws_lc_rs::digest;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;

use super::error::{Error, NoObject, Place};
use super::objects::{Objects, Placed, called};

const MAX_DEPTH: usize = 16;

/// Files of a directory as they were at one moment.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Files(Vec<(PathBuf, String)>);

impl Files {
    /// Reads `*.yaml`, `*.yml` and `*.json` of a directory and its subdirectories. Names with a leading dot are
    /// passed over: editors' swap files, and the `..data` that a mounted ConfigMap's files link to.
    pub(super) fn read(directory: &Path) -> Result<Self, Error> {
        let mut paths = Vec::new();
        list(directory, 0, &mut paths)?;
        paths.sort();
        let read = |path: PathBuf| match fs::read_to_string(&path) {
            Ok(text) => Ok((path, text)),
            Err(source) => Err(Error::Read { path, source }),
        };
        paths.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells whether anything changed since another reading.
    pub(super) fn digest(&self) -> Vec<u8> {
        let mut context = digest::Context::new(&digest::SHA256);
        for (path, text) in &self.0 {
            for part in [path.as_os_str().as_encoded_bytes(), text.as_bytes()] {
                context.update(&(part.len() as u64).to_le_bytes());
                context.update(part);
            }
        }
        context.finish().as_ref().to_vec()
    }

    pub(super) fn objects(&self) -> Result<Objects, Error> {
        let mut reader = Reader::default();
        for (path, text) in &self.0 {
            reader.file(path, text);
        }
        reader.done()
    }

    /// What can be understood, and everything that can't.
    pub(super) fn understood(&self) -> (Objects, Vec<Error>) {
        let mut reader = Reader::default();
        for (path, text) in &self.0 {
            reader.file(path, text);
        }
        (reader.objects, reader.errors)
    }
}

fn list(directory: &Path, depth: usize, paths: &mut Vec<PathBuf>) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::TooDeep { path: directory.into(), limit: MAX_DEPTH });
    }
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| Error::Read { path, source }
    };
    for entry in fs::read_dir(directory).map_err(unreadable(directory))? {
        let path = entry.map_err(unreadable(directory))?.path();
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
            continue;
        }
        let extension = path.extension().and_then(|e| e.to_str());
        let is_manifest = matches!(extension, Some("yaml" | "yml" | "json"));
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => list(&path, depth + 1, paths)?,
            Ok(_) if is_manifest => paths.push(path),
            Err(error) if is_manifest => return Err(unreadable(&path)(error)),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

impl Objects {
    /// Reads every manifest of a directory, once.
    ///
    /// # Errors
    ///
    /// The first thing in it that can't be read or understood.
    pub fn from_directory(directory: &Path) -> Result<Self, Error> {
        Files::read(directory)?.objects()
    }

    /// Reads the documents of one text; `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// The first thing in it that can't be understood.
    pub fn from_yaml(name: &str, text: &str) -> Result<Self, Error> {
        let mut reader = Reader::default();
        reader.file(Path::new(name), text);
        reader.done()
    }
}

#[derive(Default)]
struct Reader {
    objects: Objects,
    seen: HashMap<String, Place>,
    /// An object that can't be understood does not hide what is wrong with the others.
    errors: Vec<Error>,
}

/// What an object says of itself before its fields are looked at.
struct Head {
    kind: String,
    api_version: String,
}

impl Reader {
    fn done(self) -> Result<Objects, Error> {
        self.errors.into_iter().next().map_or(Ok(self.objects), Err)
    }

    fn file(&mut self, path: &Path, text: &str) {
        let source: Arc<str> = path.to_string_lossy().into();
        for (number, document) in (1..).zip(documents(path, text)) {
            let place = Place { source: source.clone(), document: Some(number), item: None };
            let outcome = match document {
                Ok(Value::Null) => Ok(()),
                Ok(value) => self.document(value, place),
                // Where the next document begins can't be known either.
                Err(problem) => return self.errors.push(Error::Syntax { place, problem }),
            };
            self.errors.extend(outcome.err());
        }
    }

    fn document(&mut self, mut value: Value, place: Place) -> Result<(), Error> {
        let head = Head::of(&value, &place, None)?;
        let Some(item_kind) = head.kind.strip_suffix("List") else {
            return self.object(value, head, place);
        };
        let items = value.as_mapping_mut().and_then(|list| list.remove("items"));
        let Some(Value::Sequence(items)) = items else {
            return Err(Error::NoObject { place, problem: NoObject::NoItems });
        };
        // Items of a `PodList` need not repeat what they are; those of a plain `List` do.
        let implied = Head { kind: item_kind.to_owned(), api_version: head.api_version };
        let implied = Some(&implied).filter(|implied| !implied.kind.is_empty());
        for (at, item) in (0..).zip(items) {
            let outcome = self.item(item, implied, Place { item: Some(at), ..place.clone() });
            self.errors.extend(outcome.err());
        }
        Ok(())
    }

    fn item(&mut self, item: Value, implied: Option<&Head>, place: Place) -> Result<(), Error> {
        let head = Head::of(&item, &place, implied)?;
        if head.kind.ends_with("List") {
            return Err(Error::NoObject { place, problem: NoObject::NestedList });
        }
        self.object(item, head, place)
    }

    fn object(&mut self, mut value: Value, head: Head, place: Place) -> Result<(), Error> {
        let (group, _) = head.api_version.split_once('/').unwrap_or(("", &head.api_version));
        let expected: &[&'static str] = match (group, head.kind.as_str()) {
            ("", "Namespace" | "Node" | "Pod" | "Service") => &["v1"],
            ("discovery.k8s.io", "EndpointSlice") => &["discovery.k8s.io/v1"],
            ("security.istio.io", "PeerAuthentication" | "AuthorizationPolicy") => {
                &["security.istio.io/v1", "security.istio.io/v1beta1"]
            }
            _ => {
                tracing::debug!(%place, kind = head.kind, api_version = head.api_version, "manifest not of use here");
                return Ok(());
            }
        };
        if !expected.contains(&head.api_version.as_str()) {
            let expected = expected.first().copied().unwrap_or_default();
            return Err(Error::ApiVersion {
                place,
                kind: head.kind,
                api_version: head.api_version,
                expected,
            });
        }
        if let Some(object) = value.as_mapping_mut() {
            object.insert("kind".into(), head.kind.as_str().into());
            object.insert("apiVersion".into(), head.api_version.as_str().into());
        }
        let metadata = self.metadata(&mut value, &head, &place)?;
        let object = called(&head.kind, &metadata);
        match self.seen.entry(object.clone()) {
            Entry::Occupied(first) => {
                return Err(Error::Duplicate { object, first: first.get().clone(), second: place });
            }
            Entry::Vacant(vacant) => drop(vacant.insert(place.clone())),
        }
        let objects = &mut self.objects;
        match head.kind.as_str() {
            "Namespace" => read(value, object, place, &mut objects.namespaces),
            "Node" => read(value, object, place, &mut objects.nodes),
            "Pod" => read(value, object, place, &mut objects.pods),
            "Service" => read(value, object, place, &mut objects.services),
            "EndpointSlice" => read(value, object, place, &mut objects.endpoint_slices),
            "PeerAuthentication" => read(value, object, place, &mut objects.peer_authentications),
            _ => read(value, object, place, &mut objects.authorization_policies),
        }
    }

    /// Reads the metadata, so that every later error can name the object, and fills in the default namespace.
    fn metadata(&self, value: &mut Value, head: &Head, place: &Place) -> Result<ObjectMeta, Error> {
        let wrong = |object: String, field: String, problem: String| Error::Field {
            place: place.clone(),
            object,
            field,
            problem,
        };
        let written = value.get("metadata").cloned().unwrap_or(Value::Null);
        let mut metadata: ObjectMeta = serde_path_to_error::deserialize(written).map_err(|error| {
            let path = error.path().to_string();
            let field = if path == "." { "metadata".to_owned() } else { format!("metadata.{path}") };
            wrong(head.kind.clone(), field, error.into_inner().to_string())
        })?;
        if metadata.name.as_ref().is_none_or(String::is_empty) {
            return Err(wrong(head.kind.clone(), "metadata.name".into(), "missing".into()));
        }
        if matches!(head.kind.as_str(), "Namespace" | "Node") {
            metadata.namespace = None;
        } else if metadata.namespace.as_ref().is_none_or(String::is_empty) {
            metadata.namespace = Some("default".to_owned());
            if let Some(written) = value.get_mut("metadata").and_then(Value::as_mapping_mut) {
                written.insert("namespace".into(), "default".into());
            }
        }
        Ok(metadata)
    }
}

impl Head {
    fn of(value: &Value, place: &Place, implied: Option<&Self>) -> Result<Self, Error> {
        let missing = |problem| Error::NoObject { place: place.clone(), problem };
        if !value.is_mapping() {
            return Err(missing(NoObject::NotAMapping));
        }
        let field = |name: &str, implied: Option<&String>| {
            value.get(name).and_then(Value::as_str).map(str::to_owned).or_else(|| implied.cloned())
        };
        Ok(Self {
            kind: field("kind", implied.map(|i| &i.kind)).ok_or_else(|| missing(NoObject::NoKind))?,
            api_version: field("apiVersion", implied.map(|i| &i.api_version))
                .ok_or_else(|| missing(NoObject::NoApiVersion))?,
        })
    }
}

fn documents<'t>(path: &Path, text: &'t str) -> Box<dyn Iterator<Item = Result<Value, String>> + 't> {
    if path.extension().is_some_and(|extension| extension == "json") {
        let values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        return Box::new(values.map(|value| value.map_err(|error| error.to_string())));
    }
    Box::new(serde_yaml_ng::Deserializer::from_str(text).map(|document| {
        let mut value = Value::deserialize(document).map_err(|error| error.to_string())?;
        value.apply_merge().map_err(|error| error.to_string())?;
        Ok(value)
    }))
}

fn read<T: DeserializeOwned>(
    value: Value,
    object: String,
    place: Place,
    into: &mut Vec<Placed<T>>,
) -> Result<(), Error> {
    match serde_path_to_error::deserialize(value) {
        Ok(object) => into.push(Placed { object, place }),
        Err(error) => {
            let field = error.path().to_string();
            let field = if field == "." { "(top level)".to_owned() } else { field };
            return Err(Error::Field { place, object, field, problem: error.into_inner().to_string() });
        }
    }
    Ok(())
}
