//! How long the answer to a configuration check takes with 500 components in the recipe: the work
//! alone, in this process; then between two broker processes over a real XMPP server on loopback.
//! The limit is 100 ms at the 99th percentile.
//!
//! `cargo bench --bench plan`. The second part needs what the federation tests need.

mod common;

use std::time::{Duration, Instant};

use cicada::clock::{Clock, SystemClock};
use cicada::interface::{MoveRequest, Reply, Request, VmRequest};
use cicada::interface::{Verdict, VmCreate};
use cicada::migration::envelope::{LIFETIME, VERSION};
use cicada::migration::message::CheckAnswer;
use cicada::migration::{AnswerBody, Envelope, ReplayGuard, RequestBody};
use cicada::repository::Repository;
use cicada::runner::check::holdings;
use cicada::types::{ByteSize, ComponentId, IdentityKey, MemberJid, MigrationId, PackId, RecipeId, VmId};
use cicada::vm::spec::Nic;
use cicada::vm::{Mac, VmSpec};
use common::world::{World, components, missing_tool};
use common::{Result, end, percentile, synthetic_components};

const COMPONENTS: u32 = 500;
const PACKS_EACH: u32 = 5;
const ROUNDS: usize = 300;
const LIMIT_MS: f64 = 100.0;

fn main() -> Result<()> {
    in_process()?;
    if !missing_tool() {
        between_brokers()?;
    }
    Ok(())
}

fn in_process() -> Result<()> {
    let dir = tempfile::tempdir_in(".")?;
    let path = dir.path().join("repository");
    let held = synthetic_components(&Repository::create(&path)?, COMPONENTS, PACKS_EACH)?;
    let repository = Repository::open(&path)?;
    let packs_of = |id: &ComponentId| -> Result<Vec<PackId>> {
        Ok(repository.manifest(id)?.packs.iter().map(|p| p.id).collect())
    };
    // The first question about components, and one about as many packs as fit.
    let lacking: Vec<ComponentId> = (0..COMPONENTS).map(|n| ComponentId::of(&n.to_le_bytes())).collect();
    let cold = Instant::now();
    holdings(&repository, &held, &[]);
    println!("holdings of {COMPONENTS} held components, first time: {:.1} ms", ms(cold.elapsed()));
    let packs: Vec<PackId> =
        held.iter().map(packs_of).collect::<Result<Vec<_>>>()?.into_iter().flatten().take(1000).collect();
    for (what, components, packs) in [
        ("held components", held.as_slice(), &[] as &[PackId]),
        ("unknown components", lacking.as_slice(), &[]),
        ("packs", &[], packs.as_slice()),
    ] {
        let mut answer = exchange(&repository, components, packs);
        let times = (0..ROUNDS).map(|_| answer()).collect::<Result<Vec<f64>>>()?;
        print(
            &format!(
                "in process, {} {what}: seal, open, look up, seal, open",
                components.len() + packs.len()
            ),
            times,
        );
    }
    Ok(())
}

/// One question and its answer, with everything but the way between them. Returns milliseconds.
fn exchange<'a>(
    repository: &'a Repository,
    components: &'a [ComponentId],
    packs: &'a [PackId],
) -> impl FnMut() -> Result<f64> + 'a {
    let (asker, answerer) =
        (IdentityKey::from_secret_bytes(&[1; 32]), IdentityKey::from_secret_bytes(&[2; 32]));
    let a: MemberJid = "a@federation.test".parse().expect("a JID");
    let b: MemberJid = "b@federation.test".parse().expect("a JID");
    let (migration, spec) = (MigrationId::random(), spec());
    let mut replay = ReplayGuard::default();
    let mut nonce = 0u128;
    move || {
        nonce += 1;
        let begun = Instant::now();
        let now = SystemClock.now();
        let body = RequestBody::Configuration {
            spec: spec.clone(),
            components: components.to_vec(),
            packs: packs.to_vec(),
        };
        let request = Envelope {
            version: VERSION,
            from: a.clone(),
            to: b.clone(),
            migration,
            vm: spec.id,
            epoch: 1,
            nonce: format!("{nonce:032x}"),
            issued: now,
            expires: now.plus(LIFETIME),
            body,
        };
        let sealed = request.seal(&asker)?;
        let asked: Envelope<RequestBody> = Envelope::open(&sealed, &asker.public(), &a, &b, now)?;
        replay.admit(&asked, now)?;
        let RequestBody::Configuration { components, packs, .. } = &asked.body else {
            return Err("another body".into());
        };
        let (components_lacking, packs_lacking) = holdings(repository, components, packs);
        let (differences, blockers) = (Vec::new(), Vec::new());
        let body = AnswerBody::Configuration(CheckAnswer {
            differences,
            blockers,
            components_lacking,
            packs_lacking,
            seed: None,
            kept: None,
            composed: false,
            reads_devices: true,
        });
        let (from, to) = (b.clone(), a.clone());
        let answer = Envelope {
            version: VERSION,
            from,
            to,
            migration,
            vm: spec.id,
            epoch: 1,
            nonce: asked.nonce,
            issued: now,
            expires: now.plus(LIFETIME),
            body,
        };
        let sealed = answer.seal(&answerer)?;
        Envelope::<AnswerBody>::open(&sealed, &answerer.public(), &b, &a, now)?;
        Ok(ms(begun.elapsed()))
    }
}

fn spec() -> VmSpec {
    let id = VmId::random();
    VmSpec {
        id,
        name: "web".parse().expect("a name"),
        cpus: 1,
        memory: ByteSize::mib(256),
        recipe: RecipeId::of(b"recipe"),
        root_size: ByteSize::mib(512),
        user_data_size: ByteSize::mib(64),
        nics: vec![Nic { network: "lan".into(), mac: Mac::derived(id, 0), model: Default::default() }],
        architecture: "amd64".into(),
        cpu_model: "qemu64".into(),
        firmware: cicada::vm::Firmware::Uefi,
        disk_bus: Default::default(),
        system_uuid: None,
    }
}

fn between_brokers() -> Result<()> {
    let tiny = components(&["format-uefi-gpt", "kernel-tiny", "os-tiny"]);
    let mut world = World::start(&["alpine", "boreal"]);
    let mut synthetic = Vec::new();
    // The second cloud lacks every tenth component, so packs are asked about too.
    for (cloud, step) in [(0, usize::MAX), (1, 10)] {
        world.stop_broker(cloud, false);
        let repository = Repository::open_or_create(&world.clouds[cloud].dir.join("data/repository"))?;
        synthetic = synthetic_components(&repository, COMPONENTS - tiny.ids.len() as u32, PACKS_EACH)?;
        for id in synthetic.iter().skip(step - 1).step_by(step) {
            repository.remove_component(id)?;
        }
        repository.gc(false, Duration::ZERO, &[])?;
        drop(repository);
        world.start_broker(cloud);
        world.push(cloud, &tiny, &tiny.ids);
    }
    world.wait("the members see each other again", 60, |w| {
        (0..2).all(|c| {
            w.members(c).iter().any(|m| {
                m.state == cicada::interface::MemberState::Online
                    && m.trust == cicada::interface::MemberTrust::Trusted
                    && !m.jid.as_str().starts_with(&w.clouds[c].name)
            })
        })
    });
    let all: Vec<ComponentId> = tiny.ids.iter().chain(&synthetic).copied().collect();
    let create = |name: &str, ids: &[ComponentId]| VmCreate {
        name: name.parse().expect("a name"),
        components: ids.iter().map(ToString::to_string).collect(),
        ordered: false,
        root_size: ByteSize::mib(512),
        user_data_size: ByteSize::mib(64),
        memory: ByteSize::mib(256),
        cpus: 1,
        networks: vec!["lan".into()],
        kernel_command_line: "console=ttyS0 quiet".into(),
        start: false,
        hardware: Default::default(),
    };
    let held: Vec<ComponentId> = tiny
        .ids
        .iter()
        .chain(synthetic.iter().enumerate().filter(|(i, _)| i % 10 != 9).map(|(_, id)| id))
        .copied()
        .collect();
    for (name, ids, what) in [("held", &held, "all held"), ("part", &all, "every tenth lacking")] {
        let made = world.call(0, &Request::Vm(VmRequest::Create(create(name, ids))));
        if let Err(problem) = made {
            return Err(format!("no VM of {} components: {problem}", ids.len()).into());
        }
        let (mut answers, mut plans) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            let Reply::Plan(plan) =
                world.call(0, &Request::Move(MoveRequest::Plan { vm: name.into(), to: None, all: false }))?
            else {
                return Err("no plan".into());
            };
            plans.push(ms(begun.elapsed()));
            let row = plan.candidates.first().ok_or("no candidate")?;
            if matches!(row.verdict, Verdict::No { .. }) {
                return Err(format!("refused: {:?}", row.verdict).into());
            }
            answers.push(row.answer_ms);
        }
        print(
            &format!("between brokers, {} components, {what}: the other broker's answer", ids.len()),
            answers,
        );
        print(
            &format!(
                "between brokers, {} components, {what}: the whole plan as the operator waits for it",
                ids.len()
            ),
            plans,
        );
    }
    end(world)
}

fn print(what: &str, mut times_ms: Vec<f64>) {
    times_ms.sort_by(f64::total_cmp);
    let (p50, p99) = (percentile(&times_ms, 50.0), percentile(&times_ms, 99.0));
    let verdict = if p99 < LIMIT_MS { "holds" } else { "BROKEN" };
    println!(
        "{what}: p50 {p50:.1} ms, p99 {p99:.1} ms, most {:.1} ms; limit {LIMIT_MS} ms: {verdict}",
        times_ms[times_ms.len() - 1]
    );
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
