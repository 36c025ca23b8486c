//! Load as the product makes it: one process, one io_uring with SINGLE_ISSUER and DEFER_TASKRUN, an exclusive open with
//! an OFD lock, direct writes. To see how long a killed one holds its device.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};

const BLOCK: usize = 4096;

#[repr(align(4096))]
struct Page([u8; BLOCK]);

/// Writes for ever, `depth` blocks at once.
pub fn run(device: &Path, depth: u32) -> Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_EXCL)
        .open(device)
        .with_context(|| format!("{} cannot be opened exclusively", device.display()))?;
    lock(&file)?;
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(depth.max(1).next_power_of_two())?;
    let pages: Vec<Box<Page>> = (0..depth).map(|number| Box::new(Page([number as u8; BLOCK]))).collect();
    for number in 0..depth {
        push(&mut ring, &file, &pages, number)?;
    }
    loop {
        ring.submit_and_wait(1)?;
        let done: Vec<(u64, i32)> =
            ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (number, result) in done {
            if result < 0 {
                bail!("a write failed: {}", std::io::Error::from_raw_os_error(-result));
            }
            push(&mut ring, &file, &pages, number as u32)?;
        }
    }
}

/// An OFD lock on the whole device, as the product takes it.
fn lock(file: &File) -> Result<()> {
    // SAFETY: flock is plain integers; all zero is a valid value.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: the argument is a flock that lives over the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if result < 0 { Err(std::io::Error::last_os_error()).context("F_OFD_SETLK") } else { Ok(()) }
}

fn push(ring: &mut IoUring, file: &File, pages: &[Box<Page>], number: u32) -> Result<()> {
    let page = &pages[number as usize];
    let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), page.0.as_ptr(), BLOCK as u32)
        .offset(u64::from(number) * BLOCK as u64)
        .build()
        .user_data(u64::from(number));
    // SAFETY: the page lives as long as the process, which never leaves `run` while writes are in flight but to end.
    unsafe { ring.submission().push(&entry) }.context("the submission queue is full")
}
