//! Number types: quantities that must not be mistaken for one another.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl $name {
            /// The plain number.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(number: $inner) -> Self {
                Self(number)
            }
        }
    };
}

number! {
    /// The store's change counter: each command that changes a key raises it by one. 0: the empty store.
    Revision(u64)
}
number! {
    /// A reign of Raft: at most one leader has it.
    Term(u64)
}
number! {
    /// Position of an entry in the Raft log. Not a [`Revision`]: entries that change no key have an index too.
    LogIndex(u64)
}
number! {
    /// A member's number, unique in its cluster and never 0.
    NodeId(u32)
}
number! {
    /// A lease's number; 0 stands for none.
    LeaseId(u64)
}
number! {
    /// A client session's number; 0 stands for none.
    SessionId(u64)
}
number! {
    /// How often the cluster was restored from a snapshot. Ordered before the revision in a fencing token.
    Epoch(u64)
}

impl Revision {
    /// The revision of the next change.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
