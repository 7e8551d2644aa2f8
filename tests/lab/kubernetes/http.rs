//! Requests: HTTP over TLS in, the API's answers out.

use std::borrow::Cow;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::access::{Attempt, User};
use super::kinds::Kind;
use super::store::{Listed, Name, Refusal, Stored};
use super::watch::Watch;
use super::{Shared, lock};

type Body = BoxBody<Bytes, Infallible>;

/// Where a watch ends that the client set no limit to.
const LONGEST_WATCH: Duration = Duration::from_secs(1800);

pub(super) async fn serve(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    loop {
        let Ok((tcp, _)) = listener.accept().await else { continue };
        let (tls, shared) = (tls.clone(), shared.clone());
        if lock(&shared.behaviour).away {
            continue;
        }
        let mut cut = shared.cut.subscribe();
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(tcp).await else { return };
            let answering = shared.clone();
            let service = service_fn(move |request| {
                let shared = answering.clone();
                async move { Ok::<_, Infallible>(answer(request, shared).await) }
            });
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                _ = cut.changed() => {}
            }
        });
    }
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Response<Body> {
    match route(request, shared).await {
        Ok(answer) => answer,
        Err(status) => {
            let code = status["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or(500);
            let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            json_answer(code, status.to_string())
        }
    }
}

/// A request's target: `/api/v1/…` or `/apis/<group>/<version>/…`, then
/// `[namespaces/<namespace>/]<plural>[/<name>[/<subresource>]]`.
struct Target {
    kind: &'static Kind,
    api_version: String,
    name: Name,
    subresource: Option<String>,
}

impl Target {
    fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, plural, rest @ ..] if Kind::at(group, version, plural).is_some() => {
                (*namespace, [&[*plural], rest].concat())
            }
            rest => ("", rest.to_vec()),
        };
        let kind = Kind::at(group, version, rest.first()?)?;
        Some(Self {
            kind,
            api_version: kind.in_version(version),
            name: (namespace.into(), rest.get(1).copied().unwrap_or_default().into()),
            subresource: rest.get(2).map(|name| (*name).to_owned()),
        })
    }
}

async fn route(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<Body>, Value> {
    let (parts, body) = request.into_parts();
    let user = caller(&parts.headers, &shared)?;
    let absent = || failure(404, "NotFound", "the server could not find the requested resource");
    let target = Target::parse(parts.uri.path()).ok_or_else(absent)?;
    let query = query(parts.uri.query().unwrap_or_default());
    let is_watch = query.get("watch").is_some_and(|watch| watch != "false" && watch != "0");
    let verb = match (parts.method.as_str(), target.name.1.is_empty(), is_watch) {
        ("GET", true, true) => "watch",
        ("GET", true, false) => "list",
        ("GET", false, _) => "get",
        ("POST", ..) => "create",
        ("PUT", ..) => "update",
        ("PATCH", ..) => "patch",
        ("DELETE", ..) => "delete",
        _ => return Err(failure(405, "MethodNotAllowed", "the server does not allow this method")),
    };
    permit(&user, verb, &target)?;
    if !lock(&shared.store).is_defined(target.kind) {
        return Err(absent());
    }
    let path = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    lock(&shared.requests).push(format!("{} {path}", parts.method));
    match verb {
        "watch" => watch(&target, &query, &shared),
        "list" => list(&target, &query, &shared),
        _ => {
            let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let answered = one(verb, &target, &body, &user, &shared);
            shared.wake();
            answered
        }
    }
}

fn caller(headers: &hyper::HeaderMap, shared: &Shared) -> Result<User, Value> {
    let header = headers.get("authorization").and_then(|value| value.to_str().ok());
    let token = header.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    let user = lock(&shared.access).caller(token).cloned();
    user.ok_or_else(|| failure(401, "Unauthorized", "Unauthorized"))
}

fn permit(user: &User, verb: &str, target: &Target) -> Result<(), Value> {
    let mut resource = target.kind.full_name();
    if let Some(subresource) = &target.subresource {
        resource = format!("{resource}/{subresource}");
    }
    let (namespace, name) = &target.name;
    if user.may(&Attempt { verb, resource: &resource, namespace }) {
        return Ok(());
    }
    let place = match namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace {namespace:?}"),
    };
    let Kind { group, plural, .. } = target.kind;
    let named = if name.is_empty() { String::new() } else { format!(" {name:?}") };
    let message = format!(
        "{plural}{named} is forbidden: User {:?} cannot {verb} resource {plural:?} in API group {group:?} {place}",
        user.name
    );
    Err(failure(403, "Forbidden", &message))
}

fn list(target: &Target, query: &HashMap<String, String>, shared: &Shared) -> Result<Response<Body>, Value> {
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(0);
    let wanted = wanted(target, query)?;
    let mut store = lock(&shared.store);
    let Listed { revision, items, next, remaining } = match query.get("continue") {
        Some(token) => store.next_page(token, limit).ok_or_else(|| {
            let message = "The provided continue parameter is too old to display a consistent list result. You must \
                           start a new list without the continue parameter.";
            json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired",
            "message": message })
        })?,
        None => store.list(target.kind, limit, wanted),
    };
    drop(store);
    let mut metadata = json!({ "resourceVersion": revision.to_string() });
    if let Some(token) = next {
        metadata["continue"] = token.into();
        metadata["remainingItemCount"] = remaining.into();
    }
    let items: Vec<Cow<'_, str>> =
        items.iter().map(|stored| rendered(&stored.json, target.kind, &target.api_version)).collect();
    let text = format!(
        "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[{}]}}",
        target.kind.kind,
        target.api_version,
        items.join(",")
    );
    Ok(json_answer(StatusCode::OK, text))
}

fn watch(
    target: &Target,
    query: &HashMap<String, String>,
    shared: &Arc<Shared>,
) -> Result<Response<Body>, Value> {
    let behaviour = *lock(&shared.behaviour);
    let number = |field: &str| query.get(field).and_then(|text| text.parse::<u64>().ok());
    let from = number("resourceVersion").filter(|version| *version > 0);
    if let (Some(version), true) = (from, behaviour.gone_by_status)
        && lock(&shared.store).since(target.kind, version).is_none()
    {
        return Err(gone(&format!("too old resource version: {version}")));
    }
    let asked = number("timeoutSeconds").map_or(LONGEST_WATCH, Duration::from_secs);
    let watch = Watch {
        kind: target.kind,
        api_version: target.api_version.clone(),
        from,
        wanted: Box::new(wanted(target, query)?),
        bookmarks: query.get("allowWatchBookmarks").is_some_and(|allow| allow == "true"),
        limit: behaviour.longest_watch.map_or(asked, |longest| longest.min(asked)),
    };
    let (send, receive) = tokio::sync::mpsc::channel(64);
    tokio::spawn(watch.run(shared.clone(), send));
    let lines = ReceiverStream::new(receive).map(|line| Ok::<_, Infallible>(Frame::data(line)));
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(lines)));
    answer.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    Ok(answer)
}

fn one(
    verb: &str,
    target: &Target,
    body: &[u8],
    user: &User,
    shared: &Shared,
) -> Result<Response<Body>, Value> {
    let Target { kind, name, subresource, .. } = target;
    let parsed = || {
        serde_json::from_slice::<Value>(body)
            .map_err(|error| failure(400, "BadRequest", &format!("the body is no JSON: {error}")))
    };
    if kind.kind == "TokenReview" {
        let mut review = parsed()?;
        review["status"] = lock(&shared.access).review(&review["spec"]);
        return Ok(json_answer(StatusCode::CREATED, review.to_string()));
    }
    let mut store = lock(&shared.store);
    let refused = |refusal: Refusal| {
        let what = format!("{} {:?}", kind.full_name(), name.1);
        match refusal {
            Refusal::NotFound => failure(404, "NotFound", &format!("{what} not found")),
            Refusal::AlreadyExists => failure(409, "AlreadyExists", &format!("{what} already exists")),
            Refusal::Conflict => {
                let message =
                    format!("Operation cannot be fulfilled on {what}: the object has been modified");
                failure(409, "Conflict", &message)
            }
        }
    };
    let (code, stored) = match verb {
        "get" => (StatusCode::OK, store.get(kind, name).ok_or_else(|| refused(Refusal::NotFound))?),
        "create" => {
            let mut object = parsed()?;
            if kind.namespaced {
                object["metadata"]["namespace"] = name.0.clone().into();
            }
            if kind.kind == "CertificateSigningRequest" {
                object["spec"]["username"] = user.name.clone().into();
            }
            (StatusCode::CREATED, store.create(kind, object).map_err(refused)?)
        }
        "update" => {
            (StatusCode::OK, store.replace(kind, name, parsed()?, subresource.as_deref()).map_err(refused)?)
        }
        "patch" => {
            (StatusCode::OK, store.merge(kind, name, &parsed()?, subresource.as_deref()).map_err(refused)?)
        }
        _ => (StatusCode::OK, store.delete(kind, name).map_err(refused)?),
    };
    Ok(json_answer(code, rendered(&stored.json, kind, &target.api_version).into_owned()))
}

/// Which objects a list or watch is about.
fn wanted(
    target: &Target,
    query: &HashMap<String, String>,
) -> Result<impl Fn(&Stored) -> bool + Send + Sync + use<>, Value> {
    let namespace = target.name.0.clone();
    let mut conditions: Vec<(String, String)> = Vec::new();
    for selector in ["fieldSelector", "labelSelector"] {
        let terms = query.get(selector).map(String::as_str).unwrap_or_default();
        for term in terms.split(',').filter(|term| !term.is_empty()) {
            let (field, value) = term.split_once('=').ok_or_else(|| {
                failure(400, "BadRequest", &format!("the test's API server selects by equality only: {term}"))
            })?;
            let pointer = match selector {
                "fieldSelector" => format!("/{}", field.replace('.', "/")),
                _ => format!("/metadata/labels/{}", field.replace('~', "~0").replace('/', "~1")),
            };
            conditions.push((pointer, value.trim_start_matches('=').to_owned()));
        }
    }
    Ok(move |stored: &Stored| {
        let text = |pointer: &str| stored.object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        (namespace.is_empty() || stored.name.0 == namespace)
            && conditions.iter().all(|(pointer, value)| text(pointer) == value)
    })
}

/// An object in the version asked for.
pub(super) fn rendered<'j>(json: &'j str, kind: &Kind, api_version: &str) -> Cow<'j, str> {
    let kept = kind.api_version();
    if kept == api_version {
        return json.into();
    }
    json.replacen(&format!("\"apiVersion\":\"{kept}\""), &format!("\"apiVersion\":\"{api_version}\""), 1)
        .into()
}

pub(super) fn gone(message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410, "reason": "Expired",
        "message": message,
    })
}

fn failure(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
        "message": message,
    })
}

fn json_answer(code: StatusCode, text: String) -> Response<Body> {
    let mut answer = Response::new(Full::new(Bytes::from(text)).boxed());
    *answer.status_mut() = code;
    answer.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    answer
}

fn query(text: &str) -> HashMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decoded(key), decoded(value))).collect()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let number =
                    std::str::from_utf8(&digits).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok());
                bytes.extend(number);
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
