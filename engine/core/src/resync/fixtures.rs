//! Hellos for the tests of this module.

use std::collections::BTreeMap;

use crate::format::record::{CopyRecord, CopyState, Era, Origin, ServerRecord};
use crate::ids::{BootId, Epoch, Generation, Incarnation, PairId, Proven, ServerName, VolumeId};
use crate::message::{Hello, LiveState, PROTOCOL_VERSION, VolumeHello};

pub(crate) const fn generation(n: u128) -> Generation {
    Generation(n)
}

/// An up-to-date copy of generation 1.
pub(crate) fn copy() -> CopyRecord {
    CopyRecord {
        pair: PairId(7),
        volume: VolumeId(8),
        size_bytes: 64 << 20,
        block_bytes: 4096,
        sector_bytes: 4096,
        generation: generation(1),
        history: Vec::new(),
        base: Generation::NONE,
        state: CopyState::UpToDate,
        unproven: false,
        proven: Proven::default(),
        origin: Origin::Created,
    }
}

/// A server with these copies, joining, never primary.
pub(crate) fn hello(name: &str, copies: Vec<CopyRecord>) -> Hello {
    let volume = |(at, copy)| VolumeHello {
        name: format!("v{at}"),
        copy,
        dirty_blocks: 0,
        lacks_solo: false,
        whole_map: false,
        undo_available: false,
    };
    Hello {
        version: PROTOCOL_VERSION,
        revision: 1,
        server: ServerName(name.to_owned()),
        pair_name: "shop".to_owned(),
        incarnation: Incarnation(1),
        boot_id: BootId(1),
        live: LiveState::Joining,
        record: ServerRecord {
            counter: 1,
            boot_id: BootId(1),
            epoch_seen: Epoch { number: 5, holder: Some(ServerName("a".to_owned())) },
            era: Era::Pair,
            last_primary: 0,
            was_primary: false,
            clean: false,
        },
        cas_outstanding: false,
        granted: false,
        config: BTreeMap::new(),
        memory: Vec::new(),
        volumes: copies.into_iter().enumerate().map(volume).collect(),
    }
}
