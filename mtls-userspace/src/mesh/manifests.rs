//! Manifests: the text of a file of YAML or JSON in, [`Objects`] out. An error names file, document, object and field.
//!
//! Never guesses: a known kind with an unknown version, or an unknown field of a policy, is an error. Kinds the mesh
//! has no use for are passed over.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;

use super::Settings;
use super::error::{Error, NoObject, Place};
use super::hosts::Host;
use super::interner::Interner;
use super::objects::{Key, Objects, Placed, Spot, Stripped, called};
use super::pod::{WrittenPod, enrols};
use super::service::{Slice, WrittenService};
use crate::policy::{AuthorizationPolicy, PeerAuthentication};

impl Objects {
    /// Reads the documents of one text; `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// The first thing in it that can't be understood.
    pub fn from_yaml(name: &str, text: &str, settings: &Settings) -> Result<Self, Error> {
        let (objects, errors) = read(Path::new(name), text, settings, &Mutex::default());
        errors.into_iter().next().map_or(Ok(objects), Err)
    }
}

/// What can be understood of a file, and everything that can't.
pub(super) fn read(
    path: &Path,
    text: &str,
    settings: &Settings,
    interner: &Mutex<Interner>,
) -> (Objects, Vec<Error>) {
    let objects = Objects::none(path.to_string_lossy().into());
    let mut reader = Reader { settings, interner, objects, errors: Vec::new() };
    reader.file(path, text);
    reader.objects.shrink();
    (reader.objects, reader.errors)
}

struct Reader<'a> {
    settings: &'a Settings,
    interner: &'a Mutex<Interner>,
    objects: Objects,
    /// An object that can't be understood does not hide what is wrong with the others.
    errors: Vec<Error>,
}

/// What an object says of itself before its fields are looked at.
struct Head {
    kind: String,
    api_version: String,
}

impl Reader<'_> {
    fn file(&mut self, path: &Path, text: &str) {
        for (number, document) in (1..).zip(documents(path, text)) {
            let spot = Spot { document: Some(number), item: None };
            let outcome = match document {
                Ok(Value::Null) => Ok(()),
                Ok(value) => self.document(value, spot),
                // Where the next document begins can't be known either.
                Err(problem) => {
                    return self.errors.push(Error::Syntax { place: self.objects.place(spot), problem });
                }
            };
            self.errors.extend(outcome.err());
        }
    }

    fn document(&mut self, mut value: Value, spot: Spot) -> Result<(), Error> {
        let head = Head::of(&value, None).map_err(|problem| self.no_object(problem, spot))?;
        let Some(item_kind) = head.kind.strip_suffix("List") else {
            return self.object(value, head, spot);
        };
        let items = value.as_mapping_mut().and_then(|list| list.remove("items"));
        let Some(Value::Sequence(items)) = items else {
            return Err(self.no_object(NoObject::NoItems, spot));
        };
        // Items of a `PodList` need not repeat what they are; those of a plain `List` do.
        let implied = Head { kind: item_kind.to_owned(), api_version: head.api_version };
        let implied = Some(&implied).filter(|implied| !implied.kind.is_empty());
        for (at, item) in (0..).zip(items) {
            let outcome = self.item(item, implied, Spot { item: Some(at), ..spot });
            self.errors.extend(outcome.err());
        }
        Ok(())
    }

    fn item(&mut self, item: Value, implied: Option<&Head>, spot: Spot) -> Result<(), Error> {
        let head = Head::of(&item, implied).map_err(|problem| self.no_object(problem, spot))?;
        if head.kind.ends_with("List") {
            return Err(self.no_object(NoObject::NestedList, spot));
        }
        self.object(item, head, spot)
    }

    fn no_object(&self, problem: NoObject, spot: Spot) -> Error {
        Error::NoObject { place: self.objects.place(spot), problem }
    }

    fn object(&mut self, mut value: Value, head: Head, spot: Spot) -> Result<(), Error> {
        let (group, _) = head.api_version.split_once('/').unwrap_or(("", &head.api_version));
        let expected: &[&'static str] = match (group, head.kind.as_str()) {
            ("", "Namespace" | "Node" | "Pod" | "Service") => &["v1"],
            ("discovery.k8s.io", "EndpointSlice") => &["discovery.k8s.io/v1"],
            ("security.istio.io", "PeerAuthentication" | "AuthorizationPolicy") => {
                &["security.istio.io/v1", "security.istio.io/v1beta1"]
            }
            _ => {
                let (place, Head { kind, api_version }) = (self.objects.place(spot), head);
                tracing::debug!(%place, kind, api_version, "manifest not of use here");
                return Ok(());
            }
        };
        let (place, interner) = (self.objects.place(spot), self.interner);
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
        let kept = &mut self.objects;
        match head.kind.as_str() {
            "Namespace" => {
                let enrolling =
                    |placed: Placed<Namespace>, _: &mut Interner| Ok(enrols(&placed.object.metadata));
                kept.namespaces.push(stripped(value, &head, place, interner, enrolling)?);
            }
            "Node" => {
                let host =
                    |placed: Placed<Node>, interner: &mut Interner| Ok(Host::read(&placed.object, interner));
                kept.nodes.push(stripped(value, &head, place, interner, host)?);
            }
            "Pod" => {
                let pod = |placed: Placed<Pod>, interner: &mut Interner| {
                    WrittenPod::read(&placed, self.settings, interner)
                };
                let mut pod = stripped(value, &head, place, interner, pod)?;
                if let Some(written) = &pod.object {
                    // The same texts once.
                    pod.key = written.key();
                }
                kept.pods.push(pod);
            }
            "Service" => {
                let service = |placed: Placed<Service>, interner: &mut Interner| {
                    WrittenService::read(&placed, interner)
                };
                kept.services.push(stripped(value, &head, place, interner, service)?);
            }
            "EndpointSlice" => {
                let slice = |placed: Placed<EndpointSlice>, interner: &mut Interner| {
                    let slice = Slice::read(&placed, interner)?;
                    Ok(slice.map(|(service, slice)| (interner.text(&service), slice)))
                };
                kept.endpoint_slices.push(stripped(value, &head, place, interner, slice)?);
            }
            "PeerAuthentication" => {
                let policy = |placed: Placed<PeerAuthentication>, _: &mut Interner| Ok(placed.object);
                kept.peer_authentications.push(stripped(value, &head, place, interner, policy)?);
            }
            _ => {
                let policy = |placed: Placed<AuthorizationPolicy>, _: &mut Interner| Ok(placed.object);
                kept.authorization_policies.push(stripped(value, &head, place, interner, policy)?);
            }
        }
        Ok(())
    }
}

impl Head {
    fn of(value: &Value, implied: Option<&Self>) -> Result<Self, NoObject> {
        if !value.is_mapping() {
            return Err(NoObject::NotAMapping);
        }
        let field = |name: &str, implied: Option<&String>| {
            value.get(name).and_then(Value::as_str).map(str::to_owned).or_else(|| implied.cloned())
        };
        Ok(Self {
            kind: field("kind", implied.map(|i| &i.kind)).ok_or(NoObject::NoKind)?,
            api_version: field("apiVersion", implied.map(|i| &i.api_version))
                .ok_or(NoObject::NoApiVersion)?,
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

/// What is written of a kind that the mesh uses.
trait Named: DeserializeOwned {
    fn metadata(&mut self) -> &mut ObjectMeta;
}

impl<T: k8s_openapi::Metadata<Ty = ObjectMeta> + DeserializeOwned> Named for T {
    fn metadata(&mut self) -> &mut ObjectMeta {
        self.metadata_mut()
    }
}

impl Named for PeerAuthentication {
    fn metadata(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Named for AuthorizationPolicy {
    fn metadata(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// As much of an object as `strip` leaves.
fn stripped<T: Named, S>(
    value: Value,
    head: &Head,
    place: Place,
    interner: &Mutex<Interner>,
    strip: impl FnOnce(Placed<T>, &mut Interner) -> Result<S, Error>,
) -> Result<Stripped<S>, Error> {
    let mut object: T = typed(value, head, &place)?;
    let spot = Spot { document: place.document, item: place.item };
    // Nothing is half done in it: what a panic left behind is at worst a text that nobody uses.
    let mut interner = interner.lock().unwrap_or_else(PoisonError::into_inner);
    let key = Key::of(object.metadata(), &mut interner);
    let object = strip(Placed { object, place }, &mut interner)?;
    Ok(Stripped { key, spot, object })
}

/// An object with a name and, if it is of a kind that has one, a namespace.
fn typed<T: Named>(value: Value, head: &Head, place: &Place) -> Result<T, Error> {
    // Following the path to every field takes as long as reading it: that is done for those who need to know it.
    let mut object = match T::deserialize(&value) {
        Ok(object) => object,
        Err(_) => traced(value, head, place)?,
    };
    let metadata = object.metadata();
    if metadata.name.as_ref().is_none_or(String::is_empty) {
        let problem = "missing".to_owned();
        return Err(wrong(head.kind.clone(), "metadata.name".into(), problem, place));
    }
    metadata.namespace = namespace(head, metadata.namespace.take());
    Ok(object)
}

/// As `typed`, with an error that names object and field.
fn traced<T: Named>(value: Value, head: &Head, place: &Place) -> Result<T, Error> {
    let written = value.get("metadata").unwrap_or(&Value::Null);
    let mut metadata: ObjectMeta = serde_path_to_error::deserialize(written).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { "metadata".to_owned() } else { format!("metadata.{path}") };
        wrong(head.kind.clone(), field, error.into_inner().to_string(), place)
    })?;
    if metadata.name.as_ref().is_none_or(String::is_empty) {
        return Err(wrong(head.kind.clone(), "metadata.name".into(), "missing".into(), place));
    }
    metadata.namespace = namespace(head, metadata.namespace.take());
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        let field = if field == "." { "(top level)".to_owned() } else { field };
        wrong(called(&head.kind, &metadata), field, error.into_inner().to_string(), place)
    })
}

fn wrong(object: String, field: String, problem: String, place: &Place) -> Error {
    Error::Field { place: place.clone(), object, field, problem }
}

fn namespace(head: &Head, written: Option<String>) -> Option<String> {
    let is_namespaced = !matches!(head.kind.as_str(), "Namespace" | "Node");
    is_namespaced
        .then(|| written.filter(|namespace| !namespace.is_empty()).unwrap_or_else(|| "default".to_owned()))
}
