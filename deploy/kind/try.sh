#!/usr/bin/env bash
# Makes a kind cluster, installs mtls and a sample, proves by capture what is on the wire, and measures.
#
#   try.sh           all of it; the cluster stays
#   try.sh down      removes the cluster
#
# IMAGE: the archive that `cargo xtask image` made. KIND_NODE_IMAGE: another Kubernetes version.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../sample/steps.sh
. "$root/deploy/sample/steps.sh"

# kind's nodes are containers: each has its own cgroup namespace and its own /sys/fs/bpf.
on_node() {
    local node=$1
    shift
    docker exec "$node" "$@"
}

cluster_exists() { kind get clusters | grep -qx "$cluster"; }
create_cluster() {
    kind create cluster --config "$root/deploy/kind/cluster.yaml" --wait 180s \
        ${KIND_NODE_IMAGE:+--image "$KIND_NODE_IMAGE"}
}
remove_cluster() { kind delete cluster --name "$cluster"; }
nodes() { kind get nodes --name "$cluster"; }
load_image() { kind load image-archive "$1" --name "$cluster"; }

main "kind-$cluster" "$root/deploy/kind" "kind docker" "$@"
