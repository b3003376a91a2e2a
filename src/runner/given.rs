//! Files that whoever asked for something opened by their own rights and handed over with the request. The
//! broker reads and writes them where it could not even see them: it runs as another user, and its service
//! sees little of the machine. Their paths are for messages.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::OFlags;

use crate::compose::Output;
use crate::interface::{FileUse, Problem, ProblemKind, Request};

/// The files of one request; without any the broker opens their paths itself.
#[derive(Default, Debug)]
pub struct Given(Vec<(String, File)>);

impl Given {
    /// Takes what came with a request: a descriptor for each of its files in their order, or none at all.
    pub fn with(request: &Request, descriptors: Vec<OwnedFd>) -> Result<Self, Problem> {
        if descriptors.is_empty() {
            return Ok(Self::default());
        }
        let bad = |reason: String| Problem::new(ProblemKind::BadRequest, "request", reason);
        let files = request.files();
        if files.len() != descriptors.len() {
            let (came, named) = (descriptors.len(), files.len());
            return Err(bad(format!("{came} descriptors came with it, and it names {named} files")));
        }
        let pairs = files.into_iter().zip(descriptors).map(|((path, file_use), descriptor)| {
            let flags = rustix::fs::fcntl_getfl(&descriptor).map_err(|e| bad(format!("{path}: {e}")))?;
            let (mode, refused) = (flags & OFlags::RWMODE, flags.contains(OFlags::PATH));
            let fits = match file_use {
                FileUse::Read => mode == OFlags::RDONLY || mode == OFlags::RDWR,
                FileUse::Write => mode == OFlags::WRONLY || mode == OFlags::RDWR,
            };
            match fits && !refused {
                true => Ok((path.to_owned(), File::from(descriptor))),
                false => Err(bad(format!("{path} was handed over, but not opened for what is asked"))),
            }
        });
        pairs.collect::<Result<_, _>>().map(Self)
    }

    /// What was handed over for a path that the request names.
    pub fn file(&self, path: &str) -> Option<&File> {
        self.0.iter().find(|(name, _)| name == path).map(|(_, file)| file)
    }

    /// Where to write what is to lie at a path.
    pub fn output<'a>(&'a self, path: &'a str) -> Output<'a> {
        match self.file(path) {
            Some(file) => Output::Given(Path::new(path), file),
            None => Output::New(Path::new(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::{CloudRequest, VmRequest};

    fn export(output: &str) -> Request {
        let output = output.into();
        Request::Vm(VmRequest::Export { vm: "web".into(), output, format: "raw".into(), user_data: false })
    }

    #[test]
    fn a_file_is_taken_for_the_use_it_was_opened_for_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (read, write) = (File::open(file.path()).unwrap(), file.reopen().unwrap());
        let given = Given::with(&export("/x"), vec![write.into()]).unwrap();
        assert!(given.file("/x").is_some() && given.file("/y").is_none());
        let path =
            File::from(rustix::fs::open(file.path(), OFlags::PATH, rustix::fs::Mode::empty()).unwrap());
        for other in [read, path] {
            let refused = Given::with(&export("/x"), vec![other.into()]).unwrap_err();
            assert_eq!(refused.kind, ProblemKind::BadRequest);
        }
    }

    #[test]
    fn there_is_one_for_each_file_or_none() {
        assert!(Given::with(&export("/x"), Vec::new()).unwrap().file("/x").is_none());
        let some = || OwnedFd::from(tempfile::tempfile().unwrap());
        for (request, descriptors) in
            [(export("/x"), vec![some(), some()]), (Request::Cloud(CloudRequest::Status), vec![some()])]
        {
            assert!(Given::with(&request, descriptors).is_err());
        }
    }
}
