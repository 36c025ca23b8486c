//! `status`.

use duplex_node::control::api::Exit;
use duplex_node::control::client::Client;
use duplex_node::failure::Failure;

use super::asked;
use crate::cli::{self, Common};
use crate::output::{self, Paint};
use crate::render;

pub(crate) async fn status(common: &Common, client: &Client, options: &cli::Status) -> Result<Exit, Failure> {
    let page = match options.wait {
        None => match options.timeout {
            None => client.status().await,
            Some(timeout) => match tokio::time::timeout(timeout, client.status()).await {
                Ok(page) => page,
                Err(_) => {
                    return Err(Failure {
                        exit: Exit::TimedOut,
                        text: "the daemon does not answer".to_owned(),
                    });
                }
            },
        },
        Some(wait) => client.wait(wait, options.timeout).await,
    };
    let page = page.map_err(|error| asked(common, &error))?;
    if common.json {
        output::json(&page, true)?;
    } else {
        output::line(render::status(&page, Paint::stdout()))?;
    }
    Ok(Exit::Done)
}
