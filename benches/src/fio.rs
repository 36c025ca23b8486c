//! fio as a client over NBD on a Unix socket, the same for every server.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Writes a second.
    pub iops: f64,
    /// Writes in all.
    pub writes: u64,
    /// Half of the writes took at most this, in microseconds.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// Processor time of the servers for one write, in microseconds.
    pub cpu_us: f64,
}

/// Random 4 KiB writes at a depth for so many seconds; `pids` are the servers whose time is counted.
pub fn random_writes(
    socket: &Path,
    export: &str,
    size_bytes: u64,
    depth: u32,
    seconds: f64,
    pids: &[u32],
) -> Result<Sample> {
    let before = crate::process::cpu_us(pids)?;
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    let mut command = Command::new("fio");
    command.args(["--name=writes", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--output-format=json"]);
    command.args(["--time_based", "--randrepeat=0", "--norandommap", "--refill_buffers"]);
    command.arg(format!("--uri={uri}")).arg(format!("--iodepth={depth}"));
    command.arg(format!("--runtime={}ms", (seconds * 1000.0).round()));
    command.arg(format!("--size={size_bytes}"));
    let output = command.output().context("fio cannot be started")?;
    let used = crate::process::cpu_us(pids)?.saturating_sub(before);
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("fio on {uri} failed: {}{text}", String::from_utf8_lossy(&output.stderr));
    }
    sample(&text, used)
}

fn sample(text: &str, used_us: u64) -> Result<Sample> {
    // Notes may stand before the object.
    let start = text.find('{').with_context(|| format!("fio printed no JSON: {text}"))?;
    let page: Value = serde_json::from_str(&text[start..]).context("fio printed broken JSON")?;
    let job = &page["jobs"][0];
    if job["error"].as_i64() != Some(0) {
        bail!("fio saw an error: {}", job["error"]);
    }
    let write = &job["write"];
    let percentile = |name: &str| {
        write["clat_ns"]["percentile"][name].as_f64().map(|ns| ns / 1000.0).context("fio gave no percentiles")
    };
    let writes = write["total_ios"].as_u64().filter(|count| *count > 0).context("fio wrote nothing")?;
    Ok(Sample {
        iops: write["iops"].as_f64().context("fio gave no rate")?,
        writes,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        cpu_us: used_us as f64 / writes as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_an_error_in_it_is_one() {
        let report = |error: i32| {
            format!(
                r#"note
                {{"jobs": [{{"error": {error}, "write": {{"iops": 10.5, "total_ios": 100,
                "clat_ns": {{"percentile": {{"50.000000": 2000, "99.000000": 9000}}}}}}}}]}}"#
            )
        };
        let found = sample(&report(0), 5000).expect("read");
        assert_eq!(found, Sample { iops: 10.5, writes: 100, p50_us: 2.0, p99_us: 9.0, cpu_us: 50.0 });
        assert!(sample(&report(5), 0).is_err());
        assert!(sample("nothing", 0).is_err());
    }
}
