//! `create`, `dump` and `compare`.

use std::path::Path;

use duplex_node::config::{Config, RunDir, Volume};
use duplex_node::control::api::{Answer, Command, Exit};
use duplex_node::control::client::{Client, ClientError};
use duplex_node::failure::Failure;
use duplex_node::offline::{self, DataArea, Saved};
use serde_json::json;

use super::{asked, block_on, show};
use crate::cli::{Common, Create, Dump};
use crate::output;
use crate::progress::Bar;

fn volume<'a>(config: &'a Config, name: &str) -> Result<&'a Volume, Failure> {
    config.volume(name).map(|(_, volume)| volume).ok_or_else(|| {
        let known: Vec<&str> = config.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let file = config.file.display();
        Failure::wrong(format!("{file}: there is no volume \"{name}\"; volumes: {}", known.join(", ")))
    })
}

pub(crate) fn create(common: &Common, options: &Create) -> Result<Exit, Failure> {
    let config = Config::load(&common.config, common.server.as_deref())?;
    let volumes: Result<Vec<&Volume>, Failure> =
        options.volumes.iter().map(|name| volume(&config, name)).collect();
    let volumes = volumes?;
    let area = match (options.overwrite_data, options.keep_data) {
        (true, _) => DataArea::Overwrite,
        (false, true) => DataArea::Keep,
        (false, false) => DataArea::MustBeEmpty,
    };
    let mut made = Vec::new();
    for volume in volumes {
        let mut bar = Bar::new(common, &format!("create {}", volume.name));
        let text = offline::create(&config, volume, area, &mut |done, all| bar.set(done, all, None));
        bar.finish();
        let text = text?;
        if !common.json {
            output::line(&text)?;
        }
        made.push(json!({ "volume": volume.name, "text": text }));
    }
    if common.json {
        output::json(&json!({ "result": "ok", "volumes": made }), true)?;
    }
    Ok(Exit::Done)
}

pub(crate) fn dump(common: &Common, run_dir: &RunDir, options: &Dump) -> Result<Exit, Failure> {
    if let Some(file) = &options.saved {
        let what = match (options.extract, &options.onto) {
            (Some((offset_bytes, length_bytes)), _) => Saved::Extract { offset_bytes, length_bytes },
            (None, Some(onto)) => Saved::Onto(onto.clone()),
            (None, None) => Saved::List,
        };
        let (text, data) = offline::dump_saved(file, &what)?;
        // What was extracted is on the standard output already.
        return match what {
            Saved::Extract { .. } => Ok(Exit::Done),
            Saved::List | Saved::Onto(_) => show(common, &Answer::Ok { text, data: Some(data) }),
        };
    }
    let name = options.volume.clone().unwrap_or_default();
    let client = Client::new(run_dir);
    let command = Command::Dump { volume: name.clone() };
    match block_on(async { client.command(&command).await })? {
        Ok(answer) => show(common, &answer),
        // Without a daemon the backing is read here.
        Err(ClientError::NoDaemon { .. }) => {
            let config = Config::load(&common.config, common.server.as_deref())?;
            let (text, data) = offline::dump(&config, volume(&config, &name)?)?;
            show(common, &Answer::Ok { text, data: Some(data) })
        }
        Err(error) => Err(asked(common, &error)),
    }
}

pub(crate) fn compare(common: &Common, a: &Path, b: &Path) -> Result<Exit, Failure> {
    let mut bar = Bar::new(common, "compare");
    let found = offline::compare(a, b, &mut |done, all| bar.set(done, all, None));
    bar.finish();
    let found = found?;
    let exit = if found.equal() { Exit::Done } else { Exit::Refused };
    if common.json {
        output::json(&found, true)?;
        return Ok(exit);
    }
    if found.equal() {
        output::line(format!("equal: {} bytes", found.compared_bytes))?;
        return Ok(exit);
    }
    output::line(format!("{} blocks of {} bytes differ:", found.differing_blocks, 4096))?;
    for range in &found.ranges {
        output::line(format!("  {range}"))?;
    }
    Ok(exit)
}
