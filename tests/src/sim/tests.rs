//! The simulator's own tests; the long runs are `duplex-sim --seeds`.

use super::finish::{Look, Outcome, run};
use super::mutant::Mutant;

fn plain(seed: u64) -> Outcome {
    run(seed, None, Look::default())
}

#[test]
fn a_seed_replays_to_the_same_hash() {
    for seed in 1..6 {
        let (first, again) = (plain(seed), plain(seed));
        assert_eq!((first.hash, first.steps), (again.hash, again.steps), "seed {seed}");
        let told = run(seed, None, Look { lines: Some(10), ..Look::default() });
        assert_eq!(first.hash, told.hash, "seed {seed} runs otherwise when it is looked at");
        assert!(!told.tail.is_empty());
    }
    assert_ne!(plain(1).hash, plain(2).hash);
}

#[test]
fn a_few_seeds_keep_every_promise() {
    for seed in 1..40 {
        let outcome = plain(seed);
        assert_eq!(outcome.broken, None, "seed {seed}");
        assert!(outcome.requests.iter().sum::<u64>() > 0, "seed {seed} asked nothing");
    }
}

#[test]
fn a_resync_that_copies_wrongly_is_found() {
    for mutant in [Mutant::SkipCopy, Mutant::SkipHole, Mutant::StaleHole] {
        let found = (1..200).any(|seed| run(seed, Some(mutant), Look::default()).broken.is_some());
        assert!(found, "{} is not found", mutant.name());
    }
}
