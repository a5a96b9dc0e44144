//! What is compared of each workload, and the ratio to etcd that is to be reached.

use std::fmt;

use super::report::Point;

/// Which figure of a sample speaks for a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Figure {
    PerSecond,
    /// The median.
    Latency,
    /// Of all servers, per operation.
    Cpu,
    /// Resident, of all servers.
    Memory,
}

impl Figure {
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::PerSecond => "per second",
            Self::Latency => "median µs",
            Self::Cpu => "CPU µs/op",
            Self::Memory => "RSS MiB",
        }
    }

    pub(crate) fn is_better(self, one: f64, other: f64) -> bool {
        if self == Self::PerSecond { one > other } else { one < other }
    }
}

/// The figure that is compared.
pub(crate) fn figure(point: Point) -> Figure {
    match (point.workload, point.callers) {
        ("fail-over" | "restart", _) | (_, 1) => Figure::Latency,
        ("lease keep-alive", _) => Figure::Cpu,
        ("million keys" | "churn", _) => Figure::Memory,
        _ => Figure::PerSecond,
    }
}

/// A ratio to etcd that is to be reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Less than etcd's, and less than so many microseconds.
    LessAndUnder(f64),
}

impl Target {
    /// Whether the first system's own figure and its ratio reach it.
    pub(crate) fn is_met(self, own: f64, ratio: f64) -> bool {
        match self {
            Self::AtLeast(bound) => ratio >= bound,
            Self::AtMost(bound) => ratio <= bound,
            Self::LessAndUnder(micros) => ratio < 1.0 && own < micros,
        }
    }

    /// The ratio it names.
    pub(crate) fn ratio(self) -> f64 {
        match self {
            Self::AtLeast(bound) | Self::AtMost(bound) => bound,
            Self::LessAndUnder(_) => 1.0,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}×"),
            Self::AtMost(bound) => write!(f, "≤ {bound}×"),
            Self::LessAndUnder(micros) => write!(f, "< 1×, < {} s", micros / 1e6),
        }
    }
}

/// The target of a workload, if it has one.
pub(crate) fn target(point: Point) -> Option<Target> {
    Some(match (point.workload, point.callers) {
        ("put", 1000) => Target::AtLeast(8.0),
        ("put", 1) => Target::AtMost(0.5),
        ("linearizable get", 1000) => Target::AtLeast(30.0),
        ("lease get" | "eventual get", 1000) => Target::AtLeast(40.0),
        ("lease get", 1) => Target::AtMost(0.3),
        ("mixed 90/10", 64) => Target::AtLeast(8.0),
        ("range 1000", _) => Target::AtLeast(4.0),
        ("watch fan-out", _) => Target::AtLeast(10.0),
        ("lease keep-alive", _) => Target::AtMost(0.2),
        ("million keys", _) => Target::AtMost(0.6),
        ("fail-over", _) => Target::LessAndUnder(1e6),
        _ => return None,
    })
}
