//! A request, by whom it is of use to. On the wire it is one JSON object whose `op` names it; the names are
//! told apart across all audiences, so which one a request is for is not written.

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::cloud::CloudRequest;
use super::content::ContentRequest;
use super::moves::MoveRequest;
use super::vms::VmRequest;

/// Makes the requests of one audience: each with its `op`.
macro_rules! requests {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$of:meta])* $op:literal => $variant:ident $(($($inner:ty),+))? $({$($fields:tt)*})?,)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Debug, serde::Serialize, serde::Deserialize)]
        #[serde(tag = "op", deny_unknown_fields)]
        pub enum $name {
            $($(#[$of])* #[serde(rename = $op)] $variant $(($($inner),+))? $({$($fields)*})?,)+
        }

        impl $name {
            /// What they are called, in their order.
            pub const OPS: &[&'static str] = &[$($op),+];

            /// What it is called.
            pub const fn op(&self) -> &'static str {
                match self { $(Self::$variant { .. } => $op,)+ }
            }
        }
    };
}
pub(super) use requests;

/// A request. `vm` is a name or a UUID; `component` a name, `name@version` or id prefix;
/// `member` and `to` a cloud name or a bare JID.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged)]
pub enum Request {
    /// Of those whose VMs run here.
    Vm(VmRequest),
    /// Of those who move VMs between clouds.
    Move(MoveRequest),
    /// Of those who run this cloud as a member of its federation.
    Cloud(CloudRequest),
    /// Of those who make what VMs are made of. It needs the repository and nothing else, so it is answered
    /// without a broker as well.
    Content(ContentRequest),
}

/// What is done with a file that a request names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileUse {
    Read,
    Write,
}

impl Request {
    /// What it is called.
    pub const fn op(&self) -> &'static str {
        match self {
            Request::Vm(request) => request.op(),
            Request::Move(request) => request.op(),
            Request::Cloud(request) => request.op(),
            Request::Content(request) => request.op(),
        }
    }

    /// The files it names, in the order in which whoever asks may hand them over with it, opened.
    pub fn files(&self) -> Vec<(&str, FileUse)> {
        match self {
            Request::Vm(request) => request.files(),
            Request::Content(request) => request.files(),
            Request::Move(_) | Request::Cloud(_) => Vec::new(),
        }
    }

    /// Notes who asks, where that is kept.
    pub fn asked_by(&mut self, uid: Option<u32>) {
        match self {
            Request::Vm(request) => request.asked_by(uid),
            Request::Move(request) => request.asked_by(uid),
            Request::Cloud(_) | Request::Content(_) => {}
        }
    }

    /// All names, by audience.
    fn ops() -> [&'static [&'static str]; 4] {
        [VmRequest::OPS, MoveRequest::OPS, CloudRequest::OPS, ContentRequest::OPS]
    }

    /// Reads the request of that name.
    fn read(op: &str, fields: Value) -> Result<Self, serde_json::Error> {
        fn of<T: DeserializeOwned + Into<Request>>(fields: Value) -> Result<Request, serde_json::Error> {
            serde_json::from_value::<T>(fields).map(Into::into)
        }
        match Self::ops().map(|ops| ops.contains(&op)) {
            [true, ..] => of::<VmRequest>(fields),
            [_, true, ..] => of::<MoveRequest>(fields),
            [_, _, true, _] => of::<CloudRequest>(fields),
            [.., true] => of::<ContentRequest>(fields),
            [false, false, false, false] => {
                let known = Self::ops().concat().join(", ");
                Err(serde_json::Error::custom(format!("no request is called {op:?}: there are {known}")))
            }
        }
    }
}

/// Its name may stand behind its other fields, so all of them are read before it is known what they are.
impl<'de> Deserialize<'de> for Request {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Request;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object whose \"op\" names a request")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Request, A::Error> {
                let mut fields = Map::new();
                while let Some(name) = map.next_key::<String>()? {
                    if fields.contains_key(&name) {
                        return Err(Error::custom(format!("duplicate field `{}`", name.escape_debug())));
                    }
                    fields.insert(name, map.next_value()?);
                }
                let op = match fields.get("op") {
                    Some(Value::String(op)) => op.clone(),
                    Some(_) => return Err(Error::custom("\"op\" is no text")),
                    None => return Err(Error::missing_field("op")),
                };
                Request::read(&op, Value::Object(fields)).map_err(Error::custom)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

macro_rules! wrapped {
    ($($request:ident as $audience:ident),+) => {$(
        impl From<$request> for Request {
            fn from(request: $request) -> Self {
                Self::$audience(request)
            }
        }
    )+};
}
wrapped!(VmRequest as Vm, MoveRequest as Move, CloudRequest as Cloud, ContentRequest as Content);

#[cfg(test)]
mod tests {
    use super::*;

    /// The JSON of requests is what it was, in both directions: lines of what a client sends (`>`), what an
    /// earlier release made of it, written again (`<`), or why it refused it (`!`).
    #[test]
    fn requests_are_read_and_written_as_before() {
        let mut ops: Vec<_> = Request::ops().concat();
        let mut given = "";
        for line in include_str!("../../fixtures/before/requests.txt").lines() {
            let (mark, rest) = line.split_once(' ').unwrap();
            let read = serde_json::from_str::<Request>(given);
            match mark {
                ">" => given = rest,
                "<" => {
                    let request = read.unwrap();
                    assert_eq!(serde_json::to_string(&request).unwrap(), rest);
                    assert_eq!(serde_json::from_str::<Request>(rest).unwrap(), request);
                    let value: Value = serde_json::from_str(rest).unwrap();
                    assert_eq!(serde_json::from_value::<Request>(value).unwrap(), request);
                    assert!(rest.starts_with(&format!("{{\"op\":\"{}\"", request.op())), "{rest}");
                    ops.retain(|op| *op != request.op());
                }
                "!" => assert!(read.is_err(), "{given}: {read:?}"),
                _ => panic!("{line}"),
            }
        }
        assert!(ops.is_empty(), "no form of before is known of {ops:?}");
    }

    #[test]
    fn what_is_wrong_with_a_request_is_said() {
        let said = |json: &str| serde_json::from_str::<Request>(json).unwrap_err().to_string();
        for (json, words) in [
            (r#"{"op":"vm-fly","vm":"web"}"#, "no request is called \"vm-fly\""),
            (r#"{"op":"vm-show"}"#, "missing field `vm`"),
            (r#"{"vm":"web"}"#, "missing field `op`"),
            (r#"{"op":"vm-show","vm":"web","vm":"db"}"#, "duplicate field `vm`"),
            (r#"{"op":"vm-show","vm":"web","colour":"red"}"#, "unknown field `colour`"),
        ] {
            assert!(said(json).contains(words), "{json}: {}", said(json));
        }
    }

    #[test]
    fn a_name_is_of_one_audience() {
        let mut ops = Request::ops().concat();
        let all = ops.len();
        ops.sort_unstable();
        ops.dedup();
        assert_eq!(ops.len(), all);
    }

    #[test]
    fn whoever_asks_is_named_by_the_socket_alone() {
        let noted = |json: &str, uid| {
            let mut request: Request = serde_json::from_str(json).unwrap();
            request.asked_by(uid);
            match request {
                Request::Vm(VmRequest::Start { by_uid, .. })
                | Request::Move(MoveRequest::Resolve { by_uid, .. }) => by_uid,
                other => panic!("{other:?}"),
            }
        };
        for json in [
            r#"{"op":"vm-start","vm":"web","by_uid":0}"#,
            r#"{"op":"migration-resolve","id":"0123","owner":"here","confirmed":true,"by_uid":0}"#,
        ] {
            assert_eq!((noted(json, Some(7)), noted(json, None)), (Some(7), None), "{json}");
        }
    }
}
