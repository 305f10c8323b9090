//! Our device and rxe side by side, test by test.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use comfy_table::{Table, presets};
use serde::Serialize;

use super::verdict::{Kind, Verdict};
use crate::e2e::guest::Distro;

/// One test on both.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Module, class and method.
    pub test: String,
    /// On our device.
    pub ours: Kind,
    /// On rxe.
    pub rxe: Kind,
    /// Why it was skipped or failed on ours, else on rxe.
    pub reason: String,
}

/// All tests of one distribution.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Which one.
    pub distro: &'static str,
    /// By name.
    pub lines: Vec<Line>,
}

impl Line {
    /// Whether rxe can do what we cannot.
    pub fn is_behind(&self) -> bool {
        self.ours.is_fault() || (self.rxe == Kind::Passed && self.ours != Kind::Passed)
    }
}

impl Comparison {
    /// Of what was found on the one and on the other.
    pub fn new(distro: Distro, ours: Vec<Verdict>, rxe: Vec<Verdict>) -> Self {
        let mut rxe: BTreeMap<String, Verdict> = rxe.into_iter().map(|found| (found.test.clone(), found)).collect();
        let line = |ours: Verdict| {
            let rxe = rxe.remove(&ours.test);
            let kinds = (ours.kind, rxe.as_ref().map_or(Kind::Died, |rxe| rxe.kind));
            let why = |found: &Verdict| found.reason().to_owned();
            let reason = if ours.kind == Kind::Passed { rxe.as_ref().map(why) } else { Some(why(&ours)) };
            Line { test: ours.test, ours: kinds.0, rxe: kinds.1, reason: reason.unwrap_or_default() }
        };
        Self { distro: distro.name(), lines: ours.into_iter().map(line).collect() }
    }

    fn count(&self, wanted: impl Fn(&Line) -> bool) -> usize {
        self.lines.iter().filter(|line| wanted(line)).count()
    }

    /// One line about all.
    pub fn summary(&self) -> String {
        let of = |kind: fn(&Line) -> Kind| {
            let [passed, skipped] = [Kind::Passed, Kind::Skipped].map(|wanted| self.count(|line| kind(line) == wanted));
            format!("{passed} passed, {skipped} skipped, {} failed", self.lines.len() - passed - skipped)
        };
        let (ours, rxe) = (of(|line| line.ours), of(|line| line.rxe));
        let behind = self.count(Line::is_behind);
        format!("{}: virtual NIC {ours}; rxe {rxe}; behind: {behind}", self.distro)
    }

    /// Fails where ours is behind.
    pub fn judge(&self) -> Result<()> {
        let behind: Vec<&Line> = self.lines.iter().filter(|line| line.is_behind()).collect();
        let text =
            |line: &&Line| format!("{} ({} on rxe) {}: {}", line.ours.name(), line.rxe.name(), line.test, line.reason);
        ensure!(behind.is_empty(), "{}", behind.iter().map(text).collect::<Vec<_>>().join("\n"));
        Ok(())
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_BORDERS_ONLY).set_header([self.distro, "virtual NIC", "rxe", "why"]);
        for line in &self.lines {
            let mark = if line.is_behind() { " <<<" } else { "" };
            let ours = format!("{}{mark}", line.ours.name());
            table.add_row([line.test.as_str(), &ours, line.rxe.name(), &line.reason]);
        }
        format!("{table}\n{}", self.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(kinds: [Kind; 3]) -> Vec<Verdict> {
        let verdict = |(test, kind): (&str, Kind)| Verdict {
            test: test.to_owned(),
            kind,
            detail: format!("{test} is {}", kind.name()),
            seconds: 0.0,
        };
        ["a", "b", "c"].into_iter().zip(kinds).map(verdict).collect()
    }

    fn compare(ours: [Kind; 3], rxe: [Kind; 3]) -> Comparison {
        Comparison::new(Distro::Trixie, verdicts(ours), verdicts(rxe))
    }

    #[test]
    fn better_and_equal_are_fine() {
        let found = compare([Kind::Passed, Kind::Skipped, Kind::Passed], [Kind::Passed, Kind::Skipped, Kind::Skipped]);
        found.judge().unwrap();
        assert_eq!(found.lines[1].reason, "b is skipped");
        assert!(found.summary().contains("2 passed, 1 skipped, 0 failed; rxe 1 passed, 2 skipped, 0 failed"));
    }

    #[test]
    fn what_rxe_does_and_we_skip_is_noticed() {
        let found = compare([Kind::Passed, Kind::Skipped, Kind::Passed], [Kind::Passed; 3]);
        assert!(found.judge().unwrap_err().to_string().contains("skipped (passed on rxe) b: b is skipped"));
        assert!(found.table().contains("<<<"));
    }

    #[test]
    fn a_fault_is_one_even_where_rxe_has_it_too() {
        for fault in [Kind::Failed, Kind::Error, Kind::Hung, Kind::Died] {
            compare([fault, Kind::Passed, Kind::Passed], [fault, Kind::Passed, Kind::Passed]).judge().unwrap_err();
        }
    }
}
