//! Which clock the daemon looks at: one that is set, or jumps, must not matter to sessions, flows, timers and retries. So time is
//! `Instant`, which nobody sets, and what the time of day is good for is named here.

use std::path::{Path, PathBuf};

/// What asks for the time of day. `Instant` and `TimerFd` of `vmm-sys-util` are monotonic (`CLOCK_MONOTONIC`).
const TIME_OF_DAY: [&str; 4] = ["SystemTime", "UnixTime", "UNIX_EPOCH", "CLOCK_REALTIME"];

/// Where that is allowed: certificates are good from one day to another.
const ALLOWED: [&str; 1] = ["router/src/cluster/tls.rs"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry of it").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn the_time_of_day_is_asked_for_certificates_alone() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut files = Vec::new();
    for folder in ["backend/src", "backend/tcp/src", "router/src"] {
        sources(&root.join(folder), &mut files);
    }
    assert!(files.len() > 100, "{} files", files.len());
    let asks = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).expect("a source");
        TIME_OF_DAY.iter().any(|word| text.contains(word))
    };
    let asking: Vec<_> =
        files.iter().filter(|path| asks(path)).filter_map(|path| path.strip_prefix(root).ok()).collect();
    assert_eq!(asking, ALLOWED.map(Path::new));
}
