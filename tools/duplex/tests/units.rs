//! The systemd unit: verified by systemd's own tool, and what the daemon relies on is in it.

use std::path::Path;
use std::process::Command;

#[test]
fn the_unit_is_right() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist/systemd/duplex.service");
    let text = std::fs::read_to_string(source).expect("the unit");
    for line in [
        "Type=notify",
        "WatchdogSec=",
        "FileDescriptorStoreMax=",
        "KillMode=process",
        "RestartPreventExitStatus=2",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line}");
    }
    for namespace in
        ["PrivateMounts", "PrivateTmp", "PrivateDevices", "ProtectSystem", "ProtectHome", "ReadOnlyPaths"]
    {
        assert!(!text.contains(namespace), "{namespace} makes a mount namespace");
    }
    let command =
        text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/duplex ")).expect("ExecStart");
    let help = Command::new(env!("CARGO_BIN_EXE_duplex")).args([command, "--help"]).output().expect("run");
    assert!(help.status.success(), "the unit starts a verb that exists: {command}");

    let dir = tempfile::tempdir().expect("directory");
    let unit = dir.path().join("duplex.service");
    std::fs::write(&unit, text.replace("/usr/bin/duplex", env!("CARGO_BIN_EXE_duplex"))).expect("written");
    let verified = match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output() {
        Ok(output) => output,
        // A machine without systemd has nothing to verify it with; its text was looked at above.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => panic!("systemd-analyze: {error}"),
    };
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("duplex")).collect();
    assert!(verified.status.success() && ours.is_empty(), "{said}");
}
