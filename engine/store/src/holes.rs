//! What is known of the holes of a backing: a hole reads as zeroes, and nobody has to read it to know.
//!
//! The kernel is asked by `lseek(SEEK_DATA)`, on the volume's thread: io_uring has no such operation, and a thread of its
//! own would cost more than it takes. It does not wait for the disk as reads do: on data it answers at once, over a hole
//! it jumps from one extent to the next. Never `SEEK_HOLE`: that one walks all the data there is. What takes long is a
//! file allocated in full and never written (a million extents, half a second): so the answer is kept until a
//! write into it makes it shorter, and the extents are walked once.
//!
//! A block device does not say where its holes are: there nothing is known. Nor is anything known past the end that the
//! file has now: somebody may have cut it since it was opened, and what was cut off reads as an error, not as zeroes.

use std::os::fd::BorrowedFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The hole found last.
#[derive(Debug, Default)]
pub(crate) struct Holes {
    /// First byte and one past the last, of the backing.
    known: Option<(u64, u64)>,
    /// The backing cannot tell.
    blind: bool,
}

impl Holes {
    /// Of a backing that was just opened.
    pub(crate) fn new(is_device: bool) -> Self {
        Self { known: None, blind: is_device }
    }

    /// How many bytes from `at` on are a hole, at most `length`. `writing`: writes in the kernel's hands, first byte and one
    /// past the last; whatever the file says, those are no hole.
    pub(crate) fn zeroes(
        &mut self,
        fd: BorrowedFd<'_>,
        (at, length): (u64, u64),
        end: u64,
        writing: impl Iterator<Item = (u64, u64)>,
    ) -> u64 {
        if self.blind || length == 0 {
            return 0;
        }
        let end = end.min(self.bytes_now(fd));
        let known = self.known.filter(|(first, until)| *first <= at && at < *until);
        let (_, until) = match known {
            Some(known) => known,
            None => {
                let asked = self.ask(fd, at, end);
                let under_way = writing.filter(|(_, after)| *after > at).map(|(first, _)| first.max(at));
                let until = under_way.fold(asked, u64::min);
                // Data right here is no reason to forget the hole that others ask for.
                if until > at {
                    self.known = Some((at, until));
                }
                (at, until)
            }
        };
        until.min(end).saturating_sub(at).min(length)
    }

    /// The file's size; 0 where it is not told.
    fn bytes_now(&mut self, fd: BorrowedFd<'_>) -> u64 {
        let size = rustix::fs::fstat(fd).ok().and_then(|stat| u64::try_from(stat.st_size).ok());
        self.blind |= size.is_none();
        size.unwrap_or(0)
    }

    /// A write begins.
    pub(crate) fn written(&mut self, at: u64, length: u64) {
        if let Some((first, until)) = self.known.filter(|(first, until)| at < *until && at + length > *first)
        {
            self.known = (at > first).then_some((first, until.min(at)));
        }
    }

    fn ask(&mut self, fd: BorrowedFd<'_>, at: u64, end: u64) -> u64 {
        match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(data) => data.max(at),
            // Nothing but a hole up to the end, if that is still behind this place.
            Err(Errno::NXIO) => end.max(at),
            Err(_) => {
                self.blind = true;
                at
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// An empty file with no name.
    fn file_of(name: &str, bytes: u64) -> std::fs::File {
        let path = std::env::temp_dir().join(format!("duplex-holes-{name}-{}", std::process::id()));
        let file = std::fs::File::options().write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(bytes).unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    #[test]
    fn what_was_cut_off_is_no_hole() {
        let file = file_of("cut", 64 * MIB);
        let mut asked_before = Holes::default();
        let ask = |holes: &mut Holes, at: u64| {
            holes.zeroes(file.as_fd(), (at, 32 * MIB), 64 * MIB, std::iter::empty())
        };
        assert_eq!(ask(&mut asked_before, 0), 32 * MIB);
        file.set_len(4 * MIB).unwrap();
        let mut asked_after = Holes::default();
        for holes in [&mut asked_before, &mut asked_after] {
            assert_eq!(ask(holes, 0), 4 * MIB, "up to the new end");
            assert_eq!(ask(holes, 4 * MIB), 0, "right at the new end");
            assert_eq!(ask(holes, 20 * MIB), 0, "past the new end");
        }
        file.set_len(64 * MIB).unwrap();
        assert_eq!(ask(&mut asked_after, 20 * MIB), 32 * MIB, "it is there again");
    }

    #[test]
    fn of_a_device_nothing_is_known() {
        let file = file_of("device", MIB);
        let mut holes = Holes::new(true);
        assert_eq!(holes.zeroes(file.as_fd(), (0, MIB), MIB, std::iter::empty()), 0);
    }

    #[test]
    fn a_hole_is_known_until_it_is_written() {
        let file = file_of("written", 64 * MIB);
        file.write_all_at(&[1; 4096], 8 * MIB).unwrap();
        let mut holes = Holes::default();
        let ask = |holes: &mut Holes, at: u64, writing: &[(u64, u64)]| {
            holes.zeroes(file.as_fd(), (at, 32 * MIB), 64 * MIB, writing.iter().copied())
        };
        assert_eq!(ask(&mut holes, 0, &[]), 8 * MIB);
        assert_eq!(ask(&mut holes, 8 * MIB, &[]), 0);
        assert_eq!(ask(&mut holes, 7 * MIB, &[]), MIB);
        holes.written(3 * MIB, 4096);
        assert_eq!(ask(&mut holes, MIB, &[]), 2 * MIB, "shorter by the write");
        assert_eq!(ask(&mut holes, 16 * MIB, &[(20 * MIB, 21 * MIB), (4 * MIB, 5 * MIB)]), 4 * MIB);
        assert_eq!(ask(&mut holes, 20 * MIB, &[(19 * MIB, 21 * MIB)]), 0, "a write is under way there");
        assert_eq!(ask(&mut holes, 60 * MIB, &[]), 4 * MIB, "up to the end");
        holes.written(59 * MIB, 2 * MIB);
        assert_eq!(holes.known, None);
    }
}
