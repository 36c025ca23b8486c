//! `duplex daemon --crash-at NAME` of test builds.

use duplex_core::boundary::Boundary;
use duplex_node::crash_at::{self, CrashAt};
use duplex_node::failure::Failure;

use crate::cli::Crash;
use crate::output;

/// Arms the process; false when only the list was asked for.
pub(crate) fn arm(crash: Crash) -> Result<bool, Failure> {
    if crash.crash_at.as_deref() == Some("help") {
        for boundary in Boundary::ALL {
            output::line(format!("{:<32} {}", boundary.name(), boundary.text()))?;
        }
        return Ok(false);
    }
    let at = crash.crash_at.as_deref().map(CrashAt::parse_place).transpose();
    crash_at::arm(CrashAt {
        at: at.map_err(|text| Failure::wrong(format!("--crash-at: {text}")))?,
        how: crash.crash_how,
        armed_by: crash.crash_armed_by,
        marker: crash.crash_marker,
        lose_log_writes: crash.lose_log_writes,
    });
    Ok(true)
}
