//! Sessions, control messages and paths between two servers.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]
#![allow(clippy::wildcard_enum_match_arm, reason = "a test waits for one event among all there are")]

mod common;

use common::{Server, fast_timers, pair};
use duplex_core::ids::{Epoch, Incarnation, ServerName, SessionId};
use duplex_core::message::{ControlMessage, LiveState};
use duplex_link::{Encryption, LinkConfig, LinkEvent, Refusal, SessionEnd};

fn bye(number: usize) -> ControlMessage {
    ControlMessage::Bye { text: number.to_string() }
}

fn heartbeat(sent_ns: u64) -> ControlMessage {
    let epoch = Epoch { number: 3, holder: Some(ServerName("alpha".into())) };
    ControlMessage::Heartbeat { sent_ns, echo_ns: 0, promising: true, live: LiveState::Secondary, epoch }
}

fn control(server: &Server, session: SessionId) -> ControlMessage {
    server.expect("a control message", |event| match event {
        LinkEvent::Control(of, message) => {
            assert_eq!(of, session);
            Some(message)
        }
        LinkEvent::SessionDown { end, .. } => panic!("the session ended: {end:?}"),
        _ => None,
    })
}

fn down(server: &Server, session: SessionId) -> SessionEnd {
    server.expect("the session's end", |event| match event {
        LinkEvent::SessionDown { session: of, end } => {
            assert_eq!(of, session);
            Some(end)
        }
        _ => None,
    })
}

fn refusal(server: &Server) -> Refusal {
    server.expect("a refusal", |event| match event {
        LinkEvent::Refused(refusal) => Some(refusal),
        _ => None,
    })
}

#[test]
fn both_agree_on_a_session_and_know_each_other() {
    for encryption in [Encryption::Tls, Encryption::Off] {
        let pair = pair(2, encryption);
        let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
        let facts = |server: &Server| {
            server.expect("a session", |event| match event {
                LinkEvent::SessionUp { session, peer } => Some((session, peer)),
                _ => None,
            })
        };
        let ((at_alpha, of_beta), (at_beta, of_alpha)) = (facts(&alpha), facts(&beta));
        assert_eq!(at_alpha, at_beta);
        assert_eq!((of_beta.incarnation, of_beta.boot_id), (pair.beta.incarnation, pair.beta.boot_id));
        assert_eq!((of_alpha.incarnation, of_alpha.boot_id), (pair.alpha.incarnation, pair.alpha.boot_id));
        beta.handle.send(at_beta, bye(1)).unwrap();
        alpha.handle.send(at_alpha, bye(2)).unwrap();
        assert_eq!((control(&alpha, at_alpha), control(&beta, at_beta)), (bye(1), bye(2)));
    }
}

#[test]
fn control_messages_survive_lost_connections_once_and_in_order() {
    let pair = pair(2, Encryption::Tls);
    let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    let session = alpha.session();
    assert_eq!(beta.session(), session);
    let count = 600;
    for number in 0..count {
        for server in [&alpha, &beta] {
            while server.handle.send(session, bye(number)) == Err(duplex_link::SendError::Busy) {
                std::thread::yield_now();
            }
        }
    }
    for number in 0..count {
        assert_eq!(control(&beta, session), bye(number));
        match number % 200 {
            20 => pair.proxies[0].cut(),
            80 => pair.proxies[1].cut(),
            140 => pair.proxies.iter().for_each(|proxy| proxy.cut()),
            _ => {}
        }
    }
    for number in 0..count {
        assert_eq!(control(&alpha, session), bye(number));
    }
}

#[test]
fn heartbeats_come_once_though_they_go_over_every_path() {
    let pair = pair(2, Encryption::Off);
    let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    let session = alpha.session();
    assert_eq!(beta.session(), session);
    // An older one is never delivered after a newer one, and none twice.
    let mut newest = 0;
    for round in 1..=50 {
        alpha.handle.send(session, heartbeat(round)).unwrap();
        alpha.handle.send(session, bye(0)).unwrap();
        loop {
            match control(&beta, session) {
                ControlMessage::Heartbeat { sent_ns, .. } => {
                    assert!(sent_ns > newest, "{sent_ns} after {newest}");
                    newest = sent_ns;
                }
                other => {
                    assert_eq!(other, bye(0));
                    break;
                }
            }
        }
    }
    assert!(newest > 0, "no heartbeat came");
}

/// The session, when it and both paths stand.
fn ready(server: &Server) -> SessionId {
    let (mut session, mut up) = (None, [false; 2]);
    server.expect("a session and both paths", |event| {
        match event {
            LinkEvent::SessionUp { session: new, .. } => session = Some(new),
            LinkEvent::Path { path, up: true, .. } => up[usize::from(path)] = true,
            _ => {}
        }
        session.filter(|_| up == [true; 2])
    })
}

#[test]
fn a_silent_path_is_left_before_it_is_given_up() {
    let mut pair = pair(2, Encryption::Off);
    for config in [&mut pair.alpha, &mut pair.beta] {
        config.timers.path_dead = std::time::Duration::from_secs(3600);
    }
    let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    let session = ready(&alpha);
    assert_eq!(ready(&beta), session);
    pair.proxies[0].stall(true);
    alpha.handle.send(session, bye(1)).unwrap();
    beta.handle.send(session, bye(2)).unwrap();
    assert_eq!((control(&beta, session), control(&alpha, session)), (bye(1), bye(2)));
    pair.proxies[0].stall(false);
}

#[test]
fn a_lost_path_is_told_and_the_session_goes_on() {
    let pair = pair(2, Encryption::Tls);
    let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    let session = ready(&alpha);
    assert_eq!(ready(&beta), session);
    let path = |server: &Server, wanted: u16, is_up: bool| {
        server.expect("the path's state", |event| match event {
            LinkEvent::Path { path, up, .. } if (path, up) == (wanted, is_up) => Some(()),
            LinkEvent::SessionDown { end, .. } => panic!("the session ended: {end:?}"),
            _ => None,
        });
    };
    for lost in [0, 1] {
        pair.proxies[usize::from(lost)].down();
        path(&alpha, lost, false);
        path(&beta, lost, false);
        alpha.handle.send(session, bye(7)).unwrap();
        assert_eq!(control(&beta, session), bye(7));
        pair.proxies[usize::from(lost)].up();
        path(&alpha, lost, true);
        path(&beta, lost, true);
    }
    let counters = &alpha.handle.path_counters()[0];
    assert!(counters.connections.load(std::sync::atomic::Ordering::Relaxed) >= 2);
}

#[test]
fn no_path_at_all_ends_no_session() {
    let pair = pair(1, Encryption::Tls);
    let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    let session = alpha.session();
    assert_eq!(beta.session(), session);
    pair.proxies[0].down();
    alpha.expect("the path's end", |event| matches!(event, LinkEvent::Path { up: false, .. }).then_some(()));
    alpha.handle.send(session, bye(1)).unwrap();
    pair.proxies[0].up();
    assert_eq!(control(&beta, session), bye(1));
}

#[test]
fn a_closed_session_is_over_for_both_and_a_new_one_is_opened() {
    let pair = pair(2, Encryption::Off);
    let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    let mut session = alpha.session();
    assert_eq!(beta.session(), session);
    for (closing, other) in [(&alpha, &beta), (&beta, &alpha)] {
        closing.handle.close_session(session, "peer not heard").unwrap();
        assert_eq!(down(closing, session), SessionEnd::Closed("peer not heard".into()));
        assert_eq!(down(other, session), SessionEnd::ClosedByPeer("peer not heard".into()));
        let old = session;
        session = alpha.session();
        assert_eq!(beta.session(), session);
        assert_ne!(session, old);
        // What is said in the old session reaches nobody.
        alpha.handle.send(old, bye(1)).unwrap();
        alpha.handle.send(session, bye(2)).unwrap();
        assert_eq!(control(&beta, session), bye(2));
    }
}

#[test]
fn a_restarted_peer_makes_a_new_session() {
    let pair = pair(1, Encryption::Tls);
    let beta = Server::start(pair.beta.clone(), None);
    let alpha = Server::start(pair.alpha.clone(), None);
    let first = beta.session();
    drop(alpha);
    let again = LinkConfig { incarnation: Incarnation(77), ..pair.alpha.clone() };
    let alpha = Server::start(again, None);
    assert_eq!(down(&beta, first), SessionEnd::PeerRestarted);
    let second = alpha.session();
    assert_eq!(beta.session(), second);
    // And the other way round: the listening server restarts.
    drop(beta);
    let beta = Server::start(LinkConfig { incarnation: Incarnation(78), ..pair.beta.clone() }, None);
    assert_eq!(down(&alpha, second), SessionEnd::PeerRestarted);
    let third = alpha.session();
    assert_eq!(beta.session(), third);
}

#[test]
fn the_operator_disconnects_and_connects() {
    let pair = pair(1, Encryption::Off);
    let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    let mut session = alpha.session();
    assert_eq!(beta.session(), session);
    for operated in [&beta, &alpha] {
        operated.handle.disconnect().unwrap();
        let text = "disconnected by the operator".to_owned();
        assert_eq!(down(operated, session), SessionEnd::Closed(text));
        operated.handle.connect().unwrap();
        session = alpha.session();
        assert_eq!(beta.session(), session);
    }
}

/// Both values and a code of its own for each difference.
#[test]
fn what_does_not_fit_is_refused_with_a_code_and_both_values() {
    let base = pair(1, Encryption::Tls);
    let other: std::net::SocketAddr = "127.0.0.9:7".parse().unwrap();
    let named = |name: &str| ServerName(name.to_owned());
    let mut forwarded = base.beta.clone();
    forwarded.paths[0].address = other;
    let cases: Vec<(LinkConfig, LinkConfig, Refusal)> = vec![
        (
            LinkConfig { pair_name: "left".into(), ..base.alpha.clone() },
            LinkConfig { pair_name: "right".into(), ..base.beta.clone() },
            Refusal { code: "pair".into(), mine: "left".into(), theirs: "right".into() },
        ),
        (
            LinkConfig { peer: named("gamma"), ..base.alpha.clone() },
            base.beta.clone(),
            Refusal { code: "server-name".into(), mine: "peer gamma".into(), theirs: "beta".into() },
        ),
        (
            base.alpha.clone(),
            LinkConfig { peer: named("aleph"), ..base.beta.clone() },
            Refusal { code: "server-name".into(), mine: "alpha".into(), theirs: "peer aleph".into() },
        ),
        (
            base.alpha.clone(),
            forwarded,
            Refusal {
                code: "address".into(),
                mine: base.proxies[0].address.to_string(),
                theirs: other.to_string(),
            },
        ),
        (
            LinkConfig { encryption: Encryption::Off, ..base.alpha.clone() },
            base.beta.clone(),
            Refusal { code: "encryption".into(), mine: "off".into(), theirs: "tls".into() },
        ),
        (
            base.alpha.clone(),
            LinkConfig { encryption: Encryption::Off, ..base.beta.clone() },
            Refusal { code: "encryption".into(), mine: "tls".into(), theirs: "off".into() },
        ),
    ];
    for (alpha, beta, expected) in cases {
        let swapped = Refusal {
            code: expected.code.clone(),
            mine: expected.theirs.clone(),
            theirs: expected.mine.clone(),
        };
        let (beta, alpha) = (Server::start(beta, None), Server::start(alpha, None));
        assert_eq!(refusal(&alpha), expected);
        // Who differs in encryption proved nothing: for the listener it is a stranger.
        if expected.code != "encryption" {
            assert_eq!(refusal(&beta), swapped);
        }
    }
}

#[test]
fn volumes_in_another_order_are_refused() {
    let mut pair = pair(1, Encryption::Off);
    pair.alpha.volumes = vec!["a".into(), "b".into()];
    pair.beta.volumes = vec!["b".into(), "a".into()];
    let (_beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
    assert_eq!(refusal(&alpha).code, "volume");
}

#[test]
fn a_configuration_that_cannot_work_is_refused() {
    let pair = pair(1, Encryption::Off);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    let start = |config: LinkConfig| duplex_link::Link::start(config).map(|_| ()).unwrap_err().to_string();
    let same = LinkConfig { peer: pair.beta.server.clone(), ..pair.beta.clone() };
    assert!(start(same).contains("same name"));
    assert!(start(LinkConfig { paths: vec![], ..pair.alpha.clone() }).contains("number of link paths"));
    let mut elsewhere = LinkConfig { timers: fast_timers(), ..pair.beta.clone() };
    elsewhere.paths[0].listen = "192.0.2.1:7700".parse().unwrap();
    assert!(start(elsewhere).contains("192.0.2.1:7700"));
}
