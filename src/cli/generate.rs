//! `cicada completions` and `cicada man`

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use crate::interface::problem::Problem;

use super::Cli;
use super::context::Context;
use super::printer::Outcome;
use super::{examples, names};

/// The annotated sample: its comments are what the page of the configuration says.
const SAMPLE: &str = include_str!("../../federation.toml");

/// What the commands read and write, for the pages.
const FILES: &[(&str, &str)] = &[
    ("./federation.toml, /etc/cicada/federation.toml", "The configuration; see federation.toml(5)."),
    ("/var/lib/cicada", "What a cloud keeps: its key, records, repository and disks (cloud.data_dir)."),
    ("DATA_DIR/cicada.sock", "The broker's socket (api.socket)."),
    ("DATA_DIR/identity.key", "This cloud's secret key."),
];

#[derive(Args)]
pub struct Completions {
    shell: Shell,
}

#[derive(Args)]
pub struct Man {
    /// Where to write them; made if it is not there
    dir: PathBuf,
}

pub fn completions(ctx: &Context, args: &Completions) -> Outcome {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "cicada", &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    ctx.printer.raw(names::with_names(args.shell, text).as_bytes())
}

pub fn man(ctx: &Context, args: &Man) -> Outcome {
    let failed = |e: io::Error| Problem::from_path(format!("directory {}", args.dir.display()), &e);
    std::fs::create_dir_all(&args.dir).map_err(failed)?;
    // Manual pages are for everybody.
    rustix::process::umask(rustix::fs::Mode::WGRP | rustix::fs::Mode::WOTH);
    let mut root = Cli::command();
    root.build();
    pages(&root, "", &args.dir).map_err(failed)?;
    std::fs::write(args.dir.join("federation.toml.5"), configuration(SAMPLE)).map_err(failed)?;
    ctx.printer.note(format!("manual pages written to {}", args.dir.display()));
    Ok(())
}

/// The page of a command, and those of its subcommands.
fn pages(command: &Command, path: &str, dir: &Path) -> io::Result<()> {
    let name = format!("cicada {path}").trim_end().replace(' ', "-");
    let subs = || command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help");
    for sub in subs() {
        pages(sub, format!("{path} {}", sub.get_name()).trim_start(), dir)?;
    }
    let shown = command.clone();
    let mut page = Vec::new();
    clap_mangen::Man::new(shown).title(name.to_uppercase()).render(&mut page)?;
    let mut more = String::new();
    if !examples::of(path).is_empty() {
        more.push_str(".SH EXAMPLES\n");
        for (what, line) in examples::of(path) {
            let _ = writeln!(more, ".PP\n{}:\n.PP\n.in +4n\n.nf\n{}\n.fi\n.in", roff(what), roff(line));
        }
    }
    more.push_str(".SH FILES\n");
    for (file, what) in FILES {
        let _ = writeln!(more, ".TP\n.I {}\n{}", roff(file), roff(what));
    }
    let parent = name.rsplit_once('-').filter(|_| !path.is_empty()).map(|(parent, _)| parent.to_owned());
    let below = subs().map(|sub| format!("{name}-{}", sub.get_name()));
    let see: Vec<_> = parent.into_iter().chain(below).map(|page| format!("{}(1)", roff(&page))).collect();
    let _ = writeln!(more, ".SH SEE ALSO\n{}", [see, vec!["federation.toml(5)".into()]].concat().join(", "));
    page.extend_from_slice(more.as_bytes());
    std::fs::write(dir.join(format!("{name}.1")), page)
}

/// The page of the configuration, of the annotated sample.
fn configuration(sample: &str) -> String {
    let mut page = String::from(
        ".TH FEDERATION.TOML 5\n.SH NAME\nfederation.toml \\- the configuration of a cloud of cicada(1)\n\
         .SH DESCRIPTION\n",
    );
    let mut words: Vec<&str> = Vec::new();
    for line in sample.lines() {
        let plain = line.strip_prefix('#').map(str::trim_start);
        let setting = |text: &str| {
            text.split_once(" = ")
                .map(|(key, _)| key)
                .filter(|key| {
                    !key.is_empty()
                        && key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
                })
                .is_some()
        };
        let section = plain.unwrap_or(line);
        match plain {
            _ if section.starts_with('[') && section.ends_with(']') => {
                paragraph(&mut page, &mut words);
                let _ = writeln!(page, ".SH {}", roff(section));
            }
            Some(text) if !setting(text) => words.push(text),
            // A line that is commented out shows the default.
            _ if setting(section) => {
                let _ = writeln!(page, ".TP\n.B {}", roff(section));
                paragraph(&mut page, &mut words);
            }
            _ => {
                if !words.is_empty() {
                    page.push_str(".PP\n");
                }
                paragraph(&mut page, &mut words);
            }
        }
    }
    paragraph(&mut page, &mut words);
    page.push_str(".SH SEE ALSO\ncicada(1), cicada\\-config\\-check(1)\n");
    page
}

fn paragraph(page: &mut String, words: &mut Vec<&str>) {
    for line in words.drain(..).filter(|line| !line.is_empty()) {
        let _ = writeln!(page, "{}", roff(line));
    }
}

/// Text that roff takes for nothing else.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    match text.starts_with(['.', '\'']) {
        true => format!("\\&{text}"),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_the_configuration_has_every_setting_with_words_for_it() {
        let page = configuration(SAMPLE);
        for section in
            ["[cloud]", "[xmpp]", "[transfer]", "[hypervisor]", "[migration]", "[repository]", "[api]"]
        {
            assert!(page.contains(&format!(".SH {section}\n")), "{section}");
        }
        for setting in ["data_dir", "channel_binding", "cpu_overcommit", "gc_grace", "concurrency"] {
            assert!(page.contains(&format!(".B {setting} = ")), "{setting}");
        }
        assert!(page.contains("Carbon intensity") && !page.contains("\n# "), "{page}");
        let odd = roff(".so\\ a-b");
        assert_eq!(odd, "\\&.so\\e a\\-b");
    }
}
