//! `[volumes.NAME]`.

use std::path::PathBuf;

use duplex_core::limits;

use super::reader::{Table, Value};
use super::values::{self, Network};
use super::{Frontend, Metadata, Nbd, PerServer, Volume, sections, unsupported};

const BACKING_FIX: &str =
    "write an absolute path, for example \"/dev/vg0/data\", or { alpha = \"/dev/…\", beta = \"/dev/…\" }";
const METADATA_FIX: &str = "write \"internal\" or an absolute path, or one for each server";
const NBD_FIX: &str = "write \"unix\" or \"IP:PORT\", or one for each server";

pub(crate) fn volumes(root: &Table<'_>, servers: &PerServer<String>) -> Option<Vec<Volume>> {
    const FIX: &str = "write [volumes.NAME] with backing = \"/dev/…\"";
    let group = root.get("nbd_group").and_then(|value| group(&value));
    let allow = root.get("nbd_allow").and_then(|value| networks(&value)).unwrap_or_default();
    let Some(value) = root.get("volumes") else {
        root.missing("volumes", FIX);
        return None;
    };
    let table = value.table(FIX)?;
    let mut names: Vec<&str> = table.keys().collect();
    names.sort_unstable();
    if names.is_empty() || names.len() > limits::VOLUMES_MAX {
        let what = format!("names {} volumes; 1 to {} are possible", names.len(), limits::VOLUMES_MAX);
        value.wrong("volume-count", what, FIX);
    }
    let mut read = Vec::new();
    for name in &names {
        let value = table.get(name)?;
        read.push(volume(&value, name, servers, &group, &allow));
    }
    table.finish();
    read.into_iter().collect()
}

fn volume(
    value: &Value<'_>,
    key: &str,
    servers: &PerServer<String>,
    default_group: &Option<String>,
    default_allow: &[Network],
) -> Option<Volume> {
    let name = sections::name(value, key);
    if key == "control" || key == "holder" || key == "dev" {
        value.wrong("bad-name", "is a name of the run directory's own", "give the volume another name");
    }
    let table = value.table("write [volumes.NAME] with backing = \"/dev/…\"")?;
    let backing = match table.get("backing") {
        Some(value) => per_server(&value, servers, |value| values::path(value, BACKING_FIX)),
        None => {
            table.missing("backing", BACKING_FIX);
            None
        }
    };
    let metadata = match table.get("metadata") {
        Some(value) => per_server(&value, servers, metadata),
        None => Some(PerServer([Metadata::Internal, Metadata::Internal])),
    };
    mode(&table);
    let block_bytes = block_bytes(&table);
    let sector_bytes = sector_bytes(&table);
    let size_bytes = size_bytes(&table);
    let frontend = frontend(&table);
    let allow = match table.get("nbd_allow") {
        Some(value) => networks(&value),
        None => Some(default_allow.to_vec()),
    };
    let nbd = match table.get("nbd") {
        Some(value) => per_server(&value, servers, nbd),
        None => Some(PerServer([Nbd::Unix, Nbd::Unix])),
    };
    if let (Some(nbd), Some(allow)) = (&nbd, &allow) {
        reach(&table, nbd, allow);
    }
    let nbd_group = match table.get("nbd_group") {
        Some(value) => group(&value).map(Some),
        None => Some(default_group.clone()),
    };
    table.finish();
    Some(Volume {
        name: name?,
        backing: backing?,
        metadata: metadata?,
        size_bytes: size_bytes?,
        block_bytes: block_bytes?,
        sector_bytes: sector_bytes?,
        frontend: frontend?,
        nbd: nbd?,
        nbd_allow: allow?,
        nbd_group: nbd_group?,
    })
}

/// A value for both servers, or a table with one for each.
pub(crate) fn per_server<T: Clone>(
    value: &Value<'_>,
    servers: &PerServer<String>,
    mut read: impl FnMut(&Value<'_>) -> Option<T>,
) -> Option<PerServer<T>> {
    if !value.is_table() {
        let both = read(value)?;
        return Some(PerServer([both.clone(), both]));
    }
    let table = value.table("")?;
    let mut values = Vec::new();
    for name in &servers.0 {
        match table.get(name) {
            Some(value) => values.push(read(&value)),
            None => {
                table.missing(name, format!("write a value for {name} too, or one value for both"));
                values.push(None);
            }
        }
    }
    table.finish();
    let [first, second]: [Option<T>; 2] = values.try_into().ok()?;
    Some(PerServer([first?, second?]))
}

fn metadata(value: &Value<'_>) -> Option<Metadata> {
    if value.string(METADATA_FIX)? == "internal" {
        return Some(Metadata::Internal);
    }
    values::path(value, METADATA_FIX).map(Metadata::Path)
}

fn mode(table: &Table<'_>) {
    let Some(value) = table.get("mode") else { return };
    if let Some("memory" | "async") = value.word(&["sync", "memory", "async"]) {
        value.not_supported(&unsupported::MODE);
    }
}

fn block_bytes(table: &Table<'_>) -> Option<u32> {
    let Some(value) = table.get("block_bytes") else { return Some(limits::BLOCK_BYTES) };
    const FIX: &str = "write a power of two from 4096 to 1048576; 4096 is the default";
    let bytes = value.integer(0..u64::MAX, "bytes")?;
    if !bytes.is_power_of_two() || !(4096..=1 << 20).contains(&bytes) {
        value.wrong("out-of-range", "is not a power of two from 4096 to 1048576", FIX);
        return None;
    }
    u32::try_from(bytes).ok()
}

fn sector_bytes(table: &Table<'_>) -> Option<u32> {
    let Some(value) = table.get("sector_bytes") else { return Some(4096) };
    let bytes = value.integer(0..u64::MAX, "bytes")?;
    if bytes != 512 && bytes != 4096 {
        value.wrong("out-of-range", "is not a sector size", "write 4096, or 512 where both disks have it");
        return None;
    }
    u32::try_from(bytes).ok()
}

fn size_bytes(table: &Table<'_>) -> Option<Option<u64>> {
    let Some(value) = table.get("size") else { return Some(None) };
    let bytes = values::size(&value)?;
    let step = limits::SIZE_ALIGN_BYTES;
    if !(step..=limits::VOLUME_MAX_BYTES).contains(&bytes) {
        value.wrong("out-of-range", "is out of range", "write a size from 4MiB to 64TiB");
        return None;
    }
    if bytes % step != 0 {
        let fix = format!("write {} (rounded down) or take the line out", bytes - bytes % step);
        value.wrong("bad-size", "is not a multiple of 4 MiB", fix);
        return None;
    }
    Some(Some(bytes))
}

fn frontend(table: &Table<'_>) -> Option<Frontend> {
    let Some(value) = table.get("frontend") else { return Some(Frontend::Auto) };
    match value.word(&["auto", "ublk", "fuse", "none"])? {
        "fuse" => Some(Frontend::Fuse),
        "none" => Some(Frontend::None),
        "ublk" => {
            value.not_supported(&unsupported::UBLK);
            None
        }
        _ => Some(Frontend::Auto),
    }
}

fn nbd(value: &Value<'_>) -> Option<Nbd> {
    match value.string(NBD_FIX)? {
        "unix" => Some(Nbd::Unix),
        text if text.starts_with("tls:") || text.starts_with("nbds:") => {
            value.not_supported(&unsupported::NBD_TLS_VALUE);
            None
        }
        _ => values::socket_address(value, "127.0.0.1:10809").map(Nbd::Tcp),
    }
}

/// Plain NBD has no authentication: TCP beyond loopback needs to be told who may come.
fn reach(table: &Table<'_>, nbd: &PerServer<Nbd>, allow: &[Network]) {
    let mut tcp = false;
    for at in &nbd.0 {
        let Nbd::Tcp(address) = at else { continue };
        tcp = true;
        if address.ip().is_loopback() || !allow.is_empty() {
            continue;
        }
        if let Some(value) = table.get("nbd") {
            value.wrong(
                "nbd-open",
                format!("{address} is open to everybody: plain NBD asks nobody who he is"),
                "write nbd = \"unix\", a loopback address, or nbd_allow = [\"192.168.1.0/24\"]",
            );
        }
        break;
    }
    if !tcp && let Some(value) = table.get("nbd_allow") {
        value.wrong("no-effect", "has no effect on a Unix socket", "take it out or write nbd = \"IP:PORT\"");
    }
}

fn networks(value: &Value<'_>) -> Option<Vec<Network>> {
    const FIX: &str = "write networks, for example nbd_allow = [\"192.168.1.0/24\"]";
    let mut read = Vec::new();
    for element in value.list(FIX)? {
        let text = element.string(FIX)?;
        match text.parse::<Network>() {
            Ok(network) => read.push(network),
            Err(what) => {
                element.wrong("bad-network", what, FIX);
                return None;
            }
        }
    }
    Some(read)
}

fn group(value: &Value<'_>) -> Option<String> {
    const FIX: &str = "write the name or number of a group, for example nbd_group = \"disk\"";
    let text = if value.is_integer() {
        value.integer(0..u64::from(u32::MAX), "a group")?.to_string()
    } else {
        value.string(FIX)?.to_owned()
    };
    if text.len() > 64 || text.chars().any(|c| c == ':' || c == '/' || c.is_whitespace()) {
        value.wrong("bad-name", "is not a group's name", FIX);
        return None;
    }
    Some(text)
}

/// The paths a volume occupies on one server.
pub(crate) fn places(volume: &Volume, side: super::Side) -> Vec<(&'static str, PathBuf)> {
    let mut all = vec![("backing", volume.backing.of(side).clone())];
    match volume.metadata.of(side) {
        Metadata::Internal => {}
        Metadata::Path(path) => all.push(("metadata", path.clone())),
    }
    all
}
