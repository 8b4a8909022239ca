//! Decoding a manifest from a peer. An empty message takes two bytes on the wire and hundreds in memory, so what is
//! there is counted before anything is made of it.

use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::restore::check::{FILES_MAX, GUARDS_MAX, MAPPINGS_MAX, THREADS_MAX};
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Pages come in runs, but every thread has some.
const PAGES_MAX: usize = 1 << 20;
/// Strings and messages within those that a manifest is made of: a few for each.
const NESTED_MAX: usize = 4 * MAPPINGS_MAX;

/// The most fields with a tag; others than these come once.
fn count_max(tag: u32) -> usize {
    match tag {
        2 => MAPPINGS_MAX,
        3 => THREADS_MAX,
        4 | 5 => FILES_MAX,
        6 => PAGES_MAX,
        7 | 8 => GUARDS_MAX,
        _ => 1,
    }
}

/// Decodes a manifest, unless there is too much of anything in it.
pub fn decode_manifest(encoded: &[u8]) -> Result<Manifest> {
    count(encoded)?;
    Manifest::decode(encoded).map_err(|e| malformed(&e))
}

fn malformed(e: &prost::DecodeError) -> Error {
    Error::Manifest(e.to_string())
}

fn too_many(what: &str, tag: u32) -> Error {
    Error::Manifest(format!("too many {what} {tag}"))
}

fn count(mut rest: &[u8]) -> Result<()> {
    let mut counts = [0usize; 10];
    let mut nested = 0;
    while !rest.is_empty() {
        let (tag, wire) = decode_key(&mut rest).map_err(|e| malformed(&e))?;
        let of_tag = &mut counts[tag.min(9) as usize];
        *of_tag += 1;
        if *of_tag > count_max(tag) {
            return Err(too_many("fields", tag));
        }
        if wire != WireType::LengthDelimited {
            skip_field(wire, tag, &mut rest, DecodeContext::default())
                .map_err(|e| malformed(&e))?;
            continue;
        }
        let len = usize::try_from(decode_varint(&mut rest).map_err(|e| malformed(&e))?);
        let parts = len.ok().and_then(|len| rest.split_at_checked(len));
        let Some((message, after)) = parts else {
            return Err(Error::Manifest("it is cut off".into()));
        };
        rest = after;
        nested += count_nested(message, NESTED_MAX - nested)?;
    }
    Ok(())
}

/// Strings and messages in a message: at most so many.
fn count_nested(mut message: &[u8], most: usize) -> Result<usize> {
    let mut nested = 0;
    while !message.is_empty() {
        let (tag, wire) = decode_key(&mut message).map_err(|e| malformed(&e))?;
        skip_field(wire, tag, &mut message, DecodeContext::default()).map_err(|e| malformed(&e))?;
        nested += usize::from(wire == WireType::LengthDelimited);
        if nested > most {
            return Err(too_many("fields within others, the last of them", tag));
        }
    }
    Ok(nested)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{AddressRange, Descriptor, Mapping};

    #[test]
    fn what_is_not_too_much_is_decoded() {
        let mappings = vec![Mapping { path: b"/x".to_vec(), ..Mapping::default() }; 1000];
        let guards = vec![AddressRange::default(); 10];
        let manifest = Manifest { mappings, guards, ..Manifest::default() };
        assert_eq!(decode_manifest(&manifest.encode_to_vec()).unwrap(), manifest);
    }

    /// Empty messages of a tag, without what makes a manifest whole.
    fn empty(tag: u8, count: usize) -> Vec<u8> {
        [tag << 3 | 2, 0].repeat(count)
    }

    #[test]
    fn too_much_of_anything_is_not_looked_at() {
        assert!(count(&empty(3, THREADS_MAX)).is_ok());
        for (tag, most) in [(1, 1), (2, MAPPINGS_MAX), (3, THREADS_MAX), (4, FILES_MAX)] {
            let error = decode_manifest(&empty(tag, most + 1)).unwrap_err().to_string();
            assert!(error.contains("too many"), "{error}");
        }
        for (tag, most) in [(5, FILES_MAX), (6, PAGES_MAX), (7, GUARDS_MAX), (8, GUARDS_MAX)] {
            assert!(count(&empty(tag, most + 1)).is_err());
        }
    }

    #[test]
    fn too_much_inside_of_something_is_not_looked_at() {
        let inside = empty(15, NESTED_MAX + 1);
        let mut process = vec![1 << 3 | 2];
        prost::encoding::encode_varint(inside.len() as u64, &mut process);
        process.extend(inside);
        assert!(count(&process).is_err());
        let descriptors = vec![Descriptor::default(); 3];
        let whole = Manifest { descriptors, ..Manifest::default() }.encode_to_vec();
        assert!(count(&whole).is_ok());
        assert!(count(&whole[..whole.len() - 1]).is_err(), "it is cut off");
    }
}
