//! Tests of the negotiation.

use proptest::prelude::*;

use super::*;

fn export() -> Export {
    Export {
        name: "vm1".to_owned(),
        is_default: true,
        size_bytes: 64 << 20,
        sector_bytes: 512,
        preferred_bytes: 4096,
        max_bytes: 1 << 20,
        read_only: false,
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn go_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for kind in wanted {
        out.extend_from_slice(&kind.to_be_bytes());
    }
    out
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        out.extend_from_slice(&(query.len() as u32).to_be_bytes());
        out.extend_from_slice(query.as_bytes());
    }
    out
}

/// The client's flags and these options.
fn client(options: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut out = 3u32.to_be_bytes().to_vec();
    for (option, data) in options {
        out.extend_from_slice(&option_bytes(*option, data));
    }
    out
}

/// Option, reply and data of every reply after the greeting.
fn replies(out: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut reader = Reader(&out[18..]);
    let mut found = Vec::new();
    while !reader.0.is_empty() {
        assert_eq!(reader.u64(), Some(wire::OPTION_REPLY_MAGIC));
        let (option, reply) = (reader.u32().unwrap(), reader.u32().unwrap());
        let length = reader.u32().unwrap() as usize;
        found.push((option, reply, reader.bytes(length).unwrap().to_vec()));
    }
    found
}

fn kinds(out: &[u8]) -> Vec<(u32, u32)> {
    replies(out).into_iter().map(|(option, reply, _)| (option, reply)).collect()
}

#[test]
fn the_greeting_is_fixed_newstyle() {
    let (out, taken, step) = negotiate(&[], &export(), None);
    assert_eq!(&out[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!((&out[16..], taken, step), (&[0u8, 3][..], 0, Step::More));
}

#[test]
fn go_describes_and_goes() {
    let input = client(&[(option::GO, go_data("vm1", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]))]);
    let (out, taken, step) = negotiate(&input, &export(), None);
    assert_eq!(taken, input.len());
    assert_eq!(step, Step::Transmission(Agreed { structured: false, allocation: false }));
    let found = replies(&out);
    let flags = 0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x100 | 0x800u16;
    let mut first = vec![0, 0];
    first.extend_from_slice(&(64u64 << 20).to_be_bytes());
    first.extend_from_slice(&flags.to_be_bytes());
    assert_eq!(found[0], (7, reply::INFO, first));
    assert_eq!(found[1].2, b"\0\x01vm1");
    assert_eq!(found[2].2, b"\0\x02Duplex volume vm1");
    assert_eq!(found[3].2, [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 0, 16, 0, 0]);
    assert_eq!(found[4], (7, reply::ACK, vec![]));
}

#[test]
fn the_bytes_after_go_are_not_touched() {
    let mut input = client(&[(option::GO, go_data("", &[]))]);
    let whole = input.len();
    input.extend_from_slice(&[0xff; 100]);
    assert_eq!(negotiate(&input, &export(), None).1, whole);
}

#[test]
fn the_empty_name_is_the_volume_only_when_it_is_the_only_one() {
    let input = client(&[(option::INFO, go_data("", &[]))]);
    let (out, _, step) = negotiate(&input, &export(), None);
    assert_eq!((step, kinds(&out).last()), (Step::More, Some(&(6, reply::ACK))));
    let several = Export { is_default: false, ..export() };
    let (out, _, step) = negotiate(&input, &several, None);
    assert_eq!((step, kinds(&out)), (Step::More, vec![(6, reply::ERR_UNKNOWN)]));
}

#[test]
fn a_refusing_server_says_why() {
    let text = "secondary; primary is alpha";
    let input = client(&[(option::GO, go_data("vm1", &[]))]);
    let (out, _, step) = negotiate(&input, &export(), Some(text));
    assert_eq!(step, Step::More);
    assert_eq!(replies(&out), vec![(7, reply::ERR_SHUTDOWN, text.as_bytes().to_vec())]);
    let input = client(&[(option::EXPORT_NAME, b"vm1".to_vec())]);
    assert_eq!(negotiate(&input, &export(), Some(text)).2, Step::Close);
}

#[test]
fn export_name_has_its_padding_unless_waived() {
    let (out, _, step) = negotiate(&client(&[(option::EXPORT_NAME, b"vm1".to_vec())]), &export(), None);
    assert_eq!((out.len(), step), (18 + 10, Step::Transmission(Agreed::default())));
    let mut old = 1u32.to_be_bytes().to_vec();
    old.extend_from_slice(&option_bytes(option::EXPORT_NAME, b"vm1"));
    assert_eq!(negotiate(&old, &export(), None).0.len(), 18 + 10 + 124);
    let wrong = client(&[(option::EXPORT_NAME, b"vm2".to_vec())]);
    assert_eq!(negotiate(&wrong, &export(), None).2, Step::Close);
}

#[test]
fn unknown_options_and_tls_are_refused_and_the_talk_goes_on() {
    let input =
        client(&[(99, vec![1, 2, 3]), (option::STARTTLS, vec![]), (option::LIST, vec![]), (2, vec![])]);
    let (out, taken, step) = negotiate(&input, &export(), None);
    assert_eq!((taken, step), (input.len(), Step::Close));
    let wanted =
        [(99, reply::ERR_UNSUP), (5, reply::ERR_UNSUP), (3, reply::SERVER), (3, reply::ACK), (2, reply::ACK)];
    assert_eq!(kinds(&out), wanted);
}

#[test]
fn block_status_is_agreed_for_the_named_export_only() {
    let queries = ["qemu:dirty-bitmap:x", BASE_ALLOCATION];
    let set = (option::SET_META_CONTEXT, context_data("vm1", &queries));
    let early = client(std::slice::from_ref(&set));
    assert_eq!(kinds(&negotiate(&early, &export(), None).0), [(10, reply::ERR_INVALID)]);
    let talk =
        |name| client(&[(option::STRUCTURED_REPLY, vec![]), set.clone(), (option::GO, go_data(name, &[]))]);
    let (out, _, step) = negotiate(&talk("vm1"), &export(), None);
    assert_eq!(step, Step::Transmission(Agreed { structured: true, allocation: true }));
    assert_eq!(replies(&out)[1].2, b"\0\0\0\x01base:allocation");
    let step = negotiate(&talk(""), &export(), None).2;
    assert_eq!(step, Step::Transmission(Agreed { structured: true, allocation: false }));
}

#[test]
fn setting_contexts_again_forgets_the_first() {
    let input = client(&[
        (option::STRUCTURED_REPLY, vec![]),
        (option::SET_META_CONTEXT, context_data("vm1", &[BASE_ALLOCATION])),
        (option::SET_META_CONTEXT, context_data("vm1", &[])),
        (option::GO, go_data("vm1", &[])),
    ]);
    let step = negotiate(&input, &export(), None).2;
    assert_eq!(step, Step::Transmission(Agreed { structured: true, allocation: false }));
}

#[test]
fn contexts_are_listed_by_namespace_or_all() {
    for queries in [&[][..], &["base:"], &[BASE_ALLOCATION]] {
        let input = client(&[
            (option::STRUCTURED_REPLY, vec![]),
            (option::LIST_META_CONTEXT, context_data("vm1", queries)),
        ]);
        let out = negotiate(&input, &export(), None).0;
        assert_eq!(kinds(&out), [(8, reply::ACK), (9, reply::META_CONTEXT), (9, reply::ACK)], "{queries:?}");
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let mut short = go_data("vm1", &[info::NAME]);
    short.pop();
    let mut long = go_data("vm1", &[]);
    long.push(0);
    let mut huge_name = go_data("vm1", &[]);
    huge_name[0] = 0xff;
    for data in [short, long, huge_name, vec![]] {
        let (out, _, step) = negotiate(&client(&[(option::GO, data)]), &export(), None);
        assert_eq!((kinds(&out), step), (vec![(7, reply::ERR_INVALID)], Step::More));
    }
}

#[test]
fn a_long_option_is_skipped_and_a_huge_one_ends_the_talk() {
    let input = client(&[(99, vec![7; OPTION_MAX_BYTES + 1]), (option::LIST, vec![])]);
    let (out, taken, _) = negotiate(&input, &export(), None);
    assert_eq!(taken, input.len());
    assert_eq!(kinds(&out), [(99, reply::ERR_TOO_BIG), (3, reply::SERVER), (3, reply::ACK)]);
    let mut input = client(&[]);
    input.extend_from_slice(&option_bytes(99, &[])[..12]);
    input.extend_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(negotiate(&input, &export(), None).2, Step::Close);
}

#[test]
fn garbage_ends_the_talk() {
    assert_eq!(negotiate(b"GET / HTTP/1.1\r\n", &export(), None).2, Step::Close);
    let mut input = client(&[]);
    input.extend_from_slice(b"GET / HTTP/1.1\r\n");
    assert_eq!(negotiate(&input, &export(), None).2, Step::Close);
    let endless: Vec<_> = (0..=OPTIONS_MAX).map(|_| (option::LIST, vec![])).collect();
    assert_eq!(negotiate(&client(&endless), &export(), None).2, Step::Close);
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = negotiate(&bytes, &export(), None);
    }

    #[test]
    fn random_options_never_panic(
        options in proptest::collection::vec((0u32..12, proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
    ) {
        let _ = negotiate(&client(&options), &export(), None);
    }

    /// How the bytes are cut into receives changes nothing.
    #[test]
    fn cuts_change_nothing(cut in 1usize..40) {
        let input = client(&[
            (option::STRUCTURED_REPLY, vec![]),
            (99, vec![3; 50]),
            (option::SET_META_CONTEXT, context_data("vm1", &[BASE_ALLOCATION])),
            (option::GO, go_data("vm1", &[info::BLOCK_SIZE])),
        ]);
        let whole = negotiate(&input, &export(), None);
        let mut out = Vec::new();
        let mut negotiation = Negotiation::new(&mut out);
        let (mut taken, mut have, mut last) = (0, 0, Step::More);
        while last == Step::More {
            let (consumed, step) = negotiation.feed(&input[taken..have], &export(), None, &mut out);
            taken += consumed;
            last = step;
            if consumed == 0 {
                prop_assert!(have < input.len());
                have = (have + cut).min(input.len());
            }
        }
        prop_assert_eq!((out, taken, last), whole);
    }
}
