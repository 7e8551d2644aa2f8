#!/usr/bin/env bash
# Makes a minikube cluster, installs mtls and a sample, proves by capture what is on the wire, and measures.
#
#   try.sh           all of it; the cluster stays
#   try.sh down      removes the cluster
#
# IMAGE: the archive that `cargo xtask image` made. MINIKUBE_DRIVER: docker, unless told otherwise; the kernel of
# minikube's own virtual machines may be older than 5.15.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../sample/steps.sh
. "$root/deploy/sample/steps.sh"

on_node() {
    local node=$1
    shift
    minikube --profile "$cluster" ssh --node "$node" -- sudo "$@" | tr -d '\r'
}

cluster_exists() { minikube --profile "$cluster" status >/dev/null 2>&1; }
create_cluster() {
    minikube start --profile "$cluster" --nodes 2 --driver "${MINIKUBE_DRIVER:-docker}" \
        --container-runtime containerd --cni kindnet
}
remove_cluster() { minikube delete --profile "$cluster"; }
nodes() { "$kubectl" get nodes -o 'jsonpath={.items[*].metadata.name}'; }
load_image() { minikube --profile "$cluster" image load "$1"; }

main "$cluster" "$root/deploy/minikube" minikube "$@"
