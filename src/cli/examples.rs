//! Examples of the commands: at the end of `--help`, and in the manual pages. Each is a command line that is
//! understood, which a test makes sure of.

use clap::Command;

/// A command's path, and lines of what is done and how.
type Examples = (&'static str, &'static [(&'static str, &'static str)]);

#[rustfmt::skip]
const EXAMPLES: &[Examples] = &[
    ("broker", &[
        ("Run this cloud's broker by another configuration", "cicada broker --config /etc/cicada/federation.toml"),
    ]),
    ("config check", &[("Try all that a broker will need", "cicada config check --online")]),
    ("config show", &[("As a program reads it", "cicada config show --json")]),
    ("identity show", &[("What to tell the operators of the other clouds", "cicada identity show")]),
    ("identity trust", &[
        ("After its operator has read the fingerprint out to you",
         "cicada identity trust cloud-b 0123-4567-89ab-cdef-0123"),
    ]),
    ("federation create", &[
        ("Make the room with the account that shall own it",
         "cicada federation create --owner-jid owner@example.org --owner-password-file owner.password"),
    ]),
    ("federation add", &[
        ("Let one more cloud in",
         "cicada federation add cloud-c@example.org --owner-jid owner@example.org --owner-password-file owner.password"),
    ]),
    ("members", &[
        ("Follow who comes and goes", "cicada members --watch"),
        ("The members that are online, as a program reads them", "cicada members --json"),
    ]),
    ("component import", &[
        ("A program's directory, laid onto an OS",
         "cicada component import ./shop --name shop --version 1.4 --requires debian-12@1"),
        ("An unpacked operating system", "cicada component import rootfs.tar.zst --name os --version 1 --kind os"),
    ]),
    ("component build", &[("From a definition", "cicada component build components/redis.toml")]),
    ("component remove", &[("One version of it", "cicada component remove redis@7.0")]),
    ("recipe create", &[
        ("A disk of 2 GiB", "cicada recipe create --component debian-12 --component redis --root-size 2G"),
    ]),
    ("compose", &[("As a file for another hypervisor", "cicada compose 4f1c -o disk.vmdk --format vmdk")]),
    ("repo export", &[("All that has a name, for a cloud that no link reaches", "cicada repo export components.tar")]),
    ("repo import", &[("With its names", "cicada repo import components.tar --bind")]),
    ("repo gc", &[("What would go", "cicada repo gc --dry-run")]),
    ("vm create", &[
        ("A VM with a disk for data, on a network, started at once",
         "cicada vm create web --component debian-12 --component redis --user-data 4G --memory 1G --network lan --start"),
        ("Its id, for a script", "cicada vm create web --component debian-12 --json"),
    ]),
    ("vm adopt", &[
        ("What would be known of it", "cicada vm adopt old old.qcow2 --dry-run"),
        ("A system that starts by the devices of its old machine",
         "cicada vm adopt old old.qcow2 --firmware bios --disk-bus sata --network lan --card-model e1000e \
          --mac 00:1b:21:0a:0b:0c --uuid 4c4c4544-0044-4710-8035-b3c04f4d3532"),
    ]),
    ("vm export", &[("Its disk as a file", "cicada vm export old /srv/images/old.qcow2 --format qcow2")]),
    ("vm list", &[("As a program reads it", "cicada vm list --json")]),
    ("vm start", &[("And wait until its guest says that it is ready", "cicada vm start web --wait")]),
    ("vm stop", &[
        ("Give its guest five minutes", "cicada vm stop web --timeout 5m"),
        ("All that run", "cicada vm stop --all"),
    ]),
    ("vm set", &[("More memory from its next start on", "cicada vm set web --memory 2G")]),
    ("vm resize", &[("A larger disk for data", "cicada vm resize web --user-data 8G")]),
    ("vm delete", &[("In a script", "cicada vm delete web --yes")]),
    ("vm console", &[
        ("Type into it and wait for an answer",
         "cicada vm console web --send uptime --expect load --timeout 1m"),
    ]),
    ("plan", &[("Who could take it, and what would travel", "cicada plan web")]),
    ("move", &[
        ("To the best member", "cicada move web"),
        ("To this one, whatever its guest makes of the power button", "cicada move web --to cloud-b --force-stop"),
    ]),
    ("migration watch", &[("Until it ends", "cicada migration watch 4f1c2a9e")]),
    ("migration limit", &[("No more than this", "cicada migration limit 4f1c2a9e 20Mbit")]),
    ("migration resolve", &[
        ("What deciding alone risks is said before it is done", "cicada migration resolve 4f1c2a9e --owner here"),
    ]),
    ("receipt verify", &[("Anywhere, without a broker", "cicada receipt verify web.receipt")]),
    ("sim", &[
        ("A few clouds, by another seed",
         "cicada sim fixtures/sim/small.toml --packages fixtures/sim/packages.tsv --seed 7"),
    ]),
    ("completions", &[("For this shell", "cicada completions bash")]),
    ("man", &[("For man(1)", "cicada man /usr/local/share/man/man1")]),
];

/// The examples of a command, by its path without the program's name.
pub fn of(path: &str) -> &'static [(&'static str, &'static str)] {
    EXAMPLES.iter().find(|(of, _)| *of == path).map_or(&[], |(_, examples)| examples)
}

/// The command with its examples at the end of every help text.
pub fn added(command: Command) -> Command {
    fn add(command: Command, path: &str) -> Command {
        let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
        let mut command = names.iter().fold(command, |command, name| {
            let below = format!("{path} {name}");
            command.mut_subcommand(name, |sub| add(sub, below.trim_start()))
        });
        let examples = of(path);
        if !examples.is_empty() {
            let lines: Vec<_> =
                examples.iter().map(|(what, line)| format!("  {what}:\n    {line}")).collect();
            command = command.after_long_help(format!("Examples:\n{}", lines.join("\n")));
        }
        command
    }
    add(command, "")
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_example_is_understood_and_of_its_command() {
        for (path, examples) in EXAMPLES {
            let mut command = &Cli::command();
            for name in path.split(' ') {
                command = command.find_subcommand(name).unwrap_or_else(|| panic!("no command {path}"));
            }
            for (what, line) in *examples {
                let words: Vec<&str> = line.split_whitespace().collect();
                assert!(line.starts_with(&format!("cicada {path}")), "{line}");
                if let Err(e) = Cli::try_parse_from(words) {
                    panic!("{what}: {line}: {e}");
                }
            }
        }
    }
}
