//! One connection with another router, from when TLS has said who that is: which messages may come when, how many, and whether it is alive.
//!
//! Not here: what they mean for the pair of hosts, which outlives connections ([`peer`](super::peer)).

use std::time::Duration;

use super::wire::{Bye, Hello, Incoming, Links, Malformed, Message, Number, Tenants};
use super::{Limits, Side};
use crate::cluster::HostName;

/// What a peer did that no router does. The session is closed.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// Not messages.
    #[error("it sent what is no message")]
    Malformed(#[from] Malformed),
    /// A message that has no place there.
    #[error("it sent {0}")]
    OutOfPlace(&'static str),
    /// There is no version that both speak.
    #[error("it speaks versions {theirs:?} of the protocol, and this router {ours:?}: bring the older one up to date")]
    Version {
        /// Oldest and newest of the peer.
        theirs: (u16, u16),
        /// Ours.
        ours: (u16, u16),
    },
    /// It is not who it says.
    #[error("it says that it is {said}, and its certificate is for {proven}")]
    Name {
        /// The name in its HELLO.
        said: HostName,
        /// Hosts of the directory that its certificate is for.
        proven: String,
    },
    /// More messages than anybody needs.
    #[error("it sends too many messages")]
    Flood,
    /// A number is out of bounds.
    #[error("its {0} cannot be")]
    Field(&'static str),
}

/// What was heard, once it has its place.
#[derive(Debug)]
pub enum Heard {
    /// Who it is.
    Hello(Hello),
    /// What it offers for data.
    Links(Links),
    /// It has what we offered.
    Linked(Number),
    /// Its tenants have changed.
    Tenants(Tenants),
    /// The end.
    Bye(Bye),
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// HELLO has not come.
    Greeting,
    /// It has; the links are not agreed on.
    Linking,
    /// All is said; changes follow.
    Up,
}

/// One connection.
#[derive(Debug)]
pub struct Talk {
    side: Side,
    stage: Stage,
    incoming: Incoming,
    budget: Budget,
    begun: Duration,
    heard: Duration,
    said: Duration,
    version: Option<u16>,
    pings: u64,
}

impl Talk {
    /// It has just been made.
    pub fn new(side: Side, now: Duration, limits: &Limits) -> Self {
        Self {
            side,
            stage: Stage::Greeting,
            incoming: Incoming::default(),
            budget: Budget::new(now, limits),
            begun: now,
            heard: now,
            said: now,
            version: None,
            pings: 0,
        }
    }

    /// More bytes have come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.incoming.push(bytes);
    }

    /// The next thing that was heard. Answers that are owed for it go into `answers`.
    pub fn next(
        &mut self,
        now: Duration,
        limits: &Limits,
        answers: &mut Vec<Message>,
    ) -> Result<Option<Heard>, Violation> {
        while let Some(message) = self.incoming.message()? {
            self.budget.spend(now, limits)?;
            self.heard = now;
            match (self.stage, message) {
                (Stage::Greeting, Message::Hello(hello)) => {
                    self.greet(&hello, limits)?;
                    return Ok(Some(Heard::Hello(hello)));
                }
                (_, Message::Bye(bye)) => return Ok(Some(Heard::Bye(bye))),
                (Stage::Greeting, _) => return Err(Violation::OutOfPlace("something before its HELLO")),
                (_, Message::Hello(_)) => return Err(Violation::OutOfPlace("a second HELLO")),
                (_, Message::Ping(token)) => answers.push(Message::Pong(token)),
                (_, Message::Pong(token)) if token < self.pings => {}
                (_, Message::Pong(_)) => return Err(Violation::OutOfPlace("an answer to what was not asked")),
                (Stage::Linking, Message::Links(links)) if self.side == Side::Accepts => {
                    return Ok(Some(Heard::Links(links)));
                }
                (Stage::Linking, Message::Linked(number)) if self.side == Side::Dials => {
                    return Ok(Some(Heard::Linked(number)));
                }
                (_, Message::Links(_) | Message::Linked(_)) => return Err(Violation::OutOfPlace("links out of turn")),
                (Stage::Up, Message::Tenants(tenants)) => return Ok(Some(Heard::Tenants(tenants))),
                (_, Message::Tenants(_)) => return Err(Violation::OutOfPlace("tenants before its links")),
            }
        }
        Ok(None)
    }

    fn greet(&mut self, hello: &Hello, limits: &Limits) -> Result<(), Violation> {
        let (theirs, ours) = ((hello.oldest, hello.newest), limits.versions);
        if theirs.0 > theirs.1 {
            return Err(Violation::Field("versions"));
        }
        let version = theirs.1.min(ours.1);
        if version < theirs.0.max(ours.0) {
            return Err(Violation::Version { theirs, ours });
        }
        if !(1..=limits.workers).contains(&hello.workers) {
            return Err(Violation::Field("number of workers"));
        }
        if !(1..=limits.lanes).contains(&hello.lanes) {
            return Err(Violation::Field("number of lanes"));
        }
        (self.stage, self.version) = (Stage::Linking, Some(version));
        Ok(())
    }

    /// The links are agreed on.
    pub fn is_linked(&mut self) {
        self.stage = Stage::Up;
    }

    /// Whether they are.
    pub fn is_up(&self) -> bool {
        self.stage == Stage::Up
    }

    /// Which of the two this side is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// The version that is spoken, once that is known.
    pub fn version(&self) -> Option<u16> {
        self.version
    }

    /// When something was last heard.
    pub fn heard(&self) -> Duration {
        self.heard
    }

    /// Something was sent.
    pub fn has_said(&mut self, now: Duration) {
        self.said = now;
    }

    /// What the time brings: silence is the end, and this side must not be silent.
    pub fn wake(&mut self, now: Duration, limits: &Limits) -> Pulse {
        if now >= self.ends(limits) {
            let why = if self.is_up() { "nothing is heard of it" } else { "it did not come to an agreement in time" };
            return Pulse::Silent(why);
        }
        if self.stage != Stage::Greeting && now >= self.said + limits.keepalive {
            self.pings += 1;
            return Pulse::Say(Message::Ping(self.pings - 1));
        }
        Pulse::Nothing
    }

    /// When [`wake`](Self::wake) has something to do.
    pub fn next_wake(&self, limits: &Limits) -> Duration {
        match self.stage {
            Stage::Greeting => self.ends(limits),
            _ => self.ends(limits).min(self.said + limits.keepalive),
        }
    }

    /// An agreement has a time of its own: who only keeps talking does not come to one.
    fn ends(&self, limits: &Limits) -> Duration {
        match self.stage {
            Stage::Up => self.heard + limits.silence,
            _ => self.begun + limits.agreement,
        }
    }

    /// Bytes that are kept for it.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.incoming.kept()
    }
}

/// What the time brings.
#[derive(Debug)]
pub enum Pulse {
    Nothing,
    /// The other has been silent for too long.
    Silent(&'static str),
    /// We have.
    Say(Message),
}

/// How many messages may still come.
#[derive(Debug)]
struct Budget {
    left: f64,
    at: Duration,
}

impl Budget {
    fn new(now: Duration, limits: &Limits) -> Self {
        Self { left: f64::from(limits.burst), at: now }
    }

    fn spend(&mut self, now: Duration, limits: &Limits) -> Result<(), Violation> {
        let earned = now.saturating_sub(self.at).as_secs_f64() * f64::from(limits.messages_per_second);
        self.left = (self.left + earned).min(f64::from(limits.burst)) - 1.0;
        self.at = now;
        if self.left < 0.0 { Err(Violation::Flood) } else { Ok(()) }
    }
}
