//! The shared secret's file: made once, mode 0600, never overwritten.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use duplex_link::{SECRET_MAX_BYTES, SECRET_MIN_BYTES};

/// Random bytes of a new secret; the file holds them as hex digits.
const SECRET_BYTES: usize = 32;
/// A longer file is not a secret: nobody reads on.
const FILE_MAX_BYTES: u64 = 4096;

/// Why a secret cannot be made or used. Never shows any of it.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It is there already.
    #[error("{} exists already and is not overwritten; name another file, or remove it first if no server uses it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Not there.
    #[error("{} does not exist; make it with `duplex secret new {}` on one server and copy it to the other", path.display(), path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Others may read it.
    #[error("{} has mode {mode:04o}: others can read it; `chmod 600 {}`", path.display(), path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody else owns it.
    #[error("{} belongs to user {owner}; `chown root {}`", path.display(), path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Too short, too long, or no file.
    #[error("{} {what}; make a new one with `duplex secret new FILE`", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What about it.
        what: String,
    },
    /// The system said no.
    #[error("{}: cannot {what}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Which step.
        what: &'static str,
        /// The system's words.
        error: std::io::Error,
    },
}

impl SecretError {
    /// Stable word.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Exists { .. } => "exists",
            Self::Missing { .. } => "missing-file",
            Self::Mode { .. } => "secret-mode",
            Self::Owner { .. } => "secret-owner",
            Self::Content { .. } => "bad-secret",
            Self::Io { .. } => "unreadable",
        }
    }
}

/// Makes a secret, stable on disk, mode 0600.
///
/// # Errors
/// The file exists, or cannot be written.
pub fn create(path: &Path) -> Result<(), SecretError> {
    let failed = |what| move |error| SecretError::Io { path: path.to_owned(), what, error };
    let random: [u8; SECRET_BYTES] = rand::random();
    let mut text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    text.push('\n');
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(SecretError::Exists { path: path.to_owned() });
        }
        Err(error) => return Err(failed("make it")(error)),
    };
    // The umask may have taken rights away, never added any.
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    if let Err(error) = written {
        let _ = std::fs::remove_file(path);
        return Err(failed("write it")(error));
    }
    Ok(())
}

/// Reads a secret: the file's text without surrounding white space. Refuses a file that others can read.
///
/// # Errors
/// See [`SecretError`].
pub fn read(path: &Path) -> Result<Vec<u8>, SecretError> {
    let failed = |what| move |error| SecretError::Io { path: path.to_owned(), what, error };
    let content = |what: String| SecretError::Content { path: path.to_owned(), what };
    // Not a blocking open: somebody may have put a FIFO there.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file: File = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(SecretError::Missing { path: path.to_owned() });
        }
        Err(error) => return Err(failed("open it")(error)),
    };
    let about = file.metadata().map_err(failed("look at it"))?;
    if !about.is_file() {
        return Err(content("is not a regular file".to_owned()));
    }
    let mode = about.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Mode { path: path.to_owned(), mode });
    }
    let me = rustix::process::geteuid().as_raw();
    if about.uid() != 0 && about.uid() != me {
        return Err(SecretError::Owner { path: path.to_owned(), owner: about.uid() });
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed("read it"))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > FILE_MAX_BYTES {
        return Err(content(format!("is larger than {FILE_MAX_BYTES} bytes")));
    }
    let trimmed = bytes.trim_ascii();
    // What the link takes.
    if !(SECRET_MIN_BYTES..=SECRET_MAX_BYTES).contains(&trimmed.len()) {
        let count = trimmed.len();
        return Err(content(format!(
            "has {count} characters, {SECRET_MIN_BYTES} to {SECRET_MAX_BYTES} are taken"
        )));
    }
    Ok(trimmed.to_vec())
}
