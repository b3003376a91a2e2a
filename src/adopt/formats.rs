//! What a disk's first bytes say of its format, and how QEMU's tools are told of one. Nothing here
//! guesses on behalf of QEMU: it is always given a format that was found or named before.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;

use crate::compose::ImageFormat;

use super::{AdoptError, VmDisk};

const HEAD_BYTES: usize = 512;
/// Bits of qcow2's incompatible features: the data lie in another file.
const QCOW2_EXTERNAL_DATA: u64 = 1 << 2;
/// Its counts of clusters are not up to date, as of a machine that crashed.
const QCOW2_DIRTY: u64 = 1;
/// Something went wrong in it, and whoever noticed wrote so.
const QCOW2_CORRUPT: u64 = 1 << 1;
/// Disk types of a VHD's footer.
const VHD_DIFFERENCING: u32 = 4;

/// The beginning of a file, and its last sector, which is where a fixed VHD says what it is.
pub struct Head {
    first: Vec<u8>,
    last: Vec<u8>,
}

impl Head {
    pub fn read(file: &File, len: u64) -> io::Result<Self> {
        let at = |offset: u64| {
            let mut bytes = vec![0; HEAD_BYTES.min((len - offset.min(len)) as usize)];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        };
        Ok(Self { first: at(0)?, last: at(len.saturating_sub(HEAD_BYTES as u64))? })
    }

    /// The format by magic; what bears none is raw.
    pub fn format(&self) -> ImageFormat {
        ImageFormat::ALL
            .into_iter()
            .find(|f| *f != ImageFormat::Raw && self.bears(*f))
            .unwrap_or(ImageFormat::Raw)
    }

    /// Whether this can be a file of that format.
    pub fn bears(&self, format: ImageFormat) -> bool {
        match format {
            ImageFormat::Raw => true,
            // The first version is another format, which QEMU calls qcow.
            ImageFormat::Qcow2 => self.first.starts_with(b"QFI\xfb") && self.be_u64(0) as u32 != 1,
            ImageFormat::Vmdk => self.first.starts_with(b"KDMV") || self.is_vmdk_descriptor(),
            ImageFormat::Vhdx => self.first.starts_with(b"vhdxfile"),
            ImageFormat::Vpc => self.first.starts_with(b"conectix") || self.last.starts_with(b"conectix"),
            ImageFormat::Vdi => self.first.get(64..68) == Some(&0xbeda_107f_u32.to_le_bytes()),
        }
    }

    /// Another file that this one would have QEMU read, as far as its first sector tells.
    pub fn refers_to(&self, format: ImageFormat) -> Option<&'static str> {
        match format {
            ImageFormat::Qcow2 if self.be_u64(8) != 0 => Some("a backing file"),
            ImageFormat::Qcow2
                if self.be_u64(0) as u32 >= 3 && self.be_u64(72) & QCOW2_EXTERNAL_DATA != 0 =>
            {
                Some("an external data file")
            }
            ImageFormat::Vmdk if self.is_vmdk_descriptor() => Some("the files that hold its data"),
            // Without a capacity the header is followed by a descriptor, which can name any file.
            ImageFormat::Vmdk if self.first.get(12..20) == Some(&[0; 8]) => {
                Some("the files that hold its data")
            }
            ImageFormat::Vpc => {
                let footer = if self.first.starts_with(b"conectix") { &self.first } else { &self.last };
                let kind = footer.get(60..64).map(|b| b.iter().fold(0, |n, b| n << 8 | u32::from(*b)));
                (kind == Some(VHD_DIFFERENCING)).then_some("a parent disk")
            }
            _ => None,
        }
    }

    /// Whether the file itself says that it is damaged.
    pub fn is_marked_corrupt(&self, format: ImageFormat) -> bool {
        format == ImageFormat::Qcow2 && self.be_u64(0) as u32 >= 3 && self.be_u64(72) & QCOW2_CORRUPT != 0
    }

    /// Whether it was not closed by whoever wrote it and is to be repaired before it is read.
    pub fn is_open(&self, format: ImageFormat) -> bool {
        format == ImageFormat::Qcow2 && self.be_u64(0) as u32 >= 3 && self.be_u64(72) & QCOW2_DIRTY != 0
    }

    fn is_vmdk_descriptor(&self) -> bool {
        self.first.starts_with(b"# Disk DescriptorFile")
    }

    /// Zero beyond the end.
    fn be_u64(&self, at: usize) -> u64 {
        (at..at + 8).fold(0, |n, i| n << 8 | u64::from(self.first.get(i).copied().unwrap_or(0)))
    }
}

/// A VM's disk for `qemu-img`, with the base we know it has: a disk file is not asked which other
/// file to read.
pub fn described(disk: &VmDisk) -> Result<String, AdoptError> {
    let text = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| AdoptError::NotADisk {
            path: path.to_owned(),
            reason: "its path is not UTF-8".into(),
        })
    };
    let file = |path: &Path| Ok::<_, AdoptError>(json!({"driver": "file", "filename": text(path)?}));
    let described = match disk {
        VmDisk::Root { overlay, base } => json!({
            "driver": "qcow2",
            "file": file(overlay)?,
            "backing": {"driver": "raw", "file": file(base)?},
        }),
        VmDisk::UserData(path) => json!({"driver": "raw", "file": file(path)?}),
    };
    Ok(format!("json:{described}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(first: &[u8]) -> Head {
        Head { first: first.to_vec(), last: vec![0; HEAD_BYTES] }
    }

    #[test]
    fn formats_are_told_by_their_magic_alone() {
        let mut vdi = [0; 512];
        vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        let fixed = Head { first: vec![0; 512], last: b"conectix".to_vec() };
        for (head, format) in [
            (head(b"QFI\xfb\0\0\0\x03"), ImageFormat::Qcow2),
            (head(b"KDMV\x01"), ImageFormat::Vmdk),
            (head(b"# Disk DescriptorFile\n"), ImageFormat::Vmdk),
            (head(b"vhdxfile"), ImageFormat::Vhdx),
            (head(b"conectix"), ImageFormat::Vpc),
            (fixed, ImageFormat::Vpc),
            (head(&vdi), ImageFormat::Vdi),
            (head(b"QFI"), ImageFormat::Raw),
            (head(b""), ImageFormat::Raw),
        ] {
            assert_eq!(head.format(), format);
        }
    }

    #[test]
    fn what_names_other_files_is_told() {
        let mut qcow2 = vec![0; 112];
        qcow2[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        assert_eq!(head(&qcow2).refers_to(ImageFormat::Qcow2), None);
        qcow2[79] = 4;
        assert_eq!(head(&qcow2).refers_to(ImageFormat::Qcow2), Some("an external data file"));
        qcow2[15] = 200;
        assert_eq!(head(&qcow2).refers_to(ImageFormat::Qcow2), Some("a backing file"));
        let mut vmdk = vec![0; 512];
        vmdk[..4].copy_from_slice(b"KDMV");
        assert!(head(&vmdk).refers_to(ImageFormat::Vmdk).is_some());
        vmdk[13] = 1;
        assert_eq!(head(&vmdk).refers_to(ImageFormat::Vmdk), None);
        assert!(head(b"# Disk DescriptorFile").refers_to(ImageFormat::Vmdk).is_some());
        let mut vhd = vec![0; 512];
        vhd[..8].copy_from_slice(b"conectix");
        vhd[63] = 3;
        assert_eq!(head(&vhd).refers_to(ImageFormat::Vpc), None);
        vhd[63] = 4;
        assert!(head(&vhd).refers_to(ImageFormat::Vpc).is_some());
    }
}
