//! The recipe: which components, composed how, give which disk. Its hash names the composition.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{ComponentId, Hash, ImageDigest, RecipeId};

/// Magic and version of an encoded recipe.
pub const MAGIC: &[u8; 8] = b"CICREC\x00\x01";
pub const COMPONENTS_MAX: u64 = 10_000;
pub const COMMAND_LINE_BYTES_MAX: u64 = 2048;
pub const VIRTUAL_SIZE_BYTES_MAX: u64 = 1 << 44;

/// A disk follows from a recipe and nothing else: any broker that holds the components makes the
/// same image, and `image_digest` says which.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recipe {
    /// The composer whose layout bytes these are, name and version. A broker with another composer
    /// refuses the recipe instead of making another disk.
    pub composer: String,
    /// In the order they were stated: where two claim a path, the later wins only if `ordered`.
    pub components: Vec<ComponentId>,
    /// Whether the order of `components` settles conflicts between them.
    pub ordered: bool,
    pub disk: DiskParameters,
    pub image_digest: ImageDigest,
}

/// All that shapes the disk beside its files.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskParameters {
    /// A multiple of 1 MiB.
    pub virtual_size_bytes: u64,
    /// The EFI system partition's size, a multiple of 1 MiB.
    pub esp_size_bytes: u64,
    pub disk_guid: Uuid,
    pub esp_guid: Uuid,
    pub root_guid: Uuid,
    pub filesystem_uuid: Uuid,
    pub hash_seed: Uuid,
    /// Creation time of the file system, seconds since 1970.
    pub epoch_s: i64,
    /// Appended to `root=…` by the boot loader configuration.
    pub kernel_command_line: String,
}

impl DiskParameters {
    /// Parameters that follow from the components alone, so equal sets give equal disks whoever
    /// composes them.
    pub fn derived(
        components: &[ComponentId],
        virtual_size_bytes: u64,
        esp_size_bytes: u64,
        kernel_command_line: &str,
    ) -> Self {
        let mut seed = Vec::new();
        components.iter().for_each(|c| seed.extend_from_slice(c.as_bytes()));
        seed.extend_from_slice(&virtual_size_bytes.to_le_bytes());
        seed.extend_from_slice(&esp_size_bytes.to_le_bytes());
        seed.extend_from_slice(kernel_command_line.as_bytes());
        let uuid = |role: &str| {
            let h = Hash::of(&[role.as_bytes(), &seed].concat());
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&h.as_bytes()[..16]);
            uuid::Builder::from_random_bytes(bytes).into_uuid()
        };
        Self {
            virtual_size_bytes,
            esp_size_bytes,
            disk_guid: uuid("disk"),
            esp_guid: uuid("esp"),
            root_guid: uuid("root"),
            filesystem_uuid: uuid("filesystem"),
            hash_seed: uuid("hash seed"),
            epoch_s: EPOCH_S,
            kernel_command_line: kernel_command_line.to_owned(),
        }
    }
}

/// The fixed time of everything that is built or composed: 2023-11-14T22:13:20Z.
pub const EPOCH_S: i64 = 1_700_000_000;

impl Recipe {
    pub fn id(&self) -> RecipeId {
        RecipeId::of(&self.encode())
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_magic(MAGIC);
        w.str(&self.composer);
        w.varint(self.components.len() as u64);
        self.components.iter().for_each(|c| w.fixed(c.as_bytes()));
        w.u8(self.ordered.into());
        let d = &self.disk;
        w.u64(d.virtual_size_bytes);
        w.u64(d.esp_size_bytes);
        for id in [d.disk_guid, d.esp_guid, d.root_guid, d.filesystem_uuid, d.hash_seed] {
            w.fixed(id.as_bytes());
        }
        w.varint_signed(d.epoch_s);
        w.str(&d.kernel_command_line);
        w.fixed(self.image_digest.as_bytes());
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader::with_magic(bytes, MAGIC, "recipe of version 1")?;
        let composer = r.str("composer", 100)?.to_owned();
        let n = r.count("components", COMPONENTS_MAX, 32)?;
        let mut components = Vec::with_capacity(n);
        for _ in 0..n {
            components.push(ComponentId::from_bytes(r.array("component id")?));
        }
        let ordered = match r.u8("ordered")? {
            0 => false,
            1 => true,
            v => return Err(CodecError::Unknown { what: "ordered", value: v.into() }),
        };
        let sizes = [r.u64("virtual size")?, r.u64("system partition size")?];
        if sizes[0] > VIRTUAL_SIZE_BYTES_MAX
            || sizes[1] > sizes[0]
            || sizes.iter().any(|s| s % (1 << 20) != 0)
        {
            return Err(CodecError::Invalid {
                what: "disk size",
                rule: "a multiple of 1 MiB up to 16 TiB that holds the system partition".into(),
            });
        }
        let mut uuid = || Ok::<_, CodecError>(Uuid::from_bytes(r.array("uuid")?));
        let ids = [uuid()?, uuid()?, uuid()?, uuid()?, uuid()?];
        let epoch_s = r.varint_signed("epoch")?;
        let kernel_command_line = r.str("kernel command line", COMMAND_LINE_BYTES_MAX)?.to_owned();
        if kernel_command_line.chars().any(char::is_control) {
            return Err(CodecError::Invalid {
                what: "kernel command line",
                rule: "control characters".into(),
            });
        }
        let image_digest = ImageDigest::from_bytes(r.array("image digest")?);
        r.end()?;
        Ok(Self {
            composer,
            components,
            ordered,
            disk: DiskParameters {
                virtual_size_bytes: sizes[0],
                esp_size_bytes: sizes[1],
                disk_guid: ids[0],
                esp_guid: ids[1],
                root_guid: ids[2],
                filesystem_uuid: ids[3],
                hash_seed: ids[4],
                epoch_s,
                kernel_command_line,
            },
            image_digest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_and_decodes_to_itself() {
        let components = vec![ComponentId::of(b"a"), ComponentId::of(b"b")];
        let disk = DiskParameters::derived(&components, 2 << 30, 32 << 20, "console=ttyS0");
        let recipe = Recipe {
            composer: "cicada-ext4/1".into(),
            components,
            ordered: false,
            disk,
            image_digest: ImageDigest::of(b"i"),
        };
        let bytes = recipe.encode();
        assert_eq!(Recipe::decode(&bytes).unwrap(), recipe);
        for n in 0..bytes.len() {
            assert!(Recipe::decode(&bytes[..n]).is_err(), "{n}");
        }
    }
}
