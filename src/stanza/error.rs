//! Stanza errors (RFC 6120, section 8.3) as this protocol uses them.

use xmpp_parsers::minidom::Element;
use xmpp_parsers::stanza_error::{DefinedCondition, ErrorType, StanzaError};

use crate::types::PeerText;

/// An error to answer with. Its type, which tells the sender whether to ask again, follows from
/// the condition.
pub fn refusal(condition: DefinedCondition, text: &str) -> StanzaError {
    let kind = match condition {
        DefinedCondition::Forbidden => ErrorType::Auth,
        DefinedCondition::BadRequest | DefinedCondition::PolicyViolation => ErrorType::Modify,
        DefinedCondition::ResourceConstraint | DefinedCondition::RecipientUnavailable => ErrorType::Wait,
        _ => ErrorType::Cancel,
    };
    StanzaError::new(kind, condition, "en", text)
}

/// The name of the condition an error element holds, such as `forbidden`.
pub fn condition_in(error: &Element) -> Option<&str> {
    error.children().map(Element::name).find(|name| *name != "text")
}

/// The name of the condition of a parsed error.
pub fn condition_name(error: &StanzaError) -> PeerText {
    let element = Element::from(error.clone());
    condition_in(&element).unwrap_or("undefined-condition").into()
}

/// What the other side said in words.
pub fn text_of(error: &StanzaError) -> PeerText {
    error.texts.values().next().map(PeerText::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_have_their_names_and_texts_their_limits() {
        let e = refusal(DefinedCondition::ResourceConstraint, &format!("a\n{}", "b".repeat(900)));
        assert_eq!((condition_name(&e).as_str(), e.type_.clone()), ("resource-constraint", ErrorType::Wait));
        assert_eq!(text_of(&e).chars().count(), crate::types::text::TEXT_CHARS_MAX);
        assert!(!text_of(&e).contains('\n'));
        let element: Element = "<error xmlns='jabber:client' type='auth'><text xmlns='x'>t</text>\
                                <forbidden xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
            .parse()
            .unwrap();
        assert_eq!(condition_in(&element), Some("forbidden"));
    }
}
