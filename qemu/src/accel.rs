//! How QEMU runs the guest's code.

use clap::ValueEnum;

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// KVM where a guest really starts with it, emulation elsewhere.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}
