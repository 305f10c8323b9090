//! Figures and how they are shown.

use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use serde::Serialize;

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// The figure; `None`: not measurable here, and `against` says why.
    pub value: Option<f64>,
    /// Its unit.
    pub unit: String,
    /// What it was measured against, with that figure.
    pub against: String,
    /// `value` to the other figure, where there is one.
    pub ratio: Option<f64>,
    /// What must be reached.
    pub bar: String,
    /// Whether it was.
    pub met: Option<bool>,
}

impl Row {
    /// A figure that must not be above the bar.
    pub fn at_most(name: &str, value: f64, unit: &str, bar: f64) -> Self {
        Self::absolute(name, value, unit, format!("at most {bar} {unit}"), value <= bar)
    }

    /// A figure that must not be below the bar.
    pub fn at_least(name: &str, value: f64, unit: &str, bar: f64) -> Self {
        Self::absolute(name, value, unit, format!("at least {bar} {unit}"), value >= bar)
    }

    fn absolute(name: &str, value: f64, unit: &str, bar: String, met: bool) -> Self {
        let (name, unit) = (name.to_owned(), unit.to_owned());
        Self { name, value: Some(value), unit, against: String::new(), ratio: None, bar, met: Some(met) }
    }

    /// A figure of which nothing is asked.
    pub fn plain(name: &str, value: f64, unit: &str) -> Self {
        Self { met: None, ..Self::absolute(name, value, unit, String::new(), true) }
    }

    /// A figure with its ratio to another, of which nothing is asked.
    pub fn versus(name: &str, value: f64, unit: &str, against: &str, ratio: f64) -> Self {
        Self { against: against.to_owned(), ratio: Some(ratio), ..Self::plain(name, value, unit) }
    }

    /// Says beside the bar what it was before, in issue A.
    #[must_use]
    pub fn before(self, bar: &str) -> Self {
        Self { bar: format!("{} (A: {bar})", self.bar), ..self }
    }

    /// A figure with its ratio to another, which must be in the range.
    pub fn ratio(name: &str, value: f64, unit: &str, against: &str, ratio: f64, bar: Bar) -> Self {
        let (met, bar) = match bar {
            Bar::AtLeast(least) => (ratio >= least, format!("ratio at least {least}")),
            Bar::AtMost(most) => (ratio <= most, format!("ratio at most {most}")),
        };
        Self {
            name: name.to_owned(),
            value: Some(value),
            unit: unit.to_owned(),
            against: against.to_owned(),
            ratio: Some(ratio),
            bar,
            met: Some(met),
        }
    }

    /// Something that this machine cannot show.
    pub fn not_measurable(name: &str, why: &str) -> Self {
        Self {
            name: name.to_owned(),
            value: None,
            unit: String::new(),
            against: format!("not measurable here: {why}"),
            ratio: None,
            bar: String::new(),
            met: None,
        }
    }
}

/// What a ratio must be.
#[derive(Debug, Clone, Copy)]
pub enum Bar {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

/// The table for people.
pub fn render(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(["measurement", "figure", "against", "ratio", "bar", "met"]);
    for row in rows {
        table.add_row([
            row.name.clone(),
            row.value.map_or_else(String::new, |v| format!("{} {}", short(v), row.unit)),
            row.against.clone(),
            row.ratio.map_or_else(String::new, short),
            row.bar.clone(),
            row.met.map_or("", |met| if met { "yes" } else { "no" }).to_owned(),
        ]);
    }
    table.to_string()
}

/// Three digits that count.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v == 0.0 || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Writes the same as JSON.
///
/// # Errors
/// When the file cannot be written.
pub fn save(rows: &[Row], path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let text = serde_json::to_string_pretty(rows)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_are_shown() {
        assert_eq!(short(0.351), "0.351");
        assert_eq!(short(8.744), "8.74");
        assert_eq!(short(42_500.0), "42500");
        assert_eq!(short(0.0), "0");
    }

    #[test]
    fn bars_are_met_or_not() {
        assert_eq!(Row::at_most("a", 0.9, "us", 1.0).met, Some(true));
        assert_eq!(Row::at_least("a", 2.9, "M/s", 3.0).met, Some(false));
        assert_eq!(Row::ratio("a", 1.0, "", "", 0.79, Bar::AtLeast(0.8)).met, Some(false));
    }
}
