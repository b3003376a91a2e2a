//! Reads XML only so deep, and tags only so long: what is nested deeper, and an element whose tag is
//! longer, is left out of the stream, well-formed as it was.
//!
//! The stanza parser goes one call deeper with every element, and so does dropping what it made: a
//! stanza of a few ten thousand bytes that is nothing but `<a><a><a>…` would end the process for
//! want of stack; and it ends the connection over a name or an attribute of more than 8,192 bytes. Any
//! account that can reach ours could send them. Ending the connection instead would let it end every
//! next one too: the room shows its members' presence again to whoever enters.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Elements around an element, the stream's own included. Nothing that is understood here comes near.
const DEPTH_MAX: usize = 64;
/// Of a start tag, as it comes. What it consists of is shorter, so the parser takes it.
const TAG_BYTES_MAX: usize = 8000;
/// Instead of a stanza that is left out, since both ends of a stream count them (XEP-0198).
const EMPTY_STANZA: &[u8] = b"<message/>";
/// Of a stanza: only the stream is around it.
const STANZA_DEPTH: usize = 2;
const CDATA: &[u8] = b"![CDATA[";

/// A connection whose incoming XML is never deeper than [`DEPTH_MAX`], with tags of at most
/// [`TAG_BYTES_MAX`].
#[derive(Debug)]
pub struct Shallow<Io> {
    io: Io,
    filter: Filter,
    /// Passed by the filter, not yet read.
    passed: Vec<u8>,
}

impl<Io> Shallow<Io> {
    pub fn new(io: Io) -> Self {
        Self { io, filter: Filter::default(), passed: Vec::new() }
    }

    pub fn into_inner(self) -> Io {
        self.io
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Shallow<Io> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        // To put nothing would say that the stream ended.
        while this.passed.is_empty() {
            // One byte may come out more than went in: the `<` that was held back.
            let mut piece = [0; 4096];
            let room = out.remaining().min(piece.len());
            let mut read = ReadBuf::new(&mut piece[..room]);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            for byte in read.filled() {
                this.filter.pass(*byte, |kept| this.passed.extend_from_slice(kept));
            }
        }
        let now = this.passed.len().min(out.remaining());
        out.put_slice(&this.passed[..now]);
        this.passed.drain(..now);
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Shallow<Io> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, bytes)
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

/// Where in the XML the next byte stands. What is no XML is passed on: refusing it is the parser's work.
#[derive(Debug, Default, Clone, Copy)]
enum Place {
    #[default]
    Text,
    /// Behind a `<` that was not passed on yet.
    Opened,
    StartTag {
        quote: Option<u8>,
        /// The last byte was a `/`.
        slash: bool,
    },
    EndTag,
    /// A declaration, or what begins with `<!`; so much of [`CDATA`] was seen.
    Other {
        cdata: usize,
    },
    /// A section, with as many `]` as were seen last, two at most.
    Section {
        brackets: u8,
    },
}

#[derive(Debug)]
struct Filter {
    place: Place,
    depth: usize,
    /// What is deeper is left out.
    depth_max: usize,
    /// A start tag that has not ended yet.
    tag: Vec<u8>,
}

impl Default for Filter {
    fn default() -> Self {
        Self { place: Place::default(), depth: 0, depth_max: DEPTH_MAX, tag: Vec::new() }
    }
}

impl Filter {
    fn pass(&mut self, byte: u8, mut keep: impl FnMut(&[u8])) {
        let mut kept = self.depth <= self.depth_max;
        let mut held = false;
        self.place = match (self.place, byte) {
            // Whether it is left out shows the next byte.
            (Place::Text, b'<') => {
                kept = false;
                Place::Opened
            }
            (Place::Text, _) => Place::Text,
            (Place::Opened, _) => {
                held = true;
                match byte {
                    b'/' => Place::EndTag,
                    b'!' => Place::Other { cdata: 1 },
                    b'?' => Place::Other { cdata: CDATA.len() + 1 },
                    _ => {
                        self.depth += 1;
                        kept = false;
                        self.tag_goes_on(&[b'<', byte], &mut keep);
                        Place::StartTag { quote: None, slash: false }
                    }
                }
            }
            (Place::StartTag { quote, slash }, _) => {
                kept = false;
                self.tag_goes_on(&[byte], &mut keep);
                match (quote, byte) {
                    (Some(quote), _) => {
                        Place::StartTag { quote: Some(quote).filter(|q| *q != byte), slash: false }
                    }
                    (None, b'>') => {
                        keep(&std::mem::take(&mut self.tag));
                        if slash {
                            self.element_ended();
                        }
                        Place::Text
                    }
                    (None, _) => Place::StartTag {
                        quote: Some(byte).filter(|b| matches!(b, b'\'' | b'"')),
                        slash: byte == b'/',
                    },
                }
            }
            (Place::EndTag, b'>') => {
                self.element_ended();
                Place::Text
            }
            (Place::EndTag, _) => Place::EndTag,
            (Place::Other { cdata }, _) if CDATA.get(cdata) == Some(&byte) => match cdata + 1 {
                seen if seen == CDATA.len() => Place::Section { brackets: 0 },
                seen => Place::Other { cdata: seen },
            },
            (Place::Other { .. }, b'>') => Place::Text,
            (Place::Other { .. }, _) => Place::Other { cdata: CDATA.len() + 1 },
            (Place::Section { brackets: 2 }, b'>') => Place::Text,
            (Place::Section { brackets }, b']') => Place::Section { brackets: (brackets + 1).min(2) },
            (Place::Section { .. }, _) => Place::Section { brackets: 0 },
        };
        if kept {
            if held {
                keep(b"<");
            }
            keep(&[byte]);
        }
    }

    /// A tag is held back until it has ended, or is found to be too long.
    fn tag_goes_on(&mut self, bytes: &[u8], keep: &mut impl FnMut(&[u8])) {
        if self.depth > self.depth_max {
            return;
        }
        self.tag.extend_from_slice(bytes);
        if self.tag.len() > TAG_BYTES_MAX {
            self.tag = Vec::new();
            self.depth_max = self.depth - 1;
            if self.depth == STANZA_DEPTH {
                keep(EMPTY_STANZA);
            }
        }
    }

    fn element_ended(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        if self.depth <= self.depth_max {
            self.depth_max = DEPTH_MAX;
        }
    }
}

/// What of `bytes` is passed on.
#[cfg(fuzzing)]
pub fn filtered(bytes: &[u8]) -> Vec<u8> {
    let (mut filter, mut out) = (Filter::default(), Vec::new());
    bytes.iter().for_each(|byte| filter.pass(*byte, |kept| out.extend_from_slice(kept)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;
    use xmpp_parsers::minidom::Element;

    fn filtered(text: &str) -> String {
        let mut filter = Filter::default();
        let mut out = Vec::new();
        text.bytes().for_each(|b| filter.pass(b, |kept| out.extend_from_slice(kept)));
        String::from_utf8(out).unwrap()
    }

    fn nested(depth: usize, within: &str) -> String {
        format!("{}{within}{}", "<a b='>/' c=\"/>\">".repeat(depth), "</a>".repeat(depth))
    }

    #[test]
    fn what_is_too_deep_is_left_out_and_the_rest_is_untouched() {
        let odd = "<?xml version='1.0'?><s a='/>\"' b=\"'>\"><![CDATA[<a><b>]] >]]]>t<x/><y /></s>";
        assert_eq!(filtered(odd), odd);
        assert_eq!(filtered(&nested(DEPTH_MAX, "text")), nested(DEPTH_MAX, "text"));
        for within in ["", "text", "<x/>", "<![CDATA[</a>]]>", "<x y='/a>'>z</x>"] {
            let deep = nested(DEPTH_MAX, &nested(500, within));
            assert_eq!(filtered(&deep), nested(DEPTH_MAX, ""), "{within}");
            assert_eq!(filtered(&format!("<s>{deep}t</s>")).len(), nested(DEPTH_MAX - 1, "").len() + 8);
        }
    }

    #[test]
    fn an_element_whose_tag_is_too_long_is_left_out() {
        let long = "x".repeat(TAG_BYTES_MAX);
        let within = |element: &str| format!("<s><iq>{element}<b/></iq><y/></s>");
        for element in [
            format!("<a c='{long}'/>"),
            format!("<a c='{long}>'>text<d>more</d><d/></a>"),
            format!("<{long}><a></a></{long}>"),
            format!("<a {long}='/>'><![CDATA[</a>]]></a>"),
            format!("<a c='1'{}/>", " d='2'".repeat(2000)),
        ] {
            assert_eq!(filtered(&within(&element)), within(""));
        }
        let just = format!("<a c='{}'>t</a>", "x".repeat(TAG_BYTES_MAX - 9));
        assert_eq!(filtered(&within(&just)), within(&just));
        // A stanza leaves an empty one, so that it counts.
        let stanzas = format!("<s><iq id='{long}'><a/></iq><iq id='{long}'/><iq id='1'><a/></iq></s>");
        assert_eq!(filtered(&stanzas), "<s><message/><message/><iq id='1'><a/></iq></s>");
    }

    /// Without the filter this ends the process.
    #[tokio::test]
    async fn a_bottomless_stanza_arrives_without_its_depths() {
        let stanza = format!("<iq xmlns='jabber:client'>{}<b/></iq>", nested(30_000, ""));
        let mut arrived = String::new();
        Shallow::new(stanza.as_bytes()).read_to_string(&mut arrived).await.unwrap();
        let element: Element = arrived.parse().unwrap();
        let names: Vec<_> = element.children().map(Element::name).collect();
        assert_eq!(names, ["a", "b"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn bytes_come_through_in_pieces_of_any_size(
            parts in proptest::collection::vec("(<a>|</a>|<b c='>'/>|t|<!\\[CDATA\\[<]]>)", 0..200),
            size in 1usize..7,
        ) {
            let text = parts.concat();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let arrived = runtime.block_on(async {
                let (mut shallow, mut out) = (Shallow::new(text.as_bytes()), Vec::new());
                let mut piece = vec![0; size];
                loop {
                    match shallow.read(&mut piece).await.unwrap() {
                        0 => break out,
                        n => out.extend_from_slice(&piece[..n]),
                    }
                }
            });
            prop_assert_eq!(String::from_utf8(arrived).unwrap(), filtered(&text));
        }
    }
}
