//! Definitions as they lie on disk: the TOML and the files it includes, read once, and the order in
//! which they are built.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::BuildError;
use crate::component::Kind;
use crate::component::definition::Definition;
use crate::types::Hash;

/// A definition with everything it includes.
#[derive(Debug)]
pub struct Source {
    pub path: PathBuf,
    pub definition: Definition,
    text: String,
    included: BTreeMap<String, Vec<u8>>,
}

const INCLUDED_BYTES_MAX: u64 = 64 << 20;

impl Source {
    pub fn read(path: &Path) -> Result<Self, BuildError> {
        let text = fs::read_to_string(path).map_err(BuildError::read(path))?;
        let definition = Definition::parse(&text)
            .map_err(|source| BuildError::Definition { path: path.to_owned(), source })?;
        let dir = path.parent().unwrap_or(Path::new(""));
        let names = definition.files.iter().filter_map(|f| f.source.as_ref());
        let names = names.chain(definition.initrd.as_ref().map(|i| &i.init));
        let mut included = BTreeMap::new();
        for name in names {
            let file = dir.join(name);
            let size_bytes = fs::metadata(&file).map_err(BuildError::read(&file))?.len();
            if size_bytes > INCLUDED_BYTES_MAX {
                return Err(BuildError::TooMuch { what: "bytes", object: file.display().to_string() });
            }
            included.insert(name.clone(), fs::read(&file).map_err(BuildError::read(&file))?);
        }
        Ok(Self { path: path.to_owned(), definition, text, included })
    }

    /// The bytes of an included file.
    pub fn included(&self, name: &str) -> Result<&[u8], BuildError> {
        self.included.get(name).map(Vec::as_slice).ok_or_else(|| BuildError::Read {
            path: self.path.with_file_name(name),
            source: std::io::ErrorKind::NotFound.into(),
        })
    }

    /// Changes when anything a build depends on does, as far as the definition says it.
    pub fn hash(&self) -> Hash {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(self.text.as_bytes());
        for (name, content) in &self.included {
            add(name.as_bytes());
            add(content);
        }
        hasher.finalize().into()
    }
}

/// Reads the definitions and puts each OS before what is built on it.
pub fn read_in_order(paths: &[PathBuf]) -> Result<Vec<Source>, BuildError> {
    let mut sources: Vec<Source> = Vec::new();
    for path in paths {
        let source = Source::read(path)?;
        if let Some(other) = sources.iter().find(|s| s.definition.name == source.definition.name) {
            return Err(BuildError::DefinedTwice {
                name: source.definition.name.clone(),
                first: other.path.clone(),
                second: source.path,
            });
        }
        sources.push(source);
    }
    for source in &sources {
        let Some(os) = &source.definition.os else { continue };
        if let Some(other) = sources.iter().map(|s| &s.definition).find(|d| d.name == *os)
            && other.kind != Kind::Os
        {
            return Err(BuildError::OsOfOtherKind {
                component: source.definition.name.clone(),
                os: os.clone(),
                kind: other.kind.to_string(),
            });
        }
    }
    // An OS is built on nothing, so one level of order is enough; otherwise as given.
    sources.sort_by_key(|s| s.definition.kind != Kind::Os);
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(dir: &Path, name: &str, kind: &str, os: Option<&str>) -> PathBuf {
        let path = dir.join(format!("{name}.toml"));
        let os = os.map(|o| format!("os = \"{o}\"\n")).unwrap_or_default();
        let text = format!(
            "name = \"{name}\"\nkind = \"{kind}\"\nversion = \"1\"\norigin = \"test\"\nmethod = \"unpack\"\n{os}"
        );
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn an_os_comes_before_what_is_built_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let program = definition(dir.path(), "redis", "program", Some("debian"));
        let os = definition(dir.path(), "debian", "os", None);
        let order = read_in_order(&[program.clone(), os]).unwrap();
        assert_eq!(order.iter().map(|s| s.definition.name.as_str()).collect::<Vec<_>>(), ["debian", "redis"]);
        let twice = read_in_order(&[program.clone(), program.clone()]).unwrap_err();
        assert!(twice.to_string().contains("redis"), "{twice}");
        let other = definition(dir.path(), "nginx", "program", Some("redis"));
        let error = read_in_order(&[program, other]).unwrap_err();
        assert!(matches!(error, BuildError::OsOfOtherKind { .. }), "{error}");
    }

    #[test]
    fn the_hash_covers_included_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = definition(dir.path(), "tiny", "os", None);
        let mut text = fs::read_to_string(&path).unwrap();
        text += "[[file]]\npath = \"init\"\nsource = \"init.sh\"\n";
        fs::write(&path, text).unwrap();
        assert!(Source::read(&path).is_err(), "an included file is missing");
        fs::write(dir.path().join("init.sh"), "one").unwrap();
        let first = Source::read(&path).unwrap().hash();
        fs::write(dir.path().join("init.sh"), "two").unwrap();
        assert_ne!(Source::read(&path).unwrap().hash(), first);
    }
}
