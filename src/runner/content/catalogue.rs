//! Components, recipes and the repository, as operators see them. Blocking functions on shared
//! resources: the broker runs them off its own task, offline commands call them directly.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::component::manifest::{limit, show};
use crate::component::{Entry, Manifest};
use crate::compose::{ComposeError, Composer, ImageFormat, Output};
use crate::interface::ObjectKind;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{
    ComponentDetail, ComponentDiff, ComponentView, ComposedView, ContentRequest, Event, PackView, RecipeView,
    Reply, ReportLine,
};
use crate::repository::{CheckReport, ObjectId, Repository, RepositoryError};
use crate::runner::Given;
use crate::types::{ByteSize, ComponentId, Hash, PackId, RecipeId};

use super::{archive, optimize};

/// Answers a request. Long work that can be taken up again asks `stop` whether anybody still waits for it.
pub fn call(
    repository: &Repository,
    composer: &Composer,
    gc_grace: Duration,
    vm_recipes: &[RecipeId],
    (request, given): (&ContentRequest, &Given),
    stop: &dyn Fn() -> bool,
    events: &mut dyn FnMut(Event),
) -> Result<Reply, Problem> {
    match request {
        ContentRequest::ComponentList => components(repository).map(Reply::Components),
        ContentRequest::ComponentShow { component, entries } => {
            detail(repository, component, *entries).map(|d| Reply::Component(Box::new(d)))
        }
        ContentRequest::ComponentDiff { from, to } => diff(repository, from, to).map(Reply::ComponentDiff),
        ContentRequest::ComponentRemove { component } => remove(repository, component).map(|()| Reply::Done),
        ContentRequest::ComponentOptimize { components, deltas } => {
            optimize::optimize(repository, components, *deltas, stop, events).map(Reply::Report)
        }
        ContentRequest::ComponentBind { id } => bind(repository, *id).map(|()| Reply::Done),
        ContentRequest::ComponentName { component, name } => {
            bind_by_hand(repository, component, name.as_deref()).map(Reply::Components)
        }
        ContentRequest::RecipeCreate { components, ordered, root_size, kernel_command_line } => {
            recipe_create(repository, composer, components, *ordered, *root_size, kernel_command_line)
                .map(Reply::Recipe)
        }
        ContentRequest::RecipeList => recipes(repository, composer).map(Reply::Recipes),
        ContentRequest::Compose { recipe, output, format } => {
            compose(repository, composer, recipe, given.output(output), format).map(Reply::Composed)
        }
        ContentRequest::RepoStats => stats(repository).map(Reply::Report),
        ContentRequest::RepoCheck => {
            check_repository(repository, events).map(|r| Reply::Report(check_lines(&r)))
        }
        ContentRequest::RepoGc { dry_run } => {
            gc(repository, composer, *dry_run, gc_grace, vm_recipes).map(Reply::Report)
        }
        ContentRequest::RepoExport { output, components, recipes } => {
            let output = given.output(output);
            archive::export(repository, output, components, recipes, stop, events).map(Reply::Report)
        }
        ContentRequest::RepoImport { input, bind } => {
            archive::import(repository, (input, given.file(input)), *bind, stop, events).map(Reply::Report)
        }
        ContentRequest::RepoRebuildIndex => rebuild(repository).map(Reply::Report),
    }
}

/// A repository error as a problem, with the class an operator acts on.
pub fn repository_problem(e: &RepositoryError) -> Problem {
    let kind = match e {
        RepositoryError::UnknownComponent { .. } => ProblemKind::NotFound,
        RepositoryError::Missing { .. } | RepositoryError::Damaged { .. } => ProblemKind::Damaged,
        RepositoryError::Ambiguous { .. } => ProblemKind::BadRequest,
        RepositoryError::InUse { .. } | RepositoryError::Locked { .. } => ProblemKind::Conflict,
        RepositoryError::NoSpace { .. } => ProblemKind::NoSpace,
        _ => ProblemKind::Failed,
    };
    let problem = Problem::from_error(kind, "repository", e);
    match e {
        RepositoryError::InUse { next_step, .. } => problem.next(next_step),
        _ => problem,
    }
}

pub fn compose_problem(e: &ComposeError) -> Problem {
    match e {
        ComposeError::Repository(e) => repository_problem(e),
        ComposeError::NoSpace { .. } => Problem::from_error(ProblemKind::NoSpace, "composition", e),
        ComposeError::Missing { .. } => Problem::from_error(ProblemKind::Damaged, "composition", e)
            .next("build or import the missing components, or fetch them from a member that has them"),
        ComposeError::NoQemuImg => Problem::from_error(ProblemKind::Missing, "composition", e),
        ComposeError::Occupied { .. } => Problem::from_error(ProblemKind::Conflict, "composition", e),
        ComposeError::Io { source, .. } => {
            Problem::from_error(Problem::from_path("composition", source).kind, "composition", e)
                .next("see that the broker's user may write there")
        }
        ComposeError::ShortPack { .. } | ComposeError::Digest { .. } | ComposeError::Damaged { .. } => {
            Problem::from_error(ProblemKind::Damaged, "composition", e)
        }
        ComposeError::TooSmall { need, .. } => Problem::from_error(ProblemKind::BadRequest, "composition", e)
            .next(format!("--root-size {}", mebibytes(*need))),
        ComposeError::TooLarge { .. } => Problem::from_error(ProblemKind::BadRequest, "composition", e),
        _ => Problem::from_error(ProblemKind::Refused, "composition", e),
    }
}

/// As `--root-size` reads it.
fn mebibytes(size: ByteSize) -> String {
    format!("{}M", size.0.div_ceil(1 << 20))
}

pub fn resolve(repository: &Repository, names: &[String]) -> Result<Vec<ComponentId>, Problem> {
    names.iter().map(|n| resolve_one(repository, n)).collect()
}

fn resolve_one(repository: &Repository, name: &str) -> Result<ComponentId, Problem> {
    repository.resolve_component(name).map_err(|e| {
        let p = repository_problem(&e);
        Problem { object: format!("component {name}"), next_step: "see 'cicada component list'".into(), ..p }
    })
}

fn manifest(repository: &Repository, id: &ComponentId) -> Result<Arc<Manifest>, Problem> {
    repository.manifest(id).map_err(|e| repository_problem(&e))
}

/// `name@version` of each component, in order.
pub fn names(repository: &Repository, ids: &[ComponentId]) -> Result<Vec<String>, Problem> {
    ids.iter().map(|id| manifest(repository, id).map(|m| format!("{}@{}", m.name, m.version))).collect()
}

/// The one architecture of a set; the composer has checked that there is only one.
pub fn architecture(repository: &Repository, ids: &[ComponentId]) -> Result<String, Problem> {
    let first = ids.first().ok_or_else(|| {
        Problem::new(ProblemKind::BadRequest, "VM", "no components were named")
            .next("name them with --component")
    })?;
    Ok(manifest(repository, first)?.architecture.clone())
}

pub fn components(repository: &Repository) -> Result<Vec<ComponentView>, Problem> {
    let mut list: Vec<ComponentView> = repository
        .components()
        .map_err(|e| repository_problem(&e))?
        .into_iter()
        .map(|(id, s)| ComponentView {
            id,
            bound: s.bound,
            name: s.name,
            version: s.version,
            kind: s.kind,
            architecture: s.architecture,
            packs: s.packs as u32,
            plain_bytes: s.plain_bytes,
            stored_bytes: s.stored_bytes,
        })
        .collect();
    list.sort_by(|a, b| (a.kind, &a.name, &a.version).cmp(&(b.kind, &b.name, &b.version)));
    Ok(list)
}

fn detail(repository: &Repository, component: &str, entries: bool) -> Result<ComponentDetail, Problem> {
    let id = resolve_one(repository, component)?;
    let m = manifest(repository, &id)?;
    let stored_bytes =
        m.packs.iter().filter_map(|p| repository.pack_stored(&p.id).ok()).map(|p| p.stored_size_bytes).sum();
    let packs = m.packs.iter().map(|p| PackView {
        id: p.id.to_string(),
        package: p.package.clone(),
        package_version: p.package_version.clone(),
        plain_bytes: p.size_bytes,
    });
    Ok(ComponentDetail {
        component: ComponentView {
            id,
            bound: repository.is_bound(&id).map_err(|e| repository_problem(&e))?,
            name: m.name.clone(),
            version: m.version.clone(),
            kind: m.kind,
            architecture: m.architecture.clone(),
            packs: m.packs.len() as u32,
            plain_bytes: m.plain_bytes(),
            stored_bytes,
        },
        origin: m.origin.clone(),
        licences: m.licences.clone(),
        requires: m.requires.clone(),
        conflicts: m.conflicts.clone(),
        entry_count: m.entries.len() as u64,
        fragments: m.fragments.iter().map(|f| show(&f.path)).collect(),
        packs: packs.collect(),
        entries: if entries { m.entries.iter().map(|e| show(&e.path)).collect() } else { Vec::new() },
    })
}

fn diff(repository: &Repository, from: &str, to: &str) -> Result<ComponentDiff, Problem> {
    let a = manifest(repository, &resolve_one(repository, from)?)?;
    let b = manifest(repository, &resolve_one(repository, to)?)?;
    // Where a file lies in its pack is no difference.
    let facts = |e: &Entry| {
        let mut e = e.clone();
        if let crate::component::EntryKind::File { pack, offset_bytes, .. } = &mut e.kind {
            (*pack, *offset_bytes) = (0, 0);
        }
        (e.meta, e.xattrs, e.kind)
    };
    let index =
        |m: &Manifest| m.entries.iter().map(|e| (e.path.clone(), facts(e))).collect::<BTreeMap<_, _>>();
    let (left, right) = (index(&a), index(&b));
    let held: HashSet<_> = a.packs.iter().map(|p| p.id).collect();
    Ok(ComponentDiff {
        added: right.keys().filter(|p| !left.contains_key(*p)).map(|p| show(p)).collect(),
        removed: left.keys().filter(|p| !right.contains_key(*p)).map(|p| show(p)).collect(),
        changed: right
            .iter()
            .filter(|(p, f)| left.get(*p).is_some_and(|l| l != *f))
            .map(|(p, _)| show(p))
            .collect(),
        bytes_missing: b.packs.iter().filter(|p| !held.contains(&p.id)).map(|p| p.size_bytes).sum(),
    })
}

fn remove(repository: &Repository, component: &str) -> Result<(), Problem> {
    let id = resolve_one(repository, component)?;
    repository.remove_component(&id).map_err(|e| {
        let p = repository_problem(&e);
        Problem { object: format!("component {component}"), ..p }
    })
}

pub fn bind(repository: &Repository, id: ComponentId) -> Result<(), Problem> {
    let m = manifest(repository, &id)?;
    let missing: Vec<_> =
        m.packs.iter().filter(|p| !repository.has_pack(&p.id)).map(|p| p.package.clone()).collect();
    if !missing.is_empty() {
        let reason = format!("packs are missing: {}", missing.join(", "));
        return Err(Problem::new(ProblemKind::Damaged, format!("component {}", m.name), reason)
            .next("send them first"));
    }
    repository.bind_component(&m, id).map(drop).map_err(|e| repository_problem(&e))
}

/// Binds a held component to its name, which no other may have.
fn bind_by_hand(
    repository: &Repository,
    component: &str,
    name: Option<&str>,
) -> Result<Vec<ComponentView>, Problem> {
    let id = resolve_one(repository, component)?;
    let mine = manifest(repository, &id)?;
    let own = format!("{}@{}", mine.name, mine.version);
    let object = format!("component {component}");
    if let Some(name) = name.filter(|name| *name != own) {
        // The name is part of what the id is the hash of.
        let reason = format!("is called {own} and cannot be bound to '{name}'");
        return Err(Problem::new(ProblemKind::BadRequest, object, reason)
            .next(format!("cicada component bind {component} {own}")));
    }
    let all = components(repository)?;
    let is_same_name = |c: &&ComponentView| {
        (c.kind, &c.name, &c.version, &c.architecture)
            == (mine.kind, &mine.name, &mine.version, &mine.architecture)
    };
    if let Some(other) = all.iter().filter(is_same_name).find(|c| c.bound && c.id != id) {
        let reason = format!("{own} is bound to {} already", other.id.short());
        return Err(Problem::new(ProblemKind::Conflict, object, reason).next(format!(
            "if that one shall not have the name any more: cicada component remove {}",
            other.id.short()
        )));
    }
    bind(repository, id)?;
    Ok(components(repository)?.into_iter().filter(|c| c.id == id).collect())
}

fn recipe_view(repository: &Repository, composer: &Composer, id: RecipeId) -> Result<RecipeView, Problem> {
    let recipe = repository.recipe(&id).map_err(|e| repository_problem(&e))?;
    Ok(RecipeView {
        id,
        components: recipe
            .components
            .iter()
            .map(|c| {
                repository.manifest(c).map_or_else(|_| c.short(), |m| format!("{}@{}", m.name, m.version))
            })
            .collect(),
        root_size: ByteSize(recipe.disk.virtual_size_bytes),
        kernel_command_line: recipe.disk.kernel_command_line.clone(),
        image_digest: recipe.image_digest,
        composed: composer.is_composed(&id),
    })
}

fn recipe_create(
    repository: &Repository,
    composer: &Composer,
    components: &[String],
    ordered: bool,
    root_size: ByteSize,
    kernel_command_line: &str,
) -> Result<RecipeView, Problem> {
    let ids = resolve(repository, components)?;
    let (id, _) = composer
        .make_recipe(&ids, ordered, root_size, kernel_command_line)
        .map_err(|e| compose_problem(&e))?;
    recipe_view(repository, composer, id)
}

fn recipes(repository: &Repository, composer: &Composer) -> Result<Vec<RecipeView>, Problem> {
    let ids = repository.recipes().map_err(|e| repository_problem(&e))?;
    ids.into_iter().map(|id| recipe_view(repository, composer, id)).collect()
}

pub(super) fn resolve_recipe(repository: &Repository, text: &str) -> Result<RecipeId, Problem> {
    let object = format!("recipe {text}");
    let all = repository.recipes().map_err(|e| repository_problem(&e))?;
    let found: Vec<_> =
        all.into_iter().filter(|id| text.len() >= 6 && id.to_string().starts_with(text)).collect();
    match found[..] {
        [id] => Ok(id),
        [] => Err(Problem::new(ProblemKind::NotFound, object, "there is no such recipe")
            .next("see 'cicada recipe list'")),
        _ => Err(Problem::new(ProblemKind::BadRequest, object, format!("{} recipes begin so", found.len()))
            .next("write more digits")),
    }
}

fn compose(
    repository: &Repository,
    composer: &Composer,
    recipe: &str,
    output: Output<'_>,
    format: &str,
) -> Result<ComposedView, Problem> {
    let begun = Instant::now();
    let id = resolve_recipe(repository, recipe)?;
    let format: ImageFormat = format.parse().map_err(|reason: String| {
        Problem::new(ProblemKind::BadRequest, format!("format {format}"), reason)
    })?;
    // Before the work.
    if let Some(reason) = output.occupied() {
        return Err(Problem::new(
            ProblemKind::Conflict,
            format!("output {}", output.path().display()),
            reason,
        ));
    }
    composer.export(&id, output, format).map_err(|e| compose_problem(&e))?;
    let recipe = repository.recipe(&id).map_err(|e| repository_problem(&e))?;
    Ok(ComposedView {
        recipe: id,
        image_digest: recipe.image_digest,
        output: output.path().display().to_string(),
        bytes: output.size_bytes(),
        elapsed_ms: begun.elapsed().as_millis() as u64,
    })
}

/// The words of a name as programs know them: `hit-rate`.
fn identifier(words: &str) -> String {
    words.replace(' ', "-")
}

pub(super) fn line(name: &str, value: u64, unit: &str, detail: impl Into<String>) -> ReportLine {
    ReportLine { name: identifier(name), value, unit: unit.into(), detail: detail.into() }
}

fn stats(repository: &Repository) -> Result<Vec<ReportLine>, Problem> {
    let s = repository.stats().map_err(|e| repository_problem(&e))?;
    let mut lines = vec![line("components", s.components, "objects", "")];
    for (name, t) in [
        ("manifests", s.objects.manifests),
        ("recipes", s.objects.recipes),
        ("packs", s.objects.packs),
        ("chunk-map nodes", s.objects.nodes),
    ] {
        lines.push(line(name, t.count, "objects", ""));
        lines.push(line(&format!("{name} plain"), t.plain_bytes, "bytes", ""));
        lines.push(line(&format!("{name} stored"), t.stored_bytes, "bytes", ""));
    }
    lines.push(line(
        "shared between components",
        s.shared_bytes,
        "bytes",
        "would be stored again without sharing",
    ));
    for (name, d) in [
        ("compositions", s.compositions),
        ("hot packs", s.hot),
        ("temporary", s.temporary),
        ("quarantine", s.quarantine),
    ] {
        lines.push(line(name, d.files, "files", ""));
        lines.push(line(&format!("{name} allocated"), d.allocated_bytes, "bytes", ""));
    }
    let l = s.lookups;
    lines.push(line("migrations received", l.count, "", ""));
    lines.push(line("held already", l.hit_bytes, "bytes", ""));
    lines.push(line("fetched", l.miss_bytes, "bytes", ""));
    let all = l.hit_bytes + l.miss_bytes;
    lines.push(line("hit rate", (l.hit_bytes * 100).checked_div(all).unwrap_or(0), "percent", ""));
    Ok(lines)
}

pub(super) fn check_repository(
    repository: &Repository,
    events: &mut dyn FnMut(Event),
) -> Result<CheckReport, Problem> {
    let mut progress = |done: u64, total: u64| {
        events(Event::Progress { phase: "check".into(), done, total, unit: "bytes".into() });
    };
    repository.check(&mut progress).map_err(|e| repository_problem(&e))
}

pub(super) fn check_lines(report: &CheckReport) -> Vec<ReportLine> {
    let mut lines = vec![
        line("good", report.good.total().count, "objects", ""),
        line("damaged", report.damaged.len() as u64, "objects", ""),
        line("missing", report.missing.len() as u64, "objects", ""),
        line("damaged references", report.damaged_refs.len() as u64, "objects", ""),
    ];
    lines.extend(report.damaged.iter().map(|d| {
        line(
            "damaged",
            1,
            "objects",
            format!("{}: {}; set aside as {}", d.object, d.reason, d.path.display()),
        )
    }));
    lines.extend(report.missing.iter().map(|m| {
        line("missing", 1, "objects", format!("{}, needed by {}", m.object, m.needed_by.join(", ")))
    }));
    lines.extend(report.damaged_refs.iter().map(|r| line("damaged references", 1, "objects", r.clone())));
    lines
}

fn gc(
    repository: &Repository,
    composer: &Composer,
    dry_run: bool,
    grace: Duration,
    vm_recipes: &[RecipeId],
) -> Result<Vec<ReportLine>, Problem> {
    let roots: Vec<_> = vm_recipes.iter().map(|r| ObjectId::Recipe(*r)).collect();
    // Compositions first: what is known of one goes with it, and no longer keeps what it was made of.
    let (compositions, bytes) =
        composer.collect(vm_recipes, grace, dry_run).map_err(|e| compose_problem(&e))?;
    if !dry_run {
        let used = |r: &RecipeId| vm_recipes.contains(r) || composer.is_composed(r);
        repository.forget_compositions(&used).map_err(|e| repository_problem(&e))?;
    }
    let report = repository.gc(dry_run, grace, &roots).map_err(|e| repository_problem(&e))?;
    let verb = if dry_run { "would remove" } else { "removed" };
    let mut lines = vec![
        line("kept", report.kept.total().count, "objects", ""),
        line(verb, report.removed.total().count, "objects", ""),
        line(verb, report.removed.total().stored_bytes, "bytes", ""),
    ];
    lines.push(line(&format!("{verb} compositions"), compositions, "files", "made again when wanted"));
    lines.push(line(&format!("{verb} compositions"), bytes, "bytes", ""));
    lines.extend(report.missing.iter().map(|m| line("missing", 1, "objects", m.to_string())));
    Ok(lines)
}

fn rebuild(repository: &Repository) -> Result<Vec<ReportLine>, Problem> {
    let objects = repository.rebuild_index().map_err(|e| repository_problem(&e))?;
    Ok(vec![line("indexed", objects, "objects", "")])
}

/// Whether an object is held.
pub fn holds(repository: &Repository, kind: ObjectKind, id: Hash) -> bool {
    match kind {
        ObjectKind::Manifest => repository.has_manifest(&ComponentId(id)),
        ObjectKind::Pack => repository.has_pack(&PackId(id)),
        ObjectKind::Recipe => repository.has_recipe(&RecipeId(id)),
    }
}

/// Puts an object in the form it is stored and sent in, verified. `piece` gives its bytes until
/// there are none; packs never lie in memory whole.
pub fn put_object(
    repository: &Repository,
    kind: ObjectKind,
    id: Hash,
    size_bytes: u64,
    piece: &mut dyn FnMut() -> Option<Bytes>,
) -> Result<(), Problem> {
    let problem = |e: RepositoryError| {
        let p = repository_problem(&e);
        let kind_of = if e.is_content_fault() { ProblemKind::Damaged } else { p.kind };
        Problem { kind: kind_of, object: format!("{} {}", kind.as_str(), id.short()), ..p }
    };
    if kind == ObjectKind::Pack {
        let mut receiver = repository.pack_receiver(PackId(id), size_bytes).map_err(problem)?;
        while let Some(bytes) = piece() {
            receiver.write(&bytes).map_err(problem)?;
        }
        return receiver.finish().map_err(problem);
    }
    let mut all = Vec::new();
    while let Some(bytes) = piece() {
        if (all.len() + bytes.len()) as u64 > limit::MANIFEST_BYTES {
            let reason = format!("is larger than {}", ByteSize(limit::MANIFEST_BYTES));
            return Err(Problem::new(ProblemKind::BadRequest, kind.as_str(), reason));
        }
        all.extend_from_slice(&bytes);
    }
    match kind {
        ObjectKind::Recipe => repository.put_recipe_bytes(&RecipeId(id), &all),
        _ => repository.put_manifest_bytes(&ComponentId(id), &all),
    }
    .map_err(problem)
}
