//! A folder of things that take long to make.
//!
//! An entry is named after a hash of everything that it is made from, so a changed recipe makes a new
//! entry and never a stale one. It is made in a temporary folder, under a lock, and renamed into place when
//! complete: whatever is in the cache under its name is whole, whoever was killed when.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use sha2::{Digest, Sha256};

use crate::progress::{Steps, say};

/// Name of an entry: what it is, and a hash of what it is made from.
#[derive(Debug, Clone)]
pub struct Recipe {
    name: String,
    hash: Sha256,
}

impl Recipe {
    /// A recipe without ingredients for the thing called `name` (used in file names and messages).
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), hash: Sha256::new() }
    }

    /// Adds something that the result depends on.
    #[must_use]
    pub fn with(mut self, ingredient: impl AsRef<[u8]>) -> Self {
        let bytes = ingredient.as_ref();
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
        self
    }

    /// Adds the names and contents of all files under `dir`.
    pub fn with_tree(mut self, dir: &Path) -> Result<Self> {
        for file in files_under(dir)? {
            let content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let name = file.strip_prefix(dir).unwrap_or(&file).to_string_lossy().into_owned();
            self = self.with(name).with(content);
        }
        Ok(self)
    }

    /// The entry's name in the cache.
    pub fn entry(&self) -> String {
        let digest = self.hash.clone().finalize();
        let hex: Vec<String> = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}", self.name, hex.concat())
    }
}

/// All regular files under `dir`, sorted, without following links.
fn files_under(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let entry = entry?;
            match entry.file_type()? {
                kind if kind.is_dir() => todo.push(entry.path()),
                kind if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// The user's cache: `$FREEFLOW_CACHE`, else `$XDG_CACHE_HOME/freeflow`, else `~/.cache/freeflow`.
    pub fn open() -> Result<Self> {
        let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = var("FREEFLOW_CACHE")
            .or_else(|| var("XDG_CACHE_HOME").map(|dir| dir.join("freeflow")))
            .or_else(|| var("HOME").map(|dir| dir.join(".cache/freeflow")))
            .ok_or_else(|| anyhow!("neither FREEFLOW_CACHE nor HOME is set: where is the cache to be?"))?;
        Self::at(&dir)
    }

    /// A cache in `dir`, which is made when missing.
    pub fn at(dir: &Path) -> Result<Self> {
        for sub in ["locks", "logs", "tmp", "run"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let dir = dir.canonicalize().with_context(|| format!("cannot resolve {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// An empty folder that never holds anything on disk: every run mounts its own memory file system over it.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Where the entry of `recipe` is, if it has been made.
    pub fn find(&self, recipe: &Recipe) -> Option<PathBuf> {
        let path = self.dir.join(recipe.entry());
        path.exists().then_some(path)
    }

    /// The entry of `recipe`; made by `build`, in the folder that it is given, when it is not there yet.
    pub fn get(&self, recipe: &Recipe, build: impl FnOnce(&Steps, &Path) -> Result<()>) -> Result<PathBuf> {
        if let Some(path) = self.find(recipe) {
            return Ok(path);
        }
        let _lock = self.lock(recipe)?;
        if let Some(path) = self.find(recipe) {
            return Ok(path);
        }
        self.build(recipe, build)
    }

    fn lock(&self, recipe: &Recipe) -> Result<File> {
        let path = self.dir.join("locks").join(recipe.entry());
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        if file.try_lock().is_err() {
            say(&format!("{}: waiting for another process that is making it", recipe.name));
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(file)
    }

    fn build(&self, recipe: &Recipe, build: impl FnOnce(&Steps, &Path) -> Result<()>) -> Result<PathBuf> {
        let entry = recipe.entry();
        let work = self.dir.join("tmp").join(&entry);
        remove(&work)?;
        fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
        let steps = Steps::new(&recipe.name, self.dir.join("logs").join(format!("{entry}.log")))?;
        build(&steps, &work).inspect_err(|_| drop(remove(&work)))?;
        let done = self.dir.join(&entry);
        fs::rename(&work, &done).with_context(|| format!("cannot move {} into place", done.display()))?;
        steps.step("ready");
        Ok(done)
    }
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        (dir, cache)
    }

    #[test]
    fn every_ingredient_changes_the_name() {
        let base = Recipe::new("thing").with("a").with("b");
        assert_eq!(base.entry(), Recipe::new("thing").with("a").with("b").entry());
        for other in [Recipe::new("thing").with("ab"), Recipe::new("thing").with("").with("ab"), base.clone().with("")]
        {
            assert_ne!(base.entry(), other.entry());
        }
    }

    #[test]
    fn a_tree_is_known_by_names_and_contents() {
        let dir = tempfile::tempdir().unwrap();
        let name = || Recipe::new("tree").with_tree(dir.path()).unwrap().entry();
        fs::write(dir.path().join("a"), "1").unwrap();
        let first = name();
        fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        let second = name();
        fs::write(dir.path().join("b"), "2").unwrap();
        assert!(first != second && second != name());
    }

    #[test]
    fn an_entry_is_made_once() {
        let (_dir, cache) = cache();
        let recipe = Recipe::new("once");
        let path = cache.get(&recipe, |_, dir| Ok(fs::write(dir.join("f"), "x")?)).unwrap();
        let again = cache.get(&recipe, |_, _| panic!("made twice")).unwrap();
        assert_eq!((path.join("f").exists(), &path), (true, &again));
    }

    #[test]
    fn a_failed_build_leaves_no_entry_and_can_be_repeated() {
        let (_dir, cache) = cache();
        let recipe = Recipe::new("fails");
        cache
            .get(&recipe, |_, dir| {
                fs::write(dir.join("half"), "")?;
                Err(anyhow!("on purpose"))
            })
            .unwrap_err();
        assert!(cache.find(&recipe).is_none());
        let path = cache.get(&recipe, |_, _| Ok(())).unwrap();
        assert!(!path.join("half").exists());
    }

    #[test]
    fn what_a_killed_build_left_is_not_used() {
        let (dir, cache) = cache();
        let recipe = Recipe::new("killed");
        let left = dir.path().join("tmp").join(recipe.entry());
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join("half"), "").unwrap();
        assert!(cache.find(&recipe).is_none());
        let path = cache.get(&recipe, |_, _| Ok(())).unwrap();
        assert!(!path.join("half").exists());
    }
}
