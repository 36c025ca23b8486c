//! Thirty and more ways to get the configuration wrong: what is written instead of what, and the key that must be named.

/// One wrong configuration.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wrong {
    /// This part of the right one …
    pub(super) from: &'static str,
    /// … is replaced by this.
    pub(super) to: &'static str,
    /// What the message must name; nothing where the line cannot be read.
    pub(super) key: &'static str,
}

const fn wrong(from: &'static str, to: &'static str, key: &'static str) -> Wrong {
    Wrong { from, to, key }
}

const PAIR: &str = "pair = \"lab\"";
const FRONTEND: &str = "frontend = \"none\"";
const LINK: &str = "link = [\"10.9.0.1:7700\"]";
const SECURITY: &str = "[security]";
const ENCRYPTION: &str = "encryption = \"on\"";

pub(super) const WRONG: &[Wrong] = &[
    wrong(PAIR, "pair = lab", ""),
    wrong(PAIR, "pear = \"lab\"", "pear"),
    wrong(PAIR, "", "pair"),
    wrong(PAIR, "pair = 7", "pair"),
    wrong(PAIR, "pair = \"my lab\"", "pair"),
    wrong(PAIR, "pair = \"\"", "pair"),
    wrong(PAIR, "pair = \"lab\"\npair = \"lab\"", "pair"),
    wrong(PAIR, "pair = \"lab\"\ncolour = \"red\"", "colour"),
    wrong(SECURITY, "[securty]", "securty"),
    wrong(SECURITY, "[security", ""),
    wrong(ENCRYPTION, "encryption = \"maybe\"", "encryption"),
    wrong(ENCRYPTION, "encryption = true", "encryption"),
    wrong("secret = \"/", "secret = \"", "secret"),
    wrong("secret = \"/", "secret = \"/no/such/directory/", "secret"),
    wrong(LINK, "link = []", "link"),
    wrong(LINK, "link = \"10.9.0.1:7700\"", "link"),
    wrong(LINK, "link = [\"alpha.lan:7700\"]", "link"),
    wrong(LINK, "link = [\"10.9.0.1\"]", "link"),
    wrong(LINK, "link = [\"10.9.0.1:0\"]", "link"),
    wrong(LINK, "link = [\"10.9.0.1:77000\"]", "link"),
    wrong(LINK, "link = [\"10.9.0.999:7700\"]", "link"),
    wrong(LINK, "link = [\"0.0.0.0:7700\"]", "link"),
    wrong(LINK, "link = [\"10.9.0.1:7700\", \"10.9.1.1:7700\"]", "link"),
    wrong(LINK, "link = [\"10.9.0.2:7700\"]", "link"),
    wrong("[servers.beta]", "[servers.alpha.beta]", "servers"),
    wrong(FRONTEND, "frontend = \"magic\"", "frontend"),
    wrong(FRONTEND, "frontend = \"ublk\"", "frontend"),
    wrong(FRONTEND, "frontend = \"none\"\nblock_bytes = 5000", "block_bytes"),
    wrong(FRONTEND, "frontend = \"none\"\nsector_bytes = 1000", "sector_bytes"),
    wrong(FRONTEND, "frontend = \"none\"\nsize = \"5MB\"", "size"),
    wrong(FRONTEND, "frontend = \"none\"\nsize = \"1KiB\"", "size"),
    wrong(FRONTEND, "frontend = \"none\"\nmode = \"async\"", "mode"),
    wrong(FRONTEND, "frontend = \"none\"\nnbd = \"192.168.1.10:10809\"", "nbd"),
    wrong(FRONTEND, "frontend = \"none\"\nbackign = \"/dev/sda\"", "backign"),
    wrong(SECURITY, "[arbiter]\nfreeze_ms = 900\nsilent_ms = 800\n[security]", "freeze_ms"),
    wrong(SECURITY, "[arbiter]\nsilent_ms = \"800\"\n[security]", "silent_ms"),
    wrong(SECURITY, "[arbiter]\nwitness = \"10.0.0.5:7701\"\n[security]", "witness"),
    wrong(SECURITY, "[arbiter]\npolicy = \"prefer:alpha\"\n[security]", "policy"),
    wrong(SECURITY, "[memory.sessions]\nsize = \"256MiB\"\n[security]", "memory"),
    wrong(SECURITY, "[service]\naddresses = [\"192.168.1.10/24@eth0\"]\n[security]", "service"),
];
