#!/usr/bin/env bash
# Stands in for kind, minikube, docker and kubectl: records each call in $STUB/calls, keeps what is applied in $STUB, and
# answers as a cluster would that behaves as $STUB_BEHAVES says.
set -euo pipefail
program=$(basename "$0")
printf '%s %s\n' "$program" "$*" >>"$STUB/calls"

behaves() { [[ " ${STUB_BEHAVES:-} " == *" $1 "* ]]; }
happened() { [ -e "$STUB/$1" ]; }
keep() { cat >"$(mktemp "$STUB/applied-XXXXXX")"; }
measured() { echo '{"seconds":5.0,"bytes":6250000000,"exchanges":50000,"all_exchanges":50010}'; }

# A packet of the client's, on the wire as the capture prints it.
packet() {
    case $1 in
        plain) echo '12:00:00.1 eth0  In  IP 10.244.1.3.45678 > 10.244.2.2.7000: tcp 128' ;;
        tunnel) echo '12:00:00.1 eth0  In  IP 10.244.1.3.45680 > 10.244.2.2.15008: tcp 150' ;;
        refused) echo '12:00:00.2 eth0  Out IP 10.244.2.2.7000 > 10.244.1.9.40001: tcp 0' ;;
    esac
}

on_node() {
    case "$*" in
        "stat -f -c %T /sys/fs/cgroup /sys/fs/cgroup/unified")
            if behaves cgroup1; then echo tmpfs; elif behaves hybrid; then printf '%s\n' tmpfs cgroup2fs; else echo cgroup2fs; fi
            # One of the two is never there but for "hybrid".
            behaves hybrid
            ;;
        "stat -f -c %T /sys/fs/bpf") if behaves without-bpffs && ! happened mounted; then echo sysfs; else echo bpf_fs; fi ;;
        "mount -t bpf bpf /sys/fs/bpf") touch "$STUB/mounted" ;;
        *) exit 64 ;;
    esac
}

cluster() {
    case "$*" in
        "apply -k "*) "$STUB_KUBECTL" kustomize "$3" | keep ;;
        "apply -f -") keep ;;
        "apply -f "*)
            keep <"$3"
            if [[ $3 == *strict.yaml ]]; then touch "$STUB/strict"; fi
            ;;
        "label namespace mtls-sample istio.io/dataplane-mode=ambient --overwrite") touch "$STUB/enrolled" ;;
        *"get pod server -o jsonpath={.status.podIP}") if behaves ipv6; then echo fd00::2; else echo 10.244.2.2; fi ;;
        *"get pod server -o jsonpath={.spec.nodeName}") echo mtls-worker2 ;;
        *"get nodes -o "*) echo "mtls mtls-m02" ;;
        *"get pods -l app.kubernetes.io/component=node -o name") printf 'pod/node-%s\n' 1 2 ;;
        *"exec pod/node-"*" -- mtls workloads --namespace mtls-sample")
            if happened enrolled && ! behaves unenrolled; then
                echo '  mtls-sample  client  …  local, enrolled'
                echo '  mtls-sample  server  …  remote'
            fi
            ;;
        *"exec client -- mtls bench client --to "*) measured ;;
        *"exec intruder -- mtls bench client --to "*)
            if behaves unreachable || { happened strict && ! behaves open; }; then exit 1; fi
            measured
            ;;
        *"logs capture" | *"logs capture --tail=5")
            if behaves deaf; then return; fi
            echo 'listening on any, link-type LINUX_SLL2 (Linux cooked v2), snapshot length 262144 bytes'
            if behaves blind; then return; fi
            if happened enrolled; then packet tunnel; else packet plain; fi
            if happened strict; then packet refused; fi
            if happened enrolled && behaves leaky; then packet plain; fi
            ;;
        *"-n mtls-check rollout status"*) if behaves unfit; then exit 1; fi ;;
        *"-n mtls-check logs "*)
            if behaves unfit; then echo "node mtls-worker: can't take part yet"; else echo "node mtls-worker: can take part"; fi
            ;;
        *wait* | *rollout* | *delete* | "config use-context "*) ;;
        *) exit 64 ;;
    esac
}

case $program in
    kubectl) cluster "$@" ;;
    docker) [ "$1" = exec ] && shift 2 && on_node "$@" ;;
    kind)
        case "$*" in
            "get clusters") ;;
            "get nodes --name mtls") printf '%s\n' mtls-control-plane mtls-worker mtls-worker2 ;;
            "create cluster --config "* | "load image-archive "*" --name mtls" | "delete cluster --name mtls") ;;
            *) exit 64 ;;
        esac
        ;;
    minikube)
        case "$*" in
            "--profile mtls status") exit 7 ;;
            "start --profile mtls --nodes 2 "* | "--profile mtls image load "* | "delete --profile mtls") ;;
            "--profile mtls ssh --node "*)
                shift 7
                on_node "$@"
                ;;
            *) exit 64 ;;
        esac
        ;;
esac
