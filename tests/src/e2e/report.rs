//! What is shown of a run: a line for each check as it ends, and a sum.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use super::interrupt::Interrupted;
use super::perf::{Program, Row};

/// One check that was made.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Where: guests and how they are used.
    pub place: String,
    /// What.
    pub test: String,
    /// Message size in bytes, for programs that measure.
    pub size: Option<u64>,
    /// Bandwidth or latency.
    pub value: Option<f64>,
    /// Of the value.
    pub unit: Option<&'static str>,
    /// Whether it passed.
    pub passed: bool,
    /// How long it took.
    pub seconds: f64,
    /// What went wrong, with the programs' output.
    pub error: Option<String>,
}

/// A measured figure.
#[derive(Debug, Clone, Copy)]
pub struct Figure {
    row: Row,
    unit: &'static str,
}

impl Figure {
    /// A value without a message size.
    pub fn plain(value: f64, unit: &'static str) -> Self {
        Self { row: Row { size: 0, value }, unit }
    }

    /// What a program found.
    pub fn of(program: &Program, row: Row) -> Self {
        Self { row, unit: program.unit() }
    }
}

/// Collects outcomes and prints them.
#[derive(Debug, Default)]
pub struct Reporter {
    filter: Option<String>,
    outcomes: Vec<Outcome>,
}

impl Reporter {
    /// For checks whose place and name contain `filter`.
    pub fn new(filter: Option<String>) -> Self {
        Self { filter, outcomes: Vec::new() }
    }

    /// Whether a check is wanted.
    pub fn wants(&self, place: &str, test: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| format!("{place} {test}").contains(filter.as_str()))
    }

    /// Makes a check, and says how it went. Only an interrupt is an error.
    pub fn check(&mut self, place: &str, test: &str, check: impl FnOnce() -> Result<Option<Figure>>) -> Result<bool> {
        let start = Instant::now();
        match check() {
            Err(error) if error.is::<Interrupted>() => Err(error),
            result => Ok(self.note(place, test, start.elapsed(), result)),
        }
    }

    fn note(&mut self, place: &str, test: &str, time: Duration, result: Result<Option<Figure>>) -> bool {
        let passed = result.is_ok();
        let (figure, error) = result.map_or_else(|error| (None, Some(format!("{error:#}"))), |figure| (figure, None));
        let outcome = Outcome {
            place: place.to_owned(),
            test: test.to_owned(),
            size: figure.map(|figure| figure.row.size),
            value: figure.map(|figure| figure.row).filter(Row::is_measured).map(|row| row.value),
            unit: figure.map(|figure| figure.unit),
            passed,
            seconds: time.as_secs_f64(),
            error,
        };
        eprintln!("{}", outcome.line());
        self.outcomes.push(outcome);
        passed
    }

    /// All outcomes.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// Numbers of checks that passed and failed.
    pub fn counts(&self) -> (usize, usize) {
        let passed = self.outcomes.iter().filter(|outcome| outcome.passed).count();
        (passed, self.outcomes.len() - passed)
    }

    /// Whether there were checks, and all passed.
    pub fn is_success(&self) -> bool {
        matches!(self.counts(), (1.., 0))
    }
}

impl Outcome {
    /// `12.3 MiB/s`, or nothing.
    pub fn figure(&self) -> String {
        match (self.value, self.unit) {
            (Some(value), Some(unit)) => format!("{value:.1} {unit}"),
            _ => String::new(),
        }
    }

    /// `passed` or `failed`.
    pub fn verdict(&self) -> &'static str {
        if self.passed { "passed" } else { "failed" }
    }

    fn line(&self) -> String {
        let head = if self.passed { "ok  " } else { "FAIL" };
        let mut line = format!("{head} {:6.1} s  {}  {}", self.seconds, self.place, self.test);
        if self.passed && self.value.is_some() {
            let _ = write!(line, "  {}", self.figure());
        }
        for error in self.error.iter().flat_map(|error| error.lines()) {
            line.push_str("\n        ");
            line.push_str(error);
        }
        line
    }
}
