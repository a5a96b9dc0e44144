//! Trace contexts as the header `traceparent` carries them: version 00 of W3C Trace Context.

use bytes::Bytes;

use crate::v1::TraceContext;

/// The header of unary calls that says to which span they belong.
pub const TRACEPARENT: &str = "traceparent";

const SAMPLED: u32 = 1;
const TRACE_ID_BYTES: usize = 16;
const SPAN_ID_BYTES: usize = 8;
/// `00-` trace id `-` span id `-` flags, in hexadecimal digits.
const VERSION_0_CHARACTERS: usize = 3 + 2 * TRACE_ID_BYTES + 1 + 2 * SPAN_ID_BYTES + 3;

impl TraceContext {
    /// The context with these ids; `None` if one of them is all zeros, which stands for none.
    #[must_use]
    pub fn new(trace_id: [u8; TRACE_ID_BYTES], span_id: [u8; SPAN_ID_BYTES], flags: u8) -> Option<Self> {
        let [trace_id, span_id] = [trace_id.as_slice(), span_id.as_slice()].map(Bytes::copy_from_slice);
        Some(Self { trace_id, span_id, flags: flags.into() }).filter(|context| context.ids().is_some())
    }

    /// The trace id and the span id, if both are as long as they must be, and not all zeros.
    #[must_use]
    pub fn ids(&self) -> Option<([u8; TRACE_ID_BYTES], [u8; SPAN_ID_BYTES])> {
        let trace_id: [u8; TRACE_ID_BYTES] = self.trace_id.as_ref().try_into().ok()?;
        let span_id: [u8; SPAN_ID_BYTES] = self.span_id.as_ref().try_into().ok()?;
        (trace_id != [0; TRACE_ID_BYTES] && span_id != [0; SPAN_ID_BYTES]).then_some((trace_id, span_id))
    }

    /// Whether somebody records the trace.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Reads the value of a `traceparent` header; `None` for one that is malformed, which the standard says to ignore.
    #[must_use]
    pub fn from_traceparent(header: &str) -> Option<Self> {
        let known = header.get(..VERSION_0_CHARACTERS)?;
        let rest = &header[VERSION_0_CHARACTERS..];
        let mut parts = known.split('-');
        let [version] = digits(parts.next()?)?;
        // A later version may go on behind a further hyphen; 255 is none.
        if version == u8::MAX || (version == 0 && !rest.is_empty()) || !(rest.is_empty() || rest.starts_with('-')) {
            return None;
        }
        let (trace_id, span_id, [flags]) = (digits(parts.next()?)?, digits(parts.next()?)?, digits(parts.next()?)?);
        Self::new(trace_id, span_id, flags)
    }

    /// The value of the header `traceparent`; `None` if the ids are no ids.
    #[must_use]
    pub fn to_traceparent(&self) -> Option<String> {
        let (trace_id, span_id) = self.ids()?;
        let (trace_id, span_id) = (u128::from_be_bytes(trace_id), u64::from_be_bytes(span_id));
        Some(format!("00-{trace_id:032x}-{span_id:016x}-{:02x}", self.flags & 0xff))
    }
}

/// Lower-case hexadecimal digits, exactly as many as the bytes need.
fn digits<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |character: &u8| match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(&pair[0])? << 4 | digit(&pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_header_is_read_and_written_alike() {
        let context = TraceContext::from_traceparent(HEADER).unwrap();
        assert!(context.is_sampled());
        assert_eq!((context.trace_id[0], context.span_id[7]), (0x4b, 0xb7));
        assert_eq!(context.to_traceparent().as_deref(), Some(HEADER));
        let unsampled = TraceContext::from_traceparent(&HEADER.replace("-01", "-00")).unwrap();
        assert!(!unsampled.is_sampled());
        assert_eq!(unsampled.ids(), context.ids());
    }

    #[test]
    fn a_later_version_may_have_more_to_say() {
        let later = format!("{}-what-is-new", HEADER.replacen("00", "cc", 1));
        assert_eq!(TraceContext::from_traceparent(&later), TraceContext::from_traceparent(HEADER));
    }

    #[test]
    fn what_is_no_header_is_ignored() {
        let zero_trace = HEADER.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32));
        let zero_span = HEADER.replace("00f067aa0ba902b7", &"0".repeat(16));
        for header in [
            "",
            "00",
            &HEADER[..HEADER.len() - 1],
            &format!("{HEADER}-more"),
            &format!("{}x", HEADER.replacen("00", "cc", 1)),
            &HEADER.replacen("00", "ff", 1),
            &HEADER.to_uppercase(),
            &HEADER.replace("4b", "4\u{e9}"),
            &HEADER.replace("-00f0", "000f0"),
            &zero_trace,
            &zero_span,
        ] {
            assert_eq!(TraceContext::from_traceparent(header), None, "{header}");
        }
        assert_eq!(TraceContext { trace_id: vec![1; 15].into(), ..TraceContext::default() }.to_traceparent(), None);
    }
}
