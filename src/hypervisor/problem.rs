//! What a hypervisor did not do, as an operator is told.

use crate::interface::{Problem, ProblemKind};

use super::DriverError;

impl Problem {
    /// What a hypervisor did not do for VM `name`.
    pub fn from_driver(name: &str, e: &DriverError) -> Self {
        use DriverError as E;
        let (kind, next) = match e {
            E::UnknownVm { .. } => (ProblemKind::NotFound, "see 'cicada vm list'".to_owned()),
            E::WrongState { .. } | E::Differs { .. } | E::ConsoleBusy { .. } => {
                (ProblemKind::Conflict, format!("see 'cicada vm show {name}'"))
            }
            E::DiskInUse { .. } => {
                (ProblemKind::Conflict, "find who uses it with 'fuser', and end that first".into())
            }
            E::FirmwareVars { .. } => (ProblemKind::Conflict, String::new()),
            E::NotOffered { .. } => {
                (ProblemKind::Refused, "see 'cicada status' and the section [hypervisor]".into())
            }
            E::BadSpec { .. } | E::PathNotUtf8 { .. } => (ProblemKind::BadRequest, String::new()),
            // As every wait for something that did not come in time.
            E::Timeout { verb: "stopped", .. } => (
                ProblemKind::Refused,
                format!(
                    "shut it down from within, give it longer with --timeout, or switch it off: cicada vm stop {name} \
                     --force"
                ),
            ),
            E::MissingTool { .. } | E::Lacks(_) | E::NoBridge { .. } => (ProblemKind::Missing, String::new()),
            _ => (ProblemKind::Failed, String::new()),
        };
        let problem = Self::from_error(kind, format!("VM {name}"), e);
        if next.is_empty() { problem } else { problem.next(next) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::types::VmId;
    use crate::vm::PowerState;

    #[test]
    fn a_guest_that_ignores_its_shutdown_is_told_with_what_to_do() {
        let timeout = |verb| DriverError::Timeout {
            vm: VmId::random(),
            verb,
            state: PowerState::Running,
            after: Duration::from_secs(2),
            next_step: "",
        };
        let problem = Problem::from_driver("web", &timeout("stopped"));
        assert_eq!(problem.kind.exit_code(), 5);
        assert!(problem.next_step.contains("cicada vm stop web --force"), "{}", problem.next_step);
        assert_eq!(Problem::from_driver("web", &timeout("started")).kind, ProblemKind::Failed);
    }
}
