//! Crash points swept one by one: a seed is run once to see where its servers stand when, then once for each of these
//! moments, with a crash there.

use std::collections::BTreeMap;

use duplex_core::boundary::Boundary;

use super::finish::Outcome;
use super::oracle::Host;
use super::trap::{Trap, Victim, WAYS};

/// Moments of one kind, in one seed, that are swept: the first ones.
const TIMES_MAX: u64 = 6;

/// Boundaries before the volume's machine begins: the simulator's processes start whole.
pub const OUTSIDE: [Boundary; 2] = [Boundary::G11BeforeClaim, Boundary::G11Claimed];

/// Every crash of a seed that was run without one.
pub fn crashes(plain: &Outcome) -> Vec<Trap> {
    let moments = plain.passed.iter().flat_map(|((boundary, host), count)| {
        (1..=(*count).min(TIMES_MAX)).map(|times| (*boundary, *host, times))
    });
    let mut all = Vec::new();
    for (boundary, host, times) in moments {
        for victim in Victim::ALL {
            all.extend(WAYS.map(|power| Trap { boundary, times, host, victim, power }));
        }
    }
    all
}

/// About so many of them: of each boundary and server the same number, spread evenly, and at least one. Another
/// `offset` gives others.
pub fn thin(all: Vec<(u64, Trap)>, most: usize, offset: usize) -> Vec<(u64, Trap)> {
    let mut places: BTreeMap<(Boundary, Host), Vec<(u64, Trap)>> = BTreeMap::new();
    for (seed, trap) in all {
        places.entry((trap.boundary, trap.host)).or_default().push((seed, trap));
    }
    let each = most.checked_div(places.len()).unwrap_or(0).max(1);
    let mut kept = Vec::new();
    for place in places.into_values() {
        let count = each.min(place.len());
        kept.extend((0..count).map(|at| place[(at * place.len() / count + offset) % place.len()]));
    }
    kept
}

/// What a sweep did.
#[derive(Debug, Default)]
pub struct Swept {
    crashed: BTreeMap<(Boundary, Host), u64>,
    /// Crashes that happened.
    pub crashes: u64,
    /// Seed, crash and why it failed.
    pub failed: Vec<(u64, Trap, String)>,
}

impl Swept {
    /// One run ended.
    pub fn add(&mut self, seed: u64, trap: Trap, result: Result<Outcome, String>) {
        let why = match result {
            Ok(outcome) if outcome.broken.is_some() => outcome.broken,
            Ok(outcome) if !outcome.fired => Some("the boundary was not reached again".to_owned()),
            Ok(_) => None,
            Err(panic) => Some(panic),
        };
        self.crashes += 1;
        *self.crashed.entry((trap.boundary, trap.host)).or_default() += 1;
        if let Some(why) = why {
            self.failed.push((seed, trap, why));
        }
    }

    /// A line for each boundary: how often each server crashed there.
    pub fn lines(&self) -> Vec<String> {
        let count = |boundary, host| self.crashed.get(&(boundary, host)).copied().unwrap_or(0);
        let reachable = Boundary::ALL.into_iter().filter(|boundary| !OUTSIDE.contains(boundary));
        reachable
            .map(|b| format!("{:<32} {:>5} alpha {:>5} beta", b.name(), count(b, 0), count(b, 1)))
            .collect()
    }

    /// Boundaries at which one of the servers never crashed.
    pub fn missing(&self) -> Vec<String> {
        let all = Boundary::ALL.into_iter().filter(|boundary| !OUTSIDE.contains(boundary));
        let each = all.flat_map(|boundary| [(boundary, 0), (boundary, 1)]);
        let missing = each.filter(|place| !self.crashed.contains_key(place));
        missing
            .map(|(boundary, host)| format!("{} on {}", boundary.name(), ["alpha", "beta"][host]))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crash_is_in_a_thin_sweep_of_some_offset() {
        let trap =
            |times| Trap { boundary: Boundary::ALL[0], times, host: 0, victim: Victim::Own, power: None };
        let all: Vec<_> = (1..=20).map(|times| (1, trap(times))).collect();
        let mut met = std::collections::BTreeSet::new();
        for offset in 0..10 {
            let kept = thin(all.clone(), 3, offset);
            assert_eq!(kept.len(), 3);
            met.extend(kept.iter().map(|(_, trap)| trap.times));
        }
        assert_eq!(met.len(), 20);
    }
}
