//! Exporting and importing archives, as operators see it. Blocking, like [`super::catalogue`].

use std::fs::File;
use std::path::Path;

use crate::compose::Output;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Event, ReportLine};
use crate::repository::{ArchiveError, ImportReport, Repository};
use crate::types::ByteSize;

use super::catalogue::{bind, line, repository_problem, resolve, resolve_recipe};

/// Writes components and recipes to an archive, until `stop` says so; that can be gone on with.
pub fn export(
    repository: &Repository,
    output: Output<'_>,
    components: &[String],
    recipes: &[String],
    stop: &dyn Fn() -> bool,
    events: &mut dyn FnMut(Event),
) -> Result<Vec<ReportLine>, Problem> {
    let components = resolve(repository, components)?;
    let recipes = recipes.iter().map(|r| resolve_recipe(repository, r)).collect::<Result<Vec<_>, _>>()?;
    let problem = |e| archive_problem(&output.path().display().to_string(), &e);
    let export = repository.export(&components, &recipes).map_err(problem)?;
    let mut go_on = |done, total| {
        events(progress("export", done, total));
        !stop()
    };
    let written = match output {
        Output::New(path) => export.write(path, &mut go_on),
        Output::Given(path, file) => export.write_into(file, path, &mut go_on).map(|()| 0),
    };
    let skipped_bytes = written.map_err(problem)?;
    let c = export.content();
    Ok(vec![
        line("components", c.components, "objects", ""),
        line("recipes", c.recipes, "objects", ""),
        line("packs", c.packs, "objects", ""),
        line("names", c.names, "", ""),
        line("exported", c.stored_bytes, "bytes", ""),
        line("there already", skipped_bytes, "bytes", ""),
    ])
}

/// Takes in an archive, until `stop` says so; that can be gone on with.
pub fn import(
    repository: &Repository,
    (input, given): (&str, Option<&File>),
    bind_names: bool,
    stop: &dyn Fn() -> bool,
    events: &mut dyn FnMut(Event),
) -> Result<Vec<ReportLine>, Problem> {
    let mut go_on = |done, total| {
        events(progress("import", done, total));
        !stop()
    };
    let (report, result) = repository.import_opened(Path::new(input), given, &mut go_on);
    if let Err(e) = result {
        let problem = archive_problem(input, &e);
        let reason = format!("{}; {}", problem.reason, kept(&report));
        return Err(Problem { reason, ..problem });
    }
    let mut lines = vec![
        line("stored", report.stored, "objects", ""),
        line("stored", report.stored_bytes, "bytes", ""),
        line("held already", report.skipped, "objects", ""),
        line("held already", report.skipped_bytes, "bytes", ""),
        line("refused", report.refused.len() as u64 + report.refused_more, "objects", ""),
    ];
    lines.extend(
        report
            .refused
            .iter()
            .map(|(object, reason)| line(REFUSED, 1, "objects", format!("{object}: {reason}"))),
    );
    let (mut bound, mut unbound) = (0, Vec::new());
    for (id, name) in &report.names {
        let result = if bind_names { bind(repository, *id) } else { Ok(()) };
        match result {
            Ok(()) if bind_names => bound += 1,
            Ok(()) => {}
            Err(p) => unbound.push(line(UNBOUND, 1, "names", format!("{name}: {}", p.reason))),
        }
    }
    lines.push(match bind_names {
        true => line("bound", bound, "names", ""),
        false => line(
            "not bound",
            report.names.len() as u64,
            "names",
            "they come from elsewhere: --bind takes them over",
        ),
    });
    lines.extend(unbound);
    Ok(lines)
}

/// Lines that say an import is not whole.
const REFUSED: &str = "refused";
const UNBOUND: &str = "cannot-be-bound";

/// Objects that an import's report says were refused, and names that cannot be bound.
pub fn import_faults(lines: &[ReportLine]) -> u64 {
    lines
        .iter()
        .filter(|l| !l.detail.is_empty() && (l.name == REFUSED || l.name == UNBOUND))
        .map(|l| l.value)
        .sum()
}

fn kept(report: &ImportReport) -> String {
    format!(
        "{} objects ({}) were verified and stored, {} were held already",
        report.stored,
        ByteSize(report.stored_bytes),
        report.skipped
    )
}

fn progress(phase: &str, done: u64, total: u64) -> Event {
    Event::Progress { phase: phase.into(), done, total, unit: "bytes".into() }
}

fn archive_problem(path: &str, e: &ArchiveError) -> Problem {
    let object = format!("archive {path}");
    let kind = match e {
        ArchiveError::Repository(e) => return repository_problem(e),
        ArchiveError::Nothing => ProblemKind::NotFound,
        ArchiveError::Target { .. } | ArchiveError::NotAnArchive { .. } => ProblemKind::BadRequest,
        ArchiveError::Changed { .. } | ArchiveError::Occupied { .. } => ProblemKind::Conflict,
        ArchiveError::Unexpected { .. } | ArchiveError::Ended { .. } => ProblemKind::Damaged,
        ArchiveError::Io { source, .. } => Problem::from_path(path, source).kind,
        ArchiveError::Stopped => ProblemKind::Cancelled,
    };
    let problem = Problem::from_error(kind, object, e);
    match e {
        ArchiveError::Stopped => problem.next("run it again to go on"),
        ArchiveError::Io { source, .. } => match source.kind() {
            std::io::ErrorKind::NotFound => problem.next("name a path on the broker's machine"),
            std::io::ErrorKind::PermissionDenied => problem.next("the broker's user must be able to open it"),
            _ => problem,
        },
        _ => problem,
    }
}
