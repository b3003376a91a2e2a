//! The system calls that scripts of packages and definitions may make, as a seccomp filter for
//! bubblewrap. What is not allowed fails with `ENOSYS`, as if the kernel did not have it, which C
//! libraries and package tools know how to go on from.
//!
//! The list allows by number: everything up to [`KNOWN_MAX`] but for [`DENIED`]. What later kernels
//! add, and the numbers of other ABIs (x32, i386), is not in it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// `cachestat` … `lsm_list_modules`: the last calls of Linux 6.12 with a use in packages are below.
const KNOWN_MAX: i64 = 462;

/// Mounts, namespaces, modules, devices, other processes' memory, kernel programs, keys, the clock:
/// nothing a package needs to be installed, and where most ways out of a sandbox began.
const DENIED: &[i64] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    // Its flags lie in memory, which a filter cannot see; C libraries fall back to clone.
    libc::SYS_clone3,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_fanotify_init,
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS__sysctl,
];

/// `CLONE_NEWTIME`, which is no flag of `clone` but of `clone3`, apart: all that make namespaces.
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// `TIOCSTI` and `TIOCLINUX` type into the terminal somebody else sits at.
const TERMINAL_INPUT: [u64; 2] = [libc::TIOCSTI, libc::TIOCLINUX];

fn program() -> Result<BpfProgram, seccompiler::BackendError> {
    let condition =
        |argument, length, operator, value| SeccompCondition::new(argument, length, operator, value);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        (0..=KNOWN_MAX).filter(|number| !DENIED.contains(number)).map(|number| (number, vec![])).collect();
    let no_namespace = SeccompCmpOp::MaskedEq(u64::from(NAMESPACES.cast_unsigned()));
    let clone = SeccompRule::new(vec![condition(0, SeccompCmpArgLen::Qword, no_namespace, 0)?])?;
    rules.insert(libc::SYS_clone, vec![clone]);
    let other =
        TERMINAL_INPUT.map(|request| condition(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, request));
    let other = other.into_iter().collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_ioctl, vec![SeccompRule::new(other)?]);
    let refuse = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, architecture)?.try_into()
}

/// Writes the filter as an array of `struct sock_filter`, which `bwrap --seccomp` reads.
pub fn write(path: &Path) -> io::Result<()> {
    let mut bytes = Vec::new();
    for step in program().map_err(io::Error::other)? {
        bytes.extend_from_slice(&step.code.to_ne_bytes());
        bytes.extend_from_slice(&[step.jt, step.jf]);
        bytes.extend_from_slice(&step.k.to_ne_bytes());
    }
    crate::durable::write_secret(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_one_the_kernel_takes() {
        let program = program().unwrap();
        assert!(program.len() <= 4096, "{}", program.len());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("filter");
        write(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap().len(), program.len() * 8);
    }
}
