//! What only several values together show.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::reader::{Table, Value};
use super::volumes::places;
use super::{
    CLOCK_RATE_ERROR_PERMILLE, Nbd, PerServer, Security, Server, Side, TIMER_GRANULARITY_MS, Volume,
};

pub(crate) fn check(root: &Table<'_>, servers: &PerServer<Server>, volumes: &[Volume], security: &Security) {
    link(root, servers);
    for side in [Side::First, Side::Second] {
        let server = servers.of(side);
        one_use_of_paths(root, server, side, volumes, security);
        one_use_of_addresses(root, server, side, volumes);
    }
}

/// Walks down to a value that was read before.
fn find<'a>(root: &Table<'a>, path: &[&str], leaf: &str, server: &Server) -> Option<Value<'a>> {
    let mut value = root.get(path.first()?)?;
    for step in path.iter().skip(1).chain(std::iter::once(&leaf)) {
        value = value.child(step)?;
    }
    match value.child(&server.name.0) {
        Some(own) => Some(own),
        None => Some(value),
    }
}

fn link(root: &Table<'_>, servers: &PerServer<Server>) {
    let [first, second] = &servers.0;
    let place = |server: &Server| find(root, &["servers", &server.name.0], "link", server);
    if first.link.len() != second.link.len()
        && let Some(value) = place(second)
    {
        value.wrong(
            "paths-differ",
            format!(
                "has {} paths, {} has {}; paths are paired by position",
                second.link.len(),
                first.name,
                first.link.len()
            ),
            "give both servers the same number of addresses, in the same order",
        );
    }
    for (path, (a, b)) in first.link.iter().zip(&second.link).enumerate() {
        if a.is_ipv4() != b.is_ipv4()
            && let Some(value) = place(second).and_then(|value| value.element(path))
        {
            value.wrong(
                "paths-differ",
                format!("path {path} joins {a} and {b}: one is IPv4, one is IPv6"),
                "use the same kind of address at both ends of a path",
            );
        }
    }
    let mut seen: BTreeMap<String, (&Server, usize)> = BTreeMap::new();
    for server in &servers.0 {
        for (path, address) in server.link.iter().enumerate() {
            let (other, at) = *seen.entry(address.ip().to_string()).or_insert((server, path));
            let same = std::ptr::eq(other, server);
            let distinct_ports = other.link[at] != *address;
            if distinct_ports && (same || address.ip().is_loopback()) || (same && at == path) {
                continue;
            }
            if let Some(value) = place(server).and_then(|value| value.element(path)) {
                value.wrong(
                    "duplicate",
                    format!("is path {at} of {} already", other.name),
                    "give every path of every server its own address",
                );
            }
        }
    }
}

fn one_use_of_paths(root: &Table<'_>, server: &Server, side: Side, volumes: &[Volume], security: &Security) {
    let mut seen: BTreeMap<PathBuf, String> = BTreeMap::new();
    seen.insert(security.secret.clone(), "security.secret".to_owned());
    for volume in volumes {
        for (what, path) in places(volume, side) {
            let mine = format!("volumes.{}.{what}", volume.name);
            let Some(other) = seen.insert(path, mine.clone()) else { continue };
            let Some(value) = find(root, &["volumes", &volume.name], what, server) else { continue };
            value.wrong(
                "duplicate",
                format!("is {other} on {} already", server.name),
                "give every volume a backing and a metadata place of its own",
            );
        }
    }
}

fn one_use_of_addresses(root: &Table<'_>, server: &Server, side: Side, volumes: &[Volume]) {
    let mut seen: BTreeMap<SocketAddr, String> = BTreeMap::new();
    for (path, address) in server.link.iter().enumerate() {
        seen.insert(*address, format!("servers.{}.link[{path}]", server.name));
    }
    for volume in volumes {
        let Nbd::Tcp(address) = volume.nbd.of(side) else { continue };
        let mine = format!("volumes.{}.nbd", volume.name);
        let Some(other) = seen.insert(*address, mine) else { continue };
        let Some(value) = find(root, &["volumes", &volume.name], "nbd", server) else { continue };
        value.wrong("duplicate", format!("is {other} already"), "give every listener a port of its own");
    }
}

/// `freeze * (1 + rho) <= silent * (1 - rho) - granularity`: the old primary has stopped before the new one
/// may begin, whatever the clocks do within rho.
pub(crate) fn timers(table: &Table<'_>, heartbeat: u64, freeze: u64, silent: u64, stall: u64) {
    let rho = CLOCK_RATE_ERROR_PERMILLE;
    let room = (silent * (1000 - rho)).saturating_sub(TIMER_GRANULARITY_MS * 1000);
    if freeze * (1000 + rho) > room {
        let silent_needed = (freeze * (1000 + rho) + TIMER_GRANULARITY_MS * 1000).div_ceil(1000 - rho);
        let place = table.get("freeze_ms").or_else(|| table.get("silent_ms"));
        if let Some(value) = place {
            value.wrong(
                "bad-timers",
                format!(
                    "freeze_ms {freeze} with silent_ms {silent} is not safe: a clock {}% slow would let two \
                     servers serve at once",
                    rho / 10
                ),
                format!(
                    "write freeze_ms = {} at most, or silent_ms = {silent_needed} at least",
                    room / (1000 + rho)
                ),
            );
        }
    }
    if heartbeat * 3 > freeze
        && let Some(value) = table.get("heartbeat_ms").or_else(|| table.get("freeze_ms"))
    {
        value.wrong(
            "bad-timers",
            format!("heartbeat_ms {heartbeat} is more than a third of freeze_ms {freeze}: one lost heartbeat would freeze"),
            format!("write heartbeat_ms = {} at most", freeze / 3),
        );
    }
    if stall < silent
        && let Some(value) = table.get("stall_ms").or_else(|| table.get("silent_ms"))
    {
        value.wrong(
            "bad-timers",
            format!(
                "stall_ms {stall} is less than silent_ms {silent}: a lost peer would count as a failed disk"
            ),
            format!("write stall_ms = {silent} at least; 10000 is the default"),
        );
    }
}
