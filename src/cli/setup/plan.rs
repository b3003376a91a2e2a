//! What of a machine has to change so that the service can run there: decided from what was found, without
//! touching anything.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// The user and the group the broker runs as.
pub const USER: &str = "cicada";
pub const CONFIG: &str = "/etc/cicada/federation.toml";
pub const PASSWORD: &str = "/etc/cicada/xmpp.password";
pub const STATE: &str = "/var/lib/cicada";
pub const PROGRAM: &str = "/usr/local/bin/cicada";
/// Where units are that an administrator installs from no package. Those in /etc/systemd/system go before.
pub const UNITS: &str = "/usr/local/lib/systemd/system";
pub const SYSUSERS: &str = include_str!("../../../deploy/systemd/cicada.sysusers.conf");

const SAMPLE: &str = include_str!("../../../federation.toml");
const TMPFILES: &str = include_str!("../../../deploy/systemd/cicada.tmpfiles.conf");
const SHIPPED: [(&str, &str); 4] = [
    ("/usr/local/lib/sysusers.d/cicada.conf", SYSUSERS),
    ("/usr/local/lib/tmpfiles.d/cicada.conf", TMPFILES),
    ("/usr/local/lib/systemd/system/cicada.service", include_str!("../../../deploy/systemd/cicada.service")),
    (
        "/usr/local/lib/systemd/system/cicada-guests.service",
        include_str!("../../../deploy/systemd/cicada-guests.service"),
    ),
];
const MARK: &str = "# Installed by 'cicada setup', which replaces it as long as it is unchanged: ";

/// Whose something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    Root,
    /// Root's, and the broker's group may use it as its mode says.
    RootForBroker,
    Broker,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Owner::Root => "root:root",
            Owner::RootForBroker => "root:cicada",
            Owner::Broker => "cicada:cicada",
        })
    }
}

/// The user and group id of the broker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ids {
    pub user: u32,
    pub group: u32,
}

impl Owner {
    /// User and group id, if those of the broker are known.
    pub fn ids(self, broker: Option<Ids>) -> Option<(u32, u32)> {
        match self {
            Owner::Root => Some((0, 0)),
            Owner::RootForBroker => broker.map(|ids| (0, ids.group)),
            Owner::Broker => broker.map(|ids| (ids.user, ids.group)),
        }
    }
}

/// What shall be at a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    pub path: PathBuf,
    pub what: What,
    pub owner: Owner,
    pub mode: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    Directory,
    /// Ours, of this version, as long as nobody changed it.
    Shipped(String),
    /// Made where there is none; then it is the operator's.
    Sample(String),
    /// The operator's, whose owner and mode matter.
    Theirs,
    /// This very program.
    Program,
}

/// What the configuration says, where it is another place than the usual.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Places {
    pub password: Option<PathBuf>,
    pub data_dir: Option<PathBuf>,
    pub repository: Option<PathBuf>,
}

/// All that the service needs, in the order in which it is made.
pub fn wanted(places: &Places) -> Vec<Wanted> {
    let mut all = Vec::new();
    let shipped = |path: PathBuf, text: &str| Wanted {
        path,
        what: What::Shipped(marked(text)),
        owner: Owner::Root,
        mode: 0o644,
    };
    all.push(Wanted { path: PROGRAM.into(), what: What::Program, owner: Owner::Root, mode: 0o755 });
    all.extend(SHIPPED.iter().map(|(path, text)| shipped(path.into(), text)));
    all.extend(TMPFILES.lines().filter_map(rule));
    if let Some(path) = &places.password {
        let path = path.clone();
        all.retain(|w| w.path != Path::new(PASSWORD));
        all.push(Wanted { path, what: What::Theirs, owner: Owner::Broker, mode: 0o600 });
    }
    let mut elsewhere = Vec::new();
    for path in [&places.data_dir, &places.repository].into_iter().flatten() {
        if !elsewhere.iter().any(|known| path.starts_with(known)) {
            elsewhere.push(path.clone());
        }
        all.push(Wanted { path: path.clone(), what: What::Directory, owner: Owner::Broker, mode: 0o700 });
    }
    if !elsewhere.is_empty() {
        // The unit may write nowhere else.
        let lines = elsewhere.iter().map(|path| format!("ReadWritePaths={}\n", path.display()));
        let text = format!("[Service]\n{}", lines.collect::<String>());
        all.push(shipped(Path::new(UNITS).join("cicada.service.d/places.conf"), &text));
    }
    all
}

/// A line of the file that restores owners and modes at every start of the machine: what is made is what that
/// keeps.
fn rule(line: &str) -> Option<Wanted> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [kind, path, mode, user, group] = words[..] else { return None };
    let owner = match (user, group) {
        ("root", "root") => Owner::Root,
        ("root", USER) => Owner::RootForBroker,
        (USER, USER) => Owner::Broker,
        _ => return None,
    };
    let what = match (kind, path) {
        ("d", _) => What::Directory,
        ("z", CONFIG) => What::Sample(SAMPLE.to_owned()),
        // For the password: to be written into a file that nobody else can read.
        ("z", PASSWORD) => What::Sample(String::new()),
        _ => return None,
    };
    Some(Wanted { path: path.into(), what, owner, mode: u32::from_str_radix(mode, 8).ok()? })
}

/// The text with a first line that says whose it is, and by which a change is noticed.
pub fn marked(text: &str) -> String {
    format!("{MARK}{}\n{text}", sum(text))
}

fn is_unchanged(text: &str) -> bool {
    let parts = text.strip_prefix(MARK).and_then(|rest| rest.split_once('\n'));
    parts.is_some_and(|(noted, rest)| noted == sum(rest))
}

fn sum(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..16].to_owned()
}

/// What is at a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub kind: Kind,
    pub user: u32,
    pub group: u32,
    pub mode: u32,
    /// Of a file that is short enough to be one of ours.
    pub text: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Directory,
    File,
    /// A link, or what is neither.
    Other,
}

/// What the machine is like.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Facts {
    /// The broker's user, if it is there.
    pub broker: Option<Ids>,
    pub may_use_kvm: bool,
    pub at: BTreeMap<PathBuf, Found>,
    /// Whether the installed program is this one.
    pub same_program: bool,
    /// Files and directories of root's in the broker's directories, which the broker cannot use.
    pub roots: BTreeMap<PathBuf, u64>,
    /// Units of ours that lie where they go before what is installed here.
    pub before: Vec<PathBuf>,
}

/// One thing to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    AddUser {
        is_there: bool,
    },
    MakeDirectory {
        path: PathBuf,
        owner: Owner,
        mode: u32,
    },
    WriteFile {
        path: PathBuf,
        text: String,
        owner: Owner,
        mode: u32,
        replaces: bool,
    },
    CopyProgram {
        path: PathBuf,
    },
    Give {
        path: PathBuf,
        owner: Owner,
        mode: u32,
    },
    /// What is root's in a directory of the broker's.
    GiveAll {
        path: PathBuf,
        count: u64,
    },
    /// systemd reads its units.
    Reload,
}

impl Step {
    /// What it is about.
    pub fn object(&self) -> String {
        match self {
            Step::AddUser { .. } => format!("user {USER}"),
            Step::MakeDirectory { path, .. }
            | Step::WriteFile { path, .. }
            | Step::CopyProgram { path }
            | Step::Give { path, .. }
            | Step::GiveAll { path, .. } => path.display().to_string(),
            Step::Reload => "systemd".into(),
        }
    }

    /// What is done to it.
    pub fn change(&self) -> String {
        match self {
            Step::AddUser { is_there: false } => "made, in the group kvm".into(),
            Step::AddUser { is_there: true } => "put into the group kvm".into(),
            Step::MakeDirectory { owner, mode, .. } => format!("directory made, {owner} {mode:04o}"),
            Step::WriteFile { replaces: true, .. } => "replaced by this version's".into(),
            Step::WriteFile { owner, mode, text, .. } if text.is_empty() => {
                format!("made empty, {owner} {mode:04o}")
            }
            Step::WriteFile { owner, mode, .. } => format!("written, {owner} {mode:04o}"),
            Step::CopyProgram { .. } => "this program, copied there".into(),
            Step::Give { owner, mode, .. } => format!("now {owner} {mode:04o}"),
            Step::GiveAll { count, .. } => {
                format!("{count} files and directories of root's in it now {USER}'s")
            }
            Step::Reload => "has read its units".into(),
        }
    }
}

/// Something that is left as it is although it is not what this version would make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept {
    pub object: String,
    pub reason: String,
}

#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Plan {
    pub steps: Vec<Step>,
    pub kept: Vec<Kept>,
}

/// Something is in the way.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("is {found} where {wanted} should be")]
pub struct InTheWay {
    pub path: PathBuf,
    pub found: &'static str,
    pub wanted: &'static str,
}

/// What has to be done so that all that is wanted is there.
pub fn plan(wanted: &[Wanted], facts: &Facts) -> Result<Plan, InTheWay> {
    let mut plan = Plan::default();
    if facts.broker.is_none() || !facts.may_use_kvm {
        plan.steps.push(Step::AddUser { is_there: facts.broker.is_some() });
    }
    for w in wanted {
        let Some(found) = facts.at.get(&w.path) else {
            plan.steps.extend(missing(w));
            continue;
        };
        let in_the_way = |found, wanted| InTheWay { path: w.path.clone(), found, wanted };
        match (&w.what, found.kind) {
            (What::Directory, Kind::Directory) => {}
            (What::Directory, _) => return Err(in_the_way("no directory", "one")),
            (_, Kind::Directory) => return Err(in_the_way("a directory", "a file")),
            (_, Kind::File) => {}
            // Whoever made a link knows what it leads to.
            (_, Kind::Other) => {
                let reason = "is no plain file: it is left as it is, and the broker must be able to read it";
                plan.kept.push(Kept { object: w.path.display().to_string(), reason: reason.into() });
                continue;
            }
        }
        match &w.what {
            What::Shipped(text) if found.text.as_ref() != Some(text) => {
                if found.text.as_deref().is_some_and(is_unchanged) {
                    plan.steps.push(write(w, text, true));
                } else {
                    let reason = "was changed, or is of somebody else: it is left as it is";
                    plan.kept.push(Kept { object: w.path.display().to_string(), reason: reason.into() });
                }
            }
            What::Program if !facts.same_program => {
                let reason = "is another version than this: it is left as it is";
                plan.kept.push(Kept { object: w.path.display().to_string(), reason: reason.into() });
            }
            What::Shipped(_) | What::Program => {}
            What::Directory | What::Sample(_) | What::Theirs => {
                let right = w.owner.ids(facts.broker) == Some((found.user, found.group));
                if !right || found.mode != w.mode {
                    plan.steps.push(Step::Give { path: w.path.clone(), owner: w.owner, mode: w.mode });
                }
                if let Some(count) = facts.roots.get(&w.path).copied().filter(|n| *n > 0) {
                    plan.steps.push(Step::GiveAll { path: w.path.clone(), count });
                }
            }
        }
    }
    for path in &facts.before {
        let reason = format!("goes before what is installed in {UNITS}: remove it unless it is meant to");
        plan.kept.push(Kept { object: path.display().to_string(), reason });
    }
    let is_unit = |step: &Step| match step {
        Step::WriteFile { path, .. } => path.starts_with(UNITS),
        _ => false,
    };
    if plan.steps.iter().any(is_unit) {
        plan.steps.push(Step::Reload);
    }
    Ok(plan)
}

fn missing(w: &Wanted) -> Option<Step> {
    let (path, owner, mode) = (w.path.clone(), w.owner, w.mode);
    match &w.what {
        What::Directory => Some(Step::MakeDirectory { path, owner, mode }),
        What::Shipped(text) | What::Sample(text) => Some(write(w, text, false)),
        What::Program => Some(Step::CopyProgram { path }),
        What::Theirs => None,
    }
}

fn write(w: &Wanted, text: &str, replaces: bool) -> Step {
    let (path, text) = (w.path.clone(), text.to_owned());
    Step::WriteFile { path, text, owner: w.owner, mode: w.mode, replaces }
}

/// Whether the configuration is still the one that was written here.
pub fn is_sample(text: &str) -> bool {
    text == SAMPLE
}

#[cfg(test)]
mod tests {
    use super::*;

    const BROKER: Ids = Ids { user: 990, group: 991 };

    /// As it is after every step of a plan.
    fn after(wanted: &[Wanted]) -> Facts {
        let found = |w: &Wanted| {
            let (user, group) = w.owner.ids(Some(BROKER)).unwrap();
            let kind = if w.what == What::Directory { Kind::Directory } else { Kind::File };
            let text = match &w.what {
                What::Shipped(text) | What::Sample(text) => Some(text.clone()),
                _ => None,
            };
            (w.path.clone(), Found { kind, user, group, mode: w.mode, text })
        };
        let at = wanted.iter().map(found).collect();
        Facts { broker: Some(BROKER), may_use_kvm: true, at, same_program: true, ..Facts::default() }
    }

    #[test]
    fn an_empty_machine_gets_all_of_it_and_then_nothing_is_left_to_do() {
        let wanted = wanted(&Places::default());
        let plan_of_empty = plan(&wanted, &Facts::default()).unwrap();
        // The user, everything, and systemd is told.
        assert_eq!(plan_of_empty.steps.len(), wanted.len() + 2, "{plan_of_empty:?}");
        for path in [CONFIG, PASSWORD, STATE, PROGRAM] {
            assert!(plan_of_empty.steps.iter().any(|s| s.object() == path), "{path}");
        }
        assert_eq!(plan(&wanted, &after(&wanted)).unwrap(), Plan::default());
    }

    #[test]
    fn owners_and_modes_are_mended_and_contents_are_not() {
        let wanted = wanted(&Places::default());
        let mut facts = after(&wanted);
        // As an editor of root's leaves them.
        for (path, text) in [(PASSWORD, "secret"), (CONFIG, "mine")] {
            let found = facts.at.get_mut(Path::new(path)).unwrap();
            (found.user, found.group, found.mode, found.text) = (0, 0, 0o600, Some(text.into()));
        }
        facts.roots.insert(STATE.into(), 3);
        let steps = plan(&wanted, &facts).unwrap().steps;
        let expected = [
            Step::Give { path: CONFIG.into(), owner: Owner::RootForBroker, mode: 0o640 },
            Step::Give { path: PASSWORD.into(), owner: Owner::Broker, mode: 0o600 },
            Step::GiveAll { path: STATE.into(), count: 3 },
        ];
        assert_eq!(steps, expected);
    }

    #[test]
    fn what_we_installed_follows_the_version_and_what_was_changed_stays() {
        let wanted = wanted(&Places::default());
        let unit = Path::new(UNITS).join("cicada.service");
        let mut facts = after(&wanted);
        facts.at.get_mut(&unit).unwrap().text = Some(marked("[Unit]\nDescription=of an earlier version\n"));
        let older = plan(&wanted, &facts).unwrap();
        assert!(
            matches!(&older.steps[..], [Step::WriteFile { replaces: true, .. }, Step::Reload]),
            "{older:?}"
        );
        let changed = marked("[Unit]\n").replace("[Unit]", "[Unit]\nWants=mine.service");
        for text in [Some(changed), Some("[Unit]\n".to_owned()), None] {
            facts.at.get_mut(&unit).unwrap().text = text;
            let plan = plan(&wanted, &facts).unwrap();
            assert_eq!((plan.steps.len(), plan.kept.len()), (0, 1), "{plan:?}");
        }
    }

    #[test]
    fn other_places_are_made_and_opened_to_the_unit() {
        let places = Places {
            password: Some("/srv/secret".into()),
            data_dir: Some("/srv/cicada".into()),
            repository: Some("/srv/cicada/packs".into()),
        };
        let wanted = wanted(&places);
        assert!(wanted.iter().all(|w| w.path != Path::new(PASSWORD)));
        let dropped_in = wanted.last().unwrap();
        let What::Shipped(text) = &dropped_in.what else { panic!("{dropped_in:?}") };
        assert!(text.ends_with("[Service]\nReadWritePaths=/srv/cicada\n"), "{text}");
        // A password that is not there yet is the operator's to make.
        let steps = plan(&wanted, &Facts::default()).unwrap().steps;
        assert!(steps.iter().all(|s| s.object() != "/srv/secret"));
    }

    #[test]
    fn a_directory_in_the_place_of_a_file_stops_it_and_a_link_is_left() {
        let wanted = wanted(&Places::default());
        let mut facts = after(&wanted);
        facts.at.get_mut(Path::new(PASSWORD)).unwrap().kind = Kind::Other;
        assert_eq!(plan(&wanted, &facts).unwrap().kept.len(), 1);
        facts.at.get_mut(Path::new(PASSWORD)).unwrap().kind = Kind::Directory;
        assert_eq!(plan(&wanted, &facts).unwrap_err().path, Path::new(PASSWORD));
        let mut facts = after(&wanted);
        facts.at.get_mut(Path::new(STATE)).unwrap().kind = Kind::File;
        assert_eq!(plan(&wanted, &facts).unwrap_err().path, Path::new(STATE));
    }
}
