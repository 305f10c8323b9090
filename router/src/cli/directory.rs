//! `freeflow directory`: who lives where, on all hosts.

use std::collections::HashMap;

use super::table;
use crate::cluster::directory::{NicView, View};

/// How good the knowledge is, and what it is.
pub fn text(view: &View) -> String {
    let state = if view.connected {
        "up to date".to_owned()
    } else {
        format!("cut off for {:.0} s, this is what was known before", view.age)
    };
    let (hosts, nics) = (view.hosts.len(), view.nics.len());
    format!("{}: {state}; {hosts} hosts, {nics} virtual NICs\n\n{}", view.source, rows(view))
}

fn rows(view: &View) -> String {
    let at: HashMap<_, _> = view.hosts.iter().map(|host| (host.name.as_str(), host.address.to_string())).collect();
    let mut table = table(&["TENANT", "ADDRESSES", "NAME", "HOST", "AT"]);
    for nic in &view.nics {
        let address = at.get(nic.host.as_str()).map_or("nobody knows", String::as_str);
        table.add_row([&nic.tenant, &addresses(nic), &nic.name, &nic.host, address]);
    }
    let idle = view.hosts.iter().filter(|host| view.nics.iter().all(|nic| nic.host != host.name));
    for host in idle {
        table.add_row(["-", "-", "-", &host.name, &host.address.to_string()]);
    }
    table.trim_fmt()
}

/// Without what is made of the MAC, which nobody asks for.
fn addresses(nic: &NicView) -> String {
    let given = nic
        .addresses
        .iter()
        .filter(|address| !matches!(address, std::net::IpAddr::V6(v6) if v6.is_unicast_link_local()));
    given.map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::directory::HostView;

    #[test]
    fn a_table_says_who_lives_where() {
        let host = |name: &str| HostView { name: name.to_owned(), address: "192.0.2.1:7471".parse().unwrap() };
        let nic = |host: &str, addresses: &[&str]| NicView {
            tenant: "blue".to_owned(),
            host: host.to_owned(),
            name: "a".to_owned(),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        };
        let mut view = View {
            source: "hosts.toml".to_owned(),
            connected: true,
            age: 0.0,
            hosts: vec![host("host1"), host("host2")],
            nics: vec![nic("host1", &["10.0.0.1", "fd00::1", "fe80::1"]), nic("host9", &["10.0.0.9"])],
        };
        let shown = text(&view);
        let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(shown.starts_with("hosts.toml: up to date; 2 hosts, 2 virtual NICs\n"), "{shown}");
        assert_eq!(lines[3], ["blue", "10.0.0.1", "fd00::1", "a", "host1", "192.0.2.1:7471"]);
        assert_eq!(lines[4], ["blue", "10.0.0.9", "a", "host9", "nobody", "knows"]);
        assert_eq!(lines[5], ["-", "-", "-", "host2", "192.0.2.1:7471"]);
        (view.connected, view.age) = (false, 12.2);
        assert!(text(&view).contains("cut off for 12 s"), "{}", text(&view));
    }
}
