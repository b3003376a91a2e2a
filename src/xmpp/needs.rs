//! What a federation needs of its room: how a room shows that it has it, and what its owner sets to get it.

use std::fmt;

use xmpp_parsers::data_forms::{DataForm, Field, FieldType};
use xmpp_parsers::disco::DiscoInfoResult;

/// What a room may lack. The order is that of weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    MembersOnly,
    RealAddresses,
    NoPassword,
    Persistent,
    NoInvites,
    Hidden,
}

/// Each need with the feature that shows that it is met, and the one that shows that it is not (XEP-0045,
/// section 6.4).
const SHOWN: [(Need, &str, &str); 5] = [
    (Need::MembersOnly, "muc_membersonly", "muc_open"),
    (Need::RealAddresses, "muc_nonanonymous", "muc_semianonymous"),
    (Need::NoPassword, "muc_unsecured", "muc_passwordprotected"),
    (Need::Persistent, "muc_persistent", "muc_temporary"),
    (Need::Hidden, "muc_hidden", "muc_public"),
];

/// Who may invite: everybody in the room, or its members. In a members-only room an invitation makes a member.
const INVITES: [&str; 2] =
    ["muc#roomconfig_allowinvites", "{http://prosody.im/protocol/muc}roomconfig_allowmemberinvites"];

impl Need {
    /// Whether a room without it must not be entered: outsiders could listen, members could hide, or nobody
    /// gets in. The others are told, and mended by `cicada federation create`.
    pub fn is_vital(self) -> bool {
        matches!(self, Self::MembersOnly | Self::RealAddresses | Self::NoPassword)
    }

    /// What a room without it is.
    pub fn lacking(self) -> &'static str {
        match self {
            Self::MembersOnly => "not members-only",
            Self::RealAddresses => "anonymous",
            Self::NoPassword => "closed by a password, and brokers have none",
            Self::Persistent => {
                "temporary: when the last leaves it is gone, its list of members too, and others may make it anew"
            }
            Self::NoInvites => "one whose members may let others in",
            Self::Hidden => "listed for everybody to see",
        }
    }
}

/// What a room lacks, by its own account.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lacks(Vec<Need>);

impl Lacks {
    pub fn of(room: &DiscoInfoResult) -> Self {
        let has = |feature: &str| room.features.contains(feature);
        // What must be there is missing unless it is said to be; of the rest only what is said counts.
        let shown = SHOWN.into_iter().filter(|(need, met, unmet)| match need {
            Need::MembersOnly | Need::RealAddresses => !has(met),
            _ => has(unmet),
        });
        let mut lacks: Vec<_> = shown.map(|(need, ..)| need).collect();
        let told = room.extensions.iter().flat_map(|form| &form.fields);
        if told.filter(|field| is_yes(field)).any(|f| f.var.as_deref().is_some_and(|v| INVITES.contains(&v)))
        {
            lacks.push(Need::NoInvites);
        }
        lacks.sort();
        Self(lacks)
    }

    /// Why the room must not be used; `None` if it may.
    pub fn fault(&self) -> Option<String> {
        let words: Vec<_> = self.0.iter().filter(|n| n.is_vital()).map(|n| n.lacking()).collect();
        (!words.is_empty()).then(|| format!("the room is {}", words.join(" and ")))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What may be borne.
    pub fn flaws(&self) -> impl Iterator<Item = Need> + '_ {
        self.0.iter().copied().filter(|need| !need.is_vital())
    }
}

impl fmt::Display for Lacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> = self.0.iter().map(|n| n.lacking()).collect();
        write!(f, "the room is {}", words.join(", and "))
    }
}

fn is_yes(field: &Field) -> bool {
    field.values.first().is_some_and(|v| matches!(v.as_str(), "1" | "true"))
}

/// Options of a federation's room. Those that are not always sent have no name that all servers share, or no
/// meaning everywhere, and are set where the room offers them.
const OPTIONS: &[(&str, &[&str], bool)] = &[
    ("muc#roomconfig_membersonly", &["1"], true),
    ("muc#roomconfig_whois", &["anyone"], true),
    ("muc#roomconfig_persistentroom", &["1"], true),
    ("muc#roomconfig_publicroom", &["0"], false),
    (INVITES[0], &["0"], false),
    (INVITES[1], &["0"], false),
    ("muc#roomconfig_changesubject", &["0"], false),
    ("muc#roomconfig_historylength", &["0"], false),
    ("muc#roomconfig_passwordprotectedroom", &["0"], false),
    ("muc#roomconfig_roomsecret", &[""], false),
    // Members that are not shown to each other are no federation.
    ("muc#roomconfig_presencebroadcast", &["visitor", "participant", "moderator"], false),
    // ejabberd: sending all that is said to accounts that are not there, and showing who is.
    ("allow_subscription", &["0"], false),
    ("public_list", &["0"], false),
];
const NAME: &str = "muc#roomconfig_roomname";
const USERS_MAX: &str = "muc#roomconfig_maxusers";

/// What to set in a room that offers these options.
pub fn settings(name: &str, offered: &DataForm) -> Vec<Field> {
    let field_of = |var: &str| offered.fields.iter().find(|f| f.var.as_deref() == Some(var));
    let set = |var: &str, values: &[&str]| {
        let kind = if values.len() > 1 { FieldType::ListMulti } else { FieldType::TextSingle };
        let mut field = Field::new(var, kind);
        field.values = values.iter().map(|v| (*v).to_owned()).collect();
        field
    };
    let options = OPTIONS.iter().filter(|(var, _, always)| *always || field_of(var).is_some());
    let mut fields: Vec<_> = options.map(|(var, values, _)| set(var, values)).collect();
    if field_of(NAME).is_some() {
        fields.push(set(NAME, &[name]));
    }
    // As many as the server lets in; `none` is no limit.
    let limits = field_of(USERS_MAX).map(|f| f.options.as_slice()).unwrap_or_default();
    let weight = |text: &str| if text == "none" { u64::MAX } else { text.parse().unwrap_or(0) };
    if let Some(most) = limits.iter().map(|o| o.value.as_str()).max_by_key(|v| weight(v)) {
        fields.push(set(USERS_MAX, &[most]));
    }
    fields
}

/// Options that did not become what they were set to, by what the room says afterwards.
pub fn not_taken(set: &[Field], now: &DataForm) -> Vec<String> {
    let plain = |values: &[String]| {
        let mut values: Vec<_> = values
            .iter()
            .map(|v| match v.as_str() {
                "true" => "1",
                "false" => "0",
                other => other,
            })
            .filter(|v| !v.is_empty())
            .collect();
        values.sort_unstable();
        values.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let differs = |wanted: &&Field| {
        let found = now.fields.iter().find(|f| f.var == wanted.var);
        // No value of a yes-or-no is no.
        found.is_some_and(|f| {
            let (is, should) = (plain(&f.values), plain(&wanted.values));
            is != should && !(is.is_empty() && should == ["0"])
        })
    };
    set.iter().filter(differs).filter_map(|f| f.var.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::data_forms::DataFormType;
    use xmpp_parsers::minidom::Element;

    fn room(features: &[&str], form: &str) -> DiscoInfoResult {
        let features: String = features.iter().map(|f| format!("<feature var='{f}'/>")).collect();
        let text = format!(
            "<query xmlns='http://jabber.org/protocol/disco#info'><identity category='conference' type='text'/>\
             {features}<x xmlns='jabber:x:data' type='result'><field var='FORM_TYPE' type='hidden'><value>\
             http://jabber.org/protocol/muc#roominfo</value></field>{form}</x></query>"
        );
        DiscoInfoResult::try_from(text.parse::<Element>().unwrap()).unwrap()
    }

    #[test]
    fn what_is_vital_must_be_said_and_of_the_rest_counts_what_is_said() {
        let fault = |features: &[&str]| Lacks::of(&room(features, "")).fault();
        assert_eq!(fault(&[]).unwrap(), "the room is not members-only and anonymous");
        assert_eq!(fault(&["muc_membersonly"]).unwrap(), "the room is anonymous");
        assert_eq!(fault(&["muc_membersonly", "muc_nonanonymous"]), None);
        let closed = fault(&["muc_membersonly", "muc_nonanonymous", "muc_passwordprotected"]).unwrap();
        assert!(closed.contains("password"), "{closed}");

        let good = ["muc_membersonly", "muc_nonanonymous"];
        let flaws = |more: &[&str], form: &str| -> Vec<_> {
            Lacks::of(&room(&[&good, more].concat(), form)).flaws().collect()
        };
        assert_eq!(flaws(&[], ""), []);
        assert_eq!(flaws(&["muc_persistent", "muc_hidden", "muc_unsecured"], ""), []);
        assert_eq!(flaws(&["muc_public", "muc_temporary"], ""), [Need::Persistent, Need::Hidden]);
        for (var, value, flawed) in [
            (INVITES[0], "<value>1</value>", true),
            (INVITES[1], "<value>true</value>", true),
            (INVITES[0], "<value>0</value>", false),
            (INVITES[0], "", false),
            ("muc#roominfo_occupants", "<value>1</value>", false),
        ] {
            let form = format!("<field var='{var}' type='boolean'>{value}</field>");
            assert_eq!(!flaws(&[], &form).is_empty(), flawed, "{form}");
        }
    }

    fn form(fields: &str) -> DataForm {
        let text = format!("<x xmlns='jabber:x:data' type='form'>{fields}</x>");
        DataForm::try_from(text.parse::<Element>().unwrap()).unwrap()
    }

    #[test]
    fn what_makes_a_federation_is_always_asked_for_the_rest_where_offered() {
        let vars = |form: &DataForm| -> Vec<_> {
            settings("lobby", form).into_iter().map(|f| (f.var.unwrap(), f.values.join(" "))).collect()
        };
        assert_eq!(vars(&DataForm::new(DataFormType::Form, "x", Vec::new())).len(), 3);
        let some = form(
            "<field var='muc#roomconfig_roomname'/><field var='muc#roomconfig_allowinvites'/>\
             <field var='muc#roomconfig_pubsub'/><field var='muc#roomconfig_presencebroadcast' type='list-multi'/>\
             <field var='muc#roomconfig_maxusers' type='list-single'><option><value>200</value></option>\
             <option><value>1000</value></option><option><value>30</value></option></field>",
        );
        let expected = [
            ("muc#roomconfig_allowinvites", "0"),
            ("muc#roomconfig_presencebroadcast", "visitor participant moderator"),
            ("muc#roomconfig_roomname", "lobby"),
            ("muc#roomconfig_maxusers", "1000"),
        ];
        assert_eq!(vars(&some)[3..], expected.map(|(var, value)| (var.to_owned(), value.to_owned())));
    }

    #[test]
    fn what_the_room_did_not_take_is_found() {
        let offered =
            form("<field var='muc#roomconfig_allowinvites'/><field var='muc#roomconfig_presencebroadcast'/>");
        let set = settings("lobby", &offered);
        let now = |invites: &str, shown: &str| {
            form(&format!(
                "<field var='muc#roomconfig_membersonly' type='boolean'><value>true</value></field>\
                 <field var='muc#roomconfig_allowinvites' type='boolean'>{invites}</field>\
                 <field var='muc#roomconfig_presencebroadcast' type='list-multi'>{shown}</field>"
            ))
        };
        let all = "<value>moderator</value><value>visitor</value><value>participant</value>";
        assert_eq!(not_taken(&set, &now("<value>0</value>", all)), Vec::<String>::new());
        assert_eq!(not_taken(&set, &now("", all)), Vec::<String>::new());
        assert_eq!(not_taken(&set, &now("<value>1</value>", all)), ["muc#roomconfig_allowinvites"]);
        let moderators = not_taken(&set, &now("", "<value>moderator</value>"));
        assert_eq!(moderators, ["muc#roomconfig_presencebroadcast"]);
    }
}
