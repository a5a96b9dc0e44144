//! The wire between members: who changes it says so by a new version.
#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

use std::fs;
use std::path::{Path, PathBuf};

use d_engine_proto::PEER_PROTOCOL_VERSION;

const PEER_PROTO: &str = "proto/d_engine/v1/peer.proto";
/// Beside it: the version, and the hash of what it stands for.
const PEER_VERSION: &str = "proto/d_engine/v1/peer.version";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

/// Hash of what a protocol file says, whatever its comments and line breaks.
fn hash(text: &str) -> String {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let words: Vec<&str> = code.flat_map(str::split_whitespace).collect();
    format!("{:08x}", crc32c::crc32c(words.join(" ").as_bytes()))
}

#[test]
fn a_changed_peer_protocol_has_a_version_of_its_own() {
    let hash = hash(&fs::read_to_string(root().join(PEER_PROTO)).unwrap());
    let kept = fs::read_to_string(root().join(PEER_VERSION)).unwrap();
    let (version, kept) = kept.trim().split_once(' ').unwrap();
    assert_eq!(version, PEER_PROTOCOL_VERSION.to_string(), "{PEER_VERSION} is of another version: write the new hash");
    assert!(
        hash == kept,
        "{PEER_PROTO} changed since PEER_PROTOCOL_VERSION became {version}: if that version was released, raise it; \
         then write \"<version> {hash}\" to {PEER_VERSION}"
    );
}

#[test]
fn comments_are_no_part_of_the_protocol_and_fields_are() {
    let plain = hash("message A {\n  uint32 b = 1;\n}");
    assert_eq!(hash("// Of A.\nmessage A { uint32 b = 1; // b\n}"), plain);
    assert_ne!(hash("message A { uint32 b = 2; }"), plain);
    assert_ne!(hash("message A { uint64 b = 1; }"), plain);
}
