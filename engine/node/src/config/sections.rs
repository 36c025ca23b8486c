//! The document and its tables, volumes apart.

use std::path::{Path, PathBuf};
use std::time::Duration;

use duplex_core::ids::ServerName;
use duplex_core::mirror::api::Priority;
use toml::de::DeTable;

use super::reader::{Reader, Table, Value};
use super::values::{self, NAME_FIX, name_fault};
use super::{
    Arbiter, Config, DEFAULT_STATE_DIR, PerServer, Problems, Resync, Security, Server, Side, cross, host,
    unsupported, volumes,
};

/// Paths of a link: more are a mistake.
const PATHS_MAX: usize = 8;
/// Default of `security.secret`.
const DEFAULT_SECRET: &str = "/etc/duplex/secret";

pub(crate) fn parse(text: &str, file: &Path, server: Option<&str>) -> Result<Config, Problems> {
    let reader = Reader::new(file, text);
    let (document, faults) = DeTable::parse_recoverable(text);
    for fault in &faults {
        syntax(&reader, fault);
    }
    // What a broken document says is not worth complaining about key by key.
    let draft = if faults.is_empty() {
        let root = Table::new(&reader, String::new(), document.get_ref(), 0..0);
        read(root, file, server)
    } else {
        None
    };
    let (problems, places) = reader.finish();
    let mut problems = Problems(problems);
    problems.sort();
    match draft {
        Some(mut config) if problems.0.is_empty() => {
            config.places = places;
            Ok(config)
        }
        Some(_) | None => Err(problems),
    }
}

fn syntax(reader: &Reader<'_>, fault: &toml::de::Error) {
    let message = fault.message().lines().collect::<Vec<_>>().join("; ");
    let fix = if message.contains("duplicate") {
        "keep one of the two"
    } else {
        "correct the line; strings stand in double quotes, tables in [brackets]"
    };
    let span = fault.span().unwrap_or(0..0);
    // The place of a doubled key is the key itself.
    let (code, key) =
        if message.contains("duplicate") { ("duplicate", reader.at(&span)) } else { ("syntax", "") };
    reader.report(span.clone(), key, None, code, message, fix);
}

fn read(root: Table<'_>, file: &Path, server: Option<&str>) -> Option<Config> {
    let pair = pair(&root);
    let (names, servers) = servers(&root);
    let me = servers.as_ref().and_then(|servers| which(&root, servers, server));
    // Without two servers only what does not depend on their names is checked.
    let volumes = match &names {
        Some(names) => volumes::volumes(&root, names),
        None => {
            root.skip(&["volumes", "nbd_group", "nbd_allow"]);
            None
        }
    };
    let arbiter = arbiter(&root);
    let security = security(&root);
    let resync = resync(&root);
    let state_dir = match (&names, root.get("state_dir")) {
        (Some(names), Some(value)) => volumes::per_server(&value, names, |value| {
            values::path(value, "write an absolute path, for example \"/var/lib/duplex\"")
        }),
        (_, None) => Some(PerServer([PathBuf::from(DEFAULT_STATE_DIR), PathBuf::from(DEFAULT_STATE_DIR)])),
        (None, Some(_)) => None,
    };
    if let (Some(servers), Some(volumes), Some(security)) = (&servers, &volumes, &security) {
        cross::check(&root, servers, volumes, security);
    }
    root.finish();
    Some(Config {
        file: file.to_owned(),
        pair: pair?,
        me: me?,
        servers: servers?,
        volumes: volumes?,
        arbiter: arbiter?,
        security: security?,
        resync: resync?,
        state_dir: state_dir?,
        places: std::collections::BTreeMap::new(),
    })
}

fn pair(root: &Table<'_>) -> Option<String> {
    const FIX: &str = "write pair = \"NAME\", the same on both servers";
    let Some(value) = root.get("pair") else {
        root.missing("pair", FIX);
        return None;
    };
    name(&value, value.string(FIX)?)
}

/// A valid name, or a report.
pub(crate) fn name(value: &Value<'_>, name: &str) -> Option<String> {
    match name_fault(name) {
        Some((code, what)) => {
            value.wrong(code, what, NAME_FIX);
            None
        }
        None => Some(name.to_owned()),
    }
}

/// The names, once there are two, and the servers, once both are right.
fn servers(root: &Table<'_>) -> (Option<PerServer<String>>, Option<PerServer<Server>>) {
    const FIX: &str = "write [servers.NAME] twice, each with link = [\"IP:7700\"]";
    let Some(value) = root.get("servers") else {
        root.missing("servers", FIX);
        return (None, None);
    };
    let Some(table) = value.table(FIX) else { return (None, None) };
    let mut names: Vec<&str> = table.keys().collect();
    names.sort_unstable();
    let read: Vec<Option<Server>> =
        names.iter().map(|name| table.get(name).and_then(|value| server(&value, name))).collect();
    table.finish();
    let [first, second] = names.as_slice() else {
        let what = format!("names {} servers; a pair has two", names.len());
        value.wrong("server-count", what, FIX);
        return (None, None);
    };
    let names = PerServer([(*first).to_owned(), (*second).to_owned()]);
    let servers = match <[Option<Server>; 2]>::try_from(read) {
        Ok([Some(first), Some(second)]) => Some(PerServer([first, second])),
        Ok(_) | Err(_) => None,
    };
    (Some(names), servers)
}

fn server(value: &Value<'_>, key: &str) -> Option<Server> {
    const FIX: &str = "write [servers.NAME] with link = [\"IP:7700\"]";
    const LINK_FIX: &str = "write link = [\"10.9.0.1:7700\"], one address for each path";
    let good_name = name(value, key);
    let table = value.table(FIX)?;
    let mut link = None;
    match table.get("link") {
        None => table.missing("link", LINK_FIX),
        Some(value) => link = addresses(&value, LINK_FIX),
    }
    table.finish();
    Some(Server { name: ServerName(good_name?), link: link? })
}

fn addresses(value: &Value<'_>, fix: &str) -> Option<Vec<std::net::SocketAddr>> {
    let elements = value.list(fix)?;
    if elements.is_empty() || elements.len() > PATHS_MAX {
        let what = format!("has {} paths; 1 to {PATHS_MAX} are possible", elements.len());
        value.wrong("path-count", what, fix);
        return None;
    }
    let read: Vec<_> =
        elements.iter().map(|element| values::socket_address(element, "10.9.0.1:7700")).collect();
    read.into_iter().collect()
}

/// Which server this is.
fn which(root: &Table<'_>, servers: &PerServer<Server>, server: Option<&str>) -> Option<Side> {
    let host = host::host_name();
    let wanted = server.unwrap_or(&host);
    let [first, second] = &servers.0;
    if first.name.0 == wanted {
        return Some(Side::First);
    }
    if second.name.0 == wanted {
        return Some(Side::Second);
    }
    let from = if server.is_some() { "--server" } else { "the host name" };
    let value = root.get("servers")?;
    value.wrong(
        "not-a-server",
        format!("{from} is \"{wanted}\", which is neither \"{}\" nor \"{}\"", first.name, second.name),
        format!("say --server {} or --server {}, or name the server as the host", first.name, second.name),
    );
    None
}

fn arbiter(root: &Table<'_>) -> Option<Arbiter> {
    let defaults = (100, 600, 800, 10_000);
    let Some(value) = root.get("arbiter") else {
        return Some(timers(defaults));
    };
    let table = value.table("write [arbiter] and its keys below")?;
    policy(&table);
    later_word(&table, "no_grant", "freeze", &["fail"], &unsupported::NO_GRANT);
    later_word(&table, "lone_restart", "wait", &["after:"], &unsupported::LONE_RESTART);
    let number = |name: &str, bounds: std::ops::Range<u64>, default: u64| match table.get(name) {
        Some(value) => value.integer(bounds, "milliseconds"),
        None => Some(default),
    };
    let heartbeat = number("heartbeat_ms", 10..10_001, defaults.0);
    let freeze = number("freeze_ms", 50..60_001, defaults.1);
    let silent = number("silent_ms", 100..120_001, defaults.2);
    let stall = number("stall_ms", 500..600_001, defaults.3);
    let read = (heartbeat, freeze, silent, stall);
    let result = match read {
        (Some(heartbeat), Some(freeze), Some(silent), Some(stall)) => {
            cross::timers(&table, heartbeat, freeze, silent, stall);
            Some(timers((heartbeat, freeze, silent, stall)))
        }
        _ => None,
    };
    table.finish();
    result
}

fn timers((heartbeat, freeze, silent, stall): (u64, u64, u64, u64)) -> Arbiter {
    Arbiter {
        heartbeat: Duration::from_millis(heartbeat),
        freeze: Duration::from_millis(freeze),
        silent: Duration::from_millis(silent),
        stall: Duration::from_millis(stall),
    }
}

fn policy(table: &Table<'_>) {
    const FIX: &str = "write policy = \"classic\" or take the line out";
    let Some(value) = table.get("policy") else { return };
    let Some(text) = value.string(FIX) else { return };
    if text.starts_with("prefer:") {
        value.not_supported(&unsupported::PREFER);
    } else if text != "classic" {
        value.wrong("unknown-value", "is not a policy", FIX);
    }
}

/// A key of which only the default is in this version.
fn later_word(table: &Table<'_>, name: &str, default: &str, later: &[&str], refusal: &unsupported::Later) {
    let Some(value) = table.get(name) else { return };
    let fix = format!("write {name} = \"{default}\" or take the line out");
    let Some(text) = value.string(&fix) else { return };
    if later.iter().any(|word| text.starts_with(word)) {
        value.not_supported(refusal);
    } else if text != default {
        value.wrong("unknown-value", "is not a known value", fix);
    }
}

fn security(root: &Table<'_>) -> Option<Security> {
    const SECRET_FIX: &str = "write an absolute path, for example \"/etc/duplex/secret\"";
    let defaults = Security { secret: PathBuf::from(DEFAULT_SECRET), secret_old: None, encryption: true };
    let Some(value) = root.get("security") else { return Some(defaults) };
    let table = value.table("write [security] and its keys below")?;
    let secret = match table.get("secret") {
        Some(value) => values::path(&value, SECRET_FIX),
        None => Some(defaults.secret),
    };
    let secret_old = match table.get("secret_old") {
        Some(value) => values::path(&value, SECRET_FIX).map(Some),
        None => Some(None),
    };
    let encryption = match table.get("encryption") {
        Some(value) => value.word(&["on", "off"]).map(|word| word == "on"),
        None => Some(true),
    };
    table.finish();
    Some(Security { secret: secret?, secret_old: secret_old?, encryption: encryption? })
}

fn resync(root: &Table<'_>) -> Option<Resync> {
    let Some(value) = root.get("resync") else {
        return Some(Resync { max_bytes_per_s: 0, priority: Priority::Normal });
    };
    let table = value.table("write [resync] and its keys below")?;
    let max_bytes_per_s = match table.get("max_bytes_per_s") {
        Some(value) => values::size(&value),
        None => Some(0),
    };
    let priority = match table.get("priority") {
        Some(value) => value.word(&["low", "normal", "high"]),
        None => Some("normal"),
    };
    table.finish();
    let priority = match priority? {
        "low" => Priority::Low,
        "high" => Priority::High,
        _ => Priority::Normal,
    };
    Some(Resync { max_bytes_per_s: max_bytes_per_s?, priority })
}
