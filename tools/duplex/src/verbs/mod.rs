//! What each verb does.

#[cfg(feature = "crash-at")]
mod crash;
mod events;
mod local;
mod offline;
mod resync;
mod status;

use duplex_core::ids::ServerName;
use duplex_node::config::RunDir;
use duplex_node::control::api::{Answer, Command, Exit, PromoteMode};
use duplex_node::control::client::{Client, ClientError};
use duplex_node::failure::Failure;
use duplex_node::{daemon, holder};

use crate::cli::{self, Cli, Common, Verb};
use crate::{demo, generate, logging, output};

/// Runs a verb.
pub(crate) fn run(cli: Cli) -> Result<Exit, Failure> {
    let common = cli.common;
    let run_dir = RunDir::new(&common.run_dir);
    if !matches!(cli.verb, Verb::Daemon(_) | Verb::Holder | Verb::Demo(_)) {
        output::end_with_the_reader();
    }
    let client = Client::new(&run_dir);
    let tell = |command: Command| block_on(send(&common, &client, &command))?;
    match cli.verb {
        Verb::Check => local::check(&common, &run_dir),
        Verb::Secret { verb } => local::secret(&common, &verb),
        Verb::Create(options) => offline::create(&common, &options),
        Verb::Compare { file_a, file_b } => offline::compare(&common, &file_a, &file_b),
        Verb::Dump(options) => offline::dump(&common, &run_dir, &options),
        Verb::Generate { kind, dir } => generate::generate(kind, &dir).map(|()| Exit::Done),
        Verb::Daemon(options) => {
            #[cfg(feature = "crash-at")]
            if !crash::arm(options.crash)? {
                return Ok(Exit::Done);
            }
            logging::begin(options.log);
            let options = daemon::Options { config: common.config, server: common.server, run_dir };
            daemon::run(&options).map(|()| Exit::Done)
        }
        Verb::Holder => holder::run(&holder::Options { run_dir }).map(|()| Exit::Done),
        Verb::Demo(options) => demo::run(&common, &options).map(|()| Exit::Done),
        Verb::Status(options) => block_on(status::status(&common, &client, &options))?,
        Verb::Events(options) => block_on(events::events(&common, &client, &options))?,
        Verb::Resync { verb } => block_on(resync::resync(&common, &client, verb))?,
        Verb::Activate => tell(Command::Activate),
        Verb::Promote(options) => tell(Command::Promote { mode: mode(&options) }),
        Verb::Demote(options) => tell(Command::Demote { force: options.force }),
        Verb::Switchover(options) => tell(Command::Switchover { force: options.force }),
        Verb::Connect => tell(Command::Connect),
        Verb::Disconnect => tell(Command::Disconnect),
        Verb::Detach(name) => tell(Command::Detach { volume: name.volume }),
        Verb::Attach(name) => tell(Command::Attach { volume: name.volume }),
        Verb::Explain { volume } => tell(Command::Explain { volume }),
        Verb::Resolve { victim } => tell(Command::Resolve { victim: ServerName(victim) }),
        Verb::Down => tell(Command::Down),
        Verb::Witness(_) => later("witness"),
        Verb::Switchback(_) => later("switchback"),
        Verb::Clear(_) => later("clear"),
        Verb::Verify(_) => later("verify"),
        Verb::Top(_) => later("top"),
    }
}

fn later(verb: &str) -> Result<Exit, Failure> {
    Err(Failure::wrong(format!("duplex {verb} is not in this version; `duplex --help` lists what is")))
}

const fn mode(options: &cli::Promote) -> PromoteMode {
    match (options.peer_is_down, options.force) {
        (_, Some(generation)) => PromoteMode::Force(generation),
        (true, None) => PromoteMode::PeerIsDown,
        (false, None) => PromoteMode::Plain,
    }
}

/// One thread is enough to ask one question.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed(format!("cannot begin: {error}")))?;
    Ok(runtime.block_on(work))
}

/// Sends a command and shows its answer.
pub(crate) async fn send(common: &Common, client: &Client, command: &Command) -> Result<Exit, Failure> {
    let answer = client.command(command).await.map_err(|error| asked(common, &error))?;
    show(common, &answer)
}

/// Shows an answer: what is done on the standard output, what is not on the standard error.
pub(crate) fn show(common: &Common, answer: &Answer) -> Result<Exit, Failure> {
    if common.json {
        output::json(answer, true)?;
        return Ok(answer.exit());
    }
    match answer {
        Answer::Ok { text, .. } => output::line(text)?,
        Answer::Refused { code, text } => eprintln!("refused ({code}): {text}"),
        Answer::Wrong { text } => eprintln!("wrong: {text}"),
        Answer::TimedOut { text } => eprintln!("timed out: {text}"),
        Answer::Stopping { text } | Answer::Failed { text } => eprintln!("{text}"),
    }
    Ok(answer.exit())
}

/// Why there is no answer. With `--json` a refusal is an object on the standard output too.
pub(crate) fn asked(common: &Common, error: &ClientError) -> Failure {
    if common.json
        && let ClientError::Answered(answer) = error
    {
        let _ = output::json(answer, true);
    }
    let text = match error {
        ClientError::Answered(Answer::Refused { code, text }) => format!("refused ({code}): {text}"),
        ClientError::Answered(_)
        | ClientError::NoDaemon { .. }
        | ClientError::NoPermission { .. }
        | ClientError::Lost(_)
        | ClientError::Unreadable(_) => error.to_string(),
    };
    Failure { exit: error.exit(), text }
}
