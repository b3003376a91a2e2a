//! Bytes as lower-case hex digits: one spelling, both ways.

/// Two digits for each byte.
pub fn encode(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes that [`encode`] makes this text of; `None` if there are none. Signs and capitals, which
/// Rust's own parser takes, are another spelling of the same bytes and refused.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let digit = |b: &u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_spelling() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&bytes)), Some(bytes));
        assert_eq!(decode(""), Some(vec![]));
        for bad in ["0", "+1", "-1", "0A", "g0", " 1", "0x", "é"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }
}
