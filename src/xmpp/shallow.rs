//! Reads XML only so deep: what is nested deeper is left out of the stream, well-formed as it was.
//!
//! The stanza parser goes one call deeper with every element, and so does dropping what it made: a
//! stanza of a few ten thousand bytes that is nothing but `<a><a><a>…` would end the process for
//! want of stack. Any account that can reach ours could send it. Ending the connection instead would
//! let it end every next one too.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Elements around an element, the stream's own included. Nothing that is understood here comes near.
const DEPTH_MAX: usize = 64;
const CDATA: &[u8] = b"![CDATA[";

/// A connection whose incoming XML is never deeper than [`DEPTH_MAX`].
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

#[derive(Debug, Default)]
struct Filter {
    place: Place,
    depth: usize,
}

impl Filter {
    fn pass(&mut self, byte: u8, mut keep: impl FnMut(&[u8])) {
        let mut kept = self.depth <= DEPTH_MAX;
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
                        kept = self.depth <= DEPTH_MAX;
                        Place::StartTag { quote: None, slash: false }
                    }
                }
            }
            (Place::StartTag { quote: Some(quote), .. }, _) => {
                Place::StartTag { quote: Some(quote).filter(|q| *q != byte), slash: false }
            }
            (Place::StartTag { slash, .. }, b'>') => {
                self.depth -= usize::from(slash);
                Place::Text
            }
            (Place::StartTag { .. }, _) => Place::StartTag {
                quote: Some(byte).filter(|b| matches!(b, b'\'' | b'"')),
                slash: byte == b'/',
            },
            (Place::EndTag, b'>') => {
                self.depth = self.depth.saturating_sub(1);
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
