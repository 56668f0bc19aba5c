//! The macros that define a thing once and describe it as data at the same time.
//!
//! [`layout!`](crate::table::layout) makes a structure with its byte codec, and
//! [`enumeration!`](crate::table::enumeration) an enum with its conversion; both leave a
//! description behind ([`Layout`], [`Enumeration`]) from which headers and documents are printed.

/// One field of a [`Layout`].
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Name, as in Rust and C.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: usize,
    /// Size of one element in bytes: 1, 2, 4 or 8.
    pub size: usize,
    /// Number of elements; 1 for a plain field.
    pub count: usize,
    /// Documentation lines.
    pub doc: &'static [&'static str],
}

/// A structure in memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Name in Rust.
    pub name: &'static str,
    /// Path in Rust.
    pub path: &'static str,
    /// Name in C, without `struct`.
    pub c_name: &'static str,
    /// Size in bytes.
    pub size: usize,
    /// Fields in order of offset.
    pub fields: &'static [Field],
    /// Documentation lines.
    pub doc: &'static [&'static str],
}

/// A named value of an [`Enumeration`].
#[derive(Clone, Copy, Debug)]
pub struct Value {
    /// Name in Rust (CamelCase, or upper case for bits).
    pub name: &'static str,
    /// Its value.
    pub value: u64,
    /// Documentation lines.
    pub doc: &'static [&'static str],
}

/// A set of named values: an enum, or the bits of a word.
#[derive(Clone, Copy, Debug)]
pub struct Enumeration {
    /// Name in Rust.
    pub name: &'static str,
    /// Path in Rust: of the enum, or of the module of the bits.
    pub path: &'static str,
    /// Width of the word in bits.
    pub width: u32,
    /// Its values.
    pub values: &'static [Value],
    /// Documentation lines.
    pub doc: &'static [&'static str],
}

/// Writes lines of documentation as one.
pub fn one_line(doc: &[&str], out: &mut dyn core::fmt::Write) -> core::fmt::Result {
    for (i, line) in doc.iter().enumerate() {
        if i > 0 {
            out.write_char(' ')?;
        }
        out.write_str(line.trim())?;
    }
    Ok(())
}

/// What a field of a [`layout!`](crate::table::layout) may be: an integer, or an array of them.
pub trait Member: Copy {
    /// Size of one element in bytes.
    const ELEMENT: usize;
    /// Reads from exactly `size_of::<Self>()` little-endian bytes.
    fn get(bytes: &[u8]) -> Self;
    /// Writes to exactly `size_of::<Self>()` little-endian bytes.
    fn put(self, bytes: &mut [u8]);
}

macro_rules! int {
    ($($t:ty),*) => {$(
        impl Member for $t {
            const ELEMENT: usize = size_of::<$t>();
            fn get(bytes: &[u8]) -> Self {
                let mut raw = [0; size_of::<$t>()];
                raw.copy_from_slice(bytes);
                <$t>::from_le_bytes(raw)
            }
            fn put(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
int!(u8, u16, u32, u64);

impl<T: Member, const N: usize> Member for [T; N] {
    const ELEMENT: usize = T::ELEMENT;
    fn get(bytes: &[u8]) -> Self {
        core::array::from_fn(|i| T::get(&bytes[i * T::ELEMENT..(i + 1) * T::ELEMENT]))
    }
    fn put(self, bytes: &mut [u8]) {
        for (value, chunk) in self.iter().zip(bytes.chunks_exact_mut(T::ELEMENT)) {
            value.put(chunk);
        }
    }
}

/// Defines a plain structure: `field: type = offset` lines, checked for overlap and size.
macro_rules! layout {
    (
        $(#[doc = $doc:literal])*
        pub struct $name:ident ($c_name:literal, $size:literal) {
            $( $(#[doc = $fdoc:literal])* $field:ident : $ty:tt = $offset:literal ),* $(,)?
        }
    ) => {
        $(#[doc = $doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $( $(#[doc = $fdoc])* pub $field: $ty ),* }

        impl $name {
            /// Size in bytes.
            pub const SIZE: usize = $size;
            /// Description of the fields.
            pub const LAYOUT: $crate::table::Layout = $crate::table::Layout {
                name: stringify!($name),
                path: concat!(module_path!(), "::", stringify!($name)),
                c_name: $c_name,
                size: $size,
                fields: &[ $( $crate::table::Field {
                    name: stringify!($field),
                    offset: $offset,
                    size: <$ty as $crate::table::Member>::ELEMENT,
                    count: core::mem::size_of::<$ty>() / <$ty as $crate::table::Member>::ELEMENT,
                    doc: &[$($fdoc),*],
                } ),* ],
                doc: &[$($doc),*],
            };
            /// Decodes from little-endian bytes.
            pub fn from_bytes(bytes: &[u8; $size]) -> Self {
                Self { $( $field: <$ty as $crate::table::Member>::get(
                    &bytes[$offset..$offset + core::mem::size_of::<$ty>()]) ),* }
            }
            /// Encodes to little-endian bytes.
            pub fn to_bytes(&self) -> [u8; $size] {
                let mut bytes = [0u8; $size];
                $( <$ty as $crate::table::Member>::put(self.$field,
                    &mut bytes[$offset..$offset + core::mem::size_of::<$ty>()]); )*
                bytes
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::from_bytes(&[0; $size])
            }
        }

        #[cfg(feature = "serde")]
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                $crate::hex::serialize(&self.to_bytes(), to)
            }
        }

        #[cfg(feature = "serde")]
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                Ok(Self::from_bytes(&$crate::hex::deserialize(from)?))
            }
        }

        const _: () = {
            // No holes: the Rust structure has the offsets of the table.
            assert!(core::mem::size_of::<$name>() == $size);
            $( assert!(core::mem::offset_of!($name, $field) == $offset); )*
        };
    };
}

/// Defines an enum of unsigned values, with a conversion from raw.
macro_rules! enumeration {
    (
        $(#[doc = $doc:literal])*
        pub enum $name:ident : $ty:ident {
            $( $(#[doc = $vdoc:literal])* $value:ident = $number:literal ),* $(,)?
        }
    ) => {
        $(#[doc = $doc])*
        #[repr($ty)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub enum $name { $( $(#[doc = $vdoc])* $value = $number ),* }

        impl $name {
            /// Description of the values.
            pub const TABLE: $crate::table::Enumeration = $crate::table::Enumeration {
                name: stringify!($name),
                path: concat!(module_path!(), "::", stringify!($name)),
                width: $ty::BITS,
                values: &[ $( $crate::table::Value {
                    name: stringify!($value), value: $number, doc: &[$($vdoc),*],
                } ),* ],
                doc: &[$($doc),*],
            };
            /// The value with this number, if there is one.
            pub const fn from_raw(raw: $ty) -> Option<Self> {
                match raw { $( $number => Some(Self::$value), )* _ => None }
            }
            /// Name, as in the table.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$value => stringify!($value) ),* }
            }
            /// What it means, in words: its lines of the table.
            pub const fn doc(self) -> &'static [&'static str] {
                match self { $( Self::$value => &[$($vdoc),*] ),* }
            }
        }

        /// What the value means, in words, as one line.
        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                $crate::table::one_line(self.doc(), f)
            }
        }
    };
}

/// Defines the bits and masks of a word as a module of constants with a table.
macro_rules! bits {
    (
        $(#[doc = $doc:literal])*
        pub mod $module:ident $name:ident : $ty:ident {
            $( $(#[doc = $vdoc:literal])* $bit:ident = $number:expr ),* $(,)?
        }
    ) => {
        $(#[doc = $doc])*
        pub mod $module {
            $( $(#[doc = $vdoc])* pub const $bit: $ty = $number; )*
            /// Description of the bits.
            pub const TABLE: $crate::table::Enumeration = $crate::table::Enumeration {
                name: stringify!($name),
                path: module_path!(),
                width: $ty::BITS,
                values: &[ $( $crate::table::Value {
                    name: stringify!($bit), value: $bit as u64, doc: &[$($vdoc),*],
                } ),* ],
                doc: &[$($doc),*],
            };
            /// All named bits together.
            pub const ALL: $ty = 0 $( | $bit )*;
        }
    };
}

pub(crate) use {bits, enumeration, layout};
