//! What is wrong with a configuration, as an operator is told.

use std::io;

use crate::interface::{Problem, ProblemKind};

use super::ConfigError;

impl Problem {
    /// What is wrong with a configuration, with the class an operator acts on.
    pub fn from_config(e: &ConfigError) -> Self {
        let kind = match e {
            ConfigError::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ProblemKind::Forbidden
            }
            ConfigError::NotFound { .. } | ConfigError::Read { .. } => ProblemKind::Missing,
            ConfigError::Exposed { .. } | ConfigError::Replaceable { .. } => ProblemKind::Forbidden,
            ConfigError::Write { .. } => ProblemKind::Failed,
            ConfigError::Syntax { .. } | ConfigError::Field { .. } | ConfigError::Secret { .. } => {
                ProblemKind::BadRequest
            }
        };
        Self::from_error(kind, e.object(), e).next(e.next_step())
    }
}
