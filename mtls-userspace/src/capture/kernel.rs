//! The kernel half in memory: the object in, loaded programs and open maps out. aya is spoken here.
//!
//! Loading does not attach anything; see [`super::pin`].

use std::hash::Hash;
use std::os::fd::AsFd;

use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuArray, RingBuf, SockHash};
use aya::programs::{Program, ProgramError, ProgramFd, loaded_programs};
use aya::{Ebpf, EbpfError, EbpfLoader, Pod as Plain};
use aya_log::EbpfLogger;
use mtls_common::{
    Agent, Choice, Direct, Endpoint, Flow, Grant, GrantKey, Lease, ListenerKey, Local, ModeKey, Note, Pod,
    Settings, constant, map, program,
};

use super::error::Error;
use super::events::{Events, Log};
use super::pin::Pins;
use super::preflight::{self, Cgroup};
use super::sys::AttachType;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mtls-ebpf.o"));

/// Maps that only control operations write; whoever holds this holds the lock on them.
pub(super) struct Control {
    pub agents: HashMap<MapData, u32, Agent>,
    pub captured4: LpmTrie<MapData, u32, u32>,
    pub captured6: LpmTrie<MapData, [u32; 4], u32>,
    pub hello: HashMap<MapData, u64, u32>,
    pub listeners: SockHash<MapData, ListenerKey>,
    pub local: HashMap<MapData, [u32; 4], Local>,
    pub modes: HashMap<MapData, ModeKey, u32>,
    pub pod_cgroups: HashMap<MapData, u64, u32>,
    pub pods: HashMap<MapData, u64, Pod>,
    pub settings: Array<MapData, Settings>,
    pub lookup: ProgramFd,
    ebpf: Ebpf,
}

/// Maps of direct connections that userspace writes; whoever holds this holds the lock on them.
pub(super) struct DirectMaps {
    pub grants: HashMap<MapData, GrantKey, Grant>,
    pub choices: HashMap<MapData, GrantKey, Choice>,
    pub lease: Array<MapData, Lease>,
    pub records: HashMap<MapData, Flow, Direct>,
}

/// Maps that the data path reads without a lock.
pub(super) struct Flows {
    pub counters: PerCpuArray<MapData, u64>,
    pub notes: MapData,
    pub original: HashMap<MapData, Flow, Endpoint>,
    pub trusted: HashMap<MapData, Flow, u64>,
    /// Second handles on what control operations write.
    pub local: HashMap<MapData, [u32; 4], Local>,
    pub direct: HashMap<MapData, Flow, Direct>,
}

pub(super) struct Loaded {
    pub control: Control,
    pub flows: Flows,
    pub direct: DirectMaps,
    pub events: Events,
    pub endings: RingBuf<MapData>,
}

/// Loads the programs against the pinned maps, making those that don't exist.
pub(super) fn load(pins: &Pins) -> Result<Loaded, Error> {
    let mut ebpf = open(pins)?;
    // Taken first and kept: closing the log's map would make loading the programs fail.
    let log = logger(&mut ebpf)?;
    for (name, program) in ebpf.programs_mut() {
        load_into_kernel(name, program)?;
    }
    let mut open = Open { ebpf: &mut ebpf, pins };
    let flows = Flows {
        counters: open.map(map::COUNTERS, size_of::<u32>(), size_of::<u64>())?,
        notes: open.storage(map::NOTES)?,
        original: open.hash(map::ORIGINAL)?,
        trusted: open.hash(map::TRUSTED)?,
        local: open.again(map::LOCAL)?,
        direct: open.again(map::DIRECT)?,
    };
    let direct = DirectMaps {
        grants: open.hash(map::GRANTS)?,
        choices: open.hash(map::CHOICES)?,
        lease: open.map(map::LEASE, size_of::<u32>(), size_of::<Lease>())?,
        records: open.hash(map::DIRECT)?,
    };
    let endings = open.map::<RingBuf<MapData>>(map::ENDINGS, 0, 0)?;
    let ring = open.map::<RingBuf<MapData>>(map::EVENTS, 0, 0)?;
    let control = Control {
        agents: open.hash(map::AGENTS)?,
        captured4: open.map(map::CAPTURED4, 4 + size_of::<u32>(), size_of::<u32>())?,
        captured6: open.map(map::CAPTURED6, 4 + size_of::<[u32; 4]>(), size_of::<u32>())?,
        hello: open.hash(map::HELLO)?,
        listeners: open.map(map::LISTENERS, size_of::<ListenerKey>(), size_of::<u32>())?,
        local: open.hash(map::LOCAL)?,
        modes: open.hash(map::MODES)?,
        pod_cgroups: open.hash(map::POD_CGROUPS)?,
        pods: open.hash(map::PODS)?,
        settings: open.map(map::SETTINGS, size_of::<u32>(), size_of::<Settings>())?,
        lookup: program_fd(&ebpf, program::SK_LOOKUP)?,
        ebpf,
    };
    Ok(Loaded { control, flows, direct, events: Events::new(ring, log), endings })
}

/// Makes or adopts the maps; no program is loaded yet.
pub(super) fn open(pins: &Pins) -> Result<Ebpf, Error> {
    if OBJECT.is_empty() {
        return Err(Error::NoObject);
    }
    let ebpf = open_object(OBJECT, pins)?;
    let maps = map::PINNED.into_iter().chain([map::EVENTS, map::ENDINGS]);
    let lacks = maps.filter(|name| ebpf.map(name).is_none());
    let lacks = lacks.chain(program::ALL.into_iter().filter(|name| ebpf.program(name).is_none()));
    match lacks.collect::<Vec<_>>().join(", ") {
        lacks if lacks.is_empty() => Ok(ebpf),
        lacks => Err(Error::StaleObject { what: format!("it lacks {lacks}") }),
    }
}

fn open_object(object: &[u8], pins: &Pins) -> Result<Ebpf, Error> {
    let mut loader = EbpfLoader::new();
    for name in map::PINNED {
        loader.map_pin_path(name, pins.map(name));
    }
    let tells_mptcp = u32::from(preflight::tells_mptcp());
    loader.override_global(constant::TELLS_MPTCP, &tells_mptcp, true);
    loader.load(object).map_err(|source| match source {
        // Not the kernel's doing: it has not seen it yet.
        EbpfError::ParseError(error) => Error::StaleObject { what: error.to_string() },
        source => failed("the object and its maps", source),
    })
}

/// Loads one program of an opened object.
pub(super) fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<ProgramFd, Error> {
    load_into_kernel(name, ebpf.program_mut(name).ok_or_else(|| absent(name))?)?;
    program_fd(ebpf, name)
}

fn load_into_kernel(name: &str, program: &mut Program) -> Result<(), Error> {
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => Ok(()),
    };
    loaded.map_err(|source| failed(&format!("program {name}"), source))
}

/// The hooks at the cgroup, in the order in which they are attached: sock_ops before connect, and getpeername before
/// both, so that a captured connection finds everything it needs in place.
pub(super) const HOOKS: [(&str, AttachType); 5] = [
    (program::GETPEERNAME4, AttachType::Getpeername4),
    (program::GETPEERNAME6, AttachType::Getpeername6),
    (program::SOCK_OPS, AttachType::SockOps),
    (program::CONNECT4, AttachType::Connect4),
    (program::CONNECT6, AttachType::Connect6),
];

/// Attaches the programs at the cgroup, or puts them behind the links of an earlier agent, of its pods' lookups too.
pub(super) fn attach(control: &Control, pins: &Pins, cgroup: &Cgroup) -> Result<(), Error> {
    for (name, attach) in HOOKS {
        let program = program_fd(&control.ebpf, name)?;
        pins.cgroup_link(name, program.as_fd(), attach, &cgroup.file, cgroup.id)?;
    }
    pins.replace_lookups(control.lookup.as_fd())
}

/// Names of all programs in the kernel, ours and others', by id.
pub(super) fn program_names() -> std::collections::HashMap<u32, String> {
    let loaded = loaded_programs().filter_map(Result::ok);
    loaded.map(|program| (program.id(), program.name_as_str().unwrap_or_default().to_owned())).collect()
}

/// Whether it was this map that could not be made.
pub(super) fn is_about_map(error: &(dyn std::error::Error + 'static), map: &str) -> bool {
    matches!(error.downcast_ref(), Some(MapError::CreateError { name, .. }) if name == map)
        || error.source().is_some_and(|cause| is_about_map(cause, map))
}

/// What the verifier had against a program: its last words, without its statistics and its trace.
pub(super) fn verifier_line(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let Some(ProgramError::LoadError { verifier_log, .. }) = error.downcast_ref() else {
        return None;
    };
    last_words(&verifier_log.to_string()).map(|said| format!("the verifier: {said}"))
}

fn last_words(log: &str) -> Option<&str> {
    log.lines().map(str::trim).rfind(|line| !line.is_empty() && !line.starts_with("processed "))
}

fn program_fd(ebpf: &Ebpf, name: &str) -> Result<ProgramFd, Error> {
    let program = ebpf.program(name).ok_or_else(|| absent(name))?;
    let fd = program.fd().and_then(|fd| Ok(fd.try_clone()?));
    fd.map_err(|source| failed(&format!("program {name}"), source))
}

fn logger(ebpf: &mut Ebpf) -> Result<Log, Error> {
    let mut logger = EbpfLogger::init(ebpf).map_err(|source| failed("the log", source))?;
    let fd = logger.as_fd().try_clone_to_owned().map_err(|source| failed("the log", source))?;
    Ok(Log { fd, flush: Box::new(move || logger.flush()) })
}

/// Takes maps out of the loaded object, checking that what was pinned has the shape this version expects: aya checks
/// the object's definition, not the map that was found at the pin.
struct Open<'a> {
    ebpf: &'a mut Ebpf,
    pins: &'a Pins,
}

impl Open<'_> {
    fn hash<K: Plain + Hash, V: Plain>(
        &mut self,
        name: &'static str,
    ) -> Result<HashMap<MapData, K, V>, Error> {
        self.map(name, size_of::<K>(), size_of::<V>())
    }

    fn map<M>(&mut self, name: &'static str, key: usize, value: usize) -> Result<M, Error>
    where
        M: TryFrom<Map, Error = aya::maps::MapError>,
    {
        let map = self.ebpf.take_map(name).ok_or_else(|| absent(name))?;
        if map::PINNED.contains(&name) {
            self.check(name, key, value)?;
        }
        M::try_from(map).map_err(|source| Error::Map { map: name, what: "opening", source })
    }

    /// A map that is opened a second time, from its pin.
    fn again<K: Plain, V: Plain>(&mut self, name: &'static str) -> Result<HashMap<MapData, K, V>, Error> {
        self.check(name, size_of::<K>(), size_of::<V>())?;
        let data = MapData::from_pin(self.pins.map(name));
        let map = data.map(Map::HashMap).and_then(HashMap::try_from);
        map.map_err(|source| Error::Map { map: name, what: "opening", source })
    }

    fn storage(&mut self, name: &'static str) -> Result<MapData, Error> {
        self.check(name, size_of::<u32>(), size_of::<Note>())?;
        let data = MapData::from_pin(self.pins.map(name));
        data.map_err(|source| Error::Map { map: name, what: "opening", source })
    }

    fn check(&self, name: &'static str, key: usize, value: usize) -> Result<(), Error> {
        let path = self.pins.map(name);
        let info =
            MapInfo::from_pin(&path).map_err(|source| Error::Map { map: name, what: "opening", source })?;
        if info.key_size() as usize == key && info.value_size() as usize == value {
            Ok(())
        } else {
            Err(Error::PinnedShape { path })
        }
    }
}

fn failed(what: &str, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Load { what: what.into(), source: Box::new(source) }
}

fn absent(name: &str) -> Error {
    failed(name, std::io::Error::from(std::io::ErrorKind::NotFound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_last_words_are_not_its_statistics() {
        let log = "0: R1=ctx() R10=fp0\n12: (61) r0 = *(u32 *)(r1 +8)\ninvalid bpf_context access off=8 size=4\n\
                   processed 12 insns (limit 1000000) max_states_per_insn 0 total_states 1\n\n";
        assert_eq!(last_words(log), Some("invalid bpf_context access off=8 size=4"));
        assert_eq!(last_words("\n"), None);
    }

    /// An object from before a constant that this version sets, or from after it was renamed.
    #[test]
    fn an_object_of_another_version_is_called_that() {
        if OBJECT.is_empty() {
            println!("skipped: built without the BPF object");
            return;
        }
        let mut object = OBJECT.to_vec();
        let name = constant::TELLS_MPTCP.as_bytes();
        let places: Vec<_> = (0..object.len()).filter(|at| object[*at..].starts_with(name)).collect();
        assert!(!places.is_empty());
        places.into_iter().for_each(|at| object[at] ^= 1);
        let place = tempfile::tempdir().unwrap();
        let error = open_object(&object, &Pins::create(place.path()).unwrap()).unwrap_err();
        assert!(matches!(error, Error::StaleObject { .. }), "{error:?}");
        assert!(error.to_string().contains("cargo xtask build"), "{error}");
    }
}
