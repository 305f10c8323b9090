//! The library under a program, on a machine with or without SMC in its kernel: the program works.
#![allow(missing_docs, reason = "a test program")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

/// The shared library, which cargo puts beside its test programs.
fn library() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let path = program.with_file_name("libfreeflow_smc.so");
    assert!(path.exists(), "{} is missing", path.display());
    path
}

#[test]
fn a_shell_talks_to_a_peer_without_smc() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && echo question >&3 && cat <&3");
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(script).env("LD_PRELOAD", library());
    let client = std::thread::spawn(move || shell.output().unwrap());
    let (mut peer, _) = listener.accept().unwrap();
    let mut question = [0; 9];
    peer.read_exact(&mut question).unwrap();
    assert_eq!(&question, b"question\n");
    peer.write_all(b"answer").unwrap();
    drop(peer);
    let output = client.join().unwrap();
    // A library that cannot be loaded would be complained about here, and ignored.
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.stdout, b"answer");
    assert!(output.status.success());
}
