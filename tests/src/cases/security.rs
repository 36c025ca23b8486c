//! SEC: strangers, other users, open ports, altered bytes.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Case, Stage, client, says, verify, write_some};
use crate::lab::disk::process::program;
use crate::lab::history::Floor;
use crate::lab::host::Output;
use crate::lab::pair::{LIMIT, LINK_PORT};
use crate::lab::{Pair, PairOptions, Relay, Seed, Server, wait};

/// Where a relay listens.
const RELAY_PORT: u16 = 7799;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "SEC-1",
        sabotage: "the stranger is given the right secret",
        run: stranger,
        ends_mirrored: false,
        limit_s: 240,
    },
    Case {
        name: "SEC-3",
        sabotage: "the other user is root",
        run: control_socket,
        ends_mirrored: true,
        limit_s: 120,
    },
    Case {
        name: "SEC-4",
        sabotage: "the configuration opens an NBD port",
        run: listening_surface,
        ends_mirrored: true,
        limit_s: 120,
    },
    Case {
        name: "SEC-5",
        sabotage: "the relay flips nothing",
        run: altered_on_the_wire,
        ends_mirrored: true,
        limit_s: 300,
    },
];

/// Relays in front of both link ports; a server's own address stays what it was.
fn tap(pair: &Pair) -> Result<[Relay; 2]> {
    let start = |server: &Server, host: u8| -> Result<Relay> {
        let address = |port: u16| format!("10.9.0.{host}:{port}").parse().context("an address");
        let relay = Relay::start(server.network(), address(RELAY_PORT)?, address(LINK_PORT)?)?;
        server.network().redirect("mir", LINK_PORT, RELAY_PORT)?;
        Ok(relay)
    };
    Ok([start(&pair.alpha, 1)?, start(&pair.beta, 2)?])
}

fn stranger(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let pair = stage.pair(PairOptions::default())?;
    let relays = tap(pair)?;
    pair.start_mirrored()?;
    let history = super::history_of(pair)?;
    write_some(&pair.alpha, &history, 201, 200)?;
    let recorded: Vec<Vec<u8>> = relays.iter().map(Relay::recorded).collect();
    ensure!(recorded.iter().any(|bytes| !bytes.is_empty()), "no handshake passed the relay");

    // A recorded handshake, random bytes, silence: all closed, and the pair does not notice.
    let load = client(&pair.alpha, &history, 202)?;
    let mut random = Seed::new(8);
    let garbage: Vec<u8> = (0..4096).map(|_| random.bits() as u8).collect();
    let before = sessions(pair)?;
    let mut closed = [0; 2];
    for bytes in recorded.iter().chain([&garbage, &Vec::new()]) {
        for (server, host) in [(&pair.alpha, 1), (&pair.beta, 2)] {
            closed[host - 1] += usize::from(closed_by(server, host, bytes)?);
        }
    }
    ensure!(closed.contains(&4), "nobody listens on the mirror link: {closed:?} strangers came in");
    load.wait_more(200, LIMIT)?;
    let finished = load.finish()?;
    ensure!(
        finished.broken.is_none() && finished.errors.is_empty(),
        "strangers hurt the client: {finished:?}"
    );
    // A stranger's connection goes when the kernel has buried it; the pair's own are the same as before.
    wait::until(
        &format!("the connections and sessions of before, {before:?}"),
        Duration::from_secs(20),
        || Ok((sessions(pair)? == before).then_some(())),
    )?;
    for (server, closed) in [&pair.alpha, &pair.beta].into_iter().zip(closed) {
        ensure!(server.status_word("/state")? == "mirrored", "{} was disturbed", server.name());
        // One: `activate` before the peer was there.
        ensure!(server.events_of("alone")?.len() <= 1, "{} went alone", server.name());
        if closed == 0 {
            continue;
        }
        let event = server.event("stranger")?;
        ensure!(event.to_string().contains("10.9.0."), "a stranger without an address: {event}");
        ensure!(server.events_of("stranger")?.len() < 100, "strangers flood the events of {}", server.name());
    }
    wrong_secret(pair, sabotage)
}

/// Of each server: its end of every connection of the mirror link, and how many sessions began and ended.
fn sessions(pair: &Pair) -> Result<Vec<(Vec<String>, [usize; 2])>> {
    let of = |server: &Server| {
        let port = format!(":{LINK_PORT}");
        let table = server.network().run(&["ss", "-Htn", "state", "established"])?;
        let ends =
            table.lines().map(|line| line.split_whitespace().skip(2).take(2).collect::<Vec<_>>().join(" "));
        let mut ends: Vec<String> = ends.filter(|ends| ends.contains(&port)).collect();
        ends.sort();
        Ok((ends, [server.events_of("link-up")?.len(), server.events_of("link-lost")?.len()]))
    };
    [&pair.alpha, &pair.beta].into_iter().map(of).collect()
}

/// Sends these bytes to a server's link port; the server must close, and say nothing that depends on them. False where
/// nobody listens: one of the two dials.
fn closed_by(server: &Server, host: usize, bytes: &[u8]) -> Result<bool> {
    server.network().enter(|| {
        let mut stream = match TcpStream::connect(format!("10.9.0.{host}:{LINK_PORT}")) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => return Ok(false),
            connected => connected?,
        };
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let _ = stream.write_all(bytes); // it may have closed already
        let mut answer = Vec::new();
        match stream.take(1 << 20).read_to_end(&mut answer) {
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                anyhow::bail!("{} kept a stranger's connection for 30 s", server.name())
            }
            Ok(_) | Err(_) => Ok(true),
        }
    })
}

/// Beta comes back with another secret: refused, alpha goes on.
fn wrong_secret(pair: &mut Pair, sabotage: bool) -> Result<()> {
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    if !sabotage {
        let other = pair.directory().join("other-secret");
        let words =
            [&program("duplex")?.display().to_string(), "secret", "new", &other.display().to_string()]
                .map(str::to_owned);
        ensure!(pair.alpha.host()?.run(&words, LIMIT)?.success(), "no second secret");
        pair.beta.edit_config(&pair.secret().display().to_string(), &other.display().to_string())?;
    }
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    let limit = Duration::from_secs(15);
    // The one that dials is told, the one that listens met a stranger; each says so in an event.
    for server in [&pair.alpha, &pair.beta] {
        wait::until("the wrong secret to be noticed", limit, || {
            let strangers = server.events_of("stranger")?.into_iter();
            let met =
                strangers.filter(|event| event["reason"].as_str().is_some_and(|why| why.contains("secret")));
            let told = server.events_of("refused")?.into_iter().filter(|event| event["reason"] == "secret");
            Ok(met.chain(told).next())
        })
        .with_context(|| server.name())?;
    }
    ensure!(pair.alpha.status_word("/state")? == "alone", "alpha took a peer with another secret");
    ensure!(pair.beta.status_word("/state")? != "mirrored", "beta is mirrored with another secret");
    Ok(())
}

fn control_socket(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    write_some(&pair.alpha, &history, 211, 100)?;
    let uid = if sabotage { 0 } else { 65534 };
    // The program must be readable for the other user, or he fails for another reason.
    let mine = pair.directory().join("duplex");
    std::fs::copy(program("duplex")?, &mine)?;
    for verb in [&["status", "--json"][..], &["demote"], &["down"]] {
        let output = as_user(&pair.alpha, uid, &mine, verb)?;
        ensure!(!output.success(), "user {uid} may `{}`: {}", verb.join(" "), output.text());
        says(&output.text(), &["this user may not"])?;
    }
    let control = pair.alpha.run_directory().join("control");
    let mode = std::fs::metadata(&control)?.permissions().mode();
    ensure!(mode & 0o007 == 0, "the control socket's mode is {mode:o}");
    // With the mode opened by mistake, the peer's credentials still refuse, and it is logged.
    for path in [pair.alpha.run_directory(), control] {
        std::fs::set_permissions(path, Permissions::from_mode(0o777))?;
    }
    for _ in 0..20 {
        let output = as_user(&pair.alpha, uid, &mine, &["demote"])?;
        ensure!(!output.success(), "user {uid} may `demote`: {}", output.text());
        says(&output.text(), &[&format!("user {uid} may not")])
            .context("the refusal must always be clear")?;
    }
    let event = pair.alpha.event("refused")?;
    says(&event.to_string(), &[&uid.to_string()])?;
    ensure!(pair.alpha.status_word("/role")? == "primary", "alpha was disturbed");
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// Runs a verb as another user, with a copy of the program that he may read.
fn as_user(server: &Server, uid: u32, program: &Path, verb: &[&str]) -> Result<Output> {
    let mut words = vec!["setpriv".to_owned(), "--clear-groups".to_owned()];
    words.extend([format!("--reuid={uid}"), format!("--regid={uid}"), program.display().to_string()]);
    words.extend(["--run-dir".to_owned(), server.run_directory().display().to_string()]);
    words.extend(["--config".to_owned(), server.config().display().to_string()]);
    words.extend(["--server".to_owned(), server.name().to_owned()]);
    words.extend(verb.iter().map(|word| (*word).to_owned()));
    server.host()?.run(&words, LIMIT)
}

fn listening_surface(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let lines = if sabotage { "nbd = \"127.0.0.1:10809\"" } else { "" };
    let options = PairOptions { volume_lines: lines.to_owned(), paths: 2, ..PairOptions::default() };
    let pair = stage.pair(options)?;
    pair.start_mirrored()?;
    let mut listening = 0;
    for (server, host) in [(&pair.alpha, 1), (&pair.beta, 2)] {
        let table = server.network().run(&["ss", "-Hltun"])?;
        let open: Vec<&str> = table.lines().filter_map(|line| line.split_whitespace().nth(4)).collect();
        let allowed = [0, 1].map(|path| format!("10.9.{path}.{host}:{LINK_PORT}"));
        for address in &open {
            ensure!(
                allowed.iter().any(|one| one == address),
                "{} listens at {address}: {table}",
                server.name()
            );
        }
        listening += open.len();
    }
    ensure!(listening > 0, "nobody listens on the mirror link: this case looks at the wrong place");
    Ok(())
}

fn altered_on_the_wire(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    for encryption in [false, true] {
        let pair = stage.pair(PairOptions { encryption, ..PairOptions::default() })?;
        let relays = tap(pair)?;
        pair.start_mirrored()?;
        let history = super::history_of(pair)?;
        // 9: inside a header; 1000: inside a payload.
        for position in [9, 1000] {
            let load = client(&pair.alpha, &history, 221 + position)?;
            load.wait_more(100, LIMIT)?;
            if !sabotage {
                relays.iter().for_each(|relay| relay.flip_next(position));
            }
            let limit = Duration::from_secs(if sabotage { 5 } else { 30 });
            wait::until("a corrupt frame to be noticed", limit, || {
                let mut seen = 0;
                for server in [&pair.alpha, &pair.beta] {
                    seen += server.events_of("corrupt-frame")?.len();
                }
                let wanted = if position == 9 { 1 } else { 2 };
                Ok((seen >= wanted).then_some(()))
            })?;
            relays.iter().for_each(|relay| relay.flip_next(u64::MAX));
            load.wait_more(100, LIMIT)?;
            let finished = load.finish()?;
            ensure!(
                finished.broken.is_none() && finished.errors.is_empty(),
                "the client was hurt: {finished:?}"
            );
            pair.wait_mirrored()?;
            verify(&pair.alpha, &history, Floor::Acknowledged)?;
            pair.assert_equal()?;
        }
        let event = pair
            .beta
            .events_of("corrupt-frame")?
            .pop()
            .map_or_else(|| pair.alpha.event("corrupt-frame"), Ok)?;
        ensure!(event["reason"].as_str().is_some_and(|why| !why.is_empty()), "no reason: {event}");
        pair.alpha.network().heal()?;
        pair.beta.network().heal()?;
    }
    Ok(())
}
