//! `freeflow hosts`: other hosts, and whether there are sessions with them.

use comfy_table::Table;

use crate::cluster::status::HostStatus;

pub fn table(hosts: &[HostStatus]) -> Table {
    let mut table = super::table(&["HOST", "ADDRESS", "STATE", "FOR", "LINKS", "SESSIONS", "WHY NOT"]);
    for host in hosts {
        table.add_row([
            host.name.clone(),
            host.address.to_string(),
            host.state.name().to_owned(),
            duration(host.since_ms),
            host.links.to_string(),
            host.sessions.to_string(),
            host.why.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table
}

/// In the largest unit that has more than one.
fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..=1 => format!("{}.{} s", seconds, ms % 1000 / 100),
        2..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn durations_are_short() {
        for (ms, expected) in [
            (0, "0.0 s"),
            (1999, "1.9 s"),
            (2000, "2 s"),
            (119_999, "119 s"),
            (120_000, "2 min"),
            (7_200_000, "2 h"),
            (172_800_000, "2 d"),
        ] {
            assert_eq!(duration(ms), expected);
        }
    }
}
