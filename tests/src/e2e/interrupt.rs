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

/// Asks again and again until there is an answer.
pub fn wait_for<T>(what: &str, timeout: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
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
