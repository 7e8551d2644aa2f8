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

cluster=mtls

# kind's nodes are containers: each has its own cgroup namespace and its own /sys/fs/bpf.
on_node() {
    local node=$1
    shift
    docker exec "$node" "$@"
}

up() {
    local archive node
    archive=$(image_archive)
    if ! kind get clusters | grep -qx "$cluster"; then
        say "creating the cluster"
        kind create cluster --config "$root/deploy/kind/cluster.yaml" --wait 180s \
            ${KIND_NODE_IMAGE:+--image "$KIND_NODE_IMAGE"}
    fi
    "$kubectl" config use-context "kind-$cluster"
    for node in $(kind get nodes --name "$cluster"); do
        prepare_node "$node"
    done
    say "loading the image"
    kind load image-archive "$archive" --name "$cluster"
    install_mtls "$root/deploy/kind"
}

case ${1:-all} in
    all)
        require kind docker "$kubectl"
        up
        try
        ;;
    down) kind delete cluster --name "$cluster" ;;
    *) die "usage: $0 [all|down]" ;;
esac
