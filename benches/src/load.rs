//! A small NBD client of our own that does an exact number of writes at a depth, so that calls can be counted for each.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::scratch::next;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const EXPORT_NAME: u32 = 1;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const WRITE: u16 = 1;
const BLOCK_BYTES: u64 = 4096;
const REQUEST_BYTES: usize = 28;
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to an export.
#[derive(Debug)]
pub struct Load {
    stream: UnixStream,
    size_bytes: u64,
    state: u64,
}

impl Load {
    /// Connects and agrees on the export.
    pub fn connect(socket: &Path, export: &str) -> Result<Load> {
        let mut stream =
            UnixStream::connect(socket).with_context(|| format!("{} refuses", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let magics = (number(&greeting[..8]), number(&greeting[8..16]));
        if magics != (MAGIC, OPTION) {
            bail!("{} is no NBD server", socket.display());
        }
        let mut option = 3u32.to_be_bytes().to_vec(); // fixed newstyle, no zeroes behind
        option.extend_from_slice(&OPTION.to_be_bytes());
        option.extend_from_slice(&EXPORT_NAME.to_be_bytes());
        option.extend_from_slice(&u32::try_from(export.len())?.to_be_bytes());
        option.extend_from_slice(export.as_bytes());
        stream.write_all(&option)?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).with_context(|| format!("export {export} is refused"))?;
        let size_bytes = number(&answer[..8]);
        Ok(Load { stream, size_bytes, state: 0x2545_f491_4f6c_dd1d })
    }

    /// Random 4 KiB writes, `depth` of them in flight, until `count` are answered.
    pub fn write(&mut self, count: u64, depth: u64) -> Result<()> {
        let (mut asked, mut answered) = (0, 0);
        let mut reply = [0; 16];
        while answered < count {
            let mut batch = Vec::new();
            while asked < count && asked - answered < depth {
                self.request(asked, &mut batch);
                asked += 1;
            }
            self.stream.write_all(&batch)?;
            self.stream.read_exact(&mut reply)?;
            let (magic, error) = (number(&reply[..4]), number(&reply[4..8]));
            if (magic, error) != (u64::from(REPLY), 0) {
                bail!("an answer began with {magic:#x}, error {error}");
            }
            answered += 1;
        }
        Ok(())
    }

    fn request(&mut self, cookie: u64, batch: &mut Vec<u8>) {
        let block = next(&mut self.state) % (self.size_bytes / BLOCK_BYTES);
        let end = batch.len() + REQUEST_BYTES + BLOCK_BYTES as usize;
        batch.extend_from_slice(&REQUEST.to_be_bytes());
        batch.extend_from_slice(&0u16.to_be_bytes());
        batch.extend_from_slice(&WRITE.to_be_bytes());
        batch.extend_from_slice(&cookie.to_be_bytes());
        batch.extend_from_slice(&(block * BLOCK_BYTES).to_be_bytes());
        batch.extend_from_slice(&u32::try_from(BLOCK_BYTES).expect("a block is small").to_be_bytes());
        batch.resize(end, (cookie % 251) as u8 + 1);
    }
}

/// Big-endian, up to 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_are_big_endian() {
        assert_eq!(number(&[1, 2]), 258);
    }
}
