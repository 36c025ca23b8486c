//! What the format knows and this version does not do: refused by name, never ignored.

/// Something a later version will have.
pub(crate) struct Later {
    /// What it is, as the subject of a sentence.
    pub(crate) what: &'static str,
    /// What to write instead.
    pub(crate) fix: &'static str,
}

const MEMORY: Later = Later {
    what: "mirroring of memory",
    fix: "take the [memory] tables out; volumes are mirrored without them",
};
const SERVICE: Later = Later {
    what: "moving of service addresses and hooks",
    fix: "take [service] out; move addresses by hand after `duplex promote`",
};
const LAN: Later = Later {
    what: "LAN evidence (state packets, adapter scores)",
    fix: "take it out; the mirror link and the operator's word are the evidence in this version",
};
const WITNESS: Later = Later {
    what: "a witness",
    fix: "take it out; after a loss of the primary type `duplex promote --peer-is-down`",
};
const METRICS: Later =
    Later { what: "a metrics endpoint", fix: "take it out; `duplex status --json` has the figures" };
const UNDO: Later = Later { what: "the undo area", fix: "take it out" };
const CHECKSUMS: Later =
    Later { what: "block checksums", fix: "take it out; the link's frames are checked always" };
const NBD_TLS: Later = Later {
    what: "NBD over TLS",
    fix: "take it out; use the Unix socket, a loopback address, or plain TCP with nbd_allow",
};
const BUNDLES: Later = Later { what: "bundles", fix: "take them out" };

/// Values of known keys, refused where they are read.
pub(crate) const MODE: Later = Later {
    what: "an acknowledgement before both copies are written (memory, async)",
    fix: "write mode = \"sync\" or take the line out",
};
pub(crate) const UBLK: Later =
    Later { what: "ublk", fix: "write frontend = \"auto\", \"fuse\" or \"none\"; NBD is always there" };
pub(crate) const PREFER: Later = Later {
    what: "a preferred server",
    fix: "write policy = \"classic\" or take the line out; the operator promotes in this version",
};
pub(crate) const NO_GRANT: Later = Later {
    what: "failing requests without a grant",
    fix: "write no_grant = \"freeze\" or take the line out",
};
pub(crate) const LONE_RESTART: Later = Later {
    what: "serving alone after a restart by time",
    fix: "write lone_restart = \"wait\" or take the line out; `duplex promote --force` is the named way",
};
pub(crate) const NBD_TLS_VALUE: Later = NBD_TLS;

/// Looks a full key up.
pub(crate) fn key(full: &str) -> Option<&'static Later> {
    let parts: Vec<&str> = full.split('.').collect();
    match parts.as_slice() {
        ["memory", ..] => Some(&MEMORY),
        ["service", ..] => Some(&SERVICE),
        ["lan", ..] | ["servers", _, "lan", ..] => Some(&LAN),
        ["arbiter", "witness"] => Some(&WITNESS),
        ["metrics", ..] => Some(&METRICS),
        ["bundles", ..] => Some(&BUNDLES),
        ["volumes", _, "undo" | "undo_bytes"] => Some(&UNDO),
        ["volumes", _, "checksums"] => Some(&CHECKSUMS),
        ["volumes", _, "nbd_tls"] | ["security", "nbd_tls"] => Some(&NBD_TLS),
        _ => None,
    }
}
