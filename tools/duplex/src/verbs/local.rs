//! `check` and `secret`.

use duplex_node::config::environment::{self, Purpose};
use duplex_node::config::{Config, Problems, RunDir, Severity, secret};
use duplex_node::control::api::Exit;
use duplex_node::failure::Failure;
use serde_json::json;

use crate::cli::{Common, SecretVerb};
use crate::output;

pub(crate) fn check(common: &Common, run_dir: &RunDir) -> Result<Exit, Failure> {
    let (problems, config) = match Config::load(&common.config, common.server.as_deref()) {
        Ok(config) => (environment::check(&config, run_dir, Purpose::Check), Some(config)),
        Err(problems) => (problems, None),
    };
    let count = |severity| problems.0.iter().filter(|problem| problem.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    let exit = if problems.has_errors() { Exit::Wrong } else { Exit::Done };
    if common.json {
        let page =
            json!({ "ok": errors == 0, "errors": errors, "warnings": warnings, "problems": problems.0 });
        output::json(&page, true)?;
        return Ok(exit);
    }
    report(&problems);
    let what = match config {
        None => "the machine was not looked at".to_owned(),
        Some(config) => {
            let (me, peer) = (&config.my_server().name, &config.peer_server().name);
            format!(
                "pair {}, this is {me}, the peer is {peer}, {} volumes",
                config.pair,
                config.volumes.len()
            )
        }
    };
    output::line(format!("{}: {errors} errors, {warnings} warnings ({what})", common.config.display()))?;
    Ok(exit)
}

/// Problems go to the standard error, wherever they are found.
pub(crate) fn report(problems: &Problems) {
    if !problems.0.is_empty() {
        eprintln!("{problems}");
    }
}

pub(crate) fn secret(common: &Common, verb: &SecretVerb) -> Result<Exit, Failure> {
    let SecretVerb::New { file } = verb;
    secret::create(file).map_err(|error| match error {
        secret::SecretError::Exists { .. } => Failure::refused(error.to_string()),
        secret::SecretError::Missing { .. }
        | secret::SecretError::Mode { .. }
        | secret::SecretError::Owner { .. }
        | secret::SecretError::Content { .. }
        | secret::SecretError::Io { .. } => Failure::failed(error.to_string()),
    })?;
    if common.json {
        output::json(&json!({ "result": "ok", "file": file }), false)?;
    } else {
        output::line(format!("{}: new secret, mode 0600; copy it to the other server", file.display()))?;
    }
    Ok(Exit::Done)
}
