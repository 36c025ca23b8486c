//! What the status page sees of a volume.

use duplex_core::format::record::{CopyRecord, CopyState};
use duplex_core::ids::ByteRange;
use duplex_core::mirror::Volume;
use duplex_core::mirror::api::Progress;

/// A volume at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// The copy's durable record, once read.
    pub copy: Option<CopyRecord>,
    /// Its state, a latched failure included.
    pub state: Option<CopyState>,
    /// Blocks marked.
    pub dirty_blocks: u64,
    /// Extents in the activity log.
    pub active_extents: usize,
    /// The resync, if this side is its source.
    pub progress: Option<Progress>,
    /// Blocks the resync cannot read here, and the first ranges of them.
    pub unreadable: (u64, Vec<ByteRange>),
    /// Requests in flight.
    pub requests: usize,
    /// Clients connected.
    pub clients: usize,
    /// Requests are served.
    pub serving: bool,
}

impl Snapshot {
    pub(super) fn of(volume: &Volume, clients: usize, serving: bool) -> Self {
        Self {
            copy: volume.copy().cloned(),
            state: volume.copy_state(),
            dirty_blocks: volume.dirty_blocks(),
            active_extents: volume.active_extents(),
            progress: volume.progress(),
            unreadable: volume.unreadable(),
            requests: volume.requests_in_flight(),
            clients,
            serving,
        }
    }
}
