//! The committed inputs of the fuzz targets, without a fuzzer: `make fuzz` looks for more.
#![allow(missing_docs, reason = "a test program")]

use std::path::Path;

use freeflow_tests::fuzz::TARGETS;
use freeflow_tests::rng::Rng;

#[test]
fn committed_inputs() {
    for (name, target) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = files.collect();
        files.sort();
        assert!(files.len() >= 10, "{}: {} inputs", folder.display(), files.len());
        for file in files {
            println!("{}", file.display());
            target(&std::fs::read(&file).unwrap());
        }
    }
}

/// Not guided by anything, but a target that breaks at once is noticed at once.
#[test]
fn random_inputs() {
    let seed = Rng::seed();
    println!("FREEFLOW_SEED={seed}");
    let mut rng = Rng::new(seed);
    for (name, target) in TARGETS {
        for _ in 0..200 {
            let len = rng.size(400);
            let input = rng.bytes(len);
            println!("{name} {input:?}");
            target(&input);
        }
    }
}
