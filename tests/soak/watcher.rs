//! Looks at the machine's processes all the time: a VM that runs twice is seen even if both sides
//! believe themselves alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const EVERY: Duration = Duration::from_millis(30);

/// A hypervisor process below the test's directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    pub pid: i32,
    pub cloud: String,
    pub vm: String,
}

pub struct Watcher {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    looks: AtomicU64,
    seen_twice: Mutex<Option<String>>,
}

impl Watcher {
    pub fn start(dir: &Path) -> Self {
        let (shared, dir) = (Arc::new(Shared::default()), dir.to_owned());
        let watching = shared.clone();
        let thread = std::thread::spawn(move || {
            while !watching.stop.load(Ordering::Relaxed) {
                let mut places: BTreeMap<String, Vec<Process>> = BTreeMap::new();
                for process in processes(&dir) {
                    places.entry(process.vm.clone()).or_default().push(process);
                }
                if let Some((vm, twice)) = places.into_iter().find(|(_, p)| p.len() > 1) {
                    // A process that forks, as QEMU does at its start, is one VM still.
                    let clouds: std::collections::BTreeSet<_> = twice.iter().map(|p| &p.cloud).collect();
                    if clouds.len() > 1 {
                        *watching.seen_twice.lock().unwrap() = Some(format!("VM {vm} runs twice: {twice:?}"));
                    }
                }
                watching.looks.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(EVERY);
            }
        });
        Self { shared, thread: Some(thread) }
    }

    pub fn assert_one_place_each(&self) {
        if let Some(what) = self.shared.seen_twice.lock().unwrap().as_ref() {
            panic!("{what}");
        }
    }

    pub fn looks(&self) -> u64 {
        self.shared.looks.load(Ordering::Relaxed)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The hypervisor processes of the clouds below `dir`.
pub fn processes(dir: &Path) -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line);
            if !line.starts_with("qemu-system") && !line.contains("/qemu-system") {
                return None;
            }
            // A start that is only tried, below `rehearsals`: its CPUs never begin to run.
            if line.split('\0').any(|a| a == "-S") {
                return None;
            }
            let vm = line.split('\0').skip_while(|a| *a != "-uuid").nth(1)?.to_owned();
            let below = line.split(dir.to_str()?).nth(1)?;
            let cloud = PathBuf::from(below.trim_start_matches('/')).iter().next()?.to_str()?.to_owned();
            Some(Process { pid, cloud, vm })
        })
        .collect()
}
