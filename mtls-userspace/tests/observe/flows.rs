//! Pods and flows to report.

use std::sync::Arc;

use mtls::addr::{OriginalDst, OriginalSrc};
use mtls::identity::SpiffeId;
use mtls::mesh::Workload;
use mtls::observe::{Direction, Flow, Party, Path, Refusal};
use mtls::policy::{Denied, Reason};

pub const CIPHER: &str = "TLS13_AES_128_GCM_SHA256";

pub fn spiffe(namespace: &str, account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap()
}

pub fn pod(namespace: &str, name: &str, labels: &[(&str, &str)]) -> Arc<Workload> {
    Arc::new(Workload {
        namespace: namespace.into(),
        name: name.into(),
        uid: None,
        service_account: "default".into(),
        app: name.into(),
        node: Some("node-a".into()),
        addresses: vec!["10.0.1.2".parse().unwrap()],
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        enrolled: true,
        identity: spiffe("never", "looked-up"),
        ports: Vec::new(),
        netns: None,
        cgroup: None,
    })
}

/// `web` of namespace `shop`, a Deployment's pod, to the database of namespace `data` through its Service.
pub fn web_to_db(direction: Direction) -> Flow {
    let web = pod(
        "shop",
        "web-7d9f6c5b8-x2x9z",
        &[("app", "web"), ("version", "v2"), ("pod-template-hash", "7d9f6c5b8")],
    );
    let db = pod("data", "db-0", &[("statefulset.kubernetes.io/pod-name", "db-0")]);
    Flow {
        direction,
        path: Path::Tunnel,
        source: Party { workload: Some(web), identity: Some(spiffe("shop", "web")) },
        destination: Party { workload: Some(db), identity: Some(spiffe("data", "db")) },
        original_dst: Some(OriginalDst::new("10.96.0.9:5432".parse().unwrap())),
        address: "10.0.2.3:5432".parse().unwrap(),
        original_src: OriginalSrc::new("10.0.1.2:41000".parse().unwrap()),
        service: Some("data/postgres".into()),
        cipher: Some(CIPHER),
    }
}

/// What the policy room says.
pub fn denied(reason: Reason, policy: Option<&str>) -> Refusal {
    Refusal::Denied(Denied { reason, policy: policy.map(Into::into), dry_run: None })
}

pub fn strict() -> Refusal {
    denied(Reason::StrictMode, None)
}

/// Plaintext from an address that nobody knows.
pub fn stranger_to_db() -> Flow {
    Flow {
        path: Path::Plaintext,
        source: Party::default(),
        original_dst: None,
        original_src: OriginalSrc::new("192.0.2.7:5000".parse().unwrap()),
        service: None,
        cipher: None,
        destination: Party { identity: None, ..web_to_db(Direction::Inbound).destination },
        ..web_to_db(Direction::Inbound)
    }
}
