//! Extended headers of tar archives (POSIX pax) as GNU tar, bsdtar and star write them: their records,
//! and which of them are honoured, which may be ignored, and that any other refuses the archive. A
//! record that is neither would make the member something else than what was packed, in silence.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use crate::component::manifest::limit;

/// The longest extended header that is read: attributes, ACLs and maps of sparse files of one member.
pub const HEADER_BYTES_MAX: u64 = 16 << 20;
/// The longest map of a sparse file.
const SPARSE_RUNS_MAX: usize = 1 << 20;

/// Records that say nothing a component holds, and why.
const IGNORED: &[&str] = &[
    // Access and status times: a composed disk has its own (`compose/LAYOUT.md`). The creation time too.
    "atime",
    "ctime",
    "LIBARCHIVE.creationtime",
    // Where the member lay on the machine it was packed on.
    "SCHILY.dev",
    "SCHILY.ino",
    "SCHILY.nlink",
    // How the values are encoded: they are taken as bytes, whatever they are. What the content is in.
    "hdrcharset",
    "charset",
    // For people.
    "comment",
    "GNU.volume.label",
    "SCHILY.archtype",
    "SCHILY.release",
    // Whether a link was one to a file or a directory on Windows.
    "LIBARCHIVE.symlinktype",
];

/// Records of a global header that may stand for all members.
const GLOBAL: &[&str] = &["mtime", "uid", "gid", "uname", "gname"];

const XATTR: &str = "SCHILY.xattr.";
const XATTR_BSD: &str = "LIBARCHIVE.xattr.";
const SELINUX: &str = "RHT.security.selinux";
const ACL_ACCESS: &str = "SCHILY.acl.access";
const ACL_DEFAULT: &str = "SCHILY.acl.default";

/// What extended headers say of a member.
#[derive(Clone, Default, Debug)]
pub struct Extended {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size_bytes: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    /// Names only tell whom an ACL means; of an owner the id decides, as it does for a directory.
    pub uname: Option<Vec<u8>>,
    pub gname: Option<Vec<u8>>,
    pub mtime_s: Option<i64>,
    pub device: (Option<u32>, Option<u32>),
    /// As a program would set them.
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// In text form.
    pub acl_access: Option<Vec<u8>>,
    pub acl_default: Option<Vec<u8>>,
    pub sparse: Option<Sparse>,
}

/// A sparse file of GNU tar's formats 0.0, 0.1 and 1.0.
#[derive(Clone, Default, Debug)]
pub struct Sparse {
    major: u64,
    minor: u64,
    pub name: Option<Vec<u8>>,
    pub size_bytes: Option<u64>,
    count: Option<u64>,
    numbers: Vec<u64>,
}

impl Sparse {
    /// Whether the map precedes the content (format 1.0) instead of standing in the header.
    pub fn map_is_in_content(&self) -> bool {
        self.major == 1
    }

    /// The runs of data in the header: offset and length.
    pub fn runs(&self) -> Result<Vec<(u64, u64)>, String> {
        if !self.numbers.len().is_multiple_of(2)
            || self.count.is_some_and(|n| n != (self.numbers.len() / 2) as u64)
        {
            return Err("its map of a sparse file has not as many numbers as it says".into());
        }
        Ok(self.numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn push(&mut self, number: u64) -> Result<(), String> {
        if self.numbers.len() >= 2 * SPARSE_RUNS_MAX {
            return Err(too_many_runs());
        }
        self.numbers.push(number);
        Ok(())
    }
}

fn too_many_runs() -> String {
    format!("its map of a sparse file has more than {SPARSE_RUNS_MAX} runs")
}

/// The records of a header, each read by its own length: values may hold any byte.
pub fn records(mut bytes: &[u8]) -> Result<Vec<(&str, &[u8])>, String> {
    let bad = || "its extended header is malformed: make the archive again".to_owned();
    let mut out = Vec::new();
    while !bytes.is_empty() {
        // `25 ctime=1084839148.1212\n`: the number counts all of it.
        let space = bytes.iter().take(20).position(|b| *b == b' ').ok_or_else(bad)?;
        let length = usize::try_from(decimal(&bytes[..space]).ok_or_else(bad)?).map_err(|_| bad())?;
        if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &bytes[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        let key = str::from_utf8(&record[..equals])
            .map_err(|_| "its extended header has a key that is not UTF-8".to_owned())?;
        out.push((key, &record[equals + 1..]));
        bytes = &bytes[length..];
    }
    Ok(out)
}

impl Extended {
    /// Takes up the records of a member's own header, or of a global one, which goes before all.
    pub fn take(&mut self, bytes: &[u8], is_global: bool) -> Result<(), String> {
        for (key, value) in records(bytes)? {
            if IGNORED.contains(&key) {
                continue;
            }
            if is_global && !GLOBAL.contains(&key) {
                return Err(format!(
                    "a global header says '{}' of all members, which is not supported: make the archive \
                     without it",
                    key.escape_default()
                ));
            }
            self.record(key, value)
                .map_err(|reason| format!("its extended header, key '{}': {reason}", key.escape_default()))?;
        }
        Ok(())
    }

    fn record(&mut self, key: &str, value: &[u8]) -> Result<(), String> {
        // An empty value takes back what was said before.
        let is_empty = value.is_empty();
        let number = || decimal(value).ok_or_else(|| "is no number".to_owned());
        let optional = || if is_empty { Ok(None) } else { number().map(Some) };
        let small = || -> Result<Option<u32>, String> {
            optional()?.map(|n| n.try_into().map_err(|_| "is too large".to_owned())).transpose()
        };
        match key {
            "path" => self.path = (!is_empty).then(|| value.to_vec()),
            "linkpath" => self.link = (!is_empty).then(|| value.to_vec()),
            "size" => self.size_bytes = optional()?,
            "uid" => self.uid = optional()?,
            "gid" => self.gid = optional()?,
            "uname" => self.uname = (!is_empty).then(|| value.to_vec()),
            "gname" => self.gname = (!is_empty).then(|| value.to_vec()),
            "mtime" if is_empty => self.mtime_s = None,
            "mtime" => self.mtime_s = Some(seconds(value).ok_or("is no time")?),
            "SCHILY.devmajor" => self.device.0 = small()?,
            "SCHILY.devminor" => self.device.1 = small()?,
            ACL_ACCESS => self.acl_access = (!is_empty).then(|| value.to_vec()),
            ACL_DEFAULT => self.acl_default = (!is_empty).then(|| value.to_vec()),
            // The kernel keeps the context with its final NUL, tar without.
            SELINUX => self.xattr("security.selinux", [value, b"\0"].concat())?,
            _ if key.starts_with("GNU.sparse.") => self.sparse_record(key, value)?,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    // GNU tar writes the two bytes that a key cannot hold in this way.
                    let name = name.replace("%3D", "=").replace("%25", "%");
                    self.xattr(&name, value.to_vec())?;
                } else if let Some(name) = key.strip_prefix(XATTR_BSD) {
                    let text = value.trim_ascii();
                    let decoded = STANDARD_NO_PAD.decode(text).or_else(|_| STANDARD.decode(text));
                    let value = decoded.map_err(|_| "is no base64".to_owned())?;
                    self.xattr(&percent_decoded(name).ok_or("is no attribute name")?, value)?;
                } else {
                    return Err("is not supported, and what it changes would be lost: make the archive \
                                without it, for example with 'tar --format=gnu' or 'bsdtar --no-fflags', \
                                or import the directory itself"
                        .into());
                }
            }
        }
        Ok(())
    }

    /// bsdtar writes each attribute twice, in both encodings.
    fn xattr(&mut self, name: &str, value: Vec<u8>) -> Result<(), String> {
        if name.is_empty() || name.len() > 255 || name.contains('\0') {
            return Err("is no attribute name".into());
        }
        match self.xattrs.iter().find(|(n, _)| n == name) {
            Some((_, before)) if *before == value => {}
            // SELinux contexts come with their NUL or without.
            Some((_, before)) if name == "security.selinux" && without_nul(before) == without_nul(&value) => {
            }
            Some(_) => return Err("gives the attribute a second value".into()),
            None if self.xattrs.len() as u64 >= 2 * limit::XATTRS => {
                return Err("is one extended attribute too many".into());
            }
            None => self.xattrs.push((name.to_owned(), value)),
        }
        Ok(())
    }

    fn sparse_record(&mut self, key: &str, value: &[u8]) -> Result<(), String> {
        let number = || decimal(value).ok_or_else(|| "is no number".to_owned());
        let sparse = self.sparse.get_or_insert_default();
        match key {
            "GNU.sparse.major" => sparse.major = number()?,
            "GNU.sparse.minor" => sparse.minor = number()?,
            "GNU.sparse.name" => sparse.name = Some(value.to_vec()),
            "GNU.sparse.size" | "GNU.sparse.realsize" => sparse.size_bytes = Some(number()?),
            "GNU.sparse.numblocks" => sparse.count = Some(number()?),
            "GNU.sparse.offset" if sparse.numbers.len().is_multiple_of(2) => sparse.push(number()?)?,
            "GNU.sparse.numbytes" if !sparse.numbers.len().is_multiple_of(2) => sparse.push(number()?)?,
            "GNU.sparse.map" => {
                sparse.numbers.clear();
                for text in value.split(|b| *b == b',').filter(|_| !value.is_empty()) {
                    sparse.push(decimal(text).ok_or("is no map")?)?;
                }
            }
            _ => return Err("is not of a known format of sparse files".into()),
        }
        if !matches!((sparse.major, sparse.minor), (0 | 1, 0) | (0, 1)) {
            return Err("is a format of sparse files that is not known".into());
        }
        Ok(())
    }
}

/// The map at the beginning of a sparse member of format 1.0: a count, then offset and length of each
/// run, a line each. `next_line` gives the next line without its end.
pub fn map_of_content(
    next_line: &mut dyn FnMut() -> Result<Vec<u8>, String>,
) -> Result<Vec<(u64, u64)>, String> {
    let mut number =
        || decimal(&next_line()?).ok_or_else(|| "its map of a sparse file is malformed".to_owned());
    let count = number()?;
    if count > SPARSE_RUNS_MAX as u64 {
        return Err(too_many_runs());
    }
    let mut runs = Vec::new();
    for _ in 0..count {
        runs.push((number()?, number()?));
    }
    Ok(runs)
}

/// Digits only, no sign.
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

/// Whole seconds of a time such as `-1.5`, rounded down as file systems do.
fn seconds(text: &[u8]) -> Option<i64> {
    let text = str::from_utf8(text).ok()?;
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let whole = i64::try_from(decimal(whole.as_bytes())?).ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let is_between = fraction.bytes().any(|b| b != b'0');
    Some(sign * whole - i64::from(sign < 0 && is_between))
}

fn without_nul(value: &[u8]) -> &[u8] {
    value.strip_suffix(b"\0").unwrap_or(value)
}

fn percent_decoded(name: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut rest = name.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            out.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        out.push(u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn records_are_read_by_their_length() {
        let long = vec![b'\n'; 1000];
        let header =
            [record("path", b"a\nb"), record("SCHILY.xattr.user.x", b"\0=\n9 y=z\n"), record("k", &long)]
                .concat();
        let expected: Vec<(&str, &[u8])> =
            vec![("path", b"a\nb"), ("SCHILY.xattr.user.x", b"\0=\n9 y=z\n"), ("k", &long)];
        assert_eq!(records(&header).unwrap(), expected);
        // Any cut is an error or ends between two records; nothing panics.
        for n in 0..header.len() {
            let _ = records(&header[..n]);
        }
        for bad in [
            &b"5 a=\n"[..],
            b"99 a=b\n",
            b"6 a=b ",
            b"3 \n",
            b"x a=b\n",
            b" a=b\n",
            b"18446744073709551615 a=b\n",
        ] {
            assert!(records(bad).is_err() || bad == b"5 a=\n", "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn keys_are_honoured_ignored_or_refused() {
        let take = |key: &str, value: &[u8]| {
            let mut e = Extended::default();
            e.take(&record(key, value), false).map(|()| e)
        };
        assert_eq!(take("mtime", b"-1.5").unwrap().mtime_s, Some(-2));
        assert_eq!(take("mtime", b"-1.0").unwrap().mtime_s, Some(-1));
        assert_eq!(take("mtime", b"1735689600.999999999").unwrap().mtime_s, Some(1_735_689_600));
        assert_eq!(take("uid", b"70000").unwrap().uid, Some(70_000));
        let binary = take("SCHILY.xattr.security.capability", b"\x01\0\0\x02\n\0").unwrap();
        assert_eq!(binary.xattrs, [("security.capability".to_owned(), b"\x01\0\0\x02\n\0".to_vec())]);
        let bsd = take("LIBARCHIVE.xattr.user.a%3Db", b"AQoA").unwrap();
        assert_eq!(bsd.xattrs, [("user.a=b".to_owned(), vec![1, 10, 0])]);
        for ignored in IGNORED {
            take(ignored, b"x").unwrap();
        }
        for refused in [
            "SCHILY.fflags",
            "SCHILY.acl.ace",
            "GNU.dumpdir",
            "GNU.sparse.other",
            "VENDOR.key",
            "SCHILY.realsize",
        ] {
            let reason = take(refused, b"1").unwrap_err();
            assert!(reason.contains(refused), "{reason}");
        }
        for (key, value) in
            [("mtime", "x"), ("mtime", "1.x"), ("size", "-1"), ("uid", ""), ("GNU.sparse.major", "2")]
        {
            assert_eq!(take(key, value.as_bytes()).is_err(), !value.is_empty(), "{key} {value}");
        }
        let mut global = Extended::default();
        global.take(&[record("comment", b"0123abc"), record("mtime", b"5")].concat(), true).unwrap();
        assert_eq!(global.mtime_s, Some(5));
        assert!(global.take(&record("path", b"x"), true).unwrap_err().contains("'path'"));
    }

    #[test]
    fn an_attribute_in_both_encodings_is_one_and_must_not_differ() {
        let mut e = Extended::default();
        e.take(&record("SCHILY.xattr.user.a", &[1, 10, 0]), false).unwrap();
        e.take(&record("LIBARCHIVE.xattr.user.a", b"AQoA"), false).unwrap();
        assert_eq!(e.xattrs.len(), 1);
        assert!(e.take(&record("LIBARCHIVE.xattr.user.a", b"AQoB"), false).is_err());
    }
}
