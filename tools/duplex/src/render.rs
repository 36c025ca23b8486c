//! Pages for people: compact and aligned.

use duplex_node::control::status::{
    CopyState, LinkPath, PathState, RangeStatus, ResyncStatus, Role, SessionRefusal, State, Status,
    VolumeStatus,
};
use duplex_node::events::EventRecord;

use crate::output::{Ink, Paint};

/// `status`, several lines without the last line end.
pub(crate) fn status(page: &Status, paint: Paint) -> String {
    let mut lines = Vec::new();
    let holder = page.epoch.holder.as_ref().map_or_else(|| "nobody".to_owned(), ToString::to_string);
    lines.push(format!(
        "{}  {}: {}, {}   epoch {} ({holder})",
        paint.ink(Ink::Strong, &page.pair),
        page.server,
        paint.ink(state_ink(page.state), page.state),
        role(page.role),
        page.epoch.number
    ));
    let mut field = |name: &str, text: String| lines.push(format!("  {name:<8} {text}"));
    if let Some(reason) = &page.reason {
        field("reason", reason.clone());
    }
    if let Some(frozen) = &page.frozen {
        field("frozen", paint.ink(Ink::Bad, format!("since {}: {}", frozen.since, frozen.reason)));
    }
    if let Some(refusal) = &page.refusal {
        let text = refused(refusal);
        field("refused", paint.ink(Ink::Bad, text));
    }
    field("peer", peer(page, paint));
    field("policy", page.policy.clone());
    for path in &page.link {
        field("link", link(path, paint));
    }
    lines.extend(volumes(&page.volumes, paint));
    lines.join("\n")
}

/// Code and rule, and both values where there is one that can be shown (of a secret there is none).
fn refused(refusal: &SessionRefusal) -> String {
    let shown = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let text = format!("{} by {}", refusal.code, or_dash(shown(&refusal.rule)));
    match (shown(&refusal.mine), shown(&refusal.theirs)) {
        (None, None) => text,
        (mine, theirs) => format!("{text}: mine {}, theirs {}", or_dash(mine), or_dash(theirs)),
    }
}

fn peer(page: &Status, paint: Paint) -> String {
    let peer = &page.peer;
    let heard =
        peer.heard_ms.map_or_else(|| "never heard".to_owned(), |ms| format!("heard {} ago", millis(ms)));
    match (peer.state, peer.role) {
        (Some(state), Some(peer_role)) => {
            format!("{}: {}, {}, {heard}", peer.server, paint.ink(state_ink(state), state), role(peer_role))
        }
        (Some(state), None) => format!("{}: {}, {heard}", peer.server, paint.ink(state_ink(state), state)),
        (None, _) => format!("{}: {heard}", peer.server),
    }
}

fn link(path: &LinkPath, paint: Paint) -> String {
    let ink = match path.state {
        PathState::Up => Ink::Good,
        PathState::Connecting => Ink::Watch,
        PathState::Down | PathState::Disconnected => Ink::Bad,
    };
    let rtt = path.rtt_us.map_or_else(String::new, |us| format!("  rtt {}.{:03} ms", us / 1000, us % 1000));
    format!(
        "path {} {}  {} - {}{rtt}  sent {}  received {}",
        path.path,
        paint.ink(ink, path.state),
        path.local,
        path.remote,
        bytes(path.sent_bytes),
        bytes(path.received_bytes)
    )
}

const HEADS: [&str; 6] = ["VOLUME", "SIZE", "COPY", "PEER COPY", "DIRTY", "DEVICE"];

fn volumes(all: &[VolumeStatus], paint: Paint) -> Vec<String> {
    let rows: Vec<[String; 6]> = all.iter().map(row).collect();
    let mut widths = HEADS.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head: Vec<String> = HEADS.iter().zip(widths).map(|(head, width)| format!("{head:<width$}")).collect();
    let mut lines = vec![paint.ink(Ink::Faint, format!("  {}", head.join("  ").trim_end()))];
    for (volume, row) in all.iter().zip(&rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(column, (cell, width))| {
                let padded = format!("{cell:<width$}");
                match column {
                    2 => paint.ink(copy_ink(volume.copy), padded),
                    3 => paint.ink(copy_ink(volume.peer_copy), padded),
                    _ => padded,
                }
            })
            .collect();
        lines.push(format!("  {}", cells.join("  ").trim_end()));
        if let Some(resync) = &volume.resync {
            let done = resync.total_bytes.saturating_sub(resync.left_bytes);
            let percent = if resync.total_bytes == 0 {
                100
            } else {
                u64::try_from(u128::from(done) * 100 / u128::from(resync.total_bytes)).unwrap_or(100)
            };
            let eta = resync
                .eta_s
                .map_or_else(|| "time left unknown".to_owned(), |s| format!("{} left", duration(s)));
            lines.push(format!(
                "    resync as {}: {} {percent} %, {} to go, {}/s, {eta} ({})",
                resync.role,
                resync.phase,
                bytes(resync.left_bytes),
                bytes(resync.rate_bytes_per_s),
                resync.pace
            ));
            if let Some(text) = unreadable(resync) {
                lines.push(paint.ink(Ink::Bad, format!("    unreadable here: {text}")));
            }
        }
    }
    lines
}

/// Blocks that hold the resync up; what writes them anew mends it.
fn unreadable(resync: &ResyncStatus) -> Option<String> {
    if resync.unreadable_blocks == 0 {
        return None;
    }
    let place = |r: &RangeStatus| format!("{} bytes at {}", r.length_bytes, r.offset_bytes);
    let mut places: Vec<String> = resync.unreadable.iter().map(place).collect();
    let named: u64 = resync.unreadable.iter().map(|r| r.length_bytes).sum();
    if named < resync.unreadable_blocks.saturating_mul(4096) {
        places.push("and more".to_owned());
    }
    Some(format!("{}; the resync ends once they are written anew", places.join(", ")))
}

fn row(volume: &VolumeStatus) -> [String; 6] {
    let dirty = volume.dirty_blocks.saturating_mul(u64::from(volume.block_bytes));
    [
        volume.name.clone(),
        volume.size_bytes.map_or_else(|| "-".to_owned(), bytes),
        volume.copy.to_string(),
        volume.peer_copy.to_string(),
        bytes(dirty),
        volume.device.clone().or_else(|| volume.nbd.clone()).unwrap_or_else(|| "-".to_owned()),
    ]
}

/// `events`, one line.
pub(crate) fn event(record: &EventRecord, paint: Paint) -> String {
    let change = match (&record.state_before, &record.state_after) {
        (Some(before), Some(after)) if before != after => format!(" [{before} -> {after}]"),
        _ => String::new(),
    };
    let told = record.reason.is_empty() || record.text.contains(&record.reason);
    let reason = if told { String::new() } else { format!(" ({})", record.reason) };
    format!(
        "{}  {}  {}  {}{change}{reason}",
        paint.ink(Ink::Faint, record.time),
        record.server,
        paint.ink(Ink::Strong, format!("{:<16}", record.kind)),
        record.text
    )
}

const fn state_ink(state: State) -> Ink {
    match state {
        State::Mirrored => Ink::Good,
        State::Joining | State::Syncing | State::Alone => Ink::Watch,
        State::Dying | State::Down | State::Refused => Ink::Bad,
    }
}

const fn copy_ink(copy: CopyState) -> Ink {
    match copy {
        CopyState::UpToDate => Ink::Good,
        CopyState::Outdated | CopyState::Inconsistent | CopyState::Blank | CopyState::Unknown => Ink::Watch,
        CopyState::Failed => Ink::Bad,
    }
}

const fn role(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Secondary => "secondary",
        Role::None => "no role",
    }
}

/// Bytes in the unit that leaves one to four digits.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let step = (63 - count.leading_zeros()) / 10;
    let unit = UNITS[step as usize - 1];
    let whole = count >> (10 * step);
    let tenth = ((count >> (10 * (step - 1))) & 1023) * 10 / 1024;
    if whole >= 100 { format!("{whole} {unit}") } else { format!("{whole}.{tenth} {unit}") }
}

fn millis(ms: u64) -> String {
    if ms < 10_000 { format!("{ms} ms") } else { duration(ms / 1000) }
}

/// Seconds as people say them.
pub(crate) fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    if days > 0 {
        format!("{days} d {hours} h")
    } else if hours > 0 {
        format!("{hours} h {minutes:02} min")
    } else if minutes > 0 {
        format!("{minutes} min {:02} s", seconds % 60)
    } else {
        format!("{seconds} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (123 << 20, "123 MiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (64 << 40, "64.0 TiB"),
            (u64::MAX, "15.9 EiB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(61), "1 min 01 s");
        assert_eq!(duration(3660), "1 h 01 min");
        assert_eq!(duration(90_000), "1 d 1 h");
        assert_eq!(millis(41), "41 ms");
        assert_eq!(millis(61_000), "1 min 01 s");
    }

    #[test]
    fn a_refusal_shows_the_values_there_are() {
        let some = |value: &str| Some(value.to_owned());
        let refusal = |mine: Option<String>, theirs: Option<String>| {
            refused(&SessionRefusal { code: "secret".to_owned(), rule: some("link"), mine, theirs })
        };
        assert_eq!(refusal(None, None), "secret by link");
        assert_eq!(refusal(some(""), some("")), "secret by link");
        assert_eq!(refusal(some(""), some("b")), "secret by link: mine -, theirs b");
        assert_eq!(refusal(some("a"), None), "secret by link: mine a, theirs -");
    }

    #[test]
    fn a_page_is_aligned_and_plain_without_a_terminal() {
        let page: Status = serde_json::from_value(serde_json::json!({
            "version": 1, "pair": "shop", "server": "alpha", "state": "syncing", "role": "primary",
            "epoch": { "number": 3, "holder": "alpha" }, "reason": "takeover",
            "peer": { "server": "beta", "state": "syncing", "role": "secondary", "heard_ms": 41 },
            "link": [{ "path": 0, "state": "up", "local": "10.9.0.1:7700", "remote": "10.9.0.2:7700",
                       "rtt_us": 180, "sent_bytes": 2048, "received_bytes": 0 }],
            "lan": [], "witness": null, "policy": "manual", "frozen": null,
            "refusal": { "code": "foreign", "rule": "D1", "mine": "1", "theirs": null },
            "volumes": [
              { "name": "data", "size_bytes": 1_073_741_824_u64, "device": "/dev/duplex/data", "nbd": null,
                "copy": "up-to-date", "peer_copy": "inconsistent", "generation": null, "dirty_blocks": 3,
                "block_bytes": 4096,
                "resync": { "role": "source", "phase": "disk", "total_bytes": 4096, "left_bytes": 1024,
                            "sent_bytes": 0, "rate_bytes_per_s": 1024, "eta_s": 1, "pace": "idle",
                            "unreadable_blocks": 1,
                            "unreadable": [{ "offset_bytes": 286_720, "length_bytes": 4096 }] } },
              { "name": "a-longer-name", "size_bytes": null, "device": null, "nbd": "/run/x.nbd", "copy": "blank",
                "peer_copy": "unknown", "generation": null, "dirty_blocks": 0, "block_bytes": 4096, "resync": null }
            ],
            "memory": []
        }))
        .expect("a page");
        let text = status(&page, Paint::never());
        let wanted = "\
shop  alpha: syncing, primary   epoch 3 (alpha)
  reason   takeover
  refused  foreign by D1: mine 1, theirs -
  peer     beta: syncing, secondary, heard 41 ms ago
  policy   manual
  link     path 0 up  10.9.0.1:7700 - 10.9.0.2:7700  rtt 0.180 ms  sent 2.0 KiB  received 0 B
  VOLUME         SIZE     COPY        PEER COPY     DIRTY     DEVICE
  data           1.0 GiB  up-to-date  inconsistent  12.0 KiB  /dev/duplex/data
    resync as source: disk 75 %, 1.0 KiB to go, 1.0 KiB/s, 1 s left (idle)
    unreadable here: 4096 bytes at 286720; the resync ends once they are written anew
  a-longer-name  -        blank       unknown       0 B       /run/x.nbd";
        assert_eq!(text, wanted);
    }
}
