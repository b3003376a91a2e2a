//! A move steered from its target: the guest held still, and switched over before its time.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::thread::JoinHandle;

use cicada::client::Client;
use cicada::interface::{Event, MigrationView};
use cicada::interface::{MoveRequest, Problem, ProblemKind, Reply, Request};
use cicada::vm::PowerState;
use world::{World, components, missing_tool, turn};

const TINY: [&str; 3] = ["format-uefi-gpt", "kernel-tiny", "os-tiny"];
/// So slow that a pass lasts until somebody lifts the cap.
const SLOW: &str =
    "[transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\nbandwidth_limit = \"400000\"\n";

type Moved = (Result<Reply, Problem>, Vec<String>);

/// Moves a VM in the background; gives its end and what it said it was doing.
fn begin(world: &World, vm: &str) -> JoinHandle<Moved> {
    let (socket, vm) = (world.socket(0), vm.to_owned());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut details = Vec::new();
        let result = runtime.block_on(async {
            let request =
                Request::Move(MoveRequest::Begin { vm, to: None, dry_run: false, force_stop: false });
            let note = |event: Event| {
                if let Event::Migration(p) = event {
                    details.push(p.detail);
                }
            };
            Client::connect(&socket).await?.call(&request, note).await
        });
        (result, details)
    })
}

/// The move that runs, once a pass is under way at the target.
fn under_way(world: &World) -> String {
    let staging = |w: &World| -> Option<MigrationView> {
        let Ok(Reply::Migrations(all)) = w.call(1, &Request::Move(MoveRequest::List)) else { return None };
        all.into_iter()
            .find(|m| !m.progress.ended && m.progress.phase == cicada::interface::MigrationPhase::Stage)
    };
    world.wait("a pass is under way", 120, |w| staging(w).is_some());
    staging(world).expect("it is slow").progress.id.to_string()
}

#[test]
fn a_target_holds_the_guest_and_ends_the_passes() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    // The components are there already: what is slow is the user data.
    (0..2).for_each(|cloud| world.push(cloud, &built, &built.ids));
    world.stop_broker(0, false);
    world.configure(0, SLOW);
    world.start_broker(0);
    world.wait("they see each other", 60, |w| {
        (0..2).all(|n| {
            w.members(n).iter().any(|m| {
                m.state == cicada::interface::MemberState::Online
                    && m.trust == cicada::interface::MemberTrust::Trusted
            })
        })
    });
    world.create_vm(0, "web", &built.ids, 64, true);
    world.wait_booted(0, "web", 120);
    // More than what one pass may carry to be the last before the switch-over.
    world.guest(0, "web", "dd if=/dev/urandom of=/data/much bs=1M count=20 2>/dev/null; sync");

    // Held at the wish of the target, the guest goes on when the move is called off.
    let moving = begin(&world, "web");
    let id = under_way(&world);
    world.call(1, &Request::Move(MoveRequest::Hold { id: id.clone() })).unwrap();
    assert_eq!(world.vm(0, "web").power, PowerState::Paused, "{}", world.log(0));
    world.call(0, &Request::Move(MoveRequest::Cancel { id: id.clone() })).unwrap();
    assert_eq!(moving.join().unwrap().0.unwrap_err().kind, ProblemKind::Cancelled);
    world.wait("the guest goes on", 60, |w| w.vm(0, "web").power == PowerState::Running);
    world.guest(0, "web", "true");
    let late = world.call(0, &Request::Move(MoveRequest::Hold { id })).unwrap_err();
    assert_eq!(late.kind, ProblemKind::Conflict, "{late}");

    // Told to switch over during the first pass, the source makes no second one.
    let moving = begin(&world, "web");
    let id = under_way(&world);
    world.call(1, &Request::Move(MoveRequest::SwitchOver { id: id.clone() })).unwrap();
    world.call(0, &Request::Move(MoveRequest::Limit { id, bytes_per_s: None })).unwrap();
    let (result, details) = moving.join().unwrap();
    let Ok(Reply::Migration(moved)) = result else { panic!("{result:?}\n{}", world.log(0)) };
    assert!(moved.account.user_data_bytes > 16 << 20, "{:?}", moved.account);
    assert!(details.iter().any(|d| d.starts_with("pass 1")), "{details:?}");
    assert!(!details.iter().any(|d| d.starts_with("pass 2")), "{details:?}");
    world.wait_booted(1, "web", 120);
    world.guest(1, "web", "[ $(wc -c </data/much) = 20971520 ]");
}
