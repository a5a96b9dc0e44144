//! The deadline of a call: what its `grpc-timeout` header says, or the server's default.

use std::time::Duration;

use d_engine_proto::ErrorCode;
use d_engine_proto::v1::Outcome;
use tonic::{Request, Status};

use super::error::status;
use crate::engine::Deadline;
use crate::limits::CALL_TIMEOUT_MAX;

/// The answer has to be under way a little before the client stops waiting, or it would learn nothing from it; and
/// before tonic's own timer ends the call without details.
const MARGIN_MAX: Duration = Duration::from_millis(5);

/// Gives calls their deadlines.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines {
    default: Duration,
}

impl Deadlines {
    pub(super) fn new(default: Duration) -> Self {
        Self { default }
    }

    /// When the answer to `request` must be ready.
    pub(super) fn of<T>(self, request: &Request<T>) -> Result<Deadline, Status> {
        let timeout = match request.metadata().get("grpc-timeout") {
            None => self.default,
            Some(header) => parse(header.as_bytes()).ok_or_else(|| {
                let message = format!("grpc-timeout is {header:?}: it must be up to 8 digits and one of H M S m u n");
                status(ErrorCode::InvalidArgument, Outcome::NotApplied, message)
            })?,
        };
        Ok(Deadline::now() + shortened(timeout))
    }

    /// How long the answer to an operation of a pipeline may take that has `timeout_us` microseconds left, or 0.
    pub(super) fn of_operation(self, timeout_us: u64) -> Duration {
        shortened(if timeout_us == 0 { self.default } else { Duration::from_micros(timeout_us) })
    }
}

fn shortened(timeout: Duration) -> Duration {
    let timeout = timeout.min(CALL_TIMEOUT_MAX);
    timeout - (timeout / 10).min(MARGIN_MAX)
}

/// `TimeoutValue TimeoutUnit` of the gRPC specification.
fn parse(header: &[u8]) -> Option<Duration> {
    let (unit, digits) = header.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    match unit {
        b'H' => Some(Duration::from_secs(value * 3600)),
        b'M' => Some(Duration::from_secs(value * 60)),
        b'S' => Some(Duration::from_secs(value)),
        b'm' => Some(Duration::from_millis(value)),
        b'u' => Some(Duration::from_micros(value)),
        b'n' => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_of_the_specification_is_understood() {
        for (header, expected) in [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("4S", Duration::from_secs(4)),
            ("500m", Duration::from_millis(500)),
            ("6u", Duration::from_micros(6)),
            ("99999999n", Duration::from_nanos(99_999_999)),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
        ] {
            assert_eq!(parse(header.as_bytes()), Some(expected), "{header}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for header in ["", "S", "5", "5s", "5 S", "-5S", "+5S", "1.5S", "123456789S", "S5"] {
            assert_eq!(parse(header.as_bytes()), None, "{header}");
            let mut request = Request::new(());
            if let Ok(value) = header.parse() {
                request.metadata_mut().insert("grpc-timeout", value);
                let refused = Deadlines::new(Duration::from_secs(1)).of(&request).unwrap_err();
                assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            }
        }
    }

    #[test]
    fn the_server_answers_a_little_before_the_client_gives_up_and_never_waits_forever() {
        assert_eq!(shortened(Duration::from_secs(5)), Duration::from_millis(4995));
        assert_eq!(shortened(Duration::from_millis(10)), Duration::from_millis(9));
        assert_eq!(shortened(Duration::ZERO), Duration::ZERO);
        assert!(shortened(Duration::MAX) < CALL_TIMEOUT_MAX);
    }
}
