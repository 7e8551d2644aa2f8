//! A directory of manifests that changes under a running mesh.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mtls::mesh::{Mesh, Settings, Source};
use mtls::policy::Mode;
use tempfile::TempDir;

/// Longer than any reload by notice takes; shorter than the rescan that would hide a missed notice.
const SOON: Duration = Duration::from_secs(4);

fn settings() -> Settings {
    Settings { trust_domain: "cluster.local".parse().unwrap(), root_namespace: "istio-system".into() }
}

fn follow(directory: &Path) -> Source {
    Source::directory(directory.to_owned(), settings()).unwrap()
}

fn pod(name: &str, ip: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop}}, status: {{podIP: {ip}}}}}\n---\n"
    )
}

fn mode(mode: &str) -> String {
    format!(
        "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: default, namespace: shop}}, spec: {{mtls: {{mode: {mode}}}}}}}\n"
    )
}

fn names(mesh: &Mesh) -> Vec<String> {
    mesh.workloads.iter().map(|w| w.key()).collect()
}

#[track_caller]
fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_change_is_picked_up_and_raises_the_generation() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("a.yaml"), pod("a", "10.0.0.1")).unwrap();
    let source = follow(directory.path());
    let generations = source.subscribe();
    let first = source.current();
    assert_eq!(names(&first), ["shop/a"]);
    assert_eq!((first.generation, *generations.borrow()), (1, 1));

    fs::write(directory.path().join("b.yaml"), pod("b", "10.0.0.2")).unwrap();
    soon("the new pod", || names(&source.current()) == ["shop/a", "shop/b"]);
    soon("the generation", || *generations.borrow() == source.current().generation);
    assert!(source.current().generation > 1);
    assert_eq!(names(&first), ["shop/a"], "a snapshot in use never changes");

    fs::remove_file(directory.path().join("a.yaml")).unwrap();
    soon("the pod gone", || names(&source.current()) == ["shop/b"]);
}

#[test]
fn subdirectories_made_later_are_followed() {
    let directory = TempDir::new().unwrap();
    let source = follow(directory.path());
    assert!(names(&source.current()).is_empty());
    fs::create_dir_all(directory.path().join("apps/shop")).unwrap();
    fs::write(directory.path().join("apps/shop/a.yml"), pod("a", "10.0.0.1")).unwrap();
    soon("the pod in the subdirectory", || names(&source.current()) == ["shop/a"]);
    fs::write(directory.path().join("apps/shop/b.json"), "{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"b\"}, \"status\": {\"podIP\": \"10.0.0.2\"}}").unwrap();
    soon("the pod in JSON", || names(&source.current()) == ["shop/a", "default/b"]);
    fs::write(directory.path().join("apps/README.md"), "kind: Pod").unwrap();
    fs::write(directory.path().join("apps/.a.yaml.swp"), "kind: Pod").unwrap();
    fs::write(directory.path().join("apps/.hidden.yaml"), "kind: Pod").unwrap();
    fs::write(directory.path().join("c.yaml"), pod("c", "10.0.0.3")).unwrap();
    soon("the last pod", || names(&source.current()).len() == 3);
    assert_eq!(source.last_error(), None);
}

#[test]
fn a_broken_file_keeps_the_last_snapshot_and_a_fix_recovers() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("mesh.yaml");
    fs::write(&file, pod("a", "10.0.0.1") + &mode("STRICT")).unwrap();
    let source = follow(directory.path());
    let generations = source.subscribe();
    let strict = |mesh: Arc<Mesh>| mesh.policies.mode(&mesh.workloads[0], 80) == Mode::Strict;
    assert!(strict(source.current()));
    assert_eq!(source.errors(), 0);

    fs::write(&file, pod("a", "10.0.0.1") + &mode("STRIKT")).unwrap();
    soon("the error", || source.last_error().is_some());
    let expected = format!(
        "{}, document 2: PeerAuthentication shop/default: field spec.mtls.mode: unknown variant `STRIKT`, expected \
         one of `UNSET`, `DISABLE`, `PERMISSIVE`, `STRICT`",
        file.display()
    );
    assert_eq!(source.last_error().unwrap(), expected);
    assert_eq!(source.errors(), 1);
    assert!(strict(source.current()), "the last good snapshot stays in force");
    assert_eq!((source.current().generation, *generations.borrow()), (1, 1));

    fs::write(&file, pod("a", "10.0.0.1") + &mode("PERMISSIVE")).unwrap();
    soon("the fix", || !strict(source.current()));
    soon("the error gone", || source.last_error().is_none());
    assert_eq!(source.current().generation, 2);
}

#[test]
fn a_broken_file_put_back_as_it_was_is_no_change() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("mesh.yaml");
    fs::write(&file, pod("a", "10.0.0.1")).unwrap();
    let source = follow(directory.path());
    fs::write(&file, "kind: [").unwrap();
    soon("the error", || source.last_error().is_some());
    fs::write(&file, pod("a", "10.0.0.1")).unwrap();
    soon("the error gone", || source.last_error().is_none());
    assert_eq!(source.current().generation, 1);
}

#[test]
fn a_change_that_keeps_size_and_time_of_a_file_is_noticed() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("mesh.yaml");
    fs::write(&path, pod("a", "10.0.0.1")).unwrap();
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    let source = follow(directory.path());
    // A file's times are believed when it is read again a while after it was written.
    std::thread::sleep(Duration::from_secs(3));
    fs::write(directory.path().join("other.yaml"), mode("STRICT")).unwrap();
    soon("the policy", || source.current().generation == 2);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::io::Write::write_all(&mut &file, pod("b", "10.0.0.2").as_bytes()).unwrap();
    file.set_modified(written).unwrap();
    drop(file);
    soon("the other pod", || names(&source.current()) == ["shop/b"]);
}

#[test]
fn files_contradict_each_other_however_long_ago_one_was_read() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("a.yaml"), pod("a", "10.0.0.1")).unwrap();
    let source = follow(directory.path());
    fs::write(at("b.yaml"), pod("b", "10.0.0.2") + &pod("a", "10.0.0.3")).unwrap();
    soon("the error", || source.last_error().is_some());
    let expected = format!(
        "Pod shop/a is defined twice: {}, document 1; and {}, document 2; remove one of them",
        at("a.yaml").display(),
        at("b.yaml").display()
    );
    assert_eq!(source.last_error().unwrap(), expected);
    fs::remove_file(at("a.yaml")).unwrap();
    soon("the second one alone", || names(&source.current()) == ["shop/b", "shop/a"]);
    assert_eq!(source.last_error(), None);
}

#[test]
fn what_changed_while_a_file_was_broken_is_in_force_with_its_correction() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("a.yaml"), pod("a", "10.0.0.1")).unwrap();
    fs::write(at("b.yaml"), mode("PERMISSIVE")).unwrap();
    let source = follow(directory.path());
    fs::write(at("b.yaml"), mode("STRIKT")).unwrap();
    soon("the error", || source.last_error().is_some());
    fs::write(at("c.yaml"), pod("c", "10.0.0.3")).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(names(&source.current()), ["shop/a"], "nothing of a state that is broken");
    fs::write(at("b.yaml"), mode("STRICT")).unwrap();
    soon("the new pod", || names(&source.current()) == ["shop/a", "shop/c"]);
    let mesh = source.current();
    assert!(mesh.workloads.iter().all(|workload| mesh.policies.mode(workload, 80) == Mode::Strict));
}

#[test]
fn a_change_reaches_what_other_files_say() {
    let directory = TempDir::new().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    let namespace = |dataplane: &str| {
        format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, labels: {{istio.io/dataplane-mode: {dataplane}}}}}}}"
        )
    };
    let web = |ip: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: shop, labels: {{app: web}}}}, status: {{podIP: {ip}}}}}"
        )
    };
    write("namespace.yaml", &namespace("none"));
    write("pod.yaml", &web("10.0.0.1"));
    write(
        "service.yaml",
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, \
         spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}]}}",
    );
    let source = follow(directory.path());
    let endpoint =
        |mesh: &Mesh| mesh.served("10.96.0.1:80".parse().unwrap()).unwrap().endpoints[0].0.to_string();
    assert!(!source.current().workloads[0].enrolled);
    assert_eq!(endpoint(&source.current()), "10.0.0.1:80");

    write("namespace.yaml", &namespace("ambient"));
    soon("the pod enrolled", || source.current().workloads[0].enrolled);
    write("pod.yaml", &web("10.0.0.2"));
    soon("the Service leads to the pod's new address", || endpoint(&source.current()) == "10.0.0.2:80");

    let before = source.current();
    write("policy.yaml", &mode("STRICT"));
    soon("the policy", || source.current().generation > before.generation);
    let after = source.current();
    assert!(Arc::ptr_eq(&before.workloads, &after.workloads), "a policy makes no pod anew");
    assert_eq!(after.policies.mode(&after.workloads[0], 80), Mode::Strict);
}

#[test]
fn a_file_is_not_read_half_written() {
    use std::io::Write;
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("mesh.yaml");
    fs::write(&path, pod("a", "10.0.0.1") + &mode("STRICT")).unwrap();
    let source = follow(directory.path());
    // Truncated and valid on the way: first the pod without its policy, then both.
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(pod("a", "10.0.0.1").as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(250));
    file.write_all(pod("b", "10.0.0.2").as_bytes()).unwrap();
    file.write_all(mode("STRICT").as_bytes()).unwrap();
    drop(file);
    soon("both pods", || names(&source.current()).len() == 2);
    assert_eq!(source.current().generation, 2, "no snapshot in between was without the policy");
}

#[test]
fn an_atomic_rename_is_picked_up() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("mesh.yaml");
    fs::write(&file, pod("a", "10.0.0.1")).unwrap();
    let source = follow(directory.path());
    let elsewhere = directory.path().join(".mesh.yaml.new");
    fs::write(&elsewhere, pod("b", "10.0.0.2")).unwrap();
    fs::rename(&elsewhere, &file).unwrap();
    soon("the renamed file", || names(&source.current()) == ["shop/b"]);
}

#[test]
fn a_mounted_config_map_is_followed() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    let version = |name: &str, text: &str| {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join("mesh.yaml"), text).unwrap();
    };
    version("..2026_01", &pod("a", "10.0.0.1"));
    symlink("..2026_01", at("..data")).unwrap();
    symlink("..data/mesh.yaml", at("mesh.yaml")).unwrap();
    let source = follow(directory.path());
    assert_eq!(names(&source.current()), ["shop/a"]);

    version("..2026_02", &pod("b", "10.0.0.2"));
    symlink("..2026_02", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    fs::remove_dir_all(at("..2026_01")).unwrap();
    soon("the new version", || names(&source.current()) == ["shop/b"]);
    assert_eq!(source.last_error(), None);
}

#[test]
fn a_directory_that_loses_everything_keeps_the_last_snapshot() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("mesh.yaml");
    fs::write(&file, pod("a", "10.0.0.1")).unwrap();
    let source = follow(directory.path());
    fs::remove_file(&file).unwrap();
    soon("the error", || source.last_error().is_some());
    assert_eq!(
        source.last_error().unwrap(),
        format!(
            "{} has no manifest (*.yaml, *.yml or *.json) any more; to empty the mesh on purpose, leave a file with \
             only a comment",
            directory.path().display()
        )
    );
    assert_eq!(names(&source.current()), ["shop/a"]);
    fs::write(&file, "# empty on purpose\n").unwrap();
    soon("the empty mesh", || names(&source.current()).is_empty() && source.last_error().is_none());
}

#[test]
fn a_directory_put_in_anothers_place_is_followed() {
    let parent = TempDir::new().unwrap();
    let [one, two] = ["one", "two"].map(|name| {
        let path = parent.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    });
    fs::write(one.join("a.yaml"), pod("a", "10.0.0.1")).unwrap();
    fs::write(two.join("b.yaml"), pod("b", "10.0.0.2")).unwrap();
    let link = parent.path().join("current");
    symlink(&one, &link).unwrap();
    let source = follow(&link);
    assert_eq!(names(&source.current()), ["shop/a"]);
    let next = parent.path().join("next");
    symlink(&two, &next).unwrap();
    fs::rename(&next, &link).unwrap();
    // The link's own directory isn't watched: only the rescan notices.
    let deadline = Instant::now() + Duration::from_secs(15);
    while names(&source.current()) != ["shop/b"] {
        assert!(Instant::now() < deadline, "the rescan did not notice");
        std::thread::sleep(Duration::from_millis(50));
    }
    fs::write(two.join("c.yaml"), pod("c", "10.0.0.3")).unwrap();
    soon("a change in the new directory", || names(&source.current()).len() == 2);
}

#[test]
fn the_first_load_must_succeed() {
    let directory = TempDir::new().unwrap();
    let missing = directory.path().join("missing");
    let error = Source::directory(missing.clone(), settings()).err().unwrap().to_string();
    assert_eq!(
        error,
        format!(
            "cannot read manifests from {}: No such file or directory (os error 2); the path must exist and be readable",
            missing.display()
        )
    );
    fs::write(directory.path().join("a.yaml"), "kind: Pod").unwrap();
    let error = Source::directory(directory.path().to_owned(), settings()).err().unwrap().to_string();
    assert!(error.contains("a.yaml, document 1: field apiVersion is missing"), "{error}");
}

#[test]
fn a_file_that_is_not_text_is_refused_and_a_link_to_itself_too() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("a.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    let error = Source::directory(directory.path().to_owned(), settings()).err().unwrap().to_string();
    assert!(error.contains("a.yaml: stream did not contain valid UTF-8"), "{error}");
    fs::remove_file(directory.path().join("a.yaml")).unwrap();
    symlink(".", directory.path().join("loop")).unwrap();
    let error = Source::directory(directory.path().to_owned(), settings()).err().unwrap().to_string();
    assert!(error.contains("nested too deeply or links to itself"), "{error}");
}

#[test]
fn dropping_the_last_clone_ends_the_watching() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("a.yaml"), pod("a", "10.0.0.1")).unwrap();
    let source = follow(directory.path());
    let clone = source.clone();
    let generations = clone.subscribe();
    drop(source);
    fs::write(directory.path().join("b.yaml"), pod("b", "10.0.0.2")).unwrap();
    soon("a change seen through the clone", || names(&clone.current()).len() == 2);
    drop(clone);
    // The thread holds the sending side, and dropping the source waits for the thread.
    assert!(generations.has_changed().is_err());
}
