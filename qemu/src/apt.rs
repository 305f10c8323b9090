//! Packages of other Debian releases, without touching the machine's own package management.
//!
//! The mirror is the one that the machine's apt configuration names; only the suite is swapped. Lists and
//! packages live in a private folder, and signatures are checked with the Debian archive's keyring.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use crate::progress::{Steps, quiet};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Suites by which a Debian mirror is recognised among other package sources.
const DEBIAN_SUITES: [&str; 12] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "experimental",
];
/// Settings of the machine's apt that a private apt has to share to reach the same mirror.
const SHARED_SETTINGS: [&str; 7] = [
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
    "Acquire::https::CaInfo",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
    "Acquire::Retries",
    "Acquire::ForceIPv4",
];

/// One package source of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Address of the archive.
    pub uri: String,
    /// A suite of it.
    pub suite: String,
    /// Components that are enabled.
    pub components: Vec<String>,
}

/// Reads sources in the one-line format (`sources.list`).
pub fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim().strip_prefix("deb")?;
    let line = line.strip_prefix([' ', '\t'])?.trim_start();
    let rest = match line.strip_prefix('[') {
        Some(options) => options.split_once(']')?.1,
        None => line,
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source { uri: words.next()?, suite: words.next()?, components: words.collect() })
}

/// Reads sources in the deb822 format (`*.sources`).
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let text: String =
        text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line.trim_end(), "\n"]).collect();
    text.split("\n\n").flat_map(parse_stanza).collect()
}

fn parse_stanza(stanza: &str) -> Vec<Source> {
    // A line that starts with a blank continues the one before.
    let unfolded = stanza.replace("\n ", " ").replace("\n\t", " ");
    let field = |name: &str| -> Vec<String> {
        let value = unfolded.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.trim().eq_ignore_ascii_case(name).then_some(value)
        });
        value.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    };
    if field("Enabled").first().is_some_and(|value| value == "no") || !field("Types").iter().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let (suites, components) = (field("Suites"), field("Components"));
    let source = |uri: &String, suite: &String| Source {
        uri: uri.clone(),
        suite: suite.clone(),
        components: components.clone(),
    };
    field("URIs").iter().flat_map(|uri| suites.iter().map(|suite| source(uri, suite)).collect::<Vec<_>>()).collect()
}

/// The Debian mirror among `sources`, if there is one.
pub fn debian_mirror(sources: &[Source]) -> Option<String> {
    let is_debian = |source: &&Source| {
        DEBIAN_SUITES.contains(&source.suite.as_str())
            && source.components.iter().any(|component| component == "main")
            && !source.uri.starts_with("cdrom:")
            && !source.uri.trim_end_matches('/').ends_with("-security")
    };
    sources.iter().find(is_debian).map(|source| source.uri.clone())
}

/// All sources that are configured under `dir` (`/etc/apt`).
fn machine_sources(dir: &Path) -> Vec<Source> {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let mut parts: Vec<PathBuf> = fs::read_dir(dir.join("sources.list.d"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    parts.sort();
    let mut sources = parse_one_line(&read(&dir.join("sources.list")));
    for part in parts {
        match part.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_one_line(&read(&part))),
            Some("sources") => sources.extend(parse_deb822(&read(&part))),
            _ => {}
        }
    }
    sources
}

/// The machine's Debian mirror, or the one that `FREEFLOW_DEBIAN_MIRROR` names.
pub fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("FREEFLOW_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    let found = debian_mirror(&machine_sources(Path::new("/etc/apt"))).ok_or_else(|| {
        anyhow!("no Debian mirror in the apt configuration of this machine; name one in FREEFLOW_DEBIAN_MIRROR")
    })?;
    // Cloud images name a file that lists mirrors.
    let Some(list) = found.strip_prefix("mirror+file:") else { return Ok(found) };
    let text = fs::read_to_string(list.trim_start_matches("//"))
        .with_context(|| format!("cannot read the mirror list {list}"))?;
    let first = text.lines().filter_map(|line| line.split_whitespace().next()).find(|word| !word.starts_with('#'));
    first.map(str::to_owned).ok_or_else(|| anyhow!("no mirror in {list}"))
}

/// Writes a source list for `suites` of the machine's mirror.
pub fn write_sources(path: &Path, suites: &[&str]) -> Result<()> {
    if !Path::new(KEYRING).exists() {
        bail!("{KEYRING} is missing: install debian-archive-keyring (qemu/setup does it)");
    }
    let mirror = mirror()?;
    let lines: Vec<String> =
        suites.iter().map(|suite| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n")).collect();
    fs::write(path, lines.concat()).with_context(|| format!("cannot write {}", path.display()))
}

/// `key "value"` settings of the machine's apt that reach its mirror (proxies and the like), as `Key=value`.
pub fn shared_settings() -> Result<Vec<String>> {
    let dump = quiet(Command::new("apt-config").args(["dump", "--format", "%f=%v%n"]).args(SHARED_SETTINGS))?;
    let wanted = |line: &&str| {
        line.split_once('=').is_some_and(|(key, value)| SHARED_SETTINGS.contains(&key) && !value.is_empty())
    };
    Ok(dump.lines().filter(wanted).map(str::to_owned).collect())
}

/// An apt of its own, in one folder.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Sets one up in `dir` for `suites`, and fetches their lists.
    pub fn new(steps: &Steps, dir: PathBuf, suites: &[&str]) -> Result<Self> {
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        fs::write(dir.join("status"), "")?;
        write_sources(&dir.join("sources.list"), suites)?;
        let apt = Self { dir };
        steps.step(&format!("fetching the package lists of {}", suites.join(" and ")));
        steps.run(apt.command("apt-get").args(["--quiet", "update"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let mut set = |key: &str, value: PathBuf| {
            command.arg("-o").arg(format!("{key}={}", value.display()));
        };
        set("Dir::Etc::SourceList", self.dir.join("sources.list"));
        set("Dir::State", self.dir.join("state"));
        set("Dir::State::status", self.dir.join("status"));
        set("Dir::Cache", self.dir.join("cache"));
        for key in ["Dir::Etc::SourceParts", "Dir::Etc::Preferences", "Dir::Etc::PreferencesParts"] {
            set(key, PathBuf::from("/dev/null"));
        }
        set("APT::Sandbox::User", PathBuf::from("root"));
        command
    }

    /// The first dependency of `package` whose name starts with `prefix`: what a metapackage stands for.
    pub fn dependency(&self, steps: &Steps, package: &str, prefix: &str) -> Result<String> {
        let text = steps.output(self.command("apt-cache").args(["depends", "--important", package]))?;
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let found = names.map(str::trim).find(|name| name.starts_with(prefix));
        found.map(str::to_owned).ok_or_else(|| anyhow!("{package} depends on nothing named {prefix}..."))
    }

    /// Downloads `package` and unpacks it into `target`.
    pub fn unpack(&self, steps: &Steps, package: &str, target: &Path) -> Result<()> {
        let debs = self.dir.join(package);
        fs::create_dir_all(&debs)?;
        steps.step(&format!("downloading {package}"));
        steps.run(self.command("apt-get").args(["--quiet", "download", package]).current_dir(&debs))?;
        let deb = fs::read_dir(&debs)?.next().ok_or_else(|| anyhow!("apt downloaded nothing for {package}"))??.path();
        steps.run(Command::new("dpkg-deb").arg("-x").args([&deb, target]))?;
        Ok(fs::remove_dir_all(&debs)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suite: &str) -> Source {
        Source { uri: uri.into(), suite: suite.into(), components: vec!["main".into()] }
    }

    #[test]
    fn one_line_sources() {
        let text = "# comment\ndeb http://a.test/debian bookworm main\n\
            deb-src http://a.test/debian bookworm main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://b.test/x stable main contrib # why\n";
        let sources = parse_one_line(text);
        assert_eq!(sources[0], source("http://a.test/debian", "bookworm"));
        assert_eq!((sources.len(), sources[1].uri.as_str(), sources[1].components.len()), (2, "http://b.test/x", 2));
    }

    #[test]
    fn deb822_sources() {
        let text = "Types: deb deb-src\n# comment\nURIs: http://a.test/debian\nSuites: trixie\n trixie-updates\nComponents: main\n\n\
            Enabled: no\nTypes: deb\nURIs: http://b.test\nSuites: trixie\nComponents: main\n\n\
            Types: deb-src\nURIs: http://c.test\nSuites: trixie\nComponents: main\n";
        let expected = [source("http://a.test/debian", "trixie"), source("http://a.test/debian", "trixie-updates")];
        assert_eq!(parse_deb822(text), expected);
    }

    #[test]
    fn the_mirror_is_debians() {
        let foreign = Source { components: vec!["contrib".into()], ..source("http://x.test", "bookworm") };
        let sources = [
            source("http://security.test/debian-security", "bookworm-security"),
            source("http://other.test", "nodistro"),
            foreign,
            source("cdrom:[Debian]", "bookworm"),
            source("http://good.test/debian", "bookworm"),
        ];
        assert_eq!(debian_mirror(&sources), Some("http://good.test/debian".to_owned()));
        assert_eq!(debian_mirror(&sources[..4]), None);
    }
}
