//! Bytes on disk: what stands where, checksummed, versioned. Pure functions between structs and bytes.

pub mod record;
