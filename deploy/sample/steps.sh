# shellcheck shell=bash
# What `try.sh` of kind and of minikube have in common. Sourced; expects $root, and functions that the cluster's kind gives:
#   cluster_exists, create_cluster, remove_cluster
#   nodes                   prints the nodes' names
#   on_node NODE COMMAND…   runs a command on a node, as root
#   load_image ARCHIVE      makes every node have the image

cluster=mtls
kubectl=${KUBECTL:-kubectl}
# Any image with tcpdump.
capture_image=${CAPTURE_IMAGE:-nicolaka/netshoot:v0.13}
seconds=${SECONDS_EACH:-5}

say() { printf '── %s\n' "$*" >&2; }
die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Programs that must be there, with where to get them.
require() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || die "$program is missing"
    done
}

image_archive() {
    local arch archive
    case $(uname -m) in aarch64 | arm64) arch=arm64 ;; *) arch=amd64 ;; esac
    archive=${IMAGE:-$root/target/image/mtls-0.1.0-$arch.tar}
    [ -f "$archive" ] || die "$archive is missing: cargo xtask image (or name another one in IMAGE)"
    printf '%s\n' "$archive"
}

# A node must have cgroup2, if only beside version 1, and a BPF file system that outlives agents. The latter can be mounted.
prepare_node() {
    local node=$1
    # One of the two fails to be there on most nodes.
    { on_node "$node" stat -f -c %T /sys/fs/cgroup /sys/fs/cgroup/unified 2>/dev/null || true; } | grep -qx cgroup2fs ||
        die "node $node has no cgroup2 at /sys/fs/cgroup: boot the machine with systemd.unified_cgroup_hierarchy=1"
    if [ "$(on_node "$node" stat -f -c %T /sys/fs/bpf)" != bpf_fs ]; then
        say "mounting /sys/fs/bpf on $node"
        on_node "$node" mount -t bpf bpf /sys/fs/bpf
    fi
}

# What every node says of itself before anything is installed.
check_nodes() {
    local verdict=0
    say "asking the nodes whether they can take part"
    "$kubectl" apply -k "$root/deploy/check"
    "$kubectl" -n mtls-check rollout status daemonset/mtls-check --timeout=180s || verdict=1
    "$kubectl" -n mtls-check logs -l app.kubernetes.io/component=check --tail=-1 >&2
    "$kubectl" delete -k "$root/deploy/check"
    [ "$verdict" -eq 0 ] || die "not every node can take part; what is in the way stands above"
}

install_mtls() {
    say "installing"
    "$kubectl" apply -k "$1"
    "$kubectl" -n mtls-system rollout status deployment/mtls-ca --timeout=180s
    "$kubectl" -n mtls-system rollout status daemonset/mtls-node --timeout=180s
}

start_sample() {
    say "starting the sample: client, server, intruder"
    # What an earlier run left is enrolled already.
    "$kubectl" delete --ignore-not-found -f "$root/deploy/sample/sample.yaml"
    "$kubectl" apply -f "$root/deploy/sample/sample.yaml"
    "$kubectl" -n mtls-sample wait --for=condition=Ready pod/server pod/client --timeout=120s
    "$kubectl" -n mtls-sample-outside wait --for=condition=Ready pod/intruder --timeout=120s
}

server_address() { "$kubectl" -n mtls-sample get pod server -o 'jsonpath={.status.podIP}'; }
server_node() { "$kubectl" -n mtls-sample get pod server -o 'jsonpath={.spec.nodeName}'; }

# An IPv6 address in brackets.
with_port() {
    case $1 in
        *:*) printf '[%s]:%s\n' "$1" "$2" ;;
        *) printf '%s:%s\n' "$1" "$2" ;;
    esac
}

# load NAMESPACE POD WORKLOAD CONNECTIONS [ARGUMENT…]: one line of JSON, or failure.
load() {
    local to
    to=$(with_port "$(server_address)" 7000)
    "$kubectl" -n "$1" exec "$2" -- mtls bench client --to "$to" --workload "$3" --connections "$4" \
        --seconds "$seconds" "${@:5}"
}

# The number behind a key of a flat line of JSON.
field() { sed -n "s/.*\"$1\":\([0-9.e+-]*\).*/\1/p"; }

begin_capture() {
    end_capture
    sed -e "s|NODE|$(server_node)|" -e "s|CAPTURE_IMAGE|$capture_image|" "$root/deploy/sample/capture.yaml" |
        "$kubectl" apply -f -
    "$kubectl" -n kube-system wait --for=condition=Ready pod/capture --timeout=180s
    local tries
    for tries in $(seq 60); do
        "$kubectl" -n kube-system logs capture | grep '^listening on ' >/dev/null && return
        sleep "${PAUSE:-1}"
    done
    die "after $tries tries tcpdump does not listen: kubectl -n kube-system logs capture"
}

end_capture() { "$kubectl" -n kube-system delete pod capture --ignore-not-found --wait=true >/dev/null; }

# Payload bytes that the capture has seen on a port so far.
payload_on() {
    "$kubectl" -n kube-system logs capture | awk -v port="$1" '
        # … IP 10.0.0.1.45678 > 10.0.0.2.7000: tcp 128
        {
            for (i = 2; i < NF; i++) if ($i == ">") { from = $(i - 1); to = $(i + 1) }
            sub(/:$/, "", to)
            if (from ~ "\\." port "$" || to ~ "\\." port "$") bytes += $NF
        }
        END { print bytes + 0 }'
}

# expect_on_wire WHAT plain|tunnel: what the traffic of the client must look like on the server's node.
expect_on_wire() {
    local plain tunnel
    begin_capture
    # As much as fits in one log: after 10 MiB kubelet begins another, and `kubectl logs` shows only the last.
    load mtls-sample client paced 1 --rate 100 >/dev/null
    sleep "${CAPTURE_SETTLE:-2}"
    plain=$(payload_on 7000)
    tunnel=$(payload_on 15008)
    # It saw nothing at all: its own words tell why.
    [ $((plain + tunnel)) -gt 0 ] || "$kubectl" -n kube-system logs capture --tail=5 >&2
    end_capture
    say "$1: the node saw $plain bytes on port 7000, $tunnel bytes on port 15008"
    case $2 in
        plain) if [ "$plain" -eq 0 ] || [ "$tunnel" -gt 0 ]; then die "the capture proves nothing: it sees no plaintext"; fi ;;
        tunnel)
            if [ "$plain" -gt 0 ]; then die "plaintext is on the wire"; fi
            if [ "$tunnel" -eq 0 ]; then die "the capture proves nothing: it sees no tunnel"; fi
            ;;
    esac
}

enrol() {
    say "enrolling namespace mtls-sample"
    "$kubectl" label namespace mtls-sample istio.io/dataplane-mode=ambient --overwrite
    # Enrolled is what the agents say is enrolled, for both pods.
    local tries
    for tries in $(seq 30); do
        [ "$(enrolled)" -ge 2 ] && return
        sleep "${PAUSE:-1}"
    done
    die "after $tries tries the pods are not enrolled: kubectl -n mtls-system logs daemonset/mtls-node"
}

# Pods of the sample that the agents of their nodes show as enrolled.
enrolled() {
    local pod
    for pod in $("$kubectl" -n mtls-system get pods -l app.kubernetes.io/component=node -o name); do
        "$kubectl" -n mtls-system exec "$pod" -- mtls workloads --namespace mtls-sample || true
    done | awk '/local, enrolled$/ { count++ } END { print count + 0 }'
}

intruder_gets_in() { load mtls-sample-outside intruder first 1 >/dev/null 2>&1; }

# Measures as the client; a row for the table.
row() {
    local path=$1 upload download one many connect
    upload=$(load mtls-sample client upload 1)
    download=$(load mtls-sample client download 1)
    one=$(load mtls-sample client request 1)
    many=$(load mtls-sample client request 64)
    connect=$(load mtls-sample client connect 16)
    printf '%-8s %10s %10s %10s %10s %10s\n' "$path" \
        "$(rate bytes "$upload" 1.25e8)" "$(rate bytes "$download" 1.25e8)" \
        "$(rate exchanges "$one" 1)" "$(rate exchanges "$many" 1)" "$(rate exchanges "$connect" 1)"
}

# rate KEY JSON UNIT: of what is behind the key, per second, in units.
rate() {
    awk -v amount="$(printf '%s\n' "$2" | field "$1")" -v time="$(printf '%s\n' "$2" | field seconds)" -v unit="$3" \
        'BEGIN { value = amount / time / unit; printf (unit > 1 ? "%.2f\n" : "%.0f\n"), value }'
}

# The whole of it, after the cluster is there and mtls installed.
try() {
    local plain secured
    start_sample
    expect_on_wire "not enrolled (control)" plain
    intruder_gets_in || die "the intruder cannot reach the server even before it is protected: nothing can be proven"
    say "measuring plain TCP"
    plain=$(row plain)
    enrol
    expect_on_wire "enrolled" tunnel
    say "switching STRICT on"
    "$kubectl" apply -f "$root/deploy/sample/strict.yaml"
    local tries
    for tries in $(seq 30); do
        intruder_gets_in || break
        [ "$tries" -lt 30 ] || die "the intruder still gets in"
        sleep "${PAUSE:-1}"
    done
    say "the intruder is refused"
    expect_on_wire "STRICT" tunnel
    say "measuring mtls"
    secured=$(row mtls)
    printf '%-8s %10s %10s %10s %10s %10s\n' '' 'up Gbit/s' 'down' 'req/s 1' 'req/s 64' 'conn/s 16'
    printf '%s\n%s\n' "$plain" "$secured"
}

# main CONTEXT OVERLAY PROGRAMS [all|down]
main() {
    local context=$1 overlay=$2 programs=$3
    case ${4:-all} in
        all)
            # shellcheck disable=SC2086 # several of them
            require $programs "$kubectl"
            up "$context" "$overlay"
            try
            ;;
        down) remove_cluster ;;
        *) die "usage: $0 [all|down]" ;;
    esac
}

up() {
    local context=$1 overlay=$2 archive node
    archive=$(image_archive)
    if ! cluster_exists; then
        say "creating the cluster"
        create_cluster
    fi
    "$kubectl" config use-context "$context"
    for node in $(nodes); do
        prepare_node "$node"
    done
    say "loading the image"
    load_image "$archive"
    check_nodes
    install_mtls "$overlay"
}
