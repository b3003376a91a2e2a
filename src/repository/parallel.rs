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
}

impl<T: Send + 'static> InOrder<T> {
    pub fn new() -> Self {
        Self { waiting: VecDeque::new() }
    }

    /// Enough is under way to keep every core busy; take a result before the next push.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= 2 * cores()
    }

    pub fn push(&mut self, job: impl FnOnce() -> T + Send + 'static) {
        let (done, result) = mpsc::sync_channel(1);
        // Whoever gave the job may have gone; then nobody wants the result.
        let run = move || drop(done.send(job()));
        match pool() {
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
    let build = || {
        rayon::ThreadPoolBuilder::new()
            .num_threads(cores())
            .thread_name(|n| format!("repository-{n}"))
            .panic_handler(|_| {})
            .build()
            .ok()
    };
    POOL.get_or_init(build).as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_jobs_and_a_panic_is_an_error() {
        let mut queue = InOrder::new();
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
