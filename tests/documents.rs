//! What the documents point to is there.

use std::fs;
use std::path::{Component, Path, PathBuf};

fn documents(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if entry.is_dir() && !name.starts_with('.') && name != "target" {
            documents(&entry, out);
        } else if name.ends_with(".md") {
            out.push(entry);
        }
    }
}

/// Targets of Markdown links, without those to other hosts.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link).filter(|link| {
        !link.contains("://")
            && !link.starts_with('#')
            && !link.contains(char::is_whitespace)
            && !link.is_empty()
    })
}

/// As a heading is named in links to it.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn normal(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut out, part| {
        match part {
            Component::ParentDir => drop(out.pop()),
            part => out.push(part),
        }
        out
    })
}

#[test]
fn every_link_leads_somewhere() {
    let (mut all, mut dead, mut seen) = (Vec::new(), Vec::new(), 0);
    documents(Path::new(env!("CARGO_MANIFEST_DIR")), &mut all);
    for document in &all {
        let text = fs::read_to_string(document).unwrap();
        for link in links(&text) {
            seen += 1;
            let (path, place) = link.split_once('#').unwrap_or((link, ""));
            let target = normal(&document.parent().unwrap().join(path));
            let has_place = |text: String| {
                text.lines()
                    .filter(|l| l.starts_with('#'))
                    .any(|l| anchor(l.trim_start_matches('#')) == place)
            };
            let is_there =
                target.exists() && (place.is_empty() || fs::read_to_string(&target).is_ok_and(has_place));
            if !is_there {
                dead.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
    assert!(seen > 30, "{seen} links were found in {} documents", all.len());
}
