//! Another user, and no capabilities.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::chown;
use std::path::PathBuf;

use nix::unistd::{Gid, Uid, User, initgroups, setgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// Why privileges could not be dropped.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No such user.
    #[error("there is no user {0:?}")]
    NoSuchUser(String),
    /// The system's list of users cannot be read, or it forbids the change.
    #[error("cannot go on as user {user}")]
    Become {
        /// The user.
        user: String,
        /// Why.
        source: nix::Error,
    },
    /// A folder cannot be handed over.
    #[error("cannot give {} to the user", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Capabilities cannot be dropped.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] io::Error),
}

/// The user to go on as.
#[derive(Debug)]
pub struct Target {
    name: Option<String>,
    uid: Uid,
    gid: Gid,
}

impl Target {
    /// Looks a user up by name or number. A number that has no name has the group of the same number.
    pub fn find(user: &str) -> Result<Self, UserError> {
        let failed = |source| UserError::Become { user: user.to_owned(), source };
        let number = user.parse().ok();
        let known = match User::from_name(user).map_err(failed)? {
            None => number.map(|n| User::from_uid(Uid::from_raw(n))).transpose().map_err(failed)?.flatten(),
            known => known,
        };
        match (known, number) {
            (Some(known), _) => Ok(Self { name: Some(known.name), uid: known.uid, gid: known.gid }),
            (None, Some(n)) => Ok(Self { name: None, uid: Uid::from_raw(n), gid: Gid::from_raw(n) }),
            (None, None) => Err(UserError::NoSuchUser(user.to_owned())),
        }
    }

    /// Gives it folders.
    pub fn own(&self, folders: &[PathBuf]) -> Result<(), UserError> {
        folders.iter().try_for_each(|path| {
            chown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))
                .map_err(|source| UserError::Folder { path: path.clone(), source })
        })
    }

    fn adopt(&self) -> Result<(), UserError> {
        let user = || self.name.clone().unwrap_or_else(|| self.uid.to_string());
        self.switch().map_err(|source| UserError::Become { user: user(), source })
    }

    fn switch(&self) -> nix::Result<()> {
        if Uid::effective() == self.uid {
            // Started as that user: it could not set groups, and need not.
            return Ok(());
        }
        match self.name.as_deref().map(CString::new) {
            Some(Ok(name)) => initgroups(&name, self.gid)?,
            _ => setgroups(&[self.gid])?,
        }
        setresgid(self.gid, self.gid, self.gid)?;
        setresuid(self.uid, self.uid, self.uid)
    }
}

/// Whether it will be root.
pub fn stays_root(user: Option<&Target>) -> bool {
    user.map_or(Uid::effective(), |user| user.uid).is_root()
}

/// Goes on as `user`, without capabilities, and without any way to get some back. To be called while there is only one thread:
/// capabilities are each thread's own.
pub fn drop_privileges(user: Option<&Target>) -> Result<(), UserError> {
    // A daemon that remains root may still make sockets in other users' folders.
    let keep = if stays_root(user) { CapabilitySet::DAC_OVERRIDE } else { CapabilitySet::empty() };
    // Before the user, who may not do this.
    shut(keep).map_err(UserError::Capabilities)?;
    if let Some(user) = user {
        user.adopt()?;
    }
    give_up_all_but(keep).map_err(UserError::Capabilities)
}

/// Sees to it that nobody can gain capabilities by starting a program.
fn shut(keep: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    if !capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for capability in CapabilitySet::all().iter().filter(|c| !keep.contains(*c)) {
        match remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Err(rustix::io::Errno::INVAL) => {}
            result => result?,
        }
    }
    Ok(())
}

fn give_up_all_but(keep: CapabilitySet) -> io::Result<()> {
    let held = capabilities(None)?;
    let (effective, permitted) = (held.effective & keep, held.permitted & keep);
    Ok(set_capabilities(None, CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number() {
        assert_eq!(Target::find("root").ok().map(|t| (t.uid.as_raw(), t.gid.as_raw())), Some((0, 0)));
        assert_eq!(Target::find("0").ok().and_then(|t| t.name), Some("root".to_owned()));
        let nameless = Target::find("4000000").ok().map(|t| (t.name, t.uid.as_raw(), t.gid.as_raw()));
        assert_eq!(nameless, Some((None, 4_000_000, 4_000_000)));
        assert!(matches!(Target::find("no-such-user"), Err(UserError::NoSuchUser(_))));
    }
}
