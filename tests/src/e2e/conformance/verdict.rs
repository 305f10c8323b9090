//! How one test of rdma-core ended.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The ways to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// As it should.
    Passed,
    /// It finds that the device does not offer what it needs.
    Skipped,
    /// An assertion does not hold.
    Failed,
    /// An exception.
    Error,
    /// It took too long and was killed.
    Hung,
    /// Its process died.
    Died,
}

impl Kind {
    /// Whether something is wrong.
    pub fn is_fault(self) -> bool {
        !matches!(self, Self::Passed | Self::Skipped)
    }

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Skipped => "skipped",
            Self::Failed => "FAILED",
            Self::Error => "ERROR",
            Self::Hung => "HUNG",
            Self::Died => "DIED",
        }
    }
}

/// What came of one test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Module, class and method.
    pub test: String,
    /// How it ended.
    pub kind: Kind,
    /// Why it was skipped, or what it printed when it failed.
    pub detail: String,
    /// How long it took.
    pub seconds: f64,
}

impl Verdict {
    /// The detail's last line: of a traceback, the exception.
    pub fn reason(&self) -> &str {
        self.detail.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default()
    }

    /// Everything about it.
    pub fn report(&self) -> String {
        format!("{} {} ({:.1} s)\n{}", self.kind.name(), self.test, self.seconds, self.detail)
    }
}

/// What `suite.py` printed.
pub fn parse(output: &str) -> Result<Vec<Verdict>> {
    let parse = |line| serde_json::from_str(line).with_context(|| format!("not a verdict: {line}"));
    output.lines().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line =
            r#"{"test": "test_mr.MRTest.test_x", "kind": "error", "detail": "Traceback\n  Y\nZ: no\n", "seconds": 1}"#;
        let verdicts = parse(line).unwrap();
        assert_eq!((verdicts[0].kind, verdicts[0].reason()), (Kind::Error, "Z: no"));
        assert!(verdicts[0].kind.is_fault());
        assert!(parse("Traceback (most recent call last):").is_err());
    }
}
