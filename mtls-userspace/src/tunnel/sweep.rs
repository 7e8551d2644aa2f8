//! Maps whose entries go stale without telling.

use std::collections::HashMap;

/// Below so many entries nothing is looked through.
const FEW: usize = 64;

/// Drops a map's stale entries whenever it has doubled since they were last looked for: an insertion costs the same
/// on average, and no more than half of the map is stale.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    /// Entries at which to look again.
    at: usize,
}

impl Sweep {
    /// To be called before an entry is added; keeps those that are `alive`.
    pub fn before_insert<K, V>(&mut self, map: &mut HashMap<K, V>, alive: impl Fn(&V) -> bool) {
        if map.len() >= self.at {
            map.retain(|_, value| alive(value));
            self.at = (2 * map.len()).max(FEW);
        }
    }
}
