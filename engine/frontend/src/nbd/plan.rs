//! What is to be done about a request's header: pure.

use duplex_core::ids::ByteRange;
use duplex_core::request::RequestError;

use super::negotiate::{Agreed, Export};
use super::wire::{RequestHeader, WireError, command, flag};

/// What is to be done about a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// Read the range.
    Read {
        /// Aligned, inside, at most the largest payload.
        range: ByteRange,
    },
    /// Write the payload that follows the header.
    Write {
        /// Aligned, inside, at most the largest payload.
        range: ByteRange,
        /// Answer when stable.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Make the range read as zeroes.
    Zero {
        /// Aligned and inside.
        range: ByteRange,
        /// Space may be given back.
        may_unmap: bool,
        /// Answer when stable.
        fua: bool,
    },
    /// Tell what is allocated.
    BlockStatus {
        /// Aligned and inside.
        range: ByteRange,
        /// One extent only.
        one: bool,
    },
    /// The client is done.
    Disconnect,
    /// Answer with the error and skip the payload.
    Refuse {
        /// What to answer.
        error: WireError,
        /// Payload bytes that follow the header.
        payload_bytes: u32,
    },
}

/// What a server tells its connections.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The export.
    pub export: &'a Export,
    /// What this client agreed on.
    pub agreed: Agreed,
    /// False: every request is refused with `ESHUTDOWN`.
    pub serving: bool,
    /// Zeroing is faster than writing zeroes.
    pub fast_zero: bool,
}

/// Decides what is to be done about a request.
pub fn plan(header: &RequestHeader, rules: &Rules<'_>) -> Plan {
    if header.command == command::DISC {
        return Plan::Disconnect;
    }
    let payload_bytes = if header.command == command::WRITE { header.length_bytes } else { 0 };
    if !rules.serving {
        return Plan::Refuse { error: WireError::Shutdown, payload_bytes };
    }
    match accept(header, rules) {
        Ok(plan) => plan,
        Err(error) => Plan::Refuse { error, payload_bytes },
    }
}

fn accept(header: &RequestHeader, rules: &Rules<'_>) -> Result<Plan, WireError> {
    let allowed = match header.command {
        command::READ => flag::DF,
        command::WRITE | command::FLUSH | command::TRIM => 0,
        command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::REQ_ONE,
        _unknown => return Err(WireError::Inval),
    };
    if header.flags & !(allowed | flag::FUA) != 0 {
        return Err(WireError::Inval);
    }
    let has = |flag| header.flags & flag != 0;
    let fua = has(flag::FUA);
    if header.command == command::FLUSH {
        return Ok(Plan::Flush);
    }
    let is_write = matches!(header.command, command::WRITE | command::WRITE_ZEROES);
    if rules.export.read_only && (is_write || header.command == command::TRIM) {
        return Err(WireError::Perm);
    }
    let range = check_range(header, rules.export, is_write)?;
    match header.command {
        command::READ if has(flag::DF) && !rules.agreed.structured => Err(WireError::Inval),
        command::READ | command::WRITE if header.length_bytes > rules.export.max_bytes => {
            Err(WireError::Inval)
        }
        command::READ => Ok(Plan::Read { range }),
        command::WRITE => Ok(Plan::Write { range, fua }),
        command::TRIM => Ok(Plan::Zero { range, may_unmap: true, fua }),
        command::WRITE_ZEROES if has(flag::FAST_ZERO) && !rules.fast_zero => Err(WireError::NotSup),
        command::WRITE_ZEROES => Ok(Plan::Zero { range, may_unmap: !has(flag::NO_HOLE), fua }),
        command::BLOCK_STATUS if rules.agreed.allocation => {
            Ok(Plan::BlockStatus { range, one: has(flag::REQ_ONE) })
        }
        _not_agreed => Err(WireError::Inval),
    }
}

fn check_range(header: &RequestHeader, export: &Export, is_write: bool) -> Result<ByteRange, WireError> {
    let range = ByteRange::new(header.offset_bytes, u64::from(header.length_bytes));
    let past_end = header
        .offset_bytes
        .checked_add(range.length_bytes)
        .is_none_or(|end_bytes| end_bytes > export.size_bytes);
    if past_end {
        return Err(if is_write { WireError::NoSpc } else { WireError::Inval });
    }
    let sector_bytes = u64::from(export.sector_bytes.max(1));
    let aligned =
        range.offset_bytes.is_multiple_of(sector_bytes) && range.length_bytes.is_multiple_of(sector_bytes);
    if !aligned || range.length_bytes == 0 {
        return Err(WireError::Inval);
    }
    Ok(range)
}

/// The error on the wire for one of the volume's.
pub(super) const fn wire_error(error: RequestError, is_write: bool) -> WireError {
    match error {
        RequestError::Unaligned => WireError::Inval,
        RequestError::PastEnd if is_write => WireError::NoSpc,
        RequestError::PastEnd => WireError::Inval,
        RequestError::NotServing => WireError::Shutdown,
        RequestError::Io => WireError::Io,
        RequestError::TooMany => WireError::NoMem,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 30;

    fn export() -> Export {
        Export {
            name: "vm1".to_owned(),
            is_default: true,
            size_bytes: SIZE,
            sector_bytes: 512,
            preferred_bytes: 4096,
            max_bytes: 1 << 20,
            read_only: false,
        }
    }

    fn header(command: u16, flags: u16, offset_bytes: u64, length_bytes: u32) -> RequestHeader {
        RequestHeader { flags, command, cookie: 1, offset_bytes, length_bytes }
    }

    fn decide(header: RequestHeader) -> Plan {
        let export = export();
        let agreed = Agreed { structured: true, allocation: true };
        plan(&header, &Rules { export: &export, agreed, serving: true, fast_zero: false })
    }

    fn refused(error: WireError, payload_bytes: u32) -> Plan {
        Plan::Refuse { error, payload_bytes }
    }

    #[test]
    fn good_requests_are_carried_out() {
        let range = ByteRange::new(4096, 512);
        assert_eq!(decide(header(command::READ, flag::DF, 4096, 512)), Plan::Read { range });
        assert_eq!(decide(header(command::WRITE, 0, 4096, 512)), Plan::Write { range, fua: false });
        assert_eq!(decide(header(command::WRITE, flag::FUA, 4096, 512)), Plan::Write { range, fua: true });
        assert_eq!(decide(header(command::FLUSH, flag::FUA, 0, 0)), Plan::Flush);
        let zero = |may_unmap, fua| Plan::Zero { range, may_unmap, fua };
        assert_eq!(decide(header(command::TRIM, 0, 4096, 512)), zero(true, false));
        assert_eq!(decide(header(command::WRITE_ZEROES, flag::FUA, 4096, 512)), zero(true, true));
        assert_eq!(decide(header(command::WRITE_ZEROES, flag::NO_HOLE, 4096, 512)), zero(false, false));
        let status = Plan::BlockStatus { range, one: true };
        assert_eq!(decide(header(command::BLOCK_STATUS, flag::REQ_ONE, 4096, 512)), status);
        assert_eq!(decide(header(command::DISC, 0, 0, 0)), Plan::Disconnect);
    }

    #[test]
    fn the_end_of_the_volume_is_the_end() {
        let last = SIZE - 512;
        assert!(matches!(decide(header(command::WRITE, 0, last, 512)), Plan::Write { .. }));
        assert_eq!(decide(header(command::WRITE, 0, last, 1024)), refused(WireError::NoSpc, 1024));
        assert_eq!(decide(header(command::WRITE_ZEROES, 0, last, 1024)), refused(WireError::NoSpc, 0));
        assert_eq!(decide(header(command::READ, 0, last, 1024)), refused(WireError::Inval, 0));
        assert_eq!(decide(header(command::TRIM, 0, last, 1024)), refused(WireError::Inval, 0));
        assert_eq!(decide(header(command::READ, 0, u64::MAX - 511, 1024)), refused(WireError::Inval, 0));
        assert_eq!(
            decide(header(command::WRITE, 0, u64::MAX, u32::MAX)),
            refused(WireError::NoSpc, u32::MAX)
        );
    }

    #[test]
    fn wrong_shapes_are_refused_with_their_payload_skipped() {
        assert_eq!(decide(header(command::WRITE, 0, 1, 512)), refused(WireError::Inval, 512));
        assert_eq!(decide(header(command::WRITE, 0, 512, 100)), refused(WireError::Inval, 100));
        assert_eq!(decide(header(command::WRITE, 0, 0, 0)), refused(WireError::Inval, 0));
        let over = (1 << 20) + 512;
        assert_eq!(decide(header(command::WRITE, 0, 0, over)), refused(WireError::Inval, over));
        assert_eq!(decide(header(command::READ, 0, 0, over)), refused(WireError::Inval, 0));
        assert!(matches!(decide(header(command::TRIM, 0, 0, over)), Plan::Zero { .. }));
        assert_eq!(decide(header(5, 0, 0, 512)), refused(WireError::Inval, 0));
        assert_eq!(decide(header(999, 0, 0, 512)), refused(WireError::Inval, 0));
        assert_eq!(decide(header(command::READ, flag::NO_HOLE, 0, 512)), refused(WireError::Inval, 0));
        assert_eq!(decide(header(command::WRITE, 1 << 15, 0, 512)), refused(WireError::Inval, 512));
        assert_eq!(
            decide(header(command::WRITE_ZEROES, flag::FAST_ZERO, 0, 512)),
            refused(WireError::NotSup, 0)
        );
    }

    #[test]
    fn what_was_not_agreed_or_is_not_allowed_is_refused() {
        let export = Export { read_only: true, ..export() };
        let rules = Rules { export: &export, agreed: Agreed::default(), serving: true, fast_zero: true };
        let decide = |header: RequestHeader| plan(&header, &rules);
        assert_eq!(decide(header(command::READ, flag::DF, 0, 512)), refused(WireError::Inval, 0));
        assert_eq!(decide(header(command::BLOCK_STATUS, 0, 0, 512)), refused(WireError::Inval, 0));
        assert_eq!(decide(header(command::WRITE, 0, 0, 512)), refused(WireError::Perm, 512));
        assert_eq!(decide(header(command::TRIM, 0, 0, 512)), refused(WireError::Perm, 0));
        let away = Rules { serving: false, ..rules };
        assert_eq!(plan(&header(command::WRITE, 0, 0, 512), &away), refused(WireError::Shutdown, 512));
        assert_eq!(plan(&header(command::FLUSH, 0, 0, 0), &away), refused(WireError::Shutdown, 0));
        assert_eq!(plan(&header(command::DISC, 0, 0, 0), &away), Plan::Disconnect);
    }

    proptest! {
        /// Whatever is let through lies inside the volume and is aligned.
        #[test]
        fn nothing_outside_gets_through(command in 0u16..9, flags in 0u16..32, offset: u64, length: u32) {
            let found = decide(header(command, flags, offset, length));
            let range = match found {
                Plan::Read { range } | Plan::Write { range, .. } => {
                    prop_assert!(range.length_bytes <= 1 << 20);
                    range
                }
                Plan::Zero { range, .. } | Plan::BlockStatus { range, .. } => range,
                Plan::Flush | Plan::Disconnect | Plan::Refuse { .. } => return Ok(()),
            };
            prop_assert!(range.length_bytes > 0 && range.end_bytes() <= SIZE);
            prop_assert!(range.offset_bytes % 512 == 0 && range.length_bytes % 512 == 0);
        }
    }
}
