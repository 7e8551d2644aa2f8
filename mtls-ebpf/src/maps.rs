//! The maps, and the few questions every hook asks of them.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, bpf_sock};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_sk_storage_delete, bpf_sk_storage_get,
};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockHash};
use mtls_common::counter::{self, Counter};
use mtls_common::{
    Agent, Choice, Direct, Endpoint, Event, Flow, Grant, GrantKey, Lease, ListenerKey, Local, ModeKey, Note,
    Pod, Settings,
};

const PODS_MAX: u32 = 1024;
const FLOWS_MAX: u32 = 65536;
const GRANTS_MAX: u32 = 16384;
const CHOICES_MAX: u32 = 4096;
/// Flows that live as long as a handshake or a probe.
const BRIEF_FLOWS_MAX: u32 = 16384;

#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
/// Process id → agent.
#[map]
pub static AGENTS: HashMap<u32, Agent> = HashMap::with_max_entries(64, 0);
/// Nonce that an agent is about to dial → its process id once it has, zero before.
#[map]
pub static HELLO: HashMap<u64, u32> = HashMap::with_max_entries(64, 0);
#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(PODS_MAX, 0);
/// Address → the pod of this node that has it.
#[map]
pub static LOCAL: HashMap<[u32; 4], Local> = HashMap::with_max_entries(PODS_MAX * 8, 0);
#[map]
pub static MODES: HashMap<ModeKey, u32> = HashMap::with_max_entries(PODS_MAX * 32, 0);
/// Destination prefixes that are in the mesh.
#[map]
pub static CAPTURED4: LpmTrie<u32, u32> = LpmTrie::with_max_entries(262_144, 1);
#[map]
pub static CAPTURED6: LpmTrie<[u32; 4], u32> = LpmTrie::with_max_entries(262_144, 1);
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(PODS_MAX * 32, 0);
/// Captured flow → original destination.
#[map]
pub static ORIGINAL: LruHashMap<Flow, Endpoint> = LruHashMap::with_max_entries(FLOWS_MAX, 0);
/// Flow that the agent is dialling inside a pod → original source. Consumed by the accepting side.
#[map]
pub static DELIVERED: LruHashMap<Flow, Endpoint> = LruHashMap::with_max_entries(BRIEF_FLOWS_MAX, 0);
/// Flow from the node's own namespace to a local pod → when its SYN was sent.
#[map]
pub static TRUSTED: LruHashMap<Flow, u64> = LruHashMap::with_max_entries(BRIEF_FLOWS_MAX, 0);
/// Pods and addresses that need no agent between them. See `direct`.
#[map]
pub static GRANTS: HashMap<GrantKey, Grant> = HashMap::with_max_entries(GRANTS_MAX, BPF_F_NO_PREALLOC);
/// Services whose endpoints are all pods of this node, by pod and address dialled.
#[map]
pub static CHOICES: HashMap<GrantKey, Choice> = HashMap::with_max_entries(CHOICES_MAX, BPF_F_NO_PREALLOC);
#[map]
pub static LEASE: Array<Lease> = Array::with_max_entries(1, 0);
/// Connections between pods of this node that no agent carries, from before their SYN to the end of both sockets.
#[map]
pub static DIRECT: HashMap<Flow, Direct> = HashMap::with_max_entries(FLOWS_MAX, BPF_F_NO_PREALLOC);
#[map]
pub static ENDINGS: RingBuf = RingBuf::with_byte_size(1024 * 1024, 0);
/// Cgroups of pods: a process below one is never the node's own.
#[map]
pub static POD_CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(PODS_MAX * 4, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::NAMES.len() as u32, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);
#[btf_map]
pub static NOTES: SkStorage<Note> = SkStorage::new();

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a slot belongs to this CPU, and programs on one CPU don't interleave within it in a way that
        // could do worse than lose a count.
        unsafe { *slot += 1 }
    }
}

#[inline(always)]
pub fn emit(event: Event) {
    match EVENTS.reserve::<Event>(0) {
        Some(mut record) => {
            record.write(event);
            record.submit(0);
        }
        None => count(Counter::LostEvents),
    }
}

/// The note of a socket, if it has one.
#[inline(always)]
pub fn note<'a>(sk: *mut bpf_sock) -> Option<&'a Note> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: a socket pointer from the context; the helper returns null or the socket's own storage.
    unsafe {
        let note = bpf_sk_storage_get((&raw const NOTES) as *mut c_void, sk.cast(), core::ptr::null_mut(), 0);
        note.cast::<Note>().as_ref()
    }
}

/// Replaces the note of a socket. False: the kernel had no memory for it.
#[inline(always)]
pub fn write_note(sk: *mut bpf_sock, mut value: Note) -> bool {
    const CREATE: u64 = 1;
    if sk.is_null() {
        return false;
    }
    // SAFETY: as in `note`; the storage is only written by the socket's own connect, or before it was accepted.
    unsafe {
        let note =
            bpf_sk_storage_get((&raw const NOTES) as *mut c_void, sk.cast(), (&raw mut value).cast(), CREATE)
                .cast::<Note>();
        if note.is_null() {
            return false;
        }
        *note = value;
    }
    true
}

#[inline(always)]
pub fn drop_note(sk: *mut bpf_sock) {
    if !sk.is_null() {
        // SAFETY: as in `note`.
        unsafe { bpf_sk_storage_delete((&raw const NOTES) as *mut c_void, sk.cast()) };
    }
}

/// The pod that has an address; none if several have it.
#[inline(always)]
pub fn pod_at(addr_be: &[u32; 4]) -> Option<u64> {
    // SAFETY: entries are replaced, never written in place.
    unsafe {
        match LOCAL.get(addr_be) {
            Some(local) if local.netns != 0 => Some(local.netns),
            _ => None,
        }
    }
}

#[inline(always)]
pub fn is_captured(addr_be: &[u32; 4]) -> bool {
    match v4_of(addr_be) {
        Some(v4_be) => CAPTURED4.get(Key::new(32, v4_be)).is_some(),
        None => CAPTURED6.get(Key::new(128, *addr_be)).is_some(),
    }
}

/// Whether the current process is a registered agent. A process id alone would not do: they are reused. A mark on the
/// socket would not either: a privileged pod can set it.
#[inline(always)]
pub fn is_agent() -> bool {
    // SAFETY: plain helpers without arguments; map entries are replaced, never written in place.
    unsafe {
        let process = (bpf_get_current_pid_tgid() >> 32) as u32;
        match AGENTS.get(process) {
            Some(agent) => agent.cgroup == bpf_get_current_cgroup_id(),
            None => false,
        }
    }
}

const MAPPED: u32 = 0xffff_u32.to_be();

#[inline(always)]
pub fn mapped(v4_be: u32) -> [u32; 4] {
    [0, 0, MAPPED, v4_be]
}

#[inline(always)]
pub fn v4_of(addr_be: &[u32; 4]) -> Option<u32> {
    (addr_be[0] == 0 && addr_be[1] == 0 && addr_be[2] == MAPPED).then_some(addr_be[3])
}

#[inline(always)]
pub fn is_unspecified(addr_be: &[u32; 4]) -> bool {
    addr_be[0] == 0 && addr_be[1] == 0 && (addr_be[2] == 0 || addr_be[2] == MAPPED) && addr_be[3] == 0
}

#[inline(always)]
pub fn is_loopback(addr_be: &[u32; 4]) -> bool {
    match v4_of(addr_be) {
        Some(v4_be) => u32::from_be(v4_be) >> 24 == 127,
        None => addr_be[0] == 0 && addr_be[1] == 0 && addr_be[2] == 0 && addr_be[3] == 1u32.to_be(),
    }
}
