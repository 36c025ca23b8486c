//! Which boundary is reached in which role.

/// Who stands at a boundary, and what leads there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A primary whose secondary is killed (G4).
    Primary,
    /// A secondary that is told that its primary is down (G4).
    Secondary,
    /// A lone primary under writes whose peer comes back (G6).
    Source,
    /// The same, demoted before: it copies and does not serve.
    IdleSource,
    /// The peer that comes back (G5, G6).
    Target,
    /// It hands its role over (G9).
    OldPrimary,
    /// It takes the role (G9).
    NewPrimary,
    /// It ran alone, died and starts again (G11).
    RestartedAlone,
    /// It was primary of a mirrored pair, died and starts again; its peer lives (G11).
    RestartedPrimary,
    /// It was secondary, died and starts again; its peer lives alone (G11).
    RestartedSecondary,
}

const G4: &[&str] =
    &["g4-before-flush", "g4-flushed", "g4-durable", "g4-before-serve", "g4-first-completion"];
const G6_SOURCE: &[&str] = &[
    "g6-source-before-sync-done",
    "g6-source-sync-acked",
    "g6-source-before-return",
    "g6-source-before-both-flushed",
    "g6-source-before-flush",
    "g6-source-flushed",
    "g6-source-durable",
    "g6-source-before-mirrored",
    "g6-source-mirrored-acked",
];
const TARGET: &[&str] = &[
    "g5-before-flush",
    "g5-flushed",
    "g5-durable",
    "g6-target-before-flush",
    "g6-target-flushed",
    "g6-target-durable",
    "g6-target-mirrored-heard",
    "g6-target-before-mirrored-ack",
];
const G9_OLD: &[&str] = &[
    "g9-old-before-drain",
    "g9-old-before-both-flushed",
    "g9-old-before-settle",
    "g9-old-drained",
    "g9-old-before-flush",
    "g9-old-flushed",
    "g9-old-durable",
    "g9-old-before-handed-over",
    "g9-old-primary-heard",
];
const G9_NEW: &[&str] = &[
    "g9-new-handed-over-heard",
    "g9-new-before-flush",
    "g9-new-flushed",
    "g9-new-durable",
    "g9-new-before-primary",
];
const G11: &[&str] = &[
    "g11-before-claim",
    "g11-claimed",
    "g11-superblock-read",
    "g11-in-replay",
    "g11-before-flush",
    "g11-flushed",
    "g11-durable",
];

impl Role {
    /// Every one.
    pub const ALL: [Role; 10] = [
        Role::Primary,
        Role::Secondary,
        Role::Source,
        Role::IdleSource,
        Role::Target,
        Role::OldPrimary,
        Role::NewPrimary,
        Role::RestartedAlone,
        Role::RestartedPrimary,
        Role::RestartedSecondary,
    ];

    /// As typed.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Secondary => "secondary",
            Role::Source => "source",
            Role::IdleSource => "idle-source",
            Role::Target => "target",
            Role::OldPrimary => "old-primary",
            Role::NewPrimary => "new-primary",
            Role::RestartedAlone => "restarted-alone",
            Role::RestartedPrimary => "restarted-primary",
            Role::RestartedSecondary => "restarted-secondary",
        }
    }

    /// What it can stand at.
    pub const fn boundaries(self) -> &'static [&'static str] {
        match self {
            Role::Primary | Role::Secondary => G4,
            Role::Source | Role::IdleSource => G6_SOURCE,
            Role::Target => TARGET,
            Role::OldPrimary => G9_OLD,
            Role::NewPrimary => G9_NEW,
            Role::RestartedAlone | Role::RestartedPrimary | Role::RestartedSecondary => G11,
        }
    }

    /// It is alpha, which is primary first; else beta.
    pub const fn is_alpha(self) -> bool {
        match self {
            Role::Primary
            | Role::Source
            | Role::IdleSource
            | Role::OldPrimary
            | Role::RestartedAlone
            | Role::RestartedPrimary => true,
            Role::Secondary | Role::Target | Role::NewPrimary | Role::RestartedSecondary => false,
        }
    }
}

/// How it dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// It kills itself.
    Kill,
    /// Its power is cut: what it did not flush is lost or torn, and it boots anew.
    Power,
}

impl How {
    /// As typed.
    pub const fn name(self) -> &'static str {
        match self {
            How::Kill => "kill",
            How::Power => "power",
        }
    }
}

/// One crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// In which role.
    pub role: Role,
    /// Where.
    pub boundary: &'static str,
    /// How.
    pub how: How,
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.boundary, self.role.name(), self.how.name())
    }
}

/// Every boundary in every role, both ways.
pub fn all() -> Vec<Point> {
    let mut all = Vec::new();
    for role in Role::ALL {
        for boundary in role.boundaries() {
            all.extend([How::Kill, How::Power].map(|how| Point { role, boundary, how }));
        }
    }
    all
}

/// At most so many of them, spread evenly, both ways in turn. Another `offset` gives others.
pub fn thin(all: &[Point], most: usize, offset: usize) -> Vec<Point> {
    if all.len() <= most {
        return all.to_vec();
    }
    // An odd step meets kills and power cuts in turn.
    let step = all.len().div_ceil(most.max(1)) | 1;
    all.iter().skip(offset % step).step_by(step).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thin_sweep_has_every_role_and_both_ways_and_all_offsets_have_every_point() {
        let mut met = std::collections::BTreeSet::new();
        for offset in 0..9 {
            let thin = thin(&all(), 30, offset);
            assert!(thin.len() <= 30, "{}", thin.len());
            for role in Role::ALL {
                assert!(thin.iter().any(|point| point.role == role), "{role:?}, offset {offset}");
            }
            let kills = thin.iter().filter(|point| point.how == How::Kill).count();
            assert!(kills * 3 > thin.len() && kills * 3 < thin.len() * 2);
            met.extend(thin);
        }
        assert_eq!(met.len(), all().len());
    }
}
