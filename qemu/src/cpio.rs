//! Initial RAM disks in the `newc` format that the kernel unpacks.
