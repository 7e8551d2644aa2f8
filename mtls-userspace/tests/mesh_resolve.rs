//! Where a dialled address leads: manifests in, destinations out.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use mtls::addr::OriginalDst;
use mtls::mesh::{Destination, Mesh, Objects, Settings};

fn settings() -> Settings {
    Settings { trust_domain: "cluster.local".parse().unwrap(), root_namespace: "istio-system".into() }
}

fn mesh(manifests: &str) -> Mesh {
    Mesh::build(&mut Objects::from_yaml("mesh.yaml", manifests, &settings()).unwrap(), &settings(), 1)
        .unwrap()
}

fn refusal(manifests: &str) -> String {
    Mesh::build(&mut Objects::from_yaml("mesh.yaml", manifests, &settings()).unwrap(), &settings(), 1)
        .unwrap_err()
        .to_string()
}

/// What a connection from a pod on node `one` reaches, in words.
fn reach(mesh: &Mesh, dst: &str) -> String {
    match mesh.resolve(OriginalDst::new(dst.parse().unwrap()), "one") {
        Destination::Workload { workload, address, service } => {
            format!("mtls {} {address} via {}", workload.key(), service.as_deref().unwrap_or("-"))
        }
        Destination::Plain { workload, address, service } => {
            let workload = workload.map_or("-".to_owned(), |w| w.key());
            format!("plain {workload} {address} via {}", service.as_deref().unwrap_or("-"))
        }
        Destination::Nowhere { service } => format!("nowhere via {service}"),
    }
}

/// Everything that many connections reach.
fn reaches(mesh: &Mesh, dst: &str) -> BTreeSet<String> {
    (0..200).map(|_| reach(mesh, dst)).collect()
}

fn set(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|text| (*text).to_owned()).collect()
}

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
";

/// A pod of namespace shop. `rest` is indented YAML of top-level fields below metadata.
fn pod(name: &str, ip: &str, labels: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}\n{rest}\nstatus: {{podIP: {ip}}}\n"
    )
}

fn service(name: &str, spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n")
}

#[test]
fn a_pod_address_is_the_enrolled_pod() {
    let mesh = mesh(&(SHOP.to_owned() + &pod("web", "10.0.1.1", "app: web", "")));
    assert_eq!(reach(&mesh, "10.0.1.1:80"), "mtls shop/web 10.0.1.1:80 via -");
    assert_eq!(reach(&mesh, "[::ffff:10.0.1.1]:80"), "mtls shop/web 10.0.1.1:80 via -");
    assert_eq!(reach(&mesh, "10.0.1.2:80"), "plain - 10.0.1.2:80 via -");
}

#[test]
fn a_vip_leads_to_each_of_its_ready_endpoints_about_equally() {
    let mesh = mesh(
        &(SHOP.to_owned()
            + &pod("a", "10.0.1.1", "app: web", "")
            + &pod("b", "10.0.1.2", "app: web", "")
            + &pod("c", "10.0.1.3", "app: web", "")
            + &pod("other", "10.0.1.4", "app: db", "")
            + &service(
                "web",
                "{clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}",
            )),
    );
    let mut hits: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..3000 {
        *hits.entry(reach(&mesh, "10.96.0.1:80")).or_default() += 1;
    }
    let reached: Vec<&str> = hits.keys().map(String::as_str).collect();
    assert_eq!(
        reached,
        [
            "mtls shop/a 10.0.1.1:8080 via shop/web",
            "mtls shop/b 10.0.1.2:8080 via shop/web",
            "mtls shop/c 10.0.1.3:8080 via shop/web",
        ]
    );
    assert!(hits.values().all(|hits| (800..1200).contains(hits)), "{hits:?}");
}

#[test]
fn a_named_target_port_differs_from_pod_to_pod() {
    let port = |number: u16, protocol: &str| {
        format!(
            "spec: {{containers: [{{name: c, ports: [{{name: http, containerPort: {number}, protocol: {protocol}}}]}}]}}"
        )
    };
    let mesh = mesh(
        &(SHOP.to_owned()
            + &pod("old", "10.0.1.1", "app: web", &port(8080, "TCP"))
            + &pod("new", "10.0.1.2", "app: web", &port(9090, "TCP"))
            + &pod("udp", "10.0.1.3", "app: web", &port(7070, "UDP"))
            + &pod("portless", "10.0.1.4", "app: web", "")
            + &service(
                "web",
                "{clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: http}]}",
            )),
    );
    assert_eq!(
        reaches(&mesh, "10.96.0.1:80"),
        set(&["mtls shop/old 10.0.1.1:8080 via shop/web", "mtls shop/new 10.0.1.2:9090 via shop/web"])
    );
}

#[test]
fn a_service_without_endpoint_or_port_leads_nowhere() {
    let mesh = mesh(
        &(SHOP.to_owned()
            + &pod("a", "10.0.1.1", "app: web", "")
            + &service(
                "web",
                "{clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}, {port: 53, protocol: UDP}]}",
            )
            + &service("none", "{clusterIP: 10.96.0.2, selector: {app: nobody}, ports: [{port: 80}]}")
            + &service("all", "{clusterIP: 10.96.0.3, ports: [{port: 80}]}")),
    );
    assert_eq!(reach(&mesh, "10.96.0.1:80"), "mtls shop/a 10.0.1.1:80 via shop/web");
    assert_eq!(reach(&mesh, "10.96.0.1:81"), "nowhere via shop/web");
    assert_eq!(reach(&mesh, "10.96.0.1:53"), "nowhere via shop/web");
    assert_eq!(reach(&mesh, "10.96.0.2:80"), "nowhere via shop/none");
    assert_eq!(reach(&mesh, "10.96.0.3:80"), "nowhere via shop/all");
}

#[test]
fn headless_and_external_services_have_no_address_of_their_own() {
    let mesh = mesh(
        &(SHOP.to_owned()
            + &pod("a", "10.0.1.1", "app: web", "")
            + &service("web", "{clusterIP: None, selector: {app: web}, ports: [{port: 80}]}")
            + &service("out", "{type: ExternalName, externalName: example.com, clusterIP: 10.96.0.9}")),
    );
    assert_eq!(reach(&mesh, "10.0.1.1:80"), "mtls shop/a 10.0.1.1:80 via -");
    assert_eq!(reach(&mesh, "10.96.0.9:80"), "plain - 10.96.0.9:80 via -");
    assert_eq!(mesh.captured_addresses(), ["10.0.1.1".parse::<std::net::IpAddr>().unwrap()]);
}

#[test]
fn each_address_family_leads_to_its_own() {
    let dual = "---
apiVersion: v1
kind: Pod
metadata: {name: dual, namespace: shop, labels: {app: web}}
status: {podIP: 10.0.1.1, podIPs: [{ip: 10.0.1.1}, {ip: 'fd00::1'}]}
";
    let mesh = mesh(
        &(SHOP.to_owned()
            + dual
            + &pod("four", "10.0.1.2", "app: web", "")
            + &service(
                "web",
                "{clusterIPs: [10.96.0.1, 'fd96::1'], selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}",
            )),
    );
    assert_eq!(reaches(&mesh, "[fd96::1]:80"), set(&["mtls shop/dual [fd00::1]:8080 via shop/web"]));
    assert_eq!(
        reaches(&mesh, "10.96.0.1:80"),
        set(&["mtls shop/dual 10.0.1.1:8080 via shop/web", "mtls shop/four 10.0.1.2:8080 via shop/web"])
    );
    assert_eq!(reach(&mesh, "[fd00::1]:8080"), "mtls shop/dual [fd00::1]:8080 via -");
    let captured: Vec<String> = mesh.captured_addresses().iter().map(ToString::to_string).collect();
    assert_eq!(captured, ["10.0.1.1", "10.0.1.2", "10.96.0.1", "fd00::1", "fd96::1"]);
}

#[test]
fn a_disabled_port_is_dialled_in_plaintext_and_the_others_are_not() {
    let mesh = mesh(
        &(SHOP.to_owned()
            + &pod("a", "10.0.1.1", "app: web", "")
            + &service(
                "web",
                "{clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: 8080}, {port: 81, targetPort: 8081}]}",
            )
            + "---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: legacy, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  portLevelMtls: {8080: {mode: DISABLE}}
"),
    );
    assert_eq!(reach(&mesh, "10.0.1.1:8080"), "plain shop/a 10.0.1.1:8080 via -");
    assert_eq!(reach(&mesh, "10.96.0.1:80"), "plain shop/a 10.0.1.1:8080 via shop/web");
    assert_eq!(reach(&mesh, "10.0.1.1:80"), "mtls shop/a 10.0.1.1:80 via -");
    assert_eq!(reach(&mesh, "10.96.0.1:81"), "mtls shop/a 10.0.1.1:8081 via shop/web");
}

#[test]
fn slices_are_believed_instead_of_the_selector() {
    let slice = |name: &str, endpoints: &str| {
        format!(
            "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}, {{name: udp, port: 53, protocol: UDP}}]
endpoints: [{endpoints}]
"
        )
    };
    let spec = |ip: &str, more: &str| {
        format!("{{clusterIP: {ip}, selector: {{app: web}}, ports: [{{name: http, port: 80}}]{more}}}")
    };
    let mesh = mesh(
        &(SHOP.to_owned()
            + &pod("a", "10.0.1.1", "app: web", "")
            + &pod("b", "10.0.1.2", "app: web", "")
            + &slice(
                "some",
                "{addresses: [10.0.1.2]}, {addresses: [10.0.1.1], conditions: {ready: false, serving: true, terminating: true}}, {addresses: [192.0.2.7], conditions: {ready: true}}",
            )
            + &service("some", &spec("10.96.0.1", ""))
            + &slice(
                "draining",
                "{addresses: [10.0.1.2], conditions: {ready: false, serving: false, terminating: true}}, {addresses: [10.0.1.1], conditions: {ready: false, serving: true, terminating: true}}",
            )
            + &service("draining", &spec("10.96.0.2", ""))
            + &slice("unready", "{addresses: [10.0.1.2], conditions: {ready: false}}")
            + &service("unready", &spec("10.96.0.3", ""))
            + &slice("published", "{addresses: [10.0.1.2], conditions: {ready: false}}")
            + &service("published", &spec("10.96.0.4", ", publishNotReadyAddresses: true"))),
    );
    assert_eq!(
        reaches(&mesh, "10.96.0.1:80"),
        set(&["mtls shop/b 10.0.1.2:8080 via shop/some", "plain - 192.0.2.7:8080 via shop/some"])
    );
    assert_eq!(reaches(&mesh, "10.96.0.2:80"), set(&["mtls shop/a 10.0.1.1:8080 via shop/draining"]));
    assert_eq!(reaches(&mesh, "10.96.0.3:80"), set(&["nowhere via shop/unready"]));
    assert_eq!(reaches(&mesh, "10.96.0.4:80"), set(&["mtls shop/b 10.0.1.2:8080 via shop/published"]));
}

#[test]
fn only_ready_pods_serve_unless_the_service_publishes_all() {
    let with = |name: &str, ip: &str, metadata: &str, ready: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: web}}{metadata}}}\nstatus: {{podIP: {ip}, conditions: [{{type: Ready, status: '{ready}'}}]}}\n"
        )
    };
    let gone = ", deletionTimestamp: '2026-01-01T00:00:00Z'";
    let vip = |name: &str, ip: &str, more: &str| {
        service(name, &format!("{{clusterIP: {ip}, selector: {{app: web}}, ports: [{{port: 80}}]{more}}}"))
    };
    let services = vip("web", "10.96.0.1", "") + &vip("all", "10.96.0.2", ", publishNotReadyAddresses: true");
    let some_ready = mesh(
        &(SHOP.to_owned()
            + &with("ready", "10.0.1.1", "", "True")
            + &with("unready", "10.0.1.2", "", "False")
            + &with("leaving", "10.0.1.3", gone, "True")
            + &services),
    );
    assert_eq!(reaches(&some_ready, "10.96.0.1:80"), set(&["mtls shop/ready 10.0.1.1:80 via shop/web"]));
    assert_eq!(reaches(&some_ready, "10.96.0.2:80").len(), 3);
    let none_ready = mesh(
        &(SHOP.to_owned()
            + &with("unready", "10.0.1.2", "", "False")
            + &with("leaving", "10.0.1.3", gone, "True")
            + &services),
    );
    assert_eq!(reaches(&none_ready, "10.96.0.1:80"), set(&["mtls shop/leaving 10.0.1.3:80 via shop/web"]));
}

#[test]
fn local_traffic_stays_on_the_node() {
    let vip = |name: &str, ip: &str, more: &str| {
        service(name, &format!("{{clusterIP: {ip}, selector: {{app: web}}, ports: [{{port: 80}}], {more}}}"))
    };
    let mesh = mesh(
        &(SHOP.to_owned()
            + &pod("here", "10.0.1.1", "app: web", "spec: {nodeName: one, containers: []}")
            + &pod("there", "10.0.2.1", "app: web", "spec: {nodeName: two, containers: []}")
            + &vip("only", "10.96.0.1", "internalTrafficPolicy: Local")
            + &vip("first", "10.96.0.2", "trafficDistribution: PreferSameNode")
            + &vip("any", "10.96.0.3", "internalTrafficPolicy: Cluster")),
    );
    assert_eq!(reaches(&mesh, "10.96.0.1:80"), set(&["mtls shop/here 10.0.1.1:80 via shop/only"]));
    assert_eq!(reaches(&mesh, "10.96.0.2:80"), set(&["mtls shop/here 10.0.1.1:80 via shop/first"]));
    assert_eq!(reaches(&mesh, "10.96.0.3:80").len(), 2);
    let elsewhere = |vip: &str| {
        let dst: SocketAddr = vip.parse().unwrap();
        mesh.resolve(OriginalDst::new(dst), "three")
    };
    assert_eq!(elsewhere("10.96.0.1:80"), Destination::Nowhere { service: "shop/only".into() });
    assert!(matches!(elsewhere("10.96.0.2:80"), Destination::Workload { .. }));
}

#[test]
fn enrolment_follows_the_labels() {
    let spec = |extra: &str| format!("spec: {{containers: []{extra}}}");
    let ambient = "istio.io/dataplane-mode: ambient";
    let none = "istio.io/dataplane-mode: none";
    // (rule, namespace enrolled, pod label, pod spec, phase, enrolled; None: absent)
    let rows = [
        ("namespace label enrols", true, "", spec(""), "Running", Some(true)),
        ("no label does not", false, "", spec(""), "Running", Some(false)),
        ("pod label enrols", false, ambient, spec(""), "Running", Some(true)),
        ("none on the pod wins over the namespace", true, none, spec(""), "Running", Some(false)),
        (
            "host network is never enrolled",
            true,
            ambient,
            spec(", hostNetwork: true"),
            "Running",
            Some(false),
        ),
        ("a pending pod with an address is", true, "", spec(""), "Pending", Some(true)),
        ("Succeeded is absent", true, ambient, spec(""), "Succeeded", None),
        ("Failed is absent", true, ambient, spec(""), "Failed", None),
    ];
    for (rule, namespace_enrolled, label, spec, phase, expected) in rows {
        let namespace = if namespace_enrolled { SHOP } else { "" };
        let pod = pod("p", "10.0.1.1", label, &spec).replace("podIP", &format!("phase: {phase}, podIP"));
        let mesh = mesh(&(namespace.to_owned() + &pod));
        assert_eq!(mesh.workloads.first().map(|w| w.enrolled), expected, "{rule}");
    }
}

#[test]
fn a_pod_without_an_address_is_absent() {
    let mesh = mesh("{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: shop}}");
    assert!(mesh.workloads.is_empty());
}

#[test]
fn a_workload_carries_what_the_manifest_says() {
    let mesh = mesh(
        &(SHOP.to_owned()
            + "---
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  namespace: shop
  labels: {app.kubernetes.io/name: web}
  annotations: {mtls.dev/netns: /run/netns/web, mtls.dev/cgroup: /sys/fs/cgroup/web}
spec:
  nodeName: one
  serviceAccountName: seller
  initContainers:
  - {name: once, ports: [{containerPort: 1}]}
  - {name: sidecar, restartPolicy: Always, ports: [{name: metrics, containerPort: 2}]}
  containers:
  - {name: c, resources: {limits: {cpu: 1}}, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]}
status: {podIP: 10.0.1.1}
"),
    );
    let web = mesh.workload("10.0.1.1".parse().unwrap()).unwrap();
    assert_eq!(web.key(), "shop/web-1");
    assert_eq!(web.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/seller");
    assert_eq!(&*web.app, "web");
    assert_eq!(web.node.as_deref(), Some("one"));
    assert_eq!(web.ports, [(None, 80), (Some("metrics".into()), 2)]);
    assert_eq!(web.netns.as_deref(), Some("/run/netns/web".as_ref()));
    assert_eq!(web.cgroup.as_deref(), Some("/sys/fs/cgroup/web".as_ref()));
    assert_eq!(mesh.enrolled_on("one").count(), 1);
    assert_eq!(mesh.enrolled_on("two").count(), 0);
}

#[test]
fn an_address_claimed_twice_belongs_to_the_newer_pod() {
    let at = |name: &str, created: &str, more: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: '{created}'}}\nstatus: {{podIP: 10.0.1.1, podIPs: [{{ip: 10.0.1.1}}{more}]}}\n"
        )
    };
    let mesh = mesh(
        &(SHOP.to_owned()
            + &at("old", "2026-01-01T00:00:00Z", ", {ip: 'fd00::1'}")
            + &at("new", "2026-01-02T00:00:00Z", "")
            + &at("oldest", "2025-01-01T00:00:00Z", "")),
    );
    assert_eq!(reach(&mesh, "10.0.1.1:80"), "mtls shop/new 10.0.1.1:80 via -");
    assert_eq!(reach(&mesh, "[fd00::1]:80"), "mtls shop/old [fd00::1]:80 via -");
    let names: Vec<String> = mesh.workloads.iter().map(|w| w.key()).collect();
    assert_eq!(names, ["shop/old", "shop/new"]);
    let warnings: Vec<String> = mesh.warnings().iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "10.0.1.1 is claimed by Pod shop/new and by the older Pod shop/old; it counts as shop/new's",
            "10.0.1.1 is claimed by Pod shop/new and by the older Pod shop/oldest; it counts as shop/new's",
        ]
    );
}

#[test]
fn an_address_claimed_twice_without_a_way_to_tell_is_refused() {
    assert_eq!(
        refusal(&(SHOP.to_owned() + &pod("a", "10.0.1.1", "", "") + &pod("b", "10.0.1.1", "", ""))),
        "10.0.1.1 is claimed by Pod shop/a (mesh.yaml, document 2) and by Pod shop/b (mesh.yaml, document 3), and \
         neither is newer by metadata.creationTimestamp; remove one, or give one another status.podIP"
    );
}

#[test]
fn a_finished_or_host_network_pod_claims_nothing() {
    let host = |name: &str| pod(name, "192.0.2.1", "app: host", "spec: {hostNetwork: true, containers: []}");
    let done = pod("done", "10.0.1.1", "", "").replace("podIP", "phase: Succeeded, podIP");
    let mesh = mesh(
        &(SHOP.to_owned()
            + &host("agent")
            + &host("proxy")
            + &done
            + &pod("live", "10.0.1.1", "", "")
            + &service("host", "{clusterIP: 10.96.0.1, selector: {app: host}, ports: [{port: 80}]}")),
    );
    assert_eq!(reach(&mesh, "10.0.1.1:80"), "mtls shop/live 10.0.1.1:80 via -");
    assert_eq!(reach(&mesh, "192.0.2.1:80"), "plain - 192.0.2.1:80 via -");
    assert_eq!(reaches(&mesh, "10.96.0.1:80"), set(&["plain - 192.0.2.1:80 via shop/host"]));
}

#[test]
fn a_vip_of_two_services_is_refused() {
    let vip = |name: &str| service(name, "{clusterIP: 10.96.0.1, ports: [{port: 80}]}");
    assert_eq!(
        refusal(&(SHOP.to_owned() + &vip("a") + &vip("b"))),
        "10.96.0.1 is the clusterIP of Service shop/a (mesh.yaml, document 2) and of Service shop/b (mesh.yaml, \
         document 3); give one another clusterIP"
    );
}
