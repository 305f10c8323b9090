//! The programs that run between two guests: how they are called, and how their output is read.

use anyhow::{Context, Result, ensure};

/// What a perftest program measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Mebibytes per second.
    Bandwidth,
    /// Microseconds.
    Latency,
}

impl Measure {
    /// Its unit.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Bandwidth => "MiB/s",
            Self::Latency => "us",
        }
    }
}

/// How QPs are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Unreliable datagram.
    Ud,
}

/// A perftest program with its transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub program: &'static str,
    /// What it measures.
    pub measure: Measure,
    /// Transport.
    pub transport: Transport,
}

const fn tool(program: &'static str, measure: Measure, transport: Transport) -> Tool {
    Tool { program, measure, transport }
}

/// `ib_send_bw`, RC.
pub const SEND_BW: Tool = tool("ib_send_bw", Measure::Bandwidth, Transport::Rc);
/// `ib_send_lat`, RC.
pub const SEND_LAT: Tool = tool("ib_send_lat", Measure::Latency, Transport::Rc);
/// `ib_write_bw`, RC.
pub const WRITE_BW: Tool = tool("ib_write_bw", Measure::Bandwidth, Transport::Rc);
/// `ib_write_lat`, RC.
pub const WRITE_LAT: Tool = tool("ib_write_lat", Measure::Latency, Transport::Rc);
/// `ib_read_bw`, RC.
pub const READ_BW: Tool = tool("ib_read_bw", Measure::Bandwidth, Transport::Rc);
/// `ib_read_lat`, RC.
pub const READ_LAT: Tool = tool("ib_read_lat", Measure::Latency, Transport::Rc);
/// `ib_send_bw`, UD.
pub const UD_BW: Tool = tool("ib_send_bw", Measure::Bandwidth, Transport::Ud);
/// `ib_send_lat`, UD.
pub const UD_LAT: Tool = tool("ib_send_lat", Measure::Latency, Transport::Ud);
/// `ib_atomic_bw`.
pub const ATOMIC_BW: Tool = tool("ib_atomic_bw", Measure::Bandwidth, Transport::Rc);
/// `ib_atomic_lat`.
pub const ATOMIC_LAT: Tool = tool("ib_atomic_lat", Measure::Latency, Transport::Rc);
/// `ib_send_bw`, UC.
pub const UC_SEND_BW: Tool = tool("ib_send_bw", Measure::Bandwidth, Transport::Uc);
/// `ib_write_lat`, UC.
pub const UC_WRITE_LAT: Tool = tool("ib_write_lat", Measure::Latency, Transport::Uc);
/// Those that have sizes and flags of all kinds.
pub const TOOLS: [Tool; 8] = [SEND_BW, SEND_LAT, WRITE_BW, WRITE_LAT, READ_BW, READ_LAT, UD_BW, UD_LAT];
/// The others.
pub const MORE_TOOLS: [Tool; 4] = [ATOMIC_BW, ATOMIC_LAT, UC_SEND_BW, UC_WRITE_LAT];

impl Tool {
    /// Whether it measures bandwidth.
    pub fn is_bandwidth(self) -> bool {
        self.measure == Measure::Bandwidth
    }

    /// Whether it uses datagrams.
    pub fn is_datagram(self) -> bool {
        self.transport == Transport::Ud
    }

    /// Atomics are of 8 bytes, always.
    pub fn is_atomic(self) -> bool {
        self.program.contains("atomic")
    }

    /// Whether it can send inline.
    pub fn has_inline(self) -> bool {
        !self.program.contains("read") && !self.is_atomic()
    }

    /// Whether it can have memory with on-demand paging (of atomics not every perftest knows).
    pub fn has_odp(self) -> bool {
        self.transport != Transport::Uc && !self.is_atomic()
    }

    /// Whether it can sleep until there are completions (perftest refuses it with writes).
    pub fn has_events(self) -> bool {
        !self.program.contains("write")
    }
}

/// Message sizes of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// One.
    One(u64),
    /// 2 B to 8 MiB in powers of two (`-a`); with datagrams to the MTU.
    All,
}

/// One run of a perftest program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Perf {
    /// The program.
    pub tool: Tool,
    /// Message sizes.
    pub sizes: Sizes,
    /// Iterations of each size.
    pub iterations: u32,
    /// Queue pairs.
    pub qps: u32,
    /// Both directions at once.
    pub both_ways: bool,
    /// Sleep until there are completions.
    pub events: bool,
    /// Send messages up to this size inline.
    pub inline: Option<u32>,
    /// Memory with on-demand paging.
    pub odp: bool,
}

impl Perf {
    /// A run with nothing special.
    pub fn new(tool: Tool, size: u64, iterations: u32) -> Self {
        let sizes = Sizes::One(size);
        Self { tool, sizes, iterations, qps: 1, both_ways: false, events: false, inline: None, odp: false }
    }

    fn flags(&self) -> String {
        let mut flags = String::new();
        let mut add = |wanted: bool, flag: &str| {
            if wanted {
                flags.push(' ');
                flags.push_str(flag);
            }
        };
        add(self.tool.transport == Transport::Ud, "-c UD");
        add(self.tool.transport == Transport::Uc, "-c UC");
        match self.sizes {
            _ if self.tool.is_atomic() => {}
            Sizes::One(size) => add(true, &format!("-s {size}")),
            Sizes::All => add(true, "-a"),
        }
        add(true, &format!("-n {}", self.iterations));
        add(self.qps != 1, &format!("-q {}", self.qps));
        // One CQ has the completions of all queues, and no device has one for ten thousand of the usual length.
        add(self.qps > 64, "-t 1");
        add(self.both_ways, "-b");
        add(self.events, "-e");
        add(self.inline.is_some(), &format!("-I {}", self.inline.unwrap_or(0)));
        add(self.odp, "--odp");
        flags
    }

    /// Least and greatest size that it is to report.
    fn expected(&self) -> (u64, u64, usize) {
        match self.sizes {
            Sizes::One(size) => (size, size, 1),
            Sizes::All if self.tool.is_datagram() => (2, 1024, 10),
            Sizes::All => (2, 8 << 20, 23),
        }
    }

    fn check(&self, rows: &[Row]) -> Result<()> {
        let (least, greatest, count) = self.expected();
        let first = rows.first().context("no line of results")?;
        let last = rows.last().context("no line of results")?;
        ensure!(first.size == least && last.size >= greatest, "results from {} to {} B", first.size, last.size);
        ensure!(rows.len() >= count, "{} lines of results, expected {count}", rows.len());
        Ok(())
    }
}

/// The pingpong programs of rdma-core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PingpongKind {
    /// `ibv_rc_pingpong`
    Rc,
    /// `ibv_uc_pingpong`
    Uc,
    /// `ibv_ud_pingpong`
    Ud,
    /// `ibv_srq_pingpong`: several RC QPs that share receives.
    Srq,
}

/// One of the pingpong programs of rdma-core; both ends check every byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pingpong {
    /// Which one.
    pub kind: PingpongKind,
    /// Bytes of a message.
    pub size: u64,
    /// Messages.
    pub iterations: u32,
    /// Sleep until there are completions.
    pub events: bool,
}

/// A program whose two ends run in guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// perftest.
    Perf(Perf),
    /// rdma-core.
    Pingpong(Pingpong),
}

/// One line of results.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// Message size.
    pub size: u64,
    /// Mebibytes per second or microseconds. perftest prints 0 or `inf` when it could not calibrate its clock, which
    /// happens in guests on a busy machine and says nothing about the run.
    pub value: f64,
}

impl Row {
    /// Whether there is a figure.
    pub fn is_measured(&self) -> bool {
        self.value.is_normal()
    }
}

impl From<Perf> for Program {
    fn from(perf: Perf) -> Self {
        Self::Perf(perf)
    }
}

impl From<Pingpong> for Program {
    fn from(pingpong: Pingpong) -> Self {
        Self::Pingpong(pingpong)
    }
}

impl Program {
    /// For people: program and flags.
    pub fn label(&self) -> String {
        match self {
            Self::Perf(perf) => format!("{}{}", perf.tool.program, perf.flags()),
            Self::Pingpong(pingpong) => format!("{}{}", pingpong.program(), pingpong.flags()),
        }
    }

    /// For the guest's shell, without the server's address.
    pub fn command(&self, port: u16) -> String {
        match self {
            Self::Perf(perf) => format!("{} -F -d $DEV -x $GID -p {port}{}", perf.tool.program, perf.flags()),
            Self::Pingpong(pingpong) => {
                format!("{} -d $DEV -g $GID -p {port}{}", pingpong.program(), pingpong.flags())
            }
        }
    }

    /// The unit of its figure.
    pub fn unit(&self) -> &'static str {
        match self {
            Self::Perf(perf) => perf.tool.measure.unit(),
            Self::Pingpong(_) => Measure::Latency.unit(),
        }
    }

    /// Reads and checks what the client printed; the line of results with the greatest size.
    pub fn read(&self, output: &str) -> Result<Row> {
        match self {
            Self::Perf(perf) => {
                let rows = table(output);
                perf.check(&rows)?;
                rows.last().copied().context("no line of results")
            }
            Self::Pingpong(pingpong) => pingpong.read(output),
        }
    }
}

impl Pingpong {
    fn program(self) -> &'static str {
        match self.kind {
            PingpongKind::Rc => "ibv_rc_pingpong",
            PingpongKind::Uc => "ibv_uc_pingpong",
            PingpongKind::Ud => "ibv_ud_pingpong",
            PingpongKind::Srq => "ibv_srq_pingpong",
        }
    }

    fn flags(self) -> String {
        let events = if self.events { " -e" } else { "" };
        format!(" -c -s {} -n {}{events}", self.size, self.iterations)
    }

    /// `100 iters in 0.02 seconds = 200.30 usec/iter`.
    fn read(self, output: &str) -> Result<Row> {
        ensure!(!output.contains("invalid data"), "data arrived wrong");
        let line = output.lines().find(|line| line.contains("usec/iter")).context("no line of results")?;
        let value = line.split_whitespace().rev().nth(1).and_then(|word| word.parse().ok());
        Ok(Row { size: self.size, value: value.with_context(|| format!("not a result: {line}"))? })
    }
}

/// The lines of results of a perftest program.
fn table(output: &str) -> Vec<Row> {
    let mut column = None;
    let mut rows = Vec::new();
    for line in output.lines() {
        let line = line.trim();
        if line.starts_with("#bytes") {
            // Size, iterations, then peak and average bandwidth, or least, greatest and typical latency.
            column = Some(if line.contains("t_typical") { 4 } else { 3 });
        } else if let Some(row) = column.and_then(|column| row(line, column)) {
            rows.push(row);
        }
    }
    rows
}

fn row(line: &str, column: usize) -> Option<Row> {
    // A column of `inf` is a number to Rust, too.
    let words: Vec<&str> = line.split_whitespace().collect();
    Some(Row { size: words.first()?.parse().ok()?, value: words.get(column)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BANDWIDTH: &str = "
 #bytes     #iterations    BW peak[MiB/sec]    BW average[MiB/sec]   MsgRate[Mpps]
 2          100              0.51               0.42               0.222222
 65536      100              2812.32            2712.00            0.043392
---------------------------------------------------------------------------------------
";
    const LATENCY: &str = "
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 64      100          13.28          217.59       17.83               22.40            20.50            217.59                 217.59
";

    #[test]
    fn tables_are_read() {
        assert_eq!(table(BANDWIDTH), [Row { size: 2, value: 0.42 }, Row { size: 65536, value: 2712.0 }]);
        assert_eq!(table(LATENCY), [Row { size: 64, value: 17.83 }]);
    }

    #[test]
    fn missing_and_odd_results_are_noticed() {
        let perf = Perf::new(WRITE_BW, 65536, 100);
        assert!(Program::from(perf).read("").is_err());
        assert!(Program::from(perf).read(BANDWIDTH).is_err(), "a size too many");
        assert!(Program::from(Perf { sizes: Sizes::All, ..perf }).read(BANDWIDTH).is_err(), "sizes missing");
        let row = Program::from(Perf::new(SEND_LAT, 64, 100)).read(&LATENCY.replace("17.83", "inf")).unwrap();
        assert!(!row.is_measured());
    }

    #[test]
    fn pingpongs_are_read() {
        let pingpong = Pingpong { kind: PingpongKind::Rc, size: 4096, iterations: 100, events: false };
        let row =
            pingpong.read("819200 bytes in 0.00 seconds = 3.2 Mbit/sec\n100 iters in 0.00 seconds = 20.43 usec/iter");
        assert_eq!(row.unwrap(), Row { size: 4096, value: 20.43 });
        assert!(pingpong.read("invalid data in page 3\n100 iters in 0.00 seconds = 20.43 usec/iter").is_err());
    }

    #[test]
    fn commands_name_what_they_are_to_do() {
        let perf = Perf { qps: 64, events: true, inline: Some(32), ..Perf::new(UD_BW, 32, 20) };
        assert_eq!(Program::from(perf).label(), "ib_send_bw -c UD -s 32 -n 20 -q 64 -e -I 32");
        assert!(Program::from(perf).command(7).starts_with("ib_send_bw -F -d $DEV -x $GID -p 7 -c UD"));
    }
}
