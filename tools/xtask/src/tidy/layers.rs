//! Arrows point one way: tools, tests, benches -> node -> {store, frontend, link} -> ring -> core.
//! The three in braces never see each other, and the core sees neither a runtime nor an I/O crate.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

/// The crates of ours that each crate of ours may use.
const ALLOWED: &[(&str, &[&str])] = &[
    ("duplex-core", &[]),
    ("duplex-ring", &["duplex-core"]),
    ("duplex-store", &["duplex-ring", "duplex-core"]),
    ("duplex-frontend", &["duplex-ring", "duplex-core"]),
    ("duplex-link", &["duplex-ring", "duplex-core"]),
    ("duplex-node", &["duplex-store", "duplex-frontend", "duplex-link", "duplex-ring", "duplex-core"]),
    ("duplex", BELOW_TOOLS),
    ("duplex-tests", BELOW_TOOLS),
    ("duplex-benches", BELOW_TOOLS),
    ("xtask", &[]),
];

const BELOW_TOOLS: &[&str] =
    &["duplex-node", "duplex-store", "duplex-frontend", "duplex-link", "duplex-ring", "duplex-core"];

/// Every crate that may be linked into the core, directly or through another: computation and encoding only.
const CORE_MAY_LINK: &[&str] = &[
    "cfg-if",
    "crc32fast",
    "itoa",
    "memchr",
    "proc-macro2",
    "quote",
    "ryu",
    "serde",
    "serde_core",
    "serde_derive",
    "serde_json",
    "syn",
    "thiserror",
    "thiserror-impl",
    "unicode-ident",
    "xxhash-rust",
    "zmij",
];

/// Checks the output of `cargo metadata`.
pub(super) fn check(metadata: &Value) -> Result<Vec<String>> {
    let mut found = direct_edges(metadata)?;
    found.extend(core_closure(metadata)?);
    Ok(found)
}

fn direct_edges(metadata: &Value) -> Result<Vec<String>> {
    let members: BTreeSet<&str> =
        array(metadata, "workspace_members")?.iter().filter_map(Value::as_str).collect();
    let mut found = Vec::new();
    for package in array(metadata, "packages")? {
        if !package["id"].as_str().is_some_and(|id| members.contains(id)) {
            continue;
        }
        let name = package["name"].as_str().context("a package has no name")?;
        let Some((_, allowed)) = ALLOWED.iter().find(|(of, _)| *of == name) else {
            found.push(format!(
                "{name}: a crate the layering does not know; give it its place in tidy/layers.rs"
            ));
            continue;
        };
        for dependency in array(package, "dependencies")? {
            let of = dependency["name"].as_str().context("a dependency has no name")?;
            let ours = ALLOWED.iter().any(|(member, _)| *member == of);
            if ours && of != name && !allowed.contains(&of) {
                let kind = dependency["kind"].as_str().unwrap_or("normal");
                found.push(format!(
                    "{name} -> {of} ({kind}): this arrow points up or sideways; see ARCHITECTURE.md"
                ));
            }
        }
    }
    Ok(found)
}

/// What the core links, through however many steps; development dependencies are not linked.
fn core_closure(metadata: &Value) -> Result<Vec<String>> {
    let names: BTreeMap<&str, &str> = array(metadata, "packages")?
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package["name"].as_str()?)))
        .collect();
    let nodes: BTreeMap<&str, &Value> = array(&metadata["resolve"], "nodes")?
        .iter()
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let (core, _) = names.iter().find(|(_, name)| **name == "duplex-core").context("no crate duplex-core")?;
    let mut pending = vec![*core];
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    while let Some(id) = pending.pop() {
        if !seen.insert(id) {
            continue;
        }
        let name = names.get(id).copied().unwrap_or(id);
        if id != *core && !CORE_MAY_LINK.contains(&name) {
            found.push(format!(
                "duplex-core links {name}: the core is pure; only computation and encoding crates"
            ));
        }
        for dependency in nodes.get(id).map(|node| array(node, "deps")).transpose()?.into_iter().flatten() {
            let linked = array(dependency, "dep_kinds")?.iter().any(|kind| kind["kind"] != "dev");
            if let (true, Some(of)) = (linked, dependency["pkg"].as_str()) {
                pending.push(of);
            }
        }
    }
    Ok(found)
}

fn array<'a>(value: &'a Value, field: &str) -> Result<&'a Vec<Value>> {
    value[field].as_array().with_context(|| format!("cargo metadata has no list `{field}`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Metadata of a workspace in which each pair is an arrow (name, uses, kind).
    fn workspace(arrows: &[(&str, &str, Option<&str>)]) -> Value {
        let mut names: BTreeSet<&str> = arrows.iter().flat_map(|(from, to, _)| [*from, *to]).collect();
        names.insert("duplex-core");
        let of = |name: &str| arrows.iter().filter(|(from, ..)| *from == name).collect::<Vec<_>>();
        json!({
            "workspace_members": names.iter().filter(|n| n.starts_with("duplex") || **n == "xtask").collect::<Vec<_>>(),
            "packages": names.iter().map(|name| json!({
                "id": name, "name": name,
                "dependencies": of(name).iter().map(|(_, to, kind)| json!({"name": to, "kind": kind})).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "resolve": { "nodes": names.iter().map(|name| json!({
                "id": name,
                "deps": of(name).iter().map(|(_, to, kind)| json!({"pkg": to, "dep_kinds": [{"kind": kind}]})).collect::<Vec<_>>(),
            })).collect::<Vec<_>>() },
        })
    }

    fn found(arrows: &[(&str, &str, Option<&str>)]) -> Vec<String> {
        check(&workspace(arrows)).expect("the metadata is whole")
    }

    #[test]
    fn the_drawn_arrows_hold() {
        let arrows = [
            ("duplex", "duplex-node", None),
            ("duplex-node", "duplex-store", None),
            ("duplex-node", "duplex-link", None),
            ("duplex-store", "duplex-ring", None),
            ("duplex-ring", "duplex-core", None),
            ("duplex-core", "crc32fast", None),
            ("crc32fast", "cfg-if", None),
            ("duplex-core", "proptest", Some("dev")),
            ("duplex-tests", "duplex-core", None),
        ];
        assert_eq!(found(&arrows), Vec::<String>::new());
    }

    #[test]
    fn an_arrow_up_or_sideways_is_found() {
        for (from, to) in [
            ("duplex-core", "duplex-ring"),
            ("duplex-ring", "duplex-store"),
            ("duplex-store", "duplex-link"),
            ("duplex-frontend", "duplex-store"),
            ("duplex-link", "duplex-node"),
            ("duplex-node", "duplex"),
            ("duplex-node", "duplex-tests"),
        ] {
            let said = found(&[(from, to, None)]);
            assert!(
                said.iter().any(|line| line.starts_with(&format!("{from} -> {to}"))),
                "{from} -> {to}: {said:?}"
            );
        }
    }

    #[test]
    fn a_development_arrow_up_is_found_too() {
        assert_eq!(found(&[("duplex-store", "duplex-node", Some("dev"))]).len(), 1);
    }

    #[test]
    fn a_runtime_below_the_core_is_found_through_any_number_of_steps() {
        let said = found(&[
            ("duplex-core", "thiserror", None),
            ("thiserror", "helper", None),
            ("helper", "tokio", None),
        ]);
        assert!(said.iter().any(|line| line.contains("duplex-core links tokio")), "{said:?}");
        assert!(said.iter().any(|line| line.contains("duplex-core links helper")), "{said:?}");
    }

    #[test]
    fn a_crate_without_a_place_is_found() {
        let said = found(&[("duplex-surprise", "duplex-core", None)]);
        assert!(said[0].starts_with("duplex-surprise: a crate the layering does not know"), "{said:?}");
    }

    #[test]
    fn the_workspace_as_it_is_holds() {
        std::env::set_current_dir(crate::process::workspace_root().expect("inside the workspace"))
            .expect("it exists");
        let metadata = crate::process::metadata(true).expect("cargo metadata runs");
        assert_eq!(check(&metadata).expect("it is whole"), Vec::<String>::new());
    }
}
