//! Ad-hoc commands (XEP-0050), as far as a server's own are run.

use xmpp_parsers::data_forms::DataForm;
use xmpp_parsers::iq::{IqResultPayload, IqSetPayload};
use xso::{AsXml, FromXml};

use super::ns;

#[derive(FromXml, AsXml, Debug, Clone, PartialEq)]
#[xml(namespace = ns::COMMANDS, name = "command")]
pub struct Command {
    #[xml(attribute)]
    pub node: String,
    /// `execute` or `complete`, in a request.
    #[xml(attribute(default))]
    pub action: Option<String>,
    /// `executing`, `completed` or `canceled`, in an answer.
    #[xml(attribute(default))]
    pub status: Option<String>,
    #[xml(attribute(default, name = "sessionid"))]
    pub session_id: Option<String>,
    #[xml(child(default))]
    pub form: Option<DataForm>,
    #[xml(child(n = ..))]
    pub notes: Vec<Note>,
}

impl IqSetPayload for Command {}
impl IqResultPayload for Command {}

/// What went wrong comes as a note too, in an answer like any other.
#[derive(FromXml, AsXml, Debug, Clone, PartialEq)]
#[xml(namespace = ns::COMMANDS, name = "note")]
pub struct Note {
    /// `info`, `warn` or `error`.
    #[xml(attribute(name = "type", default))]
    pub kind: Option<String>,
    #[xml(text)]
    pub text: String,
}

impl Command {
    pub fn execute(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            action: Some("execute".into()),
            status: None,
            session_id: None,
            form: None,
            notes: Vec::new(),
        }
    }

    /// The filled form of the command that this answer belongs to.
    pub fn complete(self, form: DataForm) -> Self {
        Self { action: Some("complete".into()), status: None, form: Some(form), notes: Vec::new(), ..self }
    }

    pub fn succeeded(&self) -> bool {
        let failed = self.notes.iter().any(|note| note.kind.as_deref() == Some("error"));
        self.status.as_deref() == Some("completed") && !failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::data_forms::DataFormType;
    use xmpp_parsers::minidom::Element;

    fn answer(text: &str) -> Command {
        let text = text.replace("<command", "<command xmlns='http://jabber.org/protocol/commands'");
        Command::try_from(text.parse::<Element>().unwrap()).unwrap()
    }

    #[test]
    fn a_command_goes_on_in_its_session_and_an_error_is_one_though_it_completed() {
        let begun = answer(
            "<command node='n' status='executing' sessionid='7'><actions execute='complete'><next/></actions>\
             <x xmlns='jabber:x:data' type='form'><field var='a'><required/></field></x></command>",
        );
        let filled = Element::from(begun.complete(DataForm::new(DataFormType::Submit, "f", Vec::new())));
        assert_eq!((filled.attr("sessionid"), filled.attr("action")), (Some("7"), Some("complete")));
        assert!(
            answer("<command node='n' status='completed'><note type='info'>ok</note></command>").succeeded()
        );
        assert!(
            !answer("<command node='n' status='completed'><note type='error'>no</note></command>")
                .succeeded()
        );
        assert!(!answer("<command node='n' status='canceled'/>").succeeded());
    }
}
