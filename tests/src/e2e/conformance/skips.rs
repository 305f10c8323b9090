//! What `docs/verbs.md` says of the tests that are skipped, held against what is.

use anyhow::{Result, ensure};

use super::verdict::{Kind, Verdict};
use crate::e2e::guest::Distro;
use crate::page;

/// One row of the page's table.
#[derive(Debug, PartialEq)]
struct Row<'a> {
    patterns: Vec<&'a str>,
    versions: &'a str,
}

/// The version of rdma-core that a distribution has.
fn version(distro: Distro) -> &'static str {
    match distro {
        Distro::Bookworm => "44",
        Distro::Trixie => "56",
    }
}

/// The rows of the page's table.
fn rows(page: &str) -> Vec<Row<'_>> {
    let rows = page::rows(page, "rdma-core's own tests").into_iter();
    rows.filter_map(|row| Some(Row { patterns: page::names(row.first()?), versions: row.get(1)? })).collect()
}

/// Whether a name matches a pattern in which `*` stands for anything.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name
            .strip_prefix(head)
            .is_some_and(|rest| (0..=rest.len()).any(|at| rest.get(at..).is_some_and(|rest| matches(tail, rest)))),
    }
}

/// The page and the verdicts agree: every skipped test is listed, and what is listed is skipped.
pub fn check(verdicts: &[Verdict], distro: Distro) -> Result<()> {
    check_page(page::VERBS, verdicts, version(distro))
}

fn check_page(page: &str, verdicts: &[Verdict], version: &str) -> Result<()> {
    let rows: Vec<Row> = rows(page).into_iter().filter(|row| row.versions.contains(version)).collect();
    let patterns: Vec<&str> = rows.into_iter().flat_map(|row| row.patterns).collect();
    let is_listed = |verdict: &&Verdict| patterns.iter().any(|pattern| matches(pattern, &verdict.test));
    let skipped = || verdicts.iter().filter(|verdict| verdict.kind == Kind::Skipped);
    let mut wrong: Vec<String> = Vec::new();
    for verdict in skipped().filter(|verdict| !is_listed(verdict)) {
        wrong.push(format!("{} is skipped and not listed: {}", verdict.test, verdict.reason()));
    }
    for verdict in verdicts.iter().filter(|verdict| verdict.kind == Kind::Passed && is_listed(verdict)) {
        wrong.push(format!("{} is listed and passes", verdict.test));
    }
    for pattern in patterns.iter().filter(|pattern| !skipped().any(|verdict| matches(pattern, &verdict.test))) {
        wrong.push(format!("`{pattern}` is listed, and nothing like it is skipped"));
    }
    ensure!(wrong.is_empty(), "docs/verbs.md (rdma-core {version}):\n{}", wrong.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "## rdma-core's own tests\ntext\n| tests | rdma-core | why |\n|---|---|---|\n| `test_odp.*`, `test_x.A.b` | 44, 56 | no |\n\
        | `test_new.*` | 56 | no |\n";

    fn verdict(test: &str, kind: Kind) -> Verdict {
        Verdict { test: test.to_owned(), kind, detail: String::new(), seconds: 0.0 }
    }

    fn complaint(verdicts: &[Verdict], version: &str) -> String {
        check_page(PAGE, verdicts, version).map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn patterns() {
        assert!(matches("test_odp.*", "test_odp.A.b") && matches("*.b", "test_odp.A.b") && matches("a*c*e", "abcde"));
        assert!(!matches("test_odp.A", "test_odp.A.b") && !matches("*.c", "test_odp.A.b"));
    }

    #[test]
    fn rows_are_read() {
        let expected = Row { patterns: vec!["test_odp.*", "test_x.A.b"], versions: "44, 56" };
        assert_eq!((rows(PAGE).len(), &rows(PAGE)[0]), (2, &expected));
    }

    #[test]
    fn the_page_must_agree_both_ways() {
        let skipped = [verdict("test_odp.A.x", Kind::Skipped), verdict("test_x.A.b", Kind::Skipped)];
        assert_eq!(complaint(&skipped, "44"), "");
        assert!(complaint(&skipped, "56").contains("`test_new.*` is listed, and nothing"));
        let more = [&skipped[..], &[verdict("test_y.B.c", Kind::Skipped)]].concat();
        assert!(complaint(&more, "44").contains("test_y.B.c is skipped and not listed"));
        let passes = [&skipped[..], &[verdict("test_odp.A.y", Kind::Passed)]].concat();
        assert!(complaint(&passes, "44").contains("test_odp.A.y is listed and passes"));
    }
}
