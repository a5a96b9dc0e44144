//! The workloads of the load generator: what each repeats, and with how many callers.

use bytes::Bytes;
use d_engine_client::Consistency;

use super::client::Call;

/// Keys that exist before any load, of eight bytes each.
pub(crate) const KEYS: u64 = 10_000;
pub(crate) const VALUE_BYTES: usize = 256;
const LARGE_VALUE_BYTES: usize = 16 << 10;
/// Keys with large values.
const LARGE_KEYS: u64 = 1000;
const RANGE_KEYS: usize = 1000;

/// What callers repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    Put,
    Get(Consistency),
    /// Nine lease reads for each write.
    Mixed,
    /// Compare and put.
    Txn,
    Range,
    /// Puts of one key.
    HotKey,
    PutLarge,
}

impl Workload {
    /// Every workload, with the numbers of callers; large values last, since they stay in memory.
    pub(crate) const ALL: [(Self, &[usize]); 9] = [
        (Self::Put, &[1, 64, 1000]),
        (Self::Get(Consistency::Linearizable), &[1, 64, 1000]),
        (Self::Get(Consistency::Lease), &[1, 64, 1000]),
        (Self::Get(Consistency::Eventual), &[1, 64, 1000]),
        (Self::Mixed, &[64]),
        (Self::Txn, &[64]),
        (Self::Range, &[64]),
        (Self::HotKey, &[64]),
        (Self::PutLarge, &[64]),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get(Consistency::Linearizable) => "linearizable get",
            Self::Get(Consistency::Lease) => "lease get",
            Self::Get(_) => "eventual get",
            Self::Mixed => "mixed 90/10",
            Self::Txn => "txn",
            Self::Range => "range 1000",
            Self::HotKey => "hot key",
            Self::PutLarge => "put 16 KiB",
        }
    }

    /// What one caller after the other asks for.
    pub(crate) fn calls(self) -> impl Fn() -> Call + Clone + Send + 'static {
        let bytes = if self == Self::PutLarge { LARGE_VALUE_BYTES } else { VALUE_BYTES };
        let value = Bytes::from(vec![b'x'; bytes]);
        move || {
            let (any, value) = (key(fastrand::u64(..KEYS)), value.clone());
            match self {
                Self::Put => Call::Put { key: any, value },
                Self::Get(consistency) => Call::Get { key: any, consistency },
                Self::Mixed if fastrand::u8(..10) == 0 => Call::Put { key: any, value },
                Self::Mixed => Call::Get { key: any, consistency: Consistency::Lease },
                Self::Txn => Call::CompareAndPut { key: any, value },
                Self::Range => Call::Range {
                    from: key(fastrand::u64(..=KEYS - RANGE_KEYS as u64)),
                    end: key(KEYS),
                    limit: RANGE_KEYS,
                },
                Self::HotKey => Call::Put { key: key(0), value },
                Self::PutLarge => {
                    Call::Put { key: Bytes::from(format!("large{:03}", fastrand::u64(..LARGE_KEYS))), value }
                }
            }
        }
    }
}

/// A key by its number.
pub(crate) fn key(number: u64) -> Bytes {
    Bytes::from(format!("{number:08}"))
}
