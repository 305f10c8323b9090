//! The system calls that the daemon makes, as filters for the kernel (`seccomp(2)`).
//!
//! One list for all threads of a process: they share their memory, so who owns one of them owns all.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

use super::{Seccomp, Uses};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// Filters for this processor are not known.
    #[error("the filter cannot be made")]
    Compile(#[from] seccompiler::BackendError),
    /// The kernel has none for us.
    #[error("the kernel does not take the filter")]
    Install(#[from] seccompiler::Error),
}

/// How far the daemon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It will make its sockets and threads.
    Start,
    /// All of that is done.
    Running,
    /// The process that makes sockets and files for it.
    Steward,
}

/// Calls whose arguments do not matter.
const RUNNING: &[libc::c_long] = &[
    // Memory. Making it executable is left out, see `limited`.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads that wait, and that end.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Threads that were made, but have not come to their own code yet.
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_set_robust_list,
    // Time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_timerfd_settime,
    // Waiting for descriptors.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    // Descriptors that are open: sockets, eventfds, the log.
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Signalling eventfds, see the backend's `aio.rs`.
    libc::SYS_io_getevents,
    libc::SYS_io_submit,
    // Signals, and ending by one.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Keys and QP numbers.
    libc::SYS_getrandom,
    // Removing the sockets at the end, and seeing the steward end.
    libc::SYS_unlinkat,
    libc::SYS_wait4,
    // What the thread of a virtual NIC that comes later waits for.
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
];

/// The same under the names that only older processors have.
#[cfg(target_arch = "x86_64")]
const RUNNING_OLD: &[libc::c_long] =
    &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_readlink, libc::SYS_stat, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const RUNNING_OLD: &[libc::c_long] = &[];

/// What only the start needs.
const START: &[libc::c_long] = &[
    // Sockets and their folders.
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_fchmodat,
    libc::SYS_getsockname,
    libc::SYS_listen,
    libc::SYS_mkdirat,
    // Threads.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    // What they wait for.
    libc::SYS_io_setup,
    libc::SYS_timerfd_create,
    // The next filter.
    libc::SYS_seccomp,
];

#[cfg(target_arch = "x86_64")]
const START_OLD: &[libc::c_long] = &[libc::SYS_chmod, libc::SYS_mkdir];
#[cfg(not(target_arch = "x86_64"))]
const START_OLD: &[libc::c_long] = &[];

/// What only the steward needs.
const STEWARD: &[libc::c_long] = &[
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_fchmodat,
    libc::SYS_fsync,
    libc::SYS_listen,
    libc::SYS_mkdirat,
    libc::SYS_openat,
    libc::SYS_renameat2,
];

#[cfg(target_arch = "x86_64")]
const STEWARD_OLD: &[libc::c_long] = &[libc::SYS_chmod, libc::SYS_mkdir, libc::SYS_rename];
#[cfg(not(target_arch = "x86_64"))]
const STEWARD_OLD: &[libc::c_long] = &[libc::SYS_renameat];

/// `RDMA_VERBS_IOCTL` of `rdma_user_ioctl_cmds.h`: by which libibverbs makes and changes the objects of a NIC. It posts and polls by writing
/// to memory, or to a descriptor.
const VERBS: u64 = 0xc018_1b01;

/// Installs the filter of a stage in all threads. Filters add up: the kernel takes the strictest answer.
pub fn install(mode: Seccomp, stage: Stage, uses: Uses) -> Result<(), FilterError> {
    let refused = match mode {
        Seccomp::Enforce => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Off => return Ok(()),
    };
    if stage == Stage::Running {
        // First, as the other does not let a filter be added.
        for denied in DENIED {
            apply_filter_all_threads(&denial(denied)?)?;
        }
    }
    Ok(apply_filter_all_threads(&program(stage, refused, uses)?)?)
}

/// Calls that get an error and not the death penalty, since libraries make them of their own accord and can do without:
/// to give memory back, glibc's allocator looks for the kernel's policy in a file, once, when a thread's heap first shrinks.
/// And it starts threads with `clone3`, whose arguments no filter can see, but goes back to `clone` where the kernel does not have that.
const DENIED: &[(libc::c_long, i32)] = &[(libc::SYS_openat, libc::EACCES), (libc::SYS_clone3, libc::ENOSYS)];

fn denial((call, error): &(libc::c_long, i32)) -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = Rules::from([(*call, Vec::new())]);
    let error = SeccompAction::Errno(error.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, error, arch()?)?.try_into()
}

fn arch() -> Result<TargetArch, seccompiler::BackendError> {
    TargetArch::try_from(std::env::consts::ARCH)
}

fn program(stage: Stage, refused: SeccompAction, uses: Uses) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules(stage, uses)?, refused, SeccompAction::Allow, arch()?)?.try_into()
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rules(stage: Stage, uses: Uses) -> Result<Rules, seccompiler::BackendError> {
    let mut rules: Rules = [RUNNING, RUNNING_OLD].concat().into_iter().map(|call| (call, Vec::new())).collect();
    limited(&mut rules, uses.nic)?;
    let any = |calls: Vec<libc::c_long>| calls.into_iter().map(|call| (call, Vec::new()));
    let unix = || argument(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64);
    match stage {
        Stage::Start => {
            rules.extend(any([START, START_OLD].concat()));
            let changes = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
            rules.insert(libc::SYS_openat, vec![argument(2, SeccompCmpOp::MaskedEq(changes), 0)?]);
            rules.insert(libc::SYS_socket, vec![unix()?]);
            if uses.network {
                rules.entry(libc::SYS_socket).or_default().extend(streams()?);
            }
        }
        Stage::Running => {
            // This filter passes what the others answer.
            rules.extend(any(DENIED.iter().map(|(call, _)| *call).collect()));
            let thread = libc::CLONE_THREAD as u64;
            rules.insert(libc::SYS_clone, vec![argument(0, SeccompCmpOp::MaskedEq(thread), thread)?]);
            if uses.network {
                // Only sockets that can be made: no Unix sockets, so nothing of this host is reached that is not on its network.
                rules.insert(libc::SYS_socket, streams()?);
                rules.extend(any(vec![libc::SYS_connect]));
            }
        }
        Stage::Steward => {
            rules.extend(any([STEWARD, STEWARD_OLD].concat()));
            rules.insert(libc::SYS_socket, vec![unix()?]);
        }
    }
    Ok(rules)
}

/// TCP sockets, to other hosts.
fn streams() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let families = [libc::AF_INET, libc::AF_INET6].into_iter();
    let is = |index, op, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value);
    // With or without flags.
    let kind = 0xf;
    let rule = |family| {
        let stream = is(1, SeccompCmpOp::MaskedEq(kind), libc::SOCK_STREAM as u64)?;
        SeccompRule::new(vec![is(0, SeccompCmpOp::Eq, i64::from(family).cast_unsigned())?, stream])
    };
    families.map(rule).collect()
}

/// Calls that are made with certain arguments only.
fn limited(rules: &mut Rules, nic: bool) -> Result<(), seccompiler::BackendError> {
    let no_code = || argument(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mmap, vec![no_code()?]);
    rules.insert(libc::SYS_mprotect, vec![no_code()?]);
    rules.insert(libc::SYS_prctl, vec![argument(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?]);
    let requests = [libc::FIONBIO].into_iter().chain(nic.then_some(VERBS));
    let requests = requests.map(|request| argument(1, SeccompCmpOp::Eq, request));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_tgkill, vec![argument(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?]);
    let commands =
        [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_GET_SEALS];
    let commands =
        commands.into_iter().map(|command| argument(1, SeccompCmpOp::Eq, i64::from(command).cast_unsigned()));
    rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    Ok(())
}

fn argument(index: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_allows_nothing_that_the_start_does_not() {
        let uses = Uses { nic: true, network: false };
        let (start, running) = (rules(Stage::Start, uses).unwrap(), rules(Stage::Running, uses).unwrap());
        assert!(running.keys().all(|call| start.contains_key(call)));
        for call in [libc::SYS_socket, libc::SYS_connect, libc::SYS_bind] {
            assert!(start.contains_key(&call) && !running.contains_key(&call), "{call}");
        }
        assert!(running[&libc::SYS_clone].len() == 1, "threads only");
        assert!(DENIED.iter().all(|denied| denial(denied).is_ok()));
    }

    #[test]
    fn nothing_starts_programs_or_reaches_other_processes() {
        for rules in
            [Stage::Start, Stage::Steward].map(|stage| rules(stage, Uses { nic: true, network: true }).unwrap())
        {
            for call in
                [libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_kill]
            {
                assert!(!rules.contains_key(&call), "{call}");
            }
        }
    }
}
