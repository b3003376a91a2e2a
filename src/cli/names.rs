//! Names of what is there, for completions: shells ask for them with a hidden command.

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;

use crate::interface::{CloudRequest, ContentRequest, Reply, Request, VmRequest};

use super::Cli;
use super::context::Context;
use super::printer::Outcome;

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Named {
    Vm,
    Cloud,
    Component,
}

#[derive(Args)]
pub struct CompleteNames {
    named: Named,
}

impl Named {
    /// What an argument of this id takes, wherever it is.
    fn of(argument: &str) -> Option<Self> {
        match argument {
            "vm" | "vms" => Some(Named::Vm),
            "to" | "member" => Some(Named::Cloud),
            "component" | "components" | "from" => Some(Named::Component),
            _ => None,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Named::Vm => "vm",
            Named::Cloud => "cloud",
            Named::Component => "component",
        }
    }
}

/// One a line; none where nobody can be asked. A shell may expand what it is given: nothing odd is.
pub async fn print(ctx: &Context, args: CompleteNames) -> Outcome {
    let request = match args.named {
        Named::Vm => Request::Vm(VmRequest::List),
        Named::Cloud => Request::Cloud(CloudRequest::Members),
        Named::Component => Request::Content(ContentRequest::ComponentList),
    };
    let Ok(client) = ctx.client().await else { return Ok(()) };
    let mut names: Vec<String> = match client.call(&request, |_| ()).await {
        Ok(Reply::Vms(vms)) => vms.into_iter().map(|vm| vm.name.to_string()).collect(),
        Ok(Reply::Members(members)) => members
            .into_iter()
            .map(|m| m.cloud.map_or(m.jid.to_string(), |cloud| cloud.to_string()))
            .collect(),
        Ok(Reply::Components(components)) => components.into_iter().map(|c| c.name).collect(),
        _ => Vec::new(),
    };
    names.retain(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._@+-".contains(&b)));
    names.sort();
    names.dedup();
    names.iter().try_for_each(|name| ctx.printer.line(name))
}

/// A generated script, made to ask for names where an argument is one.
pub fn with_names(shell: Shell, script: String) -> String {
    match shell {
        Shell::Bash => bash(script),
        Shell::Zsh => zsh(&script),
        Shell::Fish => fish(script),
        _ => script,
    }
}

/// A command or an option, and what it takes.
type Taker = (String, Named);

/// The commands with an argument in a place that takes such a name, and the options that do.
fn takers() -> (Vec<Taker>, Vec<Taker>) {
    fn walk(command: &clap::Command, path: &str, places: &mut Vec<Taker>, options: &mut Vec<Taker>) {
        for argument in command.get_arguments() {
            let Some(named) = Named::of(argument.get_id().as_str()) else { continue };
            match argument.get_long() {
                None => places.push((path.to_owned(), named)),
                // Options of other commands have other meanings.
                Some(long) if matches!(long, "to" | "component") => {
                    options.push((format!("--{long}"), named))
                }
                Some(_) => {}
            }
        }
        for sub in command.get_subcommands() {
            walk(sub, format!("{path} {}", sub.get_name()).trim_start(), places, options);
        }
    }
    let (mut places, mut options) = (Vec::new(), Vec::new());
    walk(&Cli::command(), "", &mut places, &mut options);
    places.dedup();
    options.sort_by(|a, b| a.0.cmp(&b.0));
    options.dedup();
    (places, options)
}

fn bash(mut script: String) -> String {
    let (places, options) = takers();
    let mut cases = String::new();
    for (option, named) in &options {
        cases.push_str(&format!("        {option}) kind={} ;;\n", named.as_str()));
    }
    let mut lines = String::new();
    for (path, named) in &places {
        lines.push_str(&format!("            *\" {path} \"*) kind={} ;;\n", named.as_str()));
    }
    script.push_str(&format!(
        "\n_cicada_with_names() {{\n    _cicada \"$@\"\n    local cur=\"${{COMP_WORDS[COMP_CWORD]}}\" prev=\"$3\" kind=\n    \
         local line=\" ${{COMP_WORDS[*]:1:COMP_CWORD-1}} \"\n    [[ $cur == -* ]] && return\n    \
         case \"$prev\" in\n{cases}        --*) ;;\n        *) case \"$line\" in\n{lines}        esac ;;\n    esac\n    \
         [[ -z $kind ]] && return\n    \
         COMPREPLY+=($(compgen -W \"$(cicada complete-names \"$kind\" 2>/dev/null)\" -- \"$cur\"))\n}}\n\
         complete -F _cicada_with_names -o bashdefault -o default cicada\n"
    ));
    script
}

fn zsh(script: &str) -> String {
    let mut out = String::new();
    for line in script.lines() {
        let spec = line.trim_start_matches('\'').trim_start_matches(['*', ':']);
        let id = spec.split(" -- ").next().unwrap_or_default();
        let option = spec.strip_prefix("--").and_then(|s| s.split(['=', '[']).next());
        let named = match option {
            Some(option) => Named::of(option).filter(|_| matches!(option, "to" | "component")),
            None if spec.contains(" -- ") => Named::of(id),
            None => None,
        };
        match (named, line.find(":_default'")) {
            (Some(named), Some(at)) => {
                let rest = &line[at + ":_default".len()..];
                out.push_str(&format!("{}: _cicada_names {}{rest}", &line[..at], named.as_str()));
            }
            _ => out.push_str(line),
        }
        out.push('\n');
        if line.starts_with("#compdef") {
            out.push_str(
                "\n_cicada_names() {\n    local -a names\n    \
                 names=(${(f)\"$(cicada complete-names $1 2>/dev/null)\"})\n    compadd -a names\n}\n",
            );
        }
    }
    out
}

fn fish(mut script: String) -> String {
    let (places, options) = takers();
    for (path, named) in &places {
        let seen: Vec<_> =
            path.split(' ').map(|word| format!("__fish_seen_subcommand_from {word}")).collect();
        script.push_str(&format!(
            "complete -c cicada -n \"{}\" -f -a \"(cicada complete-names {} 2>/dev/null)\"\n",
            seen.join("; and "),
            named.as_str()
        ));
    }
    for (option, named) in &options {
        script.push_str(&format!(
            "complete -c cicada -l {} -x -a \"(cicada complete-names {} 2>/dev/null)\"\n",
            option.trim_start_matches('-'),
            named.as_str()
        ));
    }
    script
}
