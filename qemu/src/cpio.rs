//! Initial RAM disks in the `newc` format that the kernel unpacks.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

const TRAILER: &[u8] = b"TRAILER!!!";

/// Writes all files, folders and links under `dir` as one archive, owned by root.
pub fn pack(dir: &Path, out: &mut impl Write) -> Result<()> {
    let mut number = 0;
    pack_folder(dir, Path::new(""), &mut number, out)?;
    write_entry(out, 0, 0, TRAILER, &[])
}

fn pack_folder(base: &Path, relative: &Path, number: &mut u32, out: &mut impl Write) -> Result<()> {
    let folder = base.join(relative);
    let mut names: Vec<_> = fs::read_dir(&folder)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect())
        .with_context(|| format!("cannot list {}", folder.display()))?;
    names.sort();
    for name in names {
        let path = relative.join(name);
        let full = base.join(&path);
        let metadata = fs::symlink_metadata(&full)?;
        *number += 1;
        let data = content(&full, &metadata).with_context(|| format!("cannot read {}", full.display()))?;
        write_entry(out, *number, metadata.mode(), path.as_os_str().as_bytes(), &data)?;
        if metadata.is_dir() {
            pack_folder(base, &path, number, out)?;
        }
    }
    Ok(())
}

fn content(path: &Path, metadata: &fs::Metadata) -> std::io::Result<Vec<u8>> {
    if metadata.is_symlink() {
        return Ok(fs::read_link(path)?.as_os_str().as_bytes().to_vec());
    }
    if metadata.is_file() { fs::read(path) } else { Ok(Vec::new()) }
}

fn write_entry(out: &mut impl Write, number: u32, mode: u32, name: &[u8], data: &[u8]) -> Result<()> {
    let size = u32::try_from(data.len()).context("too large for an initial RAM disk")?;
    let links = 1;
    // ino, mode, uid, gid, nlink, mtime, filesize, four device numbers, namesize, check
    let fields = [number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    let mut header = b"070701".to_vec();
    for field in fields {
        write!(header, "{field:08X}")?;
    }
    header.extend_from_slice(name);
    header.push(0);
    write_padded(out, &header)?;
    write_padded(out, data)
}

fn write_padded(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes)?;
    let padding = bytes.len().next_multiple_of(4) - bytes.len();
    Ok(out.write_all(&[0; 4][..padding])?)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_unpacks_what_was_packed() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/file"), "content").unwrap();
        fs::write(from.path().join("empty"), "").unwrap();
        std::os::unix::fs::symlink("d/file", from.path().join("link")).unwrap();
        let mut archive = Vec::new();
        pack(from.path(), &mut archive).unwrap();
        let Ok(mut cpio) =
            Command::new("cpio").args(["--extract", "--quiet"]).current_dir(to.path()).stdin(Stdio::piped()).spawn()
        else {
            eprintln!("skipped: no cpio on this machine");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(fs::read_to_string(to.path().join("link")).unwrap(), "content");
        assert!(to.path().join("empty").exists());
    }
}
