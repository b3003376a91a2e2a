//! Work on all cores whose results come back in the order it was given.

use std::collections::VecDeque;
use std::io;
use std::num::NonZero;
use std::sync::{OnceLock, mpsc};
use std::thread;

/// A queue of jobs in flight. The jobs run in a pool of their own: a caller that is itself a pool
/// thread may wait for them without starving them.
pub(super) struct InOrder<T> {
    waiting: VecDeque<mpsc::Receiver<T>>,
    jobs_max: usize,
    pool: Option<&'static rayon::ThreadPool>,
}

/// Memory that the jobs of one queue may take together, though two always run.
const QUEUE_BYTES: usize = 96 << 20;

impl<T: Send + 'static> InOrder<T> {
    /// A queue of jobs that take about `job_bytes` of memory each.
    pub fn new(job_bytes: usize) -> Self {
        let jobs_max = (2 * cores()).min(QUEUE_BYTES / job_bytes.max(1)).max(2);
        Self { waiting: VecDeque::new(), jobs_max, pool: pool() }
    }

    /// A queue whose jobs give way to all other work on the machine.
    pub fn in_background(job_bytes: usize) -> Self {
        Self { pool: background_pool(), ..Self::new(job_bytes) }
    }

    /// Enough is under way to keep every core busy; take a result before the next push.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= self.jobs_max
    }

    pub fn push(&mut self, job: impl FnOnce() -> T + Send + 'static) {
        let (done, result) = mpsc::sync_channel(1);
        // Whoever gave the job may have gone; then nobody wants the result.
        let run = move || drop(done.send(job()));
        match self.pool {
            Some(pool) => pool.spawn(run),
            None => run(),
        }
        self.waiting.push_back(result);
    }

    /// The result of the oldest job, `None` when there are no jobs.
    pub fn pop(&mut self) -> Option<io::Result<T>> {
        let result = self.waiting.pop_front()?;
        Some(result.recv().map_err(|_| io::Error::other("a compression thread failed")))
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// `None` when the system gives us no threads; jobs then run where they are pushed.
fn pool() -> Option<&'static rayon::ThreadPool> {
    static POOL: OnceLock<Option<rayon::ThreadPool>> = OnceLock::new();
    POOL.get_or_init(|| threads("repository").build().ok()).as_ref()
}

fn background_pool() -> Option<&'static rayon::ThreadPool> {
    static POOL: OnceLock<Option<rayon::ThreadPool>> = OnceLock::new();
    // On Linux the priority is a thread's own. Without it the work is only less polite.
    let yielding = |_| {
        let _ = rustix::process::setpriority_process(None, 19);
    };
    POOL.get_or_init(|| threads("background").start_handler(yielding).build().ok()).as_ref()
}

fn threads(name: &'static str) -> rayon::ThreadPoolBuilder {
    rayon::ThreadPoolBuilder::new()
        .num_threads(cores())
        .thread_name(move |n| format!("{name}-{n}"))
        .panic_handler(|_| {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_jobs_and_a_panic_is_an_error() {
        let mut queue = InOrder::new(1);
        for n in 0..100u64 {
            queue.push(move || {
                thread::sleep(std::time::Duration::from_micros((n * 7919) % 500));
                n
            });
        }
        for n in 0..100 {
            assert_eq!(queue.pop().unwrap().unwrap(), n);
        }
        queue.push(|| panic!("on purpose"));
        assert!(queue.pop().unwrap().is_err());
        assert!(queue.pop().is_none());
    }
}
