//! Running the launcher from tests.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The launcher's `run` with a network of this test's own.
pub fn launcher(net: &str, options: &[&str], command: &[&str]) -> Command {
    let mut launcher = Command::new(env!("CARGO_BIN_EXE_freeflow-guest"));
    launcher.args(["run", "--net", net]).args(options).arg("--").args(command);
    launcher
}

/// Runs a guest to its end.
pub fn run(net: &str, options: &[&str], command: &[&str]) -> Output {
    launcher(net, options, command).stdin(Stdio::null()).output().expect("the launcher starts")
}

/// Standard output and standard error as text, and the exit status.
pub fn texts(output: &Output) -> (String, String, Option<i32>) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}

/// Starts a guest that stays, and waits until its command runs.
pub fn start(net: &str, options: &[&str]) -> Child {
    use std::io::{BufRead, BufReader};
    let mut child = launcher(net, options, &["sh", "-c", "echo up; sleep 100"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the launcher starts");
    let mut line = String::new();
    let stdout = child.stdout.as_mut().expect("its output is piped");
    BufReader::new(stdout).read_line(&mut line).expect("its output can be read");
    assert_eq!(line, "up\n");
    child
}

/// What is left of the guest whose launcher was `pid` on the network `net`.
pub fn leftovers(pid: u32, net: &str) -> Vec<String> {
    let mut left = Vec::new();
    let port = format!("ff{pid}n0");
    for entry in std::fs::read_dir("/proc").expect("there is a /proc").flatten() {
        let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        if cmdline.contains(&port) {
            left.push(cmdline);
        }
    }
    for path in [format!("/run/netns/freeflow-{net}"), format!("/run/freeflow-{net}.lock")] {
        if Path::new(&path).exists() {
            left.push(path);
        }
    }
    left
}

/// Waits until nothing is left.
pub fn expect_clean(pid: u32, net: &str) {
    let start = Instant::now();
    while !leftovers(pid, net).is_empty() && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(leftovers(pid, net), Vec::<String>::new());
}
