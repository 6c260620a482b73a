//! The fields of an encoded protobuf message, one by one and without a copy: for messages that are too many or too large
//! to be made values of first.
//!
//! <https://protobuf.dev/programming-guides/encoding/>

/// A field as it stands in its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    pub tag: u32,
    pub value: Value<'a>,
    /// All of it, with its key.
    pub encoded: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    Varint(u64),
    /// Text, bytes, a message, or several numbers.
    Bytes(&'a [u8]),
    /// 4 or 8 bytes.
    Fixed(&'a [u8]),
}

/// No message begins like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a protobuf message")]
pub(crate) struct Malformed;

/// The field that `bytes` begins with; `None` when it is not all there.
///
/// # Errors
/// [`Malformed`], also for groups, which nobody has used for long.
pub(crate) fn first(bytes: &[u8]) -> Result<Option<Field<'_>>, Malformed> {
    let Some((key, mut at)) = varint(bytes)? else { return Ok(None) };
    let tag = u32::try_from(key).map_err(|_| Malformed)? >> 3;
    let length = match key & 7 {
        0 => match varint(&bytes[at..])? {
            Some((_, length)) => length,
            None => return Ok(None),
        },
        1 => 8,
        2 => match varint(&bytes[at..])? {
            Some((length, own)) => {
                at += own;
                usize::try_from(length).map_err(|_| Malformed)?
            }
            None => return Ok(None),
        },
        5 => 4,
        _ => return Err(Malformed),
    };
    if tag == 0 {
        return Err(Malformed);
    }
    let end = at.checked_add(length).ok_or(Malformed)?;
    let Some(content) = bytes.get(at..end) else { return Ok(None) };
    let value = match key & 7 {
        0 => Value::Varint(varint(content)?.ok_or(Malformed)?.0),
        2 => Value::Bytes(content),
        _ => Value::Fixed(content),
    };
    Ok(Some(Field { tag, value, encoded: &bytes[..end] }))
}

/// All fields of a message that is all there, until the first mistake.
pub(crate) fn all(message: &[u8]) -> impl Iterator<Item = Result<Field<'_>, Malformed>> {
    let mut left = message;
    std::iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let field = first(left).and_then(|field| field.ok_or(Malformed));
        left = field.map(|field| &left[field.encoded.len()..]).unwrap_or_default();
        Some(field)
    })
}

/// A number and how many bytes it takes; `None` when it is not all there.
fn varint(bytes: &[u8]) -> Result<Option<(u64, usize)>, Malformed> {
    let mut number = 0;
    for (n, byte) in bytes.iter().enumerate().take(10) {
        // Of the tenth byte one bit is left.
        if n == 9 && *byte > 1 {
            return Err(Malformed);
        }
        number |= u64::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            return Ok(Some((number, n + 1)));
        }
    }
    if bytes.len() < 10 { Ok(None) } else { Err(Malformed) }
}

#[cfg(test)]
mod tests {
    use mesh_proto::workload::{Port, Workload};
    use prost::Message;

    use super::*;

    #[test]
    fn fields_come_as_they_were_written_and_make_up_the_message() {
        let workload = Workload {
            uid: "u".repeat(200),
            status: 1,
            capacity: Some(u32::MAX),
            addresses: vec![vec![10, 0, 0, 1].into()],
            ..Workload::default()
        };
        let encoded = workload.encode_to_vec();
        let fields: Vec<_> = all(&encoded).collect::<Result<_, _>>().unwrap();
        assert_eq!(fields.iter().map(|field| field.tag).collect::<Vec<_>>(), [3, 17, 20, 27]);
        assert_eq!(fields[0].value, Value::Bytes(&[10, 0, 0, 1]));
        assert_eq!(fields[1].value, Value::Varint(1));
        assert_eq!(fields[2].value, Value::Bytes(&[b'u'; 200]));
        assert_eq!(fields.iter().flat_map(|field| field.encoded).copied().collect::<Vec<_>>(), encoded);
    }

    #[test]
    fn what_is_cut_short_is_not_there_yet_wherever_it_is_cut() {
        let encoded = Workload { uid: "u".repeat(200), ..Workload::default() }.encode_to_vec();
        for end in 0..encoded.len() {
            assert_eq!(first(&encoded[..end]), Ok(None), "{end}");
        }
        assert_eq!(first(&encoded).unwrap().unwrap().encoded, encoded);
        assert!(all(&encoded[..100]).any(|field| field == Err(Malformed)), "a whole message must be whole");
    }

    #[test]
    fn what_is_no_field_is_refused() {
        // Field 0, a group, a wire type that does not exist, a number of eleven bytes, one beyond 64 bits.
        let long = [&[8][..], &[0xff; 10]].concat();
        let beyond = [&[8][..], &[0xff; 9], &[2]].concat();
        for bytes in [&[0, 0][..], &[0x0b], &[0x0e], &long, &beyond] {
            assert_eq!(first(bytes), Err(Malformed), "{bytes:?}");
        }
        let largest = Port { service_port: u32::MAX, ..Port::default() }.encode_to_vec();
        assert_eq!(first(&largest).unwrap().unwrap().value, Value::Varint(u32::MAX.into()));
    }
}
