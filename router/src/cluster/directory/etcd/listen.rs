//! The task that does what the mirror wants, and puts what that knows where all see it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Trouble;
use super::client::{Cause, Link, Opened};
use super::mirror::{Heard, Mirror, Task};
use crate::cluster::directory::Board;

/// How often keys that make no sense are worth a line of the log.
const COMPLAIN: Duration = Duration::from_mins(1);

/// Never ends.
pub async fn listen(mut mirror: Mirror, mut link: Link, board: Arc<Board>) {
    let start = Instant::now();
    let mut trouble = Trouble::new("changes of other hosts are not heard of, what was known before holds");
    let mut ignored = Ignored::default();
    let mut watch = None;
    loop {
        let heard = perform(mirror.task(), &mut link, &mut watch).await.unwrap_or_else(|cause| {
            trouble.failed(&cause);
            watch = None;
            link.break_off();
            Heard::Failed
        });
        mirror.hear(heard, start.elapsed());
        if let Some(known) = mirror.news() {
            board.post(known);
        }
        board.set_connected(mirror.connected());
        if mirror.connected() {
            trouble.over();
        }
        ignored.complain(mirror.ignored());
    }
}

async fn perform(task: Task, link: &mut Link, watch: &mut Option<Opened>) -> Result<Heard, Cause> {
    match task {
        Task::List { from, revision, limit } => {
            *watch = None;
            link.list(from, revision, limit).await
        }
        Task::Watch(from) => match watch {
            Some(watch) => watch.next().await,
            None => watch.insert(link.watch(from).await?).next().await,
        },
        Task::Rest(time) => {
            tokio::time::sleep(time).await;
            Ok(Heard::Rested)
        }
    }
}

#[derive(Debug, Default)]
struct Ignored {
    told: u64,
    when: Option<Instant>,
}

impl Ignored {
    fn complain(&mut self, now: u64) {
        if now > self.told && self.when.is_none_or(|when| when.elapsed() >= COMPLAIN) {
            log::warn!(
                "etcd: {} keys under our prefix are not as a router writes them, and are ignored",
                now - self.told
            );
            (self.told, self.when) = (now, Some(Instant::now()));
        }
    }
}
