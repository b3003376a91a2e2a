//! Words that others wrote: what a peer, a server or a guest says, made safe to print and to keep
//! where it is read.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Deserializer, Serialize, de};
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

/// Characters of a text at most, its mark of being cut included.
pub const TEXT_CHARS_MAX: usize = 500;
/// What stands at the end of a text that was cut.
const CUT: char = '…';
/// What stands for characters that are not printed.
const HIDDEN: char = '\u{fffd}';

/// A text from a peer: one line of at most [`TEXT_CHARS_MAX`] characters, all of them [printable](is_plain).
/// White space of every kind becomes single blanks, every run of what cannot be printed `U+FFFD`, and
/// what is too long ends in an ellipsis. Every way to make one cleans, so our own words, which may quote
/// a peer's or a guest's, are as harmless.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(transparent)]
pub struct PeerText(String);

/// Whether a character is seen, and is all that it does: no control character, no line or paragraph
/// separator, nothing that turns the direction of what stands around it, nothing invisible, nothing
/// whose look nobody agreed on. The blank is the only white space.
pub fn is_plain(c: char) -> bool {
    match c {
        ' '..='~' => true,
        // Invisible, and no format characters by category: the combining grapheme joiner, Hangul fillers,
        // Khmer inherent vowels, Mongolian and other variation selectors, the empty Braille pattern.
        '\u{34f}'
        | '\u{115f}'
        | '\u{1160}'
        | '\u{17b4}'
        | '\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{2800}'
        | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}'
        | '\u{ffa0}'
        | '\u{e0000}'..='\u{e0fff}' => false,
        c => !matches!(
            c.general_category(),
            GeneralCategory::Control
                | GeneralCategory::Format
                | GeneralCategory::LineSeparator
                | GeneralCategory::ParagraphSeparator
                | GeneralCategory::SpaceSeparator
                | GeneralCategory::Surrogate
                | GeneralCategory::PrivateUse
                | GeneralCategory::Unassigned
        ),
    }
}

/// A text of any length with every character that is not [plain](is_plain) spelt out, such as `\u{1b}`: for
/// what is printed and should be seen as it is.
pub fn escaped(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if is_plain(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c => out.extend(c.escape_unicode()),
        }
    }
    Cow::Owned(out)
}

/// JSON with every character that is not [plain](is_plain) as an escape. Outside its strings JSON is ASCII, and
/// line breaks stand only there.
pub fn escaped_json(json: &str) -> Cow<'_, str> {
    let stays = |c| c == '\n' || is_plain(c);
    if json.chars().all(stays) {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if stays(c) {
            out.push(c);
        } else {
            out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    Cow::Owned(out)
}

impl PeerText {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Looks at no more of `text` than is kept, but for what is not kept of it.
    fn clean(text: &str) -> Self {
        let mut out = String::new();
        // Characters taken, and where the last one that leaves room for the mark ends.
        let (mut taken, mut room) = (0, 0);
        let mut blank = false;
        for c in text.chars() {
            if c == HIDDEN || !(c.is_whitespace() || is_plain(c)) {
                if !blank && out.ends_with(HIDDEN) {
                    continue;
                }
            } else if c.is_whitespace() {
                blank = !out.is_empty();
                continue;
            }
            let c = if is_plain(c) { c } else { HIDDEN };
            for c in blank.then_some(' ').into_iter().chain([c]) {
                if taken == TEXT_CHARS_MAX {
                    out.truncate(room);
                    out.push(CUT);
                    return Self(out);
                }
                out.push(c);
                taken += 1;
                if taken < TEXT_CHARS_MAX {
                    room = out.len();
                }
            }
            blank = false;
        }
        Self(out)
    }
}

impl Deref for PeerText {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for PeerText {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for PeerText {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<&str> for PeerText {
    fn from(text: &str) -> Self {
        Self::clean(text)
    }
}

impl From<String> for PeerText {
    fn from(text: String) -> Self {
        Self::clean(&text)
    }
}

impl From<&String> for PeerText {
    fn from(text: &String) -> Self {
        Self::clean(text)
    }
}

impl From<PeerText> for String {
    fn from(text: PeerText) -> Self {
        text.0
    }
}

impl PartialEq<str> for PeerText {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl PartialEq<&str> for PeerText {
    fn eq(&self, other: &&str) -> bool {
        self.0 == *other
    }
}

impl PartialEq<String> for PeerText {
    fn eq(&self, other: &String) -> bool {
        self.0 == *other
    }
}

impl<'de> Deserialize<'de> for PeerText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = PeerText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PeerText, E> {
                Ok(text.into())
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

impl xso::FromXmlText for PeerText {
    fn from_xml_text(text: String) -> Result<Self, xso::error::Error> {
        Ok(text.into())
    }
}

impl xso::AsXmlText for PeerText {
    fn as_xml_text(&self) -> Result<Cow<'_, str>, xso::error::Error> {
        Ok(Cow::Borrowed(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::MemberJid;

    /// What must never be seen raw, said apart from the rule that is tested.
    fn is_hostile(c: char) -> bool {
        let n = u32::from(c);
        n < 0x20
            || (0x7f..=0x9f).contains(&n)
            || [0xad, 0x61c, 0x180e, 0x2028, 0x2029, 0xfeff, 0x3164, 0xfe0f].contains(&n)
            || (0x200b..=0x200f).contains(&n)
            || (0x202a..=0x202e).contains(&n)
            || (0x2060..=0x206f).contains(&n)
            || (0xfff9..=0xfffb).contains(&n)
            || (0xe0000..=0xe0fff).contains(&n)
    }

    #[test]
    fn no_character_that_acts_or_hides_is_plain() {
        for c in '\0'..=char::MAX {
            assert!(!(is_hostile(c) && is_plain(c)), "{c:?}");
            assert!(!(c.is_whitespace() && c != ' ' && is_plain(c)), "{c:?}");
        }
        for c in "aZ~é漢字ελ…≤€\u{1f600}\u{fffd}e\u{301}".chars() {
            assert!(is_plain(c), "{c:?}");
        }
    }

    #[test]
    fn what_an_operator_wrote_stays() {
        for text in ["", "no room: 3 of 4 CPUs are used", "Zürich, Straße 5 – 日本", "name@1.2-3+deb12u1"]
        {
            assert_eq!(PeerText::from(text), *text);
        }
    }

    #[test]
    fn what_acts_is_marked_and_lines_become_one() {
        for (from, to) in [
            ("no\r\n\n  b  yes\t5", "no b yes 5"),
            ("\x1b[2J\x1b]52;c;AAAA\x07no", "\u{fffd}[2J\u{fffd}]52;c;AAAA\u{fffd}no"),
            ("a\u{9b}\u{7f}\0b", "a\u{fffd}b"),
            ("a\u{202e}b\u{2066}\u{200b}c", "a\u{fffd}b\u{fffd}c"),
            ("a\u{2028}b\u{2029}c\u{85}d", "a b c d"),
            (" \u{a0}\u{3000} x \n", "x"),
        ] {
            assert_eq!(PeerText::from(from), *to, "{from:?}");
        }
    }

    #[test]
    fn long_texts_end_in_a_mark() {
        let whole = "é".repeat(TEXT_CHARS_MAX);
        assert_eq!(PeerText::from(&whole), *whole);
        let cut = PeerText::from("é".repeat(TEXT_CHARS_MAX + 1));
        assert_eq!((cut.chars().count(), cut.ends_with("é…")), (TEXT_CHARS_MAX, true));
        assert_eq!(PeerText::from(" ".repeat(1 << 20)), *"");
    }

    #[test]
    fn members_addresses_are_refused_what_texts_are_cleaned_of() {
        for c in ('\0'..=char::MAX).filter(|c| is_hostile(*c)) {
            for text in [format!("a{c}b@example.org"), format!("a@exa{c}mple.org")] {
                let Ok(jid) = text.parse::<MemberJid>() else { continue };
                // Some are dropped when an address is made normal.
                assert!(jid.as_str().chars().all(is_plain), "{text:?}: {jid:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn every_text_is_one_bounded_plain_line(text in any::<String>(), long in "\\PC{0,1200}|(?s).{0,900}") {
            for text in [text, long] {
                let clean = PeerText::from(text.as_str());
                prop_assert!(clean.chars().all(|c| is_plain(c) && !is_hostile(c)), "{clean:?}");
                prop_assert!(clean.chars().count() <= TEXT_CHARS_MAX);
                prop_assert_eq!(&PeerText::from(clean.as_str()), &clean, "cleaning again changes nothing");
                let json = serde_json::to_string(&text).unwrap();
                prop_assert_eq!(&serde_json::from_str::<PeerText>(&json).unwrap(), &clean, "read as it is made");
                let xml = <PeerText as xso::FromXmlText>::from_xml_text(text.clone()).unwrap();
                prop_assert_eq!(&xml, &clean);
                let kept = serde_json::to_string(&clean).unwrap();
                prop_assert_eq!(serde_json::from_str::<PeerText>(&kept).unwrap(), clean);
            }
        }

        #[test]
        fn escapes_hide_nothing(text in any::<String>()) {
            prop_assert!(escaped(&text).chars().all(is_plain));
            let json = serde_json::to_string_pretty(&[&text]).unwrap();
            let safe = escaped_json(&json);
            prop_assert!(safe.chars().all(|c| c == '\n' || is_plain(c)));
            prop_assert_eq!(serde_json::from_str::<Vec<String>>(&safe).unwrap(), vec![text]);
        }
    }
}
