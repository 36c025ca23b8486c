//! The pair's configuration, written as an operator would.

use std::path::Path;

/// The mirrored volume.
pub(crate) const VOLUME: &str = "demo";
/// Both servers; the first one begins as primary.
pub(crate) const SERVERS: [&str; 2] = ["alpha", "beta"];
/// Addresses on the mirror link.
pub(crate) const LINK: [&str; 2] = ["10.9.0.1", "10.9.0.2"];
/// Addresses on the LAN.
pub(crate) const LAN: [&str; 2] = ["192.168.90.1", "192.168.90.2"];

/// `duplex.toml`, the same for both. `disks` are the backings, `directory` is the demo's.
pub(crate) fn text(directory: &Path, disks: [&Path; 2]) -> String {
    let [alpha, beta] = SERVERS;
    let at = |server: &str, name: &str| quote(&directory.join(server).join(name));
    format!(
        "# Written by `duplex demo`; a real pair needs no more than this.
pair = \"demo\"
state_dir = {{ {alpha} = {}, {beta} = {} }}

[servers.{alpha}]
link = [\"{}:7700\"]
[servers.{beta}]
link = [\"{}:7700\"]

[volumes.{VOLUME}]
backing = {{ {alpha} = {}, {beta} = {} }}

[security]
secret = {}
",
        at(alpha, "state"),
        at(beta, "state"),
        LINK[0],
        LINK[1],
        quote(disks[0]),
        quote(disks[1]),
        quote(&directory.join("secret")),
    )
}

/// A path as a string of the configuration's language.
fn quote(path: &Path) -> String {
    let text = path.to_string_lossy();
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use duplex_node::config::{Config, PerServer};
    use std::path::PathBuf;

    #[test]
    fn what_is_written_is_a_whole_configuration_of_both_servers() {
        let directory = Path::new("/var/tmp/a \"b\" \\c");
        let written = text(directory, [Path::new("/dev/loop3"), Path::new("/dev/loop4")]);
        for name in SERVERS {
            let config = Config::parse(&written, Path::new("duplex.toml"), Some(name))
                .unwrap_or_else(|problems| panic!("{problems}\n{written}"));
            assert_eq!(config.my_server().name.0, name);
            assert_eq!(config.my_state_dir(), &directory.join(name).join("state"));
            assert_eq!(config.security.secret, directory.join("secret"));
            let (_, volume) = config.volume(VOLUME).expect("the volume");
            assert_eq!(volume.backing, PerServer([PathBuf::from("/dev/loop3"), PathBuf::from("/dev/loop4")]));
        }
    }
}
