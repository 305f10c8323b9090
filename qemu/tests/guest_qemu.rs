//! Boots QEMU guests, of both distributions: needs root, and takes minutes when the caches are cold.
//! Run with `cargo test -p freeflow-qemu --test guest_qemu -- --ignored`.

mod common;

use common::{expect_clean, run, start, texts};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
#[ignore = "boots guests"]
fn each_distribution_runs_its_own_kernel() {
    for (distro, kernel) in [("trixie", "6.12."), ("bookworm", "6.1.")] {
        let output = run("t-distro", &["--distro", distro], &["sh", "-c", "uname -r; echo err >&2; exit 7"]);
        let (stdout, stderr, code) = texts(&output);
        assert!(stdout.starts_with(kernel) && stdout.lines().count() == 1, "{stdout}{stderr}");
        assert!(stderr.ends_with("err\n") && stderr.contains("qemu: using"), "{stderr}");
        assert_eq!(code, Some(7));
    }
}

#[test]
#[ignore = "boots guests"]
fn an_ended_launcher_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut child = start("t-qended", &[]);
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("it can be signalled");
        child.wait().expect("it ends");
        expect_clean(child.id(), "t-qended");
    }
}

#[test]
#[ignore = "boots guests"]
fn it_reaches_a_user_mode_guest() {
    let mut first = start("t-mixed", &["--ip", "10.9.0.1/24"]);
    let get = "ping -c1 -W5 10.9.0.1 >&2 && echo reached";
    let output = run("t-mixed", &["--vmm", "uml", "--ip", "10.9.0.2/24"], &["sh", "-c", get]);
    kill(Pid::from_raw(first.id().cast_signed()), Signal::SIGINT).expect("it can be signalled");
    first.wait().expect("it ends");
    assert_eq!(texts(&output).0, "reached\n", "{}", texts(&output).1);
}

#[test]
#[ignore = "boots guests"]
fn a_shared_folder_is_written_through() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("in"), "from the host").expect("it can be written");
    let path = dir.path().to_str().expect("a plain path");
    let output = run("t-qshare", &["--share", path], &["cp", "/share/in", "/share/out"]);
    assert_eq!(output.status.code(), Some(0), "{}", texts(&output).1);
    assert_eq!(std::fs::read_to_string(dir.path().join("out")).expect("it is there"), "from the host");
}
