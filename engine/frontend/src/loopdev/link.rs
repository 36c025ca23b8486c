//! The link by which users name a volume's device.

use std::io;
use std::path::{Path, PathBuf};

/// Why the link is not as it should be.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}; check the directory's owner and space", path.display())]
pub struct LinkError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Path of the volume's link below a directory (`/dev/duplex`, or `RUN_DIR/dev`).
pub fn device_link(directory: &Path, volume: &str) -> PathBuf {
    directory.join(volume)
}

/// Makes (or replaces, at one stroke) the volume's link. Creates the directory where it is missing.
///
/// # Errors
/// [`LinkError`], also when something that is not a link has the name: that is left alone.
pub fn make_device_link(directory: &Path, volume: &str, device: &Path) -> Result<PathBuf, LinkError> {
    let link = device_link(directory, volume);
    let failed = |what: &'static str| {
        let path = link.clone();
        move |source| LinkError { what, path, source }
    };
    std::fs::create_dir_all(directory).map_err(failed("create the directory of"))?;
    if std::fs::symlink_metadata(&link).is_ok_and(|metadata| !metadata.file_type().is_symlink()) {
        let source =
            io::Error::new(io::ErrorKind::AlreadyExists, "something that is not a link has the name");
        return Err(failed("replace")(source));
    }
    let fresh = directory.join(format!(".{volume}.{}", std::process::id()));
    remove_if_there(&fresh).map_err(failed("replace"))?;
    std::os::unix::fs::symlink(device, &fresh).map_err(failed("create"))?;
    if let Err(source) = std::fs::rename(&fresh, &link) {
        // The rename's error is the one to tell.
        let _ = remove_if_there(&fresh);
        return Err(failed("create")(source));
    }
    Ok(link)
}

/// Removes the volume's link, if it (still) points to the device.
///
/// # Errors
/// [`LinkError`]; a link that is not there, or is another device's, is no error.
pub fn remove_device_link(directory: &Path, volume: &str, device: &Path) -> Result<(), LinkError> {
    let link = device_link(directory, volume);
    match std::fs::read_link(&link) {
        Ok(target) if target == device => {
            remove_if_there(&link).map_err(|source| LinkError { what: "remove", path: link, source })
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_made_replaced_and_removed() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("run/dev");
        let (first, second) = (Path::new("/dev/loop900"), Path::new("/dev/loop901"));
        let link = make_device_link(&directory, "v", first).expect("made");
        assert_eq!(std::fs::read_link(&link).expect("a link"), first);
        make_device_link(&directory, "v", second).expect("replaced");
        assert_eq!(std::fs::read_link(&link).expect("a link"), second);
        remove_device_link(&directory, "v", first).expect("not its device");
        assert!(std::fs::read_link(&link).is_ok(), "another device's link was removed");
        remove_device_link(&directory, "v", second).expect("removed");
        assert!(std::fs::read_link(&link).is_err());
        assert_eq!(std::fs::read_dir(&directory).expect("a directory").count(), 0);
    }

    #[test]
    fn a_file_of_the_name_is_left_alone() {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::write(root.path().join("v"), "precious").expect("written");
        let error = make_device_link(root.path(), "v", Path::new("/dev/loop900")).expect_err("refused");
        assert!(error.to_string().contains("not a link"), "{error}");
        assert_eq!(std::fs::read_to_string(root.path().join("v")).expect("there"), "precious");
    }
}
