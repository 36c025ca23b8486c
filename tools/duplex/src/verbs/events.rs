//! `events`.

use duplex_node::control::api::Exit;
use duplex_node::control::client::Client;
use duplex_node::control::status::Time;
use duplex_node::failure::Failure;

use super::asked;
use crate::cli::{self, Common};
use crate::output::{self, Paint};
use crate::render;

pub(crate) async fn events(common: &Common, client: &Client, options: &cli::Events) -> Result<Exit, Failure> {
    let paint = Paint::stdout();
    let mut unwritten = None;
    let ended = client.events(options.since.map(Time), options.follow, |record| {
        let written = if common.json {
            output::json(&record, false)
        } else {
            output::line(render::event(&record, paint))
        };
        unwritten = written.err();
        unwritten.is_none()
    });
    ended.await.map_err(|error| asked(common, &error))?;
    match unwritten {
        Some(failure) => Err(failure),
        None => Ok(Exit::Done),
    }
}
