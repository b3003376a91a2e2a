//! The carriage of sealed negotiation messages; `migration/PROTOCOL.md` says what is inside.

use xmpp_parsers::iq::{IqResultPayload, IqSetPayload};
use xso::{AsXml, FromXml};

use super::ns;

#[derive(FromXml, AsXml, Debug, Clone, PartialEq)]
#[xml(namespace = ns::NEGOTIATION, name = "request")]
pub struct Request {
    #[xml(text = xso::text::Base64)]
    pub sealed: Vec<u8>,
}

impl IqSetPayload for Request {}

#[derive(FromXml, AsXml, Debug, Clone, PartialEq)]
#[xml(namespace = ns::NEGOTIATION, name = "answer")]
pub struct Answer {
    #[xml(text = xso::text::Base64)]
    pub sealed: Vec<u8>,
}

impl IqResultPayload for Answer {}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::minidom::Element;

    #[test]
    fn carries_bytes() {
        let request = Request { sealed: (0..=255).collect() };
        let element = Element::from(request.clone());
        assert!(element.is("request", ns::NEGOTIATION));
        assert_eq!(Request::try_from(element).unwrap(), request);
        let bad: Element = "<request xmlns='urn:cicada:negotiation:1'>!</request>".parse().unwrap();
        assert!(Request::try_from(bad).is_err());
        let later: Element =
            "<answer xmlns='urn:cicada:negotiation:1' v='2'>AAE=<later xmlns='urn:x'/></answer>"
                .parse()
                .unwrap();
        assert_eq!(Answer::try_from(later).unwrap().sealed, [0, 1]);
    }
}
