//! The data path of a volume's thread enters the kernel by `io_uring_enter` and by nothing else.

use duplex_benches::pair::Pair;
use duplex_benches::process::beside;
use duplex_benches::scratch::Scratch;
use duplex_benches::trace;

const WRITES: u64 = 4000;
/// A thread also wakes the control plane now and then, to tell it something (one futex call in seconds): a run without any
/// such call is looked for. What belongs to a write is there in every run.
const RUNS: usize = 3;
const SIZE_BYTES: u64 = 64 << 20;

fn only_enters(encryption: bool) {
    if let Some(why) = trace::unavailable() {
        println!("SKIPPED: {why}");
        return;
    }
    let program = match beside("duplex") {
        Ok(program) => program,
        Err(why) => {
            println!("SKIPPED: {why:#}");
            return;
        }
    };
    let scratch = Scratch::new(&std::env::temp_dir()).expect("a directory");
    let pair = Pair::start(&scratch, &program, "pair", SIZE_BYTES, encryption).expect("a mirrored pair");
    let mut strangers = Vec::new();
    for _ in 0..RUNS {
        let counted = trace::count(&scratch, &pair, WRITES).expect("counted");
        assert_eq!(counted.len(), 2, "primary and secondary");
        strangers.clear();
        for (role, counted) in ["primary", "secondary"].into_iter().zip(&counted) {
            assert!(counted.enters() > 0, "the {role}'s thread was traced");
            strangers.extend(counted.others().into_iter().map(|call| format!("{role}: {call}")));
        }
        if strangers.is_empty() {
            return;
        }
    }
    panic!("calls of the volume's threads on the data path, every time: {strangers:?}");
}

#[test]
fn without_tls_only_the_ring_is_entered() {
    only_enters(false);
}

#[test]
fn with_tls_only_the_ring_is_entered() {
    only_enters(true);
}
