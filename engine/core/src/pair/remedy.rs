//! What the operator can do about a refused session.

use crate::format::record::{CopyRecord, CopyState};
use crate::message::Hello;

/// How to mend a refusal; the codes are those of `decide`, of the pair's decision and of the hellos' comparison.
pub(super) fn remedy(code: &str, mine: &Hello, theirs: &Hello) -> String {
    let (me, peer) = (&mine.server, &theirs.server);
    match code {
        "mixed-sources" => mixed_sources(mine, theirs),
        "same-server" => format!("both run as {me}: start the other one with its own `--server NAME`"),
        "foreign-pair-name"
        | "foreign-volume-name"
        | "volumes-differ"
        | "configuration"
        | "address"
        | "memory" => SAME_SETTINGS.to_owned(),
        // Only the settings say so: no disk must be given up for that.
        "volume-size" | "block-size" | "sector-size" if !shapes_differ(mine, theirs) => {
            SAME_SETTINGS.to_owned()
        }
        "version" => "install the same version of duplex on both servers".to_owned(),
        "foreign-pair" | "foreign-volume" | "unrelated" => format!(
            "these copies were never one: put the right disk in, or give up the wrong copy: stop the daemon there, \
             `duplex create --overwrite-data {}`",
            names(mine)
        ),
        "volume-size" | "block-size" | "sector-size" => format!(
            "one of the disks was made for another volume: stop the daemon of the copy to be given up, \
             `duplex create --overwrite-data {}` there",
            names(mine)
        ),
        "too-small" => "give the server with the smaller number a larger backing".to_owned(),
        "no-usable-copy" | "newer-unusable" => match whole(mine, theirs) {
            Some((good, bad)) => format!(
                "{}'s copy is newer or failed and cannot be used: bring its disk back, or go on with {}'s older data: \
                 stop the daemon on {}, `duplex create --overwrite-data {}` there",
                bad.server,
                good.server,
                bad.server,
                names(bad)
            ),
            None => {
                format!("neither {me} nor {peer} has a whole copy of every volume: bring a good disk back")
            }
        },
        _ => "see `duplex explain` on both servers".to_owned(),
    }
}

const SAME_SETTINGS: &str = "make duplex.toml the same on both servers, then restart both";

/// Two copies of a volume were made with other sizes.
fn shapes_differ(mine: &Hello, theirs: &Hello) -> bool {
    let shape = |copy: &CopyRecord| (copy.size_bytes, copy.block_bytes, copy.sector_bytes);
    mine.volumes.iter().any(|mine| {
        let same = theirs.volumes.iter().find(|theirs| theirs.name == mine.name);
        same.is_some_and(|theirs| shape(&theirs.copy) != shape(&mine.copy))
    })
}

fn names(hello: &Hello) -> String {
    hello.volumes.iter().map(|v| v.name.as_str()).collect::<Vec<_>>().join(" ")
}

fn is_whole(hello: &Hello) -> bool {
    hello.volumes.iter().all(|v| v.copy.state == CopyState::UpToDate)
}

/// The only server whose copies are all up to date, and the other one.
fn whole<'a>(mine: &'a Hello, theirs: &'a Hello) -> Option<(&'a Hello, &'a Hello)> {
    match (is_whole(mine), is_whole(theirs)) {
        (true, false) => Some((mine, theirs)),
        (false, true) => Some((theirs, mine)),
        (true, true) | (false, false) => None,
    }
}

/// Each server is the only source of some volume. One of them gives its copies up: all of them, so that nothing of a
/// lineage is left that the other lacks.
fn mixed_sources(mine: &Hello, theirs: &Hello) -> String {
    let keep = |good: &Hello, bad: &Hello| {
        format!(
            "to go on with {}'s data: stop the daemon on {}, `duplex create --overwrite-data {}` there, start it",
            good.server,
            bad.server,
            names(bad)
        )
    };
    let mut ways = Vec::new();
    if is_whole(mine) {
        ways.push(keep(mine, theirs));
    }
    if is_whole(theirs) {
        ways.push(keep(theirs, mine));
    }
    // Both ends of the link say it in the same order.
    ways.sort();
    if ways.is_empty() {
        return "neither server has a whole copy of every volume: bring the missing disk back".to_owned();
    }
    format!("{}. What the other one wrote alone is lost", ways.join("; or "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resync::fixtures::{copy, hello};

    #[test]
    fn mixed_sources_name_whose_copies_are_to_be_made_anew() {
        let blank = CopyRecord::blank(64 << 20, 4096, 4096);
        let a = hello("alpha", vec![blank, copy()]);
        let b = hello("beta", vec![copy(), copy()]);
        let text = remedy("mixed-sources", &a, &b);
        assert!(text.contains("to go on with beta's data"), "{text}");
        assert!(text.contains("stop the daemon on alpha, `duplex create --overwrite-data v0 v1`"), "{text}");
        assert!(!text.contains("alpha's data"), "alpha has no copy of v0: {text}");
        assert_eq!(text, remedy("mixed-sources", &b, &a), "both servers say the same");
    }

    #[test]
    fn two_whole_servers_leave_the_choice() {
        let (a, b) = (hello("alpha", vec![copy()]), hello("beta", vec![copy()]));
        let text = remedy("mixed-sources", &a, &b);
        assert!(text.contains("alpha's data") && text.contains("beta's data"), "{text}");
    }

    #[test]
    fn every_refusal_has_a_remedy_of_its_own() {
        let (a, b) = (hello("alpha", vec![copy()]), hello("beta", vec![copy()]));
        let codes = [
            "same-server",
            "foreign-pair-name",
            "foreign-volume-name",
            "foreign-pair",
            "foreign-volume",
            "volume-size",
            "block-size",
            "sector-size",
            "too-small",
            "no-usable-copy",
            "newer-unusable",
            "unrelated",
            "mixed-sources",
            "volumes-differ",
            "version",
            "memory",
            "configuration",
            "address",
        ];
        for code in codes {
            assert!(!remedy(code, &a, &b).contains("explain"), "{code}");
        }
    }

    #[test]
    fn no_disk_is_given_up_for_settings_that_differ() {
        let (a, mut b) = (hello("alpha", vec![copy()]), hello("beta", vec![copy()]));
        for code in ["volume-size", "block-size", "sector-size"] {
            let text = remedy(code, &a, &b);
            assert!(text.contains("duplex.toml") && !text.contains("overwrite"), "{code}: {text}");
        }
        b.volumes[0].copy.size_bytes += 4096;
        assert!(remedy("volume-size", &a, &b).contains("--overwrite-data"));
    }
}
