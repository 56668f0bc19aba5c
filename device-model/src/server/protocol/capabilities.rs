//! VERSION: what the client can do, and what it is offered.

use nix::errno::Errno;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{MAX_DATA, MAX_FDS, RequestError};

/// Version 0.1. A client of a lower minor version gets that.
const MINOR: u16 = 1;

/// What a client said that matters here.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(in crate::server) struct Capabilities {
    /// The most bytes that a DMA_READ or DMA_WRITE may ask it for.
    pub(in crate::server) max_data_xfer_size: u64,
    max_msg_fds: Option<u64>,
    write_multiple: Option<bool>,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            // The protocol's default.
            max_data_xfer_size: 1 << 20,
            max_msg_fds: None,
            write_multiple: None,
        }
    }
}

/// Reads a client's version. What it offers beyond our knowledge is left aside.
pub(in crate::server) fn offer(
    major: u16,
    data: &[u8],
) -> Result<(Capabilities, Map<String, Value>), RequestError> {
    if major != 0 {
        return Err(RequestError(
            Errno::EPROTONOSUPPORT,
            "the client speaks another major version than 0".into(),
        ));
    }
    let bad = |why: &'static str| RequestError(Errno::EINVAL, why.into());
    if data.is_empty() {
        return Ok((Capabilities::default(), Map::new()));
    }
    let Some((0, text)) = data.split_last() else {
        return Err(bad("the version data does not end with a zero byte"));
    };
    let no_object = || bad("the version data is no JSON object of capabilities");
    let mut data: Map<String, Value> = serde_json::from_slice(text).map_err(|_| no_object())?;
    let said = match data.remove("capabilities") {
        None => Map::new(),
        Some(Value::Object(said)) => said,
        Some(_) => return Err(no_object()),
    };
    let known: Capabilities = serde_json::from_value(Value::Object(said.clone()))
        .map_err(|_| bad("a capability has a value that makes no sense"))?;
    if known.max_data_xfer_size == 0 {
        return Err(bad("max_data_xfer_size is 0"));
    }
    Ok((known, said))
}

/// The body of the reply: a subset of what the client said, as the protocol wants it, and so
/// never longer than what QEMU has room for, which is the length of its request.
pub(in crate::server) fn version_reply(minor: u16, said: &Map<String, Value>) -> Vec<u8> {
    let ours = [
        ("max_msg_fds", json!(MAX_FDS)),
        ("max_data_xfer_size", json!(MAX_DATA)),
        ("write_multiple", json!(true)),
    ];
    let ours = ours
        .into_iter()
        .filter(|(name, _)| said.contains_key(*name));
    let ours: Map<String, Value> = ours.map(|(name, value)| (name.into(), value)).collect();
    let mut body = Vec::new();
    body.extend(0u16.to_le_bytes());
    body.extend(minor.min(MINOR).to_le_bytes());
    body.extend(json!({ "capabilities": ours }).to_string().bytes());
    body.push(0);
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(data: &str) -> Vec<u8> {
        [data.as_bytes(), &[0]].concat()
    }

    #[test]
    fn the_reply_has_of_ours_what_the_client_has_and_is_short() {
        // As QEMU 11 sends it.
        let data = text(
            "{\"capabilities\": {\"max_msg_fds\": 16, \"max_data_xfer_size\": 1048576, \
             \"migration\": {\"pgsize\": 4096, \"max_bitmap_size\": 268435456}, \
             \"pgsizes\": 4096, \"max_dma_maps\": 65535, \"write_multiple\": true}}",
        );
        let (known, said) = offer(0, &data).expect("good");
        assert_eq!(known.max_data_xfer_size, 1 << 20);
        let reply = version_reply(0, &said);
        assert_eq!(reply[..4], [0; 4]);
        assert!(reply.len() < data.len() && reply.len() <= 200);
        assert_eq!(reply.last(), Some(&0));
        let value: Value = serde_json::from_slice(&reply[4..reply.len() - 1]).expect("JSON");
        let expected = json!({ "capabilities": {
            "max_msg_fds": 8, "max_data_xfer_size": 1_048_576, "write_multiple": true,
        }});
        assert_eq!(value, expected);
        let (_, said) = offer(0, &text("{}")).expect("good");
        let reply = version_reply(9, &said);
        assert_eq!(
            reply,
            [&[0, 0, 1, 0][..], b"{\"capabilities\":{}}\0"].concat()
        );
        assert!(offer(0, &[]).is_ok(), "the data is optional");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let errno = |major, data: &[u8]| offer(major, data).err().map(|e| e.0);
        assert_eq!(errno(1, b"{}\0"), Some(Errno::EPROTONOSUPPORT));
        for data in [
            "{}",
            "\0",
            "{\0",
            "[]\0",
            "7\0",
            "{}\0{}\0",
            "{\"capabilities\":7}\0",
            "{\"capabilities\":{\"max_data_xfer_size\":-1}}\0",
            "{\"capabilities\":{\"max_data_xfer_size\":0}}\0",
            "{\"capabilities\":{\"max_msg_fds\":\"many\"}}\0",
        ] {
            assert_eq!(errno(0, data.as_bytes()), Some(Errno::EINVAL), "{data:?}");
        }
        let deep = text(&"[".repeat(100_000));
        assert_eq!(errno(0, &deep), Some(Errno::EINVAL));
    }
}
