//! What travels on a session: messages in JSON, each after its length (`docs/sessions.md`). Bytes become typed values here, and nothing after it
//! sees bytes again.
//!
//! Not here: whether a message makes sense at this moment.

use serde::{Deserialize, Serialize};

use crate::cluster::HostName;

/// Bytes of the length before each message.
const LENGTH: usize = 4;
/// Most bytes of a message.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Versions of the protocol that this router speaks, oldest and newest.
pub const VERSIONS: (u16, u16) = (1, 1);

/// Why bytes are no message. The session is closed.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// Longer than any.
    #[error("a message of {0} bytes")]
    Length(u32),
    /// Not JSON, or not a message of ours.
    #[error("not a message")]
    Json(#[from] serde_json::Error),
}

/// A secret by which a data connection is known to belong to a session.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ticket(pub [u8; 32]);

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Logs are read by more people than may know it.
        f.write_str("Ticket(..)")
    }
}

impl From<Ticket> for String {
    fn from(ticket: Ticket) -> Self {
        let digit = |half: u8| char::from(b"0123456789abcdef"[usize::from(half)]);
        ticket.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
    }
}

/// A text is not a ticket.
#[derive(Debug, thiserror::Error)]
#[error("not 64 hexadecimal digits")]
pub struct NoTicket;

impl TryFrom<String> for Ticket {
    type Error = NoTicket;

    fn try_from(text: String) -> Result<Self, NoTicket> {
        let digits = text.bytes().map(|digit| (digit as char).to_digit(16).map(|value| value as u8));
        let digits: Vec<u8> = digits.collect::<Option<_>>().ok_or(NoTicket)?;
        let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        if !digits.len().is_multiple_of(2) {
            return Err(NoTicket);
        }
        bytes.try_into().map(Ticket).map_err(|_: Vec<u8>| NoTicket)
    }
}

/// What one router says to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// First of both directions.
    Hello(Hello),
    /// What the pair has for its data: said by who dialled the session, after both HELLOs.
    Links(Links),
    /// The other has that now, too.
    Linked(Number),
    /// What the sender's tenants are called.
    Tenants(Tenants),
    /// Asks for [`Message::Pong`].
    Ping(u64),
    /// Answers [`Message::Ping`].
    Pong(u64),
    /// The last one.
    Bye(Bye),
}

/// What a pair of hosts has for its data, in one life of it: from when both have agreed on it until one of them gave it up.
pub type Number = u64;

/// Who speaks. Of any version: what a later one adds is not looked at, and nothing is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest version that the sender speaks.
    pub oldest: u16,
    /// Newest.
    pub newest: u16,
    /// Its name among hosts.
    pub name: HostName,
    /// Which life of it this is.
    pub epoch: u64,
    /// Data-path workers that it has.
    pub workers: u16,
    /// Data connections that it would like for each link.
    pub lanes: u16,
    /// The links with the other that it still has.
    pub links: Option<Number>,
}

/// The links of a pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Which life of them.
    pub number: Number,
    /// Data connections of each.
    pub lanes: u16,
    /// One for each link.
    pub tickets: Vec<Ticket>,
}

/// Changes of the sender's tenants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenants {
    /// Everything that was said before is void.
    pub anew: bool,
    /// Their numbers in the frames of data, and their names.
    pub known: Vec<(u32, String)>,
    /// Numbers that mean nothing any more.
    pub gone: Vec<u32>,
}

/// The end of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bye {
    /// Why, for people.
    pub why: String,
    /// The sender's life ends: its links are gone with it.
    pub stopping: bool,
}

impl Message {
    /// As it travels.
    ///
    /// # Panics
    /// Never: plain values can be written to memory.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; LENGTH];
        serde_json::to_writer(&mut bytes, self).expect("plain values can be written to memory");
        let length = (bytes.len() - LENGTH) as u32;
        bytes[..LENGTH].copy_from_slice(&length.to_le_bytes());
        bytes
    }
}

/// Bytes that have arrived and are not a whole message yet: never more than one message and what was read with it.
#[derive(Debug, Default)]
pub struct Incoming {
    bytes: Vec<u8>,
    /// Those before are done with.
    start: usize,
}

impl Incoming {
    /// More have arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, if it is there as a whole. A length is believed only as far as bytes have come.
    ///
    /// # Errors
    /// When it is none, and cannot become one.
    pub fn message(&mut self) -> Result<Option<Message>, Malformed> {
        let rest = &self.bytes[self.start..];
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length);
        if length as usize > MAX_MESSAGE {
            return Err(Malformed::Length(length));
        }
        let Some(body) = rest.get(..length as usize) else { return Ok(None) };
        let message = serde_json::from_slice(body)?;
        self.start += LENGTH + length as usize;
        Ok(Some(message))
    }

    /// Bytes that are kept.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        let hello = Hello {
            oldest: 1,
            newest: 2,
            name: "host1".parse().unwrap(),
            epoch: u64::MAX,
            workers: 4,
            lanes: 2,
            links: Some(7),
        };
        let tickets = vec![Ticket([0xab; 32]), Ticket([1; 32])];
        vec![
            Message::Hello(hello),
            Message::Links(Links { number: 7, lanes: 2, tickets }),
            Message::Linked(7),
            Message::Tenants(Tenants { anew: true, known: vec![(1, "blue".to_owned())], gone: vec![2] }),
            Message::Ping(1),
            Message::Pong(1),
            Message::Bye(Bye { why: "no \"reason\"".to_owned(), stopping: true }),
        ]
    }

    #[test]
    fn what_was_sent_arrives_however_it_is_cut() {
        let bytes: Vec<u8> = all().iter().flat_map(Message::encode).collect();
        for step in [1, 3, 7, 100, bytes.len()] {
            let (mut incoming, mut heard) = (Incoming::default(), Vec::new());
            for piece in bytes.chunks(step) {
                incoming.push(piece);
                while let Some(message) = incoming.message().unwrap() {
                    heard.push(message);
                }
            }
            assert_eq!(heard, all());
        }
    }

    #[test]
    fn a_long_length_is_refused_and_no_length_is_believed() {
        let mut incoming = Incoming::default();
        incoming.push(&(MAX_MESSAGE as u32).to_le_bytes());
        assert!(incoming.message().unwrap().is_none());
        assert!(incoming.bytes.capacity() < 100);
        let mut incoming = Incoming::default();
        incoming.push(&(MAX_MESSAGE as u32 + 1).to_le_bytes());
        assert!(matches!(incoming.message(), Err(Malformed::Length(_))));
    }

    #[test]
    fn a_hello_of_a_later_version_is_understood_and_nothing_else_that_is_more() {
        let parse = |text: &str| serde_json::from_str::<Message>(text);
        let hello =
            r#"{"hello":{"oldest":2,"newest":3,"name":"a","epoch":1,"workers":1,"lanes":1,"links":null,"new":[1]}}"#;
        assert!(matches!(parse(hello), Ok(Message::Hello(Hello { newest: 3, links: None, .. }))));
        for bad in [
            r#"{"hello":{"oldest":1,"newest":1,"name":"a","epoch":1,"workers":1,"links":null}}"#,
            r#"{"hello":{"oldest":1,"newest":1,"name":"a b","epoch":1,"workers":1,"lanes":1,"links":null}}"#,
            r#"{"links":{"number":1,"lanes":1,"tickets":["00"]}}"#,
            r#"{"links":{"number":1,"lanes":1,"tickets":[],"more":1}}"#,
            r#"{"ping":-1}"#,
            r#"{"ping":1} {"ping":2}"#,
            r#"{"dance":1}"#,
            "[]",
            "",
        ] {
            parse(bad).expect_err(bad);
        }
    }

    #[test]
    fn tickets_are_not_shown() {
        let text = format!("{:?}", all()[1]);
        assert!(!text.contains("ab") && !text.contains("171"), "{text}");
    }
}
