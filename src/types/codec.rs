//! The canonical binary codec of every hashed or durable record.
//!
//! One value has one encoding: integers are fixed-width little endian or minimal LEB128 varints,
//! byte strings carry a varint length, and a reader refuses anything else, anything over its
//! bound, and anything left over. Nothing is allocated before its length was checked against
//! what is really there.

/// Why bytes are not the record they claim to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("truncated: {what} needs {need} bytes, {have} are left")]
    Truncated { what: &'static str, need: u64, have: u64 },
    #[error("{what} is {value}, more than the limit of {limit}")]
    TooLarge { what: &'static str, value: u64, limit: u64 },
    #[error("{what} is not canonical")]
    NotCanonical { what: &'static str },
    #[error("{what} has the unknown value {value}")]
    Unknown { what: &'static str, value: u64 },
    #[error("{count} bytes are left over after the record")]
    LeftOver { count: u64 },
    #[error("not a {expected}: the magic or version does not match")]
    Magic { expected: &'static str },
    #[error("{what}: {rule}")]
    Invalid { what: &'static str, rule: String },
}

/// Appends canonical bytes.
#[derive(Debug, Default, Clone)]
pub struct Writer {
    out: Vec<u8>,
}

impl Writer {
    pub fn new() -> Self {
        Self::default()
    }
    /// Starts a record with its magic, which includes the version.
    pub fn with_magic(magic: &[u8; 8]) -> Self {
        Self { out: magic.to_vec() }
    }
    pub fn into_bytes(self) -> Vec<u8> {
        self.out
    }
    pub fn u8(&mut self, v: u8) {
        self.out.push(v);
    }
    pub fn u32(&mut self, v: u32) {
        self.out.extend_from_slice(&v.to_le_bytes());
    }
    pub fn u64(&mut self, v: u64) {
        self.out.extend_from_slice(&v.to_le_bytes());
    }
    /// Minimal unsigned LEB128.
    pub fn varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.out.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.out.push(v as u8);
    }
    /// Zigzag, then LEB128.
    pub fn varint_signed(&mut self, v: i64) {
        self.varint(((v << 1) ^ (v >> 63)) as u64);
    }
    pub fn fixed(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.out.extend_from_slice(bytes);
    }
    pub fn str(&mut self, s: &str) {
        self.bytes(s.as_bytes());
    }
}

/// Reads canonical bytes, bounded.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
    /// Checks the magic a record starts with.
    pub fn with_magic(bytes: &'a [u8], magic: &[u8; 8], expected: &'static str) -> Result<Self, CodecError> {
        match bytes.strip_prefix(magic.as_slice()) {
            Some(rest) => Ok(Self { rest }),
            None => Err(CodecError::Magic { expected }),
        }
    }
    pub fn remaining_bytes(&self) -> usize {
        self.rest.len()
    }
    pub fn fixed(&mut self, what: &'static str, n: usize) -> Result<&'a [u8], CodecError> {
        if n > self.rest.len() {
            return Err(CodecError::Truncated { what, need: n as u64, have: self.rest.len() as u64 });
        }
        let (head, tail) = self.rest.split_at(n);
        self.rest = tail;
        Ok(head)
    }
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], CodecError> {
        let mut out = [0; N];
        out.copy_from_slice(self.fixed(what, N)?);
        Ok(out)
    }
    pub fn u8(&mut self, what: &'static str) -> Result<u8, CodecError> {
        Ok(self.fixed(what, 1)?[0])
    }
    pub fn u32(&mut self, what: &'static str) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }
    pub fn u64(&mut self, what: &'static str) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }
    pub fn varint(&mut self, what: &'static str) -> Result<u64, CodecError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(what)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(CodecError::NotCanonical { what });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                // A last byte of zero would be a second spelling of the same number.
                if byte == 0 && shift != 0 {
                    return Err(CodecError::NotCanonical { what });
                }
                return Ok(value);
            }
        }
        Err(CodecError::NotCanonical { what })
    }
    pub fn varint_signed(&mut self, what: &'static str) -> Result<i64, CodecError> {
        let v = self.varint(what)?;
        Ok((v >> 1) as i64 ^ -((v & 1) as i64))
    }
    /// A varint no larger than `limit`.
    pub fn bounded(&mut self, what: &'static str, limit: u64) -> Result<u64, CodecError> {
        let value = self.varint(what)?;
        if value > limit {
            return Err(CodecError::TooLarge { what, value, limit });
        }
        Ok(value)
    }
    /// A count of items that take at least `bytes_min_each` bytes: it can never exceed what is left.
    pub fn count(
        &mut self,
        what: &'static str,
        limit: u64,
        bytes_min_each: usize,
    ) -> Result<usize, CodecError> {
        let n = self.bounded(what, limit)?;
        let need = n.saturating_mul(bytes_min_each.max(1) as u64);
        if need > self.rest.len() as u64 {
            return Err(CodecError::Truncated { what, need, have: self.rest.len() as u64 });
        }
        Ok(n as usize)
    }
    pub fn bytes(&mut self, what: &'static str, limit: u64) -> Result<&'a [u8], CodecError> {
        let n = self.bounded(what, limit)?;
        self.fixed(what, n as usize)
    }
    pub fn str(&mut self, what: &'static str, limit: u64) -> Result<&'a str, CodecError> {
        std::str::from_utf8(self.bytes(what, limit)?)
            .map_err(|_| CodecError::Invalid { what, rule: "not UTF-8".into() })
    }
    /// The record must end here.
    pub fn end(self) -> Result<(), CodecError> {
        match self.rest.len() {
            0 => Ok(()),
            n => Err(CodecError::LeftOver { count: n as u64 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn varints_have_one_spelling(v: u64, s: i64) {
            let mut w = Writer::new();
            w.varint(v);
            w.varint_signed(s);
            let bytes = w.into_bytes();
            let mut r = Reader::new(&bytes);
            prop_assert_eq!(r.varint("v").unwrap(), v);
            prop_assert_eq!(r.varint_signed("s").unwrap(), s);
            r.end().unwrap();
        }

        #[test]
        fn any_varint_that_reads_writes_back_the_same(bytes in proptest::collection::vec(any::<u8>(), 1..12)) {
            let mut r = Reader::new(&bytes);
            if let Ok(v) = r.varint("v") {
                let mut w = Writer::new();
                w.varint(v);
                let n = bytes.len() - r.remaining_bytes();
                prop_assert_eq!(w.into_bytes(), &bytes[..n]);
            }
        }
    }

    #[test]
    fn a_length_that_lies_allocates_nothing() {
        let mut w = Writer::new();
        w.varint(u64::MAX);
        let bytes = w.into_bytes();
        assert!(matches!(Reader::new(&bytes).bytes("b", 1 << 20), Err(CodecError::TooLarge { .. })));
        assert!(matches!(Reader::new(&bytes).count("n", u64::MAX, 32), Err(CodecError::Truncated { .. })));
    }
}
