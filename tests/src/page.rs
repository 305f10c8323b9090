//! `docs/verbs.md` as data: its tables, which tests hold against the code and against real guests.

/// The page.
pub const VERBS: &str = include_str!("../../docs/verbs.md");

/// The rows of the table under a heading, cell by cell, without its head.
pub fn rows<'a>(page: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let section = page.lines().skip_while(|line| line.strip_prefix("## ") != Some(heading)).skip(1);
    let section = section.take_while(|line| !line.starts_with("## "));
    let cells = |line: &'a str| line.trim_matches('|').split('|').map(str::trim).collect();
    section.filter(|line| line.starts_with('|')).skip(2).map(cells).collect()
}

/// What a cell has in backticks.
pub fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Debug;
    use std::path::Path;

    use freeflow_backend::Profile;
    use virtio_rdma::ctrl::Opcode;
    use virtio_rdma::ib::WrOpcode;

    use super::*;

    type Names = BTreeSet<String>;

    fn column(heading: &str, index: usize) -> Names {
        let rows = rows(VERBS, heading);
        let cells: Vec<&str> = rows.iter().map(|row| row[index]).collect();
        cells.into_iter().flat_map(names).map(str::to_owned).collect()
    }

    fn assert_same(what: &str, page: &Names, code: &Names) {
        assert!(!code.is_empty(), "{what}: nothing found in the code");
        let (missing, extra): (Vec<_>, Vec<_>) = (code.difference(page).collect(), page.difference(code).collect());
        assert!(
            missing.is_empty() && extra.is_empty(),
            "{what}: docs/verbs.md lacks {missing:?}, has too much {extra:?}"
        );
    }

    /// `AllocPd` as `ALLOC_PD`.
    fn shouted(name: &impl Debug) -> String {
        let name = format!("{name:?}");
        let word = |(index, letter): (usize, char)| {
            let gap = if index > 0 && letter.is_ascii_uppercase() { "_" } else { "" };
            format!("{gap}{}", letter.to_ascii_uppercase())
        };
        name.char_indices().map(word).collect()
    }

    /// The members that the driver's `struct ib_device_ops` sets, in whatever file.
    fn operations() -> Names {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../virtio-rdma/driver");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let sources = files.filter(|path| path.extension().is_some_and(|kind| kind == "c"));
        sources.flat_map(|path| operations_in(&std::fs::read_to_string(path).unwrap())).collect()
    }

    fn operations_in(source: &str) -> Vec<String> {
        let start = |line: &&str| !(line.starts_with("static const struct ib_device_ops") && line.ends_with('{'));
        let table = source.lines().skip_while(start).take_while(|line| *line != "};");
        let name = |line: &str| Some(line.trim().split(" = ").next()?.strip_prefix('.')?.to_owned());
        let facts = ["owner", "driver_id", "uverbs_abi_ver"];
        table
            .filter(|line| line.contains(" = "))
            .filter_map(name)
            .filter(|name| !facts.contains(&name.as_str()))
            .collect()
    }

    #[test]
    fn operations_are_the_drivers() {
        assert_same("operations", &column("Operations", 1), &operations());
    }

    #[test]
    fn commands_are_the_devices() {
        let code = Opcode::ALL.iter().map(shouted).collect();
        assert_same("commands", &column("Operations", 2), &code);
    }

    #[test]
    fn work_requests_are_those_that_exist() {
        let code = WrOpcode::ALL.iter().map(shouted).collect();
        assert_same("work requests", &column("Queue pairs and work requests", 0), &code);
    }

    #[test]
    fn limits_are_the_profiles() {
        let page =
            rows(VERBS, "Limits").into_iter().map(|row| format!("{} {}", names(row[0])[0], row[1].replace(',', "")));
        let profile = serde_json::to_value(Profile::default()).unwrap();
        let code = profile.as_object().unwrap().iter().map(|(name, value)| format!("{name} {value}"));
        assert_same("limits", &page.collect(), &code.collect());
    }

    #[test]
    fn tables_are_read() {
        let page = "# a\n## b\ntext\n| x | y |\n|---|---|\n| `p`, `q` | 1 |\n| r | |\n## c\n| z |\n";
        assert_eq!(rows(page, "b"), [vec!["`p`, `q`", "1"], vec!["r", ""]]);
        assert_eq!(names("`p`, `q` r"), ["p", "q"]);
        let source = "static const struct ib_device_ops a = {\n\t.owner = THIS,\n\t.query_ah = q,\n\t.poll_cq = r,\n};\n.x = y\n";
        assert_eq!(operations_in(source), ["query_ah", "poll_cq"]);
    }
}
