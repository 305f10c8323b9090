//! SIGINT, SIGTERM and SIGHUP end a run in an orderly way: every wait of this harness asks [`check`], and the error it
//! gives unwinds through the destructors that stop guests and router.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
/// How often a wait looks.
const PERIOD: Duration = Duration::from_millis(20);

/// The run was interrupted.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// From now on signals are noted.
pub fn install() -> Result<()> {
    let flag = FLAG.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, flag.clone()).context("cannot catch signals")?;
    }
    Ok(())
}

/// Fails when the run is to end.
pub fn check() -> Result<()> {
    match FLAG.get() {
        Some(flag) if flag.load(Relaxed) => Err(Interrupted.into()),
        _ => Ok(()),
    }
}

/// What the launcher of guests reads too: their kernel looks for mistakes of the driver, and is many times slower.
const DEBUG_KERNEL: &str = "FREEFLOW_UML_DEBUG";
/// How much longer everything may take then.
const SLOWER: u32 = 8;

/// How long to wait for what usually takes no longer than that.
pub fn patience(usual: Duration) -> Duration {
    if std::env::var_os(DEBUG_KERNEL).is_some() { usual * SLOWER } else { usual }
}

/// `timeout(1)` for a program that usually takes no longer than these seconds.
pub fn within(seconds: u64) -> String {
    format!("timeout {}", patience(Duration::from_secs(seconds)).as_secs())
}

/// Asks again and again until there is an answer.
pub fn wait_for<T>(what: &str, timeout: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let timeout = patience(timeout);
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("{what} did not happen within {} s", timeout.as_secs());
        }
        pause()?;
    }
}

/// A moment's wait.
pub fn pause() -> Result<()> {
    check()?;
    std::thread::sleep(PERIOD);
    Ok(())
}
