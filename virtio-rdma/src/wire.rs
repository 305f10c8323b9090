//! The macro that defines wire structures, and the description of them that tests compare with C.

/// One field of a wire structure, as the comparison with the C header needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Name, the same in C.
    pub name: &'static str,
    /// Offset from the start of the structure in bytes.
    pub offset: usize,
    /// Size in bytes.
    pub size: usize,
}

/// A structure with a C twin.
pub trait Wire {
    /// Tag of the C structure (`struct NAME`).
    const C_NAME: &'static str;
    /// Its fields in order. They cover the structure without padding.
    const FIELDS: &'static [Field];
}

/// Defines a packed little-endian structure, asserts its size, and describes its fields.
macro_rules! wire {
    ($(#[$meta:meta])* $name:ident = $c:literal, $size:literal { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned,
        )]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }

        const _: () = assert!(core::mem::size_of::<$name>() == $size);

        impl Default for $name {
            fn default() -> Self { zerocopy::FromZeros::new_zeroed() }
        }

        impl $crate::wire::Wire for $name {
            const C_NAME: &'static str = $c;
            const FIELDS: &'static [$crate::wire::Field] = &[$($crate::wire::Field {
                name: stringify!($field),
                offset: core::mem::offset_of!($name, $field),
                size: core::mem::size_of::<$ty>(),
            },)*];
        }
    };
}
pub(crate) use wire;
