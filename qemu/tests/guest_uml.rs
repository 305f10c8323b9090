//! Boots User-mode Linux guests: needs root, and takes minutes when the caches are cold.
//! Run with `cargo test -p freeflow-qemu --test guest_uml -- --ignored`.

mod common;

use common::{expect_clean, run, start, texts};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const UML: [&str; 2] = ["--vmm", "uml"];

fn pid(child: &std::process::Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

#[test]
#[ignore = "boots guests"]
fn output_and_exit_status_are_the_commands_own() {
    let output = run("t-status", &UML, &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(texts(&output), ("out\n".into(), "err\n".into(), Some(7)));
}

#[test]
#[ignore = "boots guests"]
fn arguments_arrive_exactly() {
    let words = ["a  b", "it's", "$HOME", "", "x\ny", "*", "--nic", "\\"];
    let output = run("t-words", &UML, &[&["printf", "%s|"], &words[..]].concat());
    assert_eq!(texts(&output).0, words.map(|word| format!("{word}|")).concat());
}

#[test]
#[ignore = "boots guests"]
fn large_output_is_whole() {
    let output = run("t-large", &UML, &["sh", "-c", "seq 1 300000"]);
    let expected: String = (1..=300_000).flat_map(|number| [number.to_string(), "\n".into()]).collect();
    assert!(texts(&output).0 == expected, "{} bytes of {}", output.stdout.len(), expected.len());
}

#[test]
#[ignore = "boots guests"]
fn a_process_that_stays_does_not_hold_the_guest() {
    let output = run("t-stays", &UML, &["sh", "-c", "sleep 100 & echo done"]);
    assert_eq!(texts(&output), ("done\n".into(), String::new(), Some(0)));
}

#[test]
#[ignore = "boots guests"]
fn signals_are_reported_as_by_a_shell() {
    assert_eq!(run("t-signal", &UML, &["sh", "-c", "kill -9 $$"]).status.code(), Some(137));
    assert_eq!(run("t-signal", &UML, &["no-such-command"]).status.code(), Some(127));
}

#[test]
#[ignore = "boots guests"]
fn a_timeout_ends_the_guest() {
    let output = run("t-timeout", &[&UML[..], &["--timeout", "4"]].concat(), &["sleep", "100"]);
    assert_eq!(output.status.code(), Some(124), "{}", texts(&output).1);
}

#[test]
#[ignore = "boots guests"]
fn cpus_that_are_not_there_are_named() {
    let output = run("t-pin", &[&UML[..], &["--pin", "0,1023"]].concat(), &["true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(texts(&output).1.contains("no CPU 1023"), "{}", texts(&output).1);
}

#[test]
#[ignore = "boots guests"]
fn an_ended_launcher_leaves_nothing() {
    for (signal, code) in [(Signal::SIGINT, Some(130)), (Signal::SIGTERM, Some(143)), (Signal::SIGKILL, None)] {
        let mut child = start("t-ended", &UML);
        assert_ne!(common::leftovers(child.id(), "t-ended"), Vec::<String>::new(), "the check finds a running guest");
        kill(pid(&child), signal).expect("it can be signalled");
        assert_eq!(child.wait().expect("it ends").code(), code);
        expect_clean(child.id(), "t-ended");
    }
}

#[test]
#[ignore = "boots guests"]
fn guests_on_one_network_reach_each_other() {
    let mut first = start("t-net", &[&UML[..], &["--ip", "10.9.0.1/24,fd09::1/64"]].concat());
    let both = "ping -c1 -W5 10.9.0.1 >&2 && ping -c1 -W5 fd09::1 >&2 && echo reached";
    let output = run("t-net", &[&UML[..], &["--ip", "10.9.0.2/24,fd09::2/64"]].concat(), &["sh", "-c", both]);
    let alone = run("t-other", &[&UML[..], &["--ip", "10.9.0.2/24"]].concat(), &["ping", "-c1", "-W1", "10.9.0.1"]);
    kill(pid(&first), Signal::SIGINT).expect("it can be signalled");
    first.wait().expect("it ends");
    assert_eq!(texts(&output).0, "reached\n", "{}", texts(&output).1);
    assert_eq!(alone.status.code(), Some(1), "another network must be apart");
    expect_clean(first.id(), "t-net");
}

#[test]
#[ignore = "boots guests"]
fn a_shared_folder_is_written_through() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("in"), "from the host").expect("it can be written");
    let path = dir.path().to_str().expect("a plain path");
    let output = run("t-share", &[&UML[..], &["--share", path]].concat(), &["cp", "/share/in", "/share/out"]);
    assert_eq!(output.status.code(), Some(0), "{}", texts(&output).1);
    assert_eq!(std::fs::read_to_string(dir.path().join("out")).expect("it is there"), "from the host");
}
