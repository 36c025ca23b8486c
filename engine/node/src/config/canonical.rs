//! The configuration by canonical key: what both servers must have equal.

use std::collections::BTreeMap;

use super::Config;

/// Local settings (paths, NBD listeners, groups, the pace of resync) are left out: they may differ while a
/// change is being rolled out, and nothing on the other server depends on them.
pub(crate) fn canonical(config: &Config) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut put = |key: String, value: String| all.insert(key, value);
    put("pair".to_owned(), config.pair.clone());
    for server in &config.servers.0 {
        let link: Vec<String> = server.link.iter().map(ToString::to_string).collect();
        put(format!("servers.{}.link", server.name), link.join(" "));
    }
    let arbiter = &config.arbiter;
    for (key, time) in [
        ("heartbeat_ms", arbiter.heartbeat),
        ("freeze_ms", arbiter.freeze),
        ("silent_ms", arbiter.silent),
        ("stall_ms", arbiter.stall),
    ] {
        put(format!("arbiter.{key}"), time.as_millis().to_string());
    }
    put("arbiter.policy".to_owned(), "classic".to_owned());
    put("arbiter.witness".to_owned(), "none".to_owned());
    put("arbiter.no_grant".to_owned(), "freeze".to_owned());
    put("arbiter.lone_restart".to_owned(), "wait".to_owned());
    let encryption = if config.security.encryption { "on" } else { "off" };
    put("security.encryption".to_owned(), encryption.to_owned());
    for volume in &config.volumes {
        let size = volume.size_bytes.map_or_else(|| "capacity".to_owned(), |bytes| bytes.to_string());
        let key = |name: &str| format!("volumes.{}.{name}", volume.name);
        put(key("mode"), "sync".to_owned());
        put(key("size"), size);
        put(key("block_bytes"), volume.block_bytes.to_string());
        put(key("sector_bytes"), volume.sector_bytes.to_string());
    }
    all
}
