//! From the crash back to a mirrored pair, and what must be true then.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::points::{How, Role};
use super::scene::Scene;
use crate::lab::history::Floor;
use crate::lab::nbd::Nbd;
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::writer::{Load, lock, verify_client};
use crate::lab::{Server, wait};

/// Nobody serves for this long: the operator helps.
const LONELY: Duration = Duration::from_secs(2);
/// Requests of a client that finds the pair healed.
const REQUESTS: u64 = 60;

impl Scene {
    /// Drives the pair back to mirrored and judges it; says which of the operator's verbs were needed.
    pub(super) fn recover(&mut self, floor: Floor) -> Result<Vec<String>> {
        let mut typed = Vec::new();
        let mut judged = self.point.how == How::Power && self.take_over(floor, &mut typed)?;
        self.come_back().context("the crashed server does not come back")?;
        for server in [&mut self.pair.alpha, &mut self.pair.beta] {
            if server.host().is_err() {
                server.boot(false)?;
                server.start_daemon()?;
            }
        }
        // A client that still writes is judged at its end.
        judged |= self.load.is_some();
        let mut lonely_since = Instant::now();
        wait::until("the pair to be mirrored again", LIMIT, || {
            let (Ok(alpha), Ok(beta)) = (self.pair.alpha.status(), self.pair.beta.status()) else {
                return Ok(None);
            };
            let words = |at: &str| [&alpha, &beta].map(|s| s[at].as_str().unwrap_or("-").to_owned());
            let (states, roles) = (words("state"), words("role"));
            ensure!(!states.contains(&"refused".to_owned()), "they refuse each other: {alpha} {beta}");
            match roles.iter().position(|role| role == "primary") {
                Some(at) => {
                    lonely_since = Instant::now();
                    let server = if at == 0 { &self.pair.alpha } else { &self.pair.beta };
                    if !judged {
                        if Nbd::unix(&server.nbd(), VOLUME, LIMIT).is_err() {
                            // It has the role, and is not yet allowed to serve.
                            return Ok(None);
                        }
                        verify_client(&server.nbd(), VOLUME, &self.history, floor)
                            .context("the first reads after the crash")?;
                        judged = true;
                    }
                    Ok((states == ["mirrored", "mirrored"]).then_some(()))
                }
                None if lonely_since.elapsed() > LONELY => {
                    typed.extend(promote(&self.pair.alpha)?.or(promote(&self.pair.beta)?));
                    lonely_since = Instant::now();
                    Ok(None)
                }
                None => Ok(None),
            }
        })?;
        self.end_load()?;
        self.judge()?;
        Ok(typed)
    }

    /// The crashed server stays away: the operator makes the other one primary, where it holds everything.
    fn take_over(&mut self, floor: Floor, typed: &mut Vec<String>) -> Result<bool> {
        let survivor = match self.point.role {
            Role::OldPrimary | Role::RestartedPrimary => &self.pair.beta,
            Role::NewPrimary => &self.pair.alpha,
            Role::Primary
            | Role::Secondary
            | Role::Source
            | Role::IdleSource
            | Role::Target
            | Role::RestartedAlone
            | Role::RestartedSecondary => return Ok(false),
        };
        let needed = wait::until("the survivor to take over", LIMIT, || {
            if survivor.status_word("/role")? == "primary" {
                // The role was its own already.
                return Ok(Some(false));
            }
            let output = survivor.cli(&["promote", "--peer-is-down"])?;
            // Until it notices that the peer is gone.
            let early = output.text().contains("peer-is-heard");
            ensure!(output.success() || early, "promote --peer-is-down: {}", output.text());
            Ok(output.success().then_some(true))
        })?;
        if !needed {
            return Ok(false);
        }
        typed.push(format!("promote --peer-is-down on {}", survivor.name()));
        verify_client(&survivor.nbd(), VOLUME, &self.history, floor)
            .context("the first reads after the takeover")?;
        self.write_some("while the other one is away")?;
        Ok(true)
    }

    /// A client writes a little where the primary is.
    fn write_some(&mut self, when: &str) -> Result<()> {
        let bits = self.seed.bits();
        let load = Load { requests: Some(REQUESTS), ..Load::everywhere(bits, &*lock(&self.history)?) };
        let is_primary = |server: &Server| {
            server.host().is_ok() && server.status_word("/role").is_ok_and(|role| role == "primary")
        };
        let primary = [&self.pair.alpha, &self.pair.beta].into_iter().find(|server| is_primary(server));
        let primary = primary.context("nobody is primary")?;
        let finished = primary.client(&self.history, load)?.join()?;
        let fine = finished.broken.is_none() && finished.errors.is_empty();
        ensure!(fine, "writes after the crash, {when}: {finished:?}");
        Ok(())
    }

    /// Both copies are equal, and hold what the history allows.
    fn judge(&mut self) -> Result<()> {
        self.write_some("once mirrored again")?;
        self.pair.assert_equal()?;
        let roles = [&self.pair.alpha, &self.pair.beta].map(|server| server.status_word("/role"));
        let primary = match roles {
            [Ok(a), _] if a == "primary" => &self.pair.alpha,
            [_, Ok(b)] if b == "primary" => &self.pair.beta,
            other => bail!("nobody is primary: {other:?}"),
        };
        verify_client(&primary.nbd(), VOLUME, &self.history, Floor::Acknowledged)
            .context("the last reads")?;
        Ok(())
    }
}

/// `promote`; what was typed, if it was done.
fn promote(server: &Server) -> Result<Option<String>> {
    let output = server.cli(&["promote"])?;
    Ok(output.success().then(|| format!("promote on {}", server.name())))
}
