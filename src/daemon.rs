//! Level 5: wiring. Makes every part of a broker, connects them, and takes them down in order.
//!
//! Signals: TERM and INT stop the broker and leave VMs running; unfinished migrations go on, or
//! are cleanly called off, when it starts again. HUP is ignored.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::BoxStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::api::Service;
use crate::broker::RoomInput;
use crate::clock::SystemClock;
use crate::compose::Composer;
use crate::config::{self, Config, DriverKind};
use crate::federation::{Keyring, Members};
use crate::hypervisor::qemu::{AcceleratorChoice, NetworkBackend, VmUids};
use crate::hypervisor::{self, Driver, QemuConfig, QemuDriver};
use crate::interface::ObjectKind;
use crate::interface::{Event, Problem, ProblemKind, Reply, Request};
use crate::recording::Recorder;
use crate::repository::Repository;
use crate::runner::Records;
use crate::runner::content::catalogue;
use crate::runner::content::serving::{Store, Tickets};
use crate::runner::host::rehearsal;
use crate::runner::{Given, Inbox, Input, Link, LinkError, Runner, Shared};
use crate::transfer::{Endpoint, Limiter};
use crate::types::{Hash, MemberJid};
use crate::xmpp::{self, RequestError, XmppEvent};

/// How long shutdown waits for what is under way.
const EXIT_DEADLINE: Duration = Duration::from_secs(5);

/// Runs a broker until a signal or a shutdown request ends it. What its core takes in goes to `recorder` as well.
pub async fn run(config: Config, after_restore: bool, recorder: Option<Recorder>) -> Result<(), Problem> {
    let failed = |object: &str, e: &(dyn std::error::Error + 'static)| {
        Problem::from_error(ProblemKind::Failed, object, e)
    };
    crate::fault::check_environment().map_err(|e| {
        failed("environment", &e).next(format!("unset {}: it is for tests", crate::fault::VARIABLE))
    })?;
    config.check_owners().map_err(|e| Problem::from_config(&e))?;
    config::private_dir(&config.cloud.data_dir).map_err(|e| Problem::from_config(&e))?;
    let password = config.xmpp.password().map_err(|e| Problem::from_config(&e))?;
    let records = Records::open(&config.cloud.data_dir).map_err(|e| failed("records", &e))?;
    let repository =
        Repository::open_or_create(&config.repository.dir).map_err(|e| catalogue::repository_problem(&e))?;
    repository
        .set_hot_limit(config.repository.hot_cache_size.0)
        .map_err(|e| catalogue::repository_problem(&e))?;
    // Read under the repository's lock: while it is held, no rotation changes it.
    let identity = config::load_identity(&config.cloud.data_dir).map_err(|e| Problem::from_config(&e))?;
    let (key, successions) = (identity.key, identity.successions);
    let driver = open_driver(&config).await?;
    for missing in lacking(&config) {
        tracing::warn!("{missing}: VMs that need it do not start");
    }

    let tickets = Arc::new(Tickets::default());
    let store = Arc::new(Store { repository: repository.clone(), tickets: tickets.clone() });
    let limiter = Limiter::new(config.transfer.bandwidth_limit_bytes_per_s);
    let endpoint =
        Endpoint::bind(config.transfer.listen, &key, tickets.clone(), store, limiter).map_err(|e| {
            failed("transfer", &e).next("stop the other broker, or set transfer.listen to a free port")
        })?;

    let (session, room_events) = xmpp::connect(xmpp_settings(&config, password.expose().to_owned()))
        .map_err(|e| failed("XMPP", &e).next("see the section [xmpp] of federation.toml"))?;
    let (inbox, inputs) = crate::runner::inbox();
    let configured: BTreeMap<_, _> = config.trust.pinned.iter().map(|p| (p.jid.clone(), p.key)).collect();
    let confirmed = records.trust().map_err(|e| failed("records", &e))?;
    let revoked = records.revoked().map_err(|e| failed("records", &e))?;
    let keys = Keyring::new(configured, confirmed, revoked, config.trust.trust_on_first_use);
    let members = Members::believing(keys).seen_by(config.cloud.name.clone());

    let socket = config.api.socket.clone();
    let shared = Arc::new(Shared {
        me: config.xmpp.jid.clone(),
        key,
        clock: Arc::new(SystemClock),
        composer: Composer::new(repository.clone()),
        repository: repository.clone(),
        driver: driver.clone(),
        link: Arc::new(Session(session.clone())),
        endpoint,
        tickets,
        records,
        inbox: inbox.clone(),
        versions: Default::default(),
        config,
    });
    let announcer = session.clone();
    let announce = move |cloud| announcer.set_presence(cloud);
    let broker = Runner::open(shared.clone(), members, Box::new(announce), recorder)
        .map_err(|e| failed("records", &e))?;
    let broker = broker.with_successions(successions);

    let broker = match after_restore {
        true => broker.after_restore().map_err(|e| failed("records", &e))?,
        false => broker,
    };

    let listener = crate::api::bind(&socket).await?;
    let (stop_api, api_stopped) = tokio::sync::watch::channel(false);
    let service: Arc<dyn Service> = Arc::new(BrokerService { inbox: inbox.clone(), repository });
    let api = tokio::spawn(crate::api::serve(listener, service, api_stopped));
    tokio::spawn(pump_room(room_events, inbox.clone()));
    tokio::spawn(xmpp::probe::warn_of_room_making(session.clone(), shared.config.xmpp.room.clone()));
    tokio::spawn(pump_time(inbox.clone()));
    tokio::spawn(pump_signals(inbox.clone()));
    tracing::info!(cloud = %shared.config.cloud.name, socket = %socket.display(), "broker runs");

    let ended = broker.run(inputs).await;

    let _ = stop_api.send(true);
    session.close().await;
    let _ = tokio::time::timeout(EXIT_DEADLINE, api).await;
    let _ = tokio::time::timeout(EXIT_DEADLINE, shared.endpoint.close()).await;
    ended.map_err(|e| failed("records", &e).next("start the broker again: it goes by what it finds recorded"))
}

/// The driver's part of a configuration.
pub fn qemu_config(config: &Config) -> QemuConfig {
    let h = &config.hypervisor;
    let mut qemu = QemuConfig { accelerator: accelerator(h.accelerator), ..QemuConfig::default() };
    if let Some(machine_type) = &h.machine_type {
        qemu.machine_type.clone_from(machine_type);
    }
    if let Some(code) = &h.firmware_code {
        qemu.firmware_code.clone_from(code);
    }
    if let Some(vars) = &h.firmware_vars {
        qemu.firmware_vars.clone_from(vars);
    }
    qemu.vm_uids = vm_uids(h.vm_uids);
    qemu.networks = config.networks.iter().map(|n| (n.name.clone(), network(&n.kind))).collect();
    qemu
}

/// What this host lacks that only some VMs need.
fn lacking(config: &Config) -> Vec<String> {
    match config.hypervisor.driver {
        DriverKind::Qemu => hypervisor::qemu::missing(&qemu_config(config)),
    }
}

/// The configured driver, after it has started a VM as the configuration makes them.
///
/// # Errors
/// What the host lacks, or why such a VM does not start.
pub async fn open_driver(config: &Config) -> Result<Arc<dyn Driver>, Problem> {
    let driver: Arc<dyn Driver> = match config.hypervisor.driver {
        DriverKind::Qemu => Arc::new(QemuDriver::open(qemu_config(config)).await.map_err(|e| {
            Problem::from_error(ProblemKind::Missing, "hypervisor", &e)
                .next("deploy/install installs what is needed")
        })?),
    };
    rehearsal::rehearse_configured(&*driver, config).await?;
    Ok(driver)
}

fn accelerator(choice: config::Accelerator) -> AcceleratorChoice {
    match choice {
        config::Accelerator::Auto => AcceleratorChoice::Auto,
        config::Accelerator::Kvm => AcceleratorChoice::Kvm,
        config::Accelerator::Tcg => AcceleratorChoice::Tcg,
    }
}

fn vm_uids(choice: config::VmUids) -> VmUids {
    match choice {
        config::VmUids::Auto => VmUids::Auto,
        config::VmUids::Off => VmUids::Off,
        config::VmUids::Range { first, last } => VmUids::Range { first, last },
    }
}

fn network(kind: &config::NetworkKind) -> NetworkBackend {
    match kind {
        config::NetworkKind::User => NetworkBackend::User,
        config::NetworkKind::Bridge(bridge) => NetworkBackend::Bridge(bridge.clone()),
        config::NetworkKind::None => NetworkBackend::None,
    }
}

/// The account and room of a configuration, also for administration.
pub fn xmpp_settings(config: &Config, password: String) -> xmpp::Settings {
    xmpp::Settings {
        jid: config.xmpp.jid.clone(),
        password,
        server: config
            .xmpp
            .server
            .as_ref()
            .map(|(host, port)| config::HostPort { host: host.clone(), port: Some(*port) }.to_string()),
        security: match config.xmpp.security {
            config::Security::DirectTls => xmpp::Security::DirectTls,
            config::Security::Starttls => xmpp::Security::Starttls,
            config::Security::Plain => xmpp::Security::Plain,
        },
        ca_file: config.xmpp.ca_file.clone(),
        rules: xmpp::LoginRules {
            tls_min: match config.xmpp.tls_min {
                config::TlsVersion::V1_2 => xmpp::TlsMin::V1_2,
                config::TlsVersion::V1_3 => xmpp::TlsMin::V1_3,
            },
            channel_binding: match config.xmpp.channel_binding {
                config::ChannelBinding::Prefer => xmpp::BindingRule::Prefer,
                config::ChannelBinding::Require => xmpp::BindingRule::Require,
            },
        },
        room: Some(config.xmpp.room.clone()),
        nick: config.cloud.name.clone(),
    }
}

/// The XMPP session as the broker's way to others.
struct Session(xmpp::Handle);

impl Link for Session {
    fn request(
        &self,
        to: &MemberJid,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, LinkError>> {
        let (handle, to) = (self.0.clone(), to.clone());
        async move {
            handle.request(to.clone(), payload, timeout).await.map_err(|e| match e {
                RequestError::NotOnline(_) => LinkError::NotOnline(to),
                RequestError::Timeout { seconds, .. } => LinkError::Timeout { to, seconds },
                RequestError::Refused { .. } => LinkError::Refused { to, reason: e.to_string() },
                RequestError::Unknown | RequestError::Closed => LinkError::Down,
            })
        }
        .boxed()
    }
}

async fn pump_room(mut events: mpsc::Receiver<XmppEvent>, inbox: Inbox) {
    while let Some(event) = events.recv().await {
        inbox.news_read().await;
        let input = match event {
            XmppEvent::Joined => Input::Room(RoomInput::Joined),
            XmppEvent::Down(reason) => Input::Room(RoomInput::Down(reason)),
            XmppEvent::Presence(p) => Input::Room(RoomInput::Presence(p)),
            XmppEvent::Removed(member) => Input::Room(RoomInput::Removed(member)),
            XmppEvent::Refused(tally) => Input::Room(RoomInput::Refused(tally)),
            XmppEvent::Request(r) => Input::Asked { from: r.from, payload: r.sealed, reply: r.reply },
        };
        if inbox.send(input).is_err() {
            return;
        }
    }
}

async fn pump_time(inbox: Inbox) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        if inbox.send(Input::Tick).is_err() {
            return;
        }
    }
}

async fn pump_signals(inbox: Inbox) {
    let (Ok(mut term), Ok(mut int), Ok(mut hup)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()))
    else {
        tracing::error!("signals cannot be caught; stop the broker with a shutdown request");
        return;
    };
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hup.recv() => {}
        }
    }
    let _ = inbox.send(Input::Shutdown);
}

/// The broker as the API sees it.
struct BrokerService {
    inbox: Inbox,
    repository: Repository,
}

impl Service for BrokerService {
    fn call(
        &self,
        request: Request,
        given: Given,
        events: mpsc::Sender<Event>,
    ) -> BoxFuture<'static, Result<Reply, Problem>> {
        let inbox = self.inbox.clone();
        async move {
            let stopping = || Problem::new(ProblemKind::Unavailable, "broker", "is shutting down");
            let (reply, answer) = oneshot::channel();
            inbox
                .send(Input::Call { request: Box::new(request), given: Arc::new(given), events, reply })
                .map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?
        }
        .boxed()
    }

    fn put_object(
        &self,
        kind: ObjectKind,
        id: Hash,
        size_bytes: u64,
        body: BoxStream<'static, std::io::Result<bytes::Bytes>>,
    ) -> BoxFuture<'static, Result<bool, Problem>> {
        let repository = self.repository.clone();
        async move { put_object(repository, kind, id, size_bytes, body).await }.boxed()
    }

    fn has_objects(
        &self,
        kind: ObjectKind,
        ids: Vec<Hash>,
    ) -> BoxFuture<'static, Result<Vec<bool>, Problem>> {
        let repository = self.repository.clone();
        async move {
            let held = tokio::task::spawn_blocking(move || {
                ids.into_iter().map(|id| catalogue::holds(&repository, kind, id)).collect()
            });
            held.await.map_err(|e| Problem::new(ProblemKind::Failed, "repository", e.to_string()))
        }
        .boxed()
    }
}

/// Small objects are gathered, packs stream through a blocking thread that verifies them.
async fn put_object(
    repository: Repository,
    kind: ObjectKind,
    id: Hash,
    size_bytes: u64,
    mut body: BoxStream<'static, std::io::Result<bytes::Bytes>>,
) -> Result<bool, Problem> {
    if catalogue::holds(&repository, kind, id) {
        // A client that is still writing would see a broken pipe instead of the answer.
        while body.next().await.is_some_and(|piece| piece.is_ok()) {}
        return Ok(false);
    }
    let (pieces, mut received) = mpsc::channel::<bytes::Bytes>(8);
    let work = tokio::task::spawn_blocking(move || {
        catalogue::put_object(&repository, kind, id, size_bytes, &mut || received.blocking_recv())
    });
    let broken = |e: &std::io::Error| Problem::from_error(ProblemKind::BadRequest, "object", e);
    let mut failure = None;
    while let Some(piece) = body.next().await {
        match piece {
            Ok(piece) => {
                if pieces.send(piece).await.is_err() {
                    // The worker gave up; it says why.
                    break;
                }
            }
            Err(e) => {
                failure = Some(broken(&e));
                break;
            }
        }
    }
    drop(pieces);
    let result = work.await.map_err(|e| Problem::new(ProblemKind::Failed, "object", e.to_string()))?;
    match failure {
        Some(problem) => Err(problem),
        None => result.map(|()| true),
    }
}
