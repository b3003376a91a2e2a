//! Watches every allocation of a run, those of C libraries included, by standing before the
//! C library's allocator. libFuzzer's own limits see resident memory only, once a second.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(at: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_free(at: *mut c_void);
    fn malloc_usable_size(at: *mut c_void) -> usize;
}

/// What a run may hold whatever its input: one frame of a pack in both forms, a decompressor, a
/// repository's buffers.
const BASE_BYTES: i64 = 24 << 20;
/// What it may hold for each byte of input. An empty entry of 7 bytes is 150 in memory, and growing
/// vectors are held twice.
const PER_INPUT_BYTE: i64 = 256;

static WATCHING: AtomicBool = AtomicBool::new(false);
static HELD_BYTES: AtomicI64 = AtomicI64::new(0);
static LIMIT_BYTES: AtomicI64 = AtomicI64::new(0);

/// Runs `work` and ends the process where it holds more than an input of `input_bytes` may cost.
pub fn watch(input_bytes: usize, work: impl FnOnce()) {
    LIMIT_BYTES.store(BASE_BYTES + PER_INPUT_BYTE * input_bytes as i64, Ordering::Relaxed);
    HELD_BYTES.store(0, Ordering::Relaxed);
    WATCHING.store(true, Ordering::Relaxed);
    work();
    WATCHING.store(false, Ordering::Relaxed);
}

/// Watches nothing until it is dropped: for what is made once and no input pays for.
pub fn pause() -> Pause {
    Pause { watching: WATCHING.swap(false, Ordering::Relaxed) }
}

pub struct Pause {
    watching: bool,
}

impl Drop for Pause {
    fn drop(&mut self) {
        WATCHING.store(self.watching, Ordering::Relaxed);
    }
}

/// A panic takes memory to say what it has to.
pub fn stop_watching_on_panic() {
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        WATCHING.store(false, Ordering::Relaxed);
        next(info);
    }));
}

fn taken(at: *mut c_void) -> *mut c_void {
    if WATCHING.load(Ordering::Relaxed) && !at.is_null() {
        // SAFETY: `at` came from the allocator just now.
        let size = unsafe { malloc_usable_size(at) } as i64;
        let held = HELD_BYTES.fetch_add(size, Ordering::Relaxed) + size;
        let limit = LIMIT_BYTES.load(Ordering::Relaxed);
        if held > limit {
            WATCHING.store(false, Ordering::Relaxed);
            panic!(
                "memory out of proportion: {held} bytes held, the last {size} of them at once, {limit} allowed"
            );
        }
    }
    at
}

fn given_back(at: *mut c_void) {
    if WATCHING.load(Ordering::Relaxed) && !at.is_null() {
        // SAFETY: `at` is an allocation that is about to be given back.
        let size = unsafe { malloc_usable_size(at) } as i64;
        HELD_BYTES.fetch_sub(size, Ordering::Relaxed);
    }
}

/// # Safety
/// As `malloc(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
    taken(unsafe { __libc_malloc(size) })
}

/// # Safety
/// As `calloc(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    taken(unsafe { __libc_calloc(count, size) })
}

/// # Safety
/// As `realloc(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(at: *mut c_void, size: usize) -> *mut c_void {
    given_back(at);
    taken(unsafe { __libc_realloc(at, size) })
}

/// # Safety
/// As `free(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(at: *mut c_void) {
    given_back(at);
    unsafe { __libc_free(at) }
}
