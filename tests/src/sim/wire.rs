//! The wire carries the bytes the link would send, made and parsed by the shipped codec.

use duplex_core::ids::VolumeIndex;
use duplex_core::message::{ControlMessage, VolumeMessage};
use duplex_link::codec::{decode_volume_frame, encode_volume_frame};
use duplex_link::control::{ControlWord, decode_control_frame, encode_control};
use duplex_link::frame::{Channel, Routing};

use super::page::{self, PAGE_BYTES, Page};

/// A frame of a volume's data channel.
///
/// # Errors
/// What the codec says.
pub fn volume_frame(
    volume: usize,
    sequence: u64,
    message: &VolumeMessage,
    pages: &[Page],
) -> Result<Vec<u8>, String> {
    let bytes = usize::try_from(message.payload_bytes()).map_err(|error| error.to_string())?;
    let mut payload = vec![0; bytes];
    for (place, page) in payload.chunks_mut(PAGE_BYTES).zip(pages) {
        if let Some(page) = page {
            place.copy_from_slice(&page[..place.len()]);
        }
    }
    let index = u16::try_from(volume).map_err(|error| error.to_string())?;
    let routing = Routing { channel: Channel::Volume(VolumeIndex(index)), sequence, ack: 0 };
    encode_volume_frame(message, &payload, routing).map_err(|error| error.to_string())
}

/// The message and payload of such a frame.
///
/// # Errors
/// What the codec says.
pub fn parse_volume(frame: &[u8]) -> Result<(VolumeMessage, Vec<Page>), String> {
    let (_, message, payload) = decode_volume_frame(frame).map_err(|error| error.to_string())?;
    Ok((message, payload.chunks(PAGE_BYTES).map(page::from_bytes).collect()))
}

/// A frame of the control channel.
///
/// # Errors
/// What the codec says.
pub fn control_frame(sequence: u64, message: &ControlMessage) -> Result<Vec<u8>, String> {
    encode_control(message, sequence, 0).map_err(|error| error.to_string())
}

/// The message of such a frame.
///
/// # Errors
/// What the codec says.
pub fn parse_control(frame: &[u8]) -> Result<ControlMessage, String> {
    match decode_control_frame(frame).map_err(|error| error.to_string())?.1 {
        ControlWord::Message(message) => Ok(message),
        ControlWord::Link(word) => Err(format!("a word of the link on the core's channel: {word:?}")),
    }
}
