//! Identities, durations and amounts as people read them.

use jiff::Timestamp;

use crate::identity::SpiffeId;

/// How identities are written: without the trust domain when there is only one.
pub struct Names {
    pub trust_domain: Option<String>,
}

impl Names {
    pub fn new<'a>(identities: impl Iterator<Item = &'a str>) -> Self {
        let mut domains: Vec<String> = identities
            .filter_map(|identity| Some(identity.parse::<SpiffeId>().ok()?.trust_domain().to_string()))
            .collect();
        domains.sort();
        domains.dedup();
        Self { trust_domain: if domains.len() == 1 { domains.pop() } else { None } }
    }

    pub fn short(&self, identity: &str) -> String {
        match identity.parse::<SpiffeId>() {
            Ok(id) if self.trust_domain.is_some() => {
                format!("ns/{}/sa/{}", id.namespace(), id.service_account())
            }
            Ok(id) => id.principal().to_owned(),
            Err(_) => identity.to_owned(),
        }
    }

    pub fn proven(&self, identity: Option<&str>) -> String {
        identity.map_or_else(|| "none".to_owned(), |identity| self.short(identity))
    }
}

pub fn seconds_between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.as_second().saturating_sub(from.as_second())).unwrap_or(0)
}

/// The two largest units.
pub fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        // What would be written as 1024.0 belongs to the next unit.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_show_the_two_largest_units() {
        let shown = [0, 59, 60, 3599, 3600, 86399, 86400, 90061].map(duration);
        assert_eq!(shown, ["0s", "59s", "1m 0s", "59m 59s", "1h 0m", "23h 59m", "1d 0h", "1d 1h"]);
    }

    #[test]
    fn bytes_have_the_unit_that_keeps_them_short() {
        let shown = [0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 20, u64::MAX].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 MiB", "16.0 EiB"]);
    }
}
