//! How bytes that need not be text are written on a command line and in output, without loss.
//!
//! Text is the default: printable characters stand for themselves, `\xNN` for any byte and `\\` for a backslash. What
//! is written can be read again. Hexadecimal and base64 are there for tools.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::ValueEnum;

/// How keys and values are written on the command line and in tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Encoding {
    /// Characters as they are, `\xNN` for other bytes, `\\` for a backslash
    #[default]
    Text,
    /// Two hexadecimal digits per byte
    Hex,
    /// Base64 with padding
    Base64,
}

/// Text that stands for no bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("`{text}`: a backslash is written \\\\, any byte \\xNN with two hexadecimal digits")]
    Escape { text: String },
    #[error("`{text}` is not hexadecimal: two digits per byte are expected")]
    Hex { text: String },
    #[error("`{text}` is not base64: {reason}")]
    Base64 { text: String, reason: base64::DecodeError },
}

impl Encoding {
    /// Writes bytes.
    pub(crate) fn encode(self, bytes: &[u8]) -> String {
        match self {
            Self::Text => encode_text(bytes),
            Self::Hex => bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
                push_hex(&mut text, *byte);
                text
            }),
            Self::Base64 => base64(bytes),
        }
    }

    /// Reads what [`encode`](Self::encode) writes.
    pub(crate) fn decode(self, text: &str) -> Result<Vec<u8>, DecodeError> {
        match self {
            Self::Text => decode_text(text).ok_or_else(|| DecodeError::Escape { text: text.to_owned() }),
            Self::Hex => decode_hex(text.as_bytes()).ok_or_else(|| DecodeError::Hex { text: text.to_owned() }),
            Self::Base64 => from_base64(text),
        }
    }
}

/// Bytes as base64.
pub(crate) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Bytes of base64.
pub(crate) fn from_base64(text: &str) -> Result<Vec<u8>, DecodeError> {
    STANDARD.decode(text).map_err(|reason| DecodeError::Base64 { text: text.to_owned(), reason })
}

fn push_hex(text: &mut String, byte: u8) {
    // Writing to a string cannot fail.
    let _ = write!(text, "{byte:02x}");
}

fn encode_text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let escape = |text: &mut String, bytes: &[u8]| {
        for byte in bytes {
            text.push_str("\\x");
            push_hex(text, *byte);
        }
    };
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                // A terminal obeys control characters, and shows some others not at all.
                _ if character.is_control() || is_invisible(character) => {
                    escape(&mut text, character.encode_utf8(&mut [0; 4]).as_bytes());
                }
                _ => text.push(character),
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

/// Characters without a shape of their own, which would make two keys look the same.
fn is_invisible(character: char) -> bool {
    matches!(character, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

fn decode_text(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        match rest {
            [b'\\', after @ ..] => {
                bytes.push(b'\\');
                rest = after;
            }
            [b'x', high, low, after @ ..] => {
                bytes.push(hex_byte(*high, *low)?);
                rest = after;
            }
            _ => return None,
        }
    }
    Some(bytes)
}

fn decode_hex(digits: &[u8]) -> Option<Vec<u8>> {
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| hex_byte(*high, *low)).collect()
}

fn hex_byte(high: u8, low: u8) -> Option<u8> {
    let digit = |digit: u8| char::from(digit).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_survive_every_encoding() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let pieces: [&[u8]; 9] =
            [b"key", b"\\", b"\\x", b"\n", "ü€🦀".as_bytes(), b"\xff\xfe", b"\xe2\x82", b"\0", "\u{200b}".as_bytes()];
        for _ in 0..20_000 {
            let mut bytes = Vec::new();
            for _ in 0..rng.usize(0..6) {
                match rng.bool() {
                    true => bytes.extend_from_slice(pieces[rng.usize(0..pieces.len())]),
                    false => bytes.push(rng.u8(..)),
                }
            }
            for encoding in [Encoding::Text, Encoding::Hex, Encoding::Base64] {
                let text = encoding.encode(&bytes);
                assert_eq!(encoding.decode(&text).as_deref(), Ok(&bytes[..]), "seed {seed}: {encoding:?} {text}");
                assert!(!text.chars().any(char::is_control), "seed {seed}: {text:?}");
            }
        }
    }

    #[test]
    fn text_shows_what_can_be_read_and_escapes_the_rest() {
        assert_eq!(Encoding::Text.encode("grüße".as_bytes()), "grüße");
        assert_eq!(Encoding::Text.encode(b"a\\b\n\xff"), "a\\\\b\\x0a\\xff");
        assert_eq!(Encoding::Text.decode("\\xE2\\x82\\xac").unwrap(), "€".as_bytes());
    }

    #[test]
    fn what_stands_for_no_bytes_is_refused() {
        for text in ["\\", "\\n", "\\x", "\\x1", "\\xzz", "C:\\new", "\\x+1"] {
            assert!(Encoding::Text.decode(text).is_err(), "{text}");
        }
        for text in ["a", "0g", "0 ", "é", "+1"] {
            assert!(Encoding::Hex.decode(text).is_err(), "{text}");
        }
        assert!(Encoding::Base64.decode("a").is_err());
    }
}
