//! `resync`: steering it and watching it.

use std::time::Duration;

use duplex_core::ids::ServerName;
use duplex_core::mirror::api;
use duplex_node::control::api::{Answer, Command, Exit};
use duplex_node::control::client::Client;
use duplex_node::control::status::{ResyncRole, State, Status};
use duplex_node::failure::Failure;

use super::{asked, send, show};
use crate::cli::{Common, Priority, ResyncVerb};
use crate::output;
use crate::progress::{Bar, Pace};

/// Between two looks at the progress.
const LOOK_TIME: Duration = Duration::from_millis(250);

pub(crate) async fn resync(
    common: &Common,
    client: &Client,
    verb: Option<ResyncVerb>,
) -> Result<Exit, Failure> {
    let (command, follow) = match verb {
        None => return watch(common, client).await,
        Some(ResyncVerb::Pause) => (Command::ResyncPause, false),
        Some(ResyncVerb::Resume) => (Command::ResyncResume, false),
        Some(ResyncVerb::Priority { priority }) => {
            let priority = match priority {
                Priority::Low => api::Priority::Low,
                Priority::Normal => api::Priority::Normal,
                Priority::High => api::Priority::High,
            };
            (Command::ResyncPriority { priority }, false)
        }
        Some(ResyncVerb::MaxRate { bytes_per_s }) => {
            (Command::ResyncMaxRate { max_bytes_per_s: bytes_per_s }, false)
        }
        Some(ResyncVerb::Start { full, target, follow }) => {
            (Command::ResyncStartFull { volume: full, target: ServerName(target) }, follow)
        }
    };
    if !follow {
        return send(common, client, &command).await;
    }
    let answer = client.command(&command).await.map_err(|error| asked(common, &error))?;
    if matches!(answer, Answer::Ok { .. }) { watch(common, client).await } else { show(common, &answer) }
}

/// Shows the progress until nothing is being copied. Exit 1 when it ends without the pair being mirrored.
async fn watch(common: &Common, client: &Client) -> Result<Exit, Failure> {
    let mut bar = Bar::new(common, "resync");
    let page = loop {
        let page = client.status().await.map_err(|error| asked(common, &error))?;
        let Some((done, all, pace)) = progress(&page) else { break page };
        bar.set(done, all, Some(pace));
        tokio::time::sleep(LOOK_TIME).await;
    };
    bar.finish();
    let mirrored = page.state == State::Mirrored;
    if common.json {
        output::json(&page, true)?;
    } else if mirrored {
        output::line("mirrored: both copies are up to date")?;
    } else {
        let reason = page.reason.as_deref().unwrap_or("no resync is under way");
        output::line(format!("{}: {reason}", page.state))?;
    }
    Ok(if mirrored { Exit::Done } else { Exit::Refused })
}

/// Bytes done, bytes in all, and how it goes, over all volumes.
fn progress(page: &Status) -> Option<(u64, u64, Pace)> {
    let running: Vec<_> = page.volumes.iter().filter_map(|volume| volume.resync.as_ref()).collect();
    let first = running.first()?;
    let all = running.iter().map(|resync| resync.total_bytes).sum();
    let left: u64 = running.iter().map(|resync| resync.left_bytes).sum();
    let pace = Pace {
        rate_bytes_per_s: running.iter().map(|resync| resync.rate_bytes_per_s).sum(),
        eta_s: running.iter().filter_map(|resync| resync.eta_s).max(),
        words: match first.role {
            ResyncRole::Source => format!("to {}, {}", page.peer.server, first.pace),
            ResyncRole::Target => format!("from {}, {}", page.peer.server, first.pace),
        },
    };
    Some((u64::saturating_sub(all, left), all, pace))
}
