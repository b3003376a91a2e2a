//! Enumerations whose variants have one word each, the same in records, in messages, in the API and on paper.

/// Makes such enumerations: all variants and words (`ALL`, `WORDS`), the word of one (`as_str`, `Display`, serde).
macro_rules! kinds {
    ($($(#[$meta:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $word:literal,)+ })+) => {$(
        $(#[$meta])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize, serde::Deserialize,
        )]
        pub enum $name { $($(#[$of])* #[serde(rename = $word)] $variant,)+ }

        impl $name {
            /// All of them, in their order.
            #[allow(dead_code, reason = "not all are listed")]
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The words for them, in that order.
            #[allow(dead_code, reason = "not all are listed")]
            pub const WORDS: &[&'static str] = &[$($word),+];

            /// The word for it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    )+};
}
pub(crate) use kinds;
