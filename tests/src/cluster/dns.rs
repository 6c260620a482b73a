//! The cluster's plain DNS: A and AAAA records of services, answered from what the supervisor last published.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, RwLock};

use anyhow::Result;
use tokio::net::UdpSocket;

/// Lower-case names without the final dot, and their addresses.
pub type Names = BTreeMap<String, Vec<IpAddr>>;

/// The zone: shared by the publisher and the server.
#[derive(Clone, Default)]
pub struct Zone(Arc<RwLock<Names>>);

const A: u16 = 1;
const AAAA: u16 = 28;
const TTL_SECONDS: u32 = 5;

impl Zone {
    /// Replaces all names.
    pub fn publish(&self, names: Names) {
        *self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = names;
    }

    /// Answers one query; `None` where it is too broken to be answered.
    fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let (name, kind, end) = question(query)?;
        let names = self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let addresses = names.get(&name);
        let records: Vec<&IpAddr> = addresses
            .into_iter()
            .flatten()
            .filter(|address| match kind {
                A => address.is_ipv4(),
                AAAA => address.is_ipv6(),
                _ => false,
            })
            .collect();
        let mut reply = query[..2].to_vec();
        // Response, authoritative, recursion desired as asked and available; NXDOMAIN where the name is unknown.
        let code = if addresses.is_some() { 0 } else { 3 };
        reply.extend([0x84 | (query[2] & 1), 0x80 | code, 0, 1]);
        reply.extend(u16::try_from(records.len()).ok()?.to_be_bytes());
        reply.extend([0; 4]);
        reply.extend(&query[12..end]);
        for address in records {
            // The name is a pointer to the question's.
            reply.extend([0xc0, 12]);
            reply.extend(kind.to_be_bytes());
            reply.extend(1u16.to_be_bytes());
            reply.extend(TTL_SECONDS.to_be_bytes());
            match address {
                IpAddr::V4(v4) => {
                    reply.extend(4u16.to_be_bytes());
                    reply.extend(v4.octets());
                }
                IpAddr::V6(v6) => {
                    reply.extend(16u16.to_be_bytes());
                    reply.extend(v6.octets());
                }
            }
        }
        Some(reply)
    }

    /// Serves until the task is dropped.
    pub async fn serve(self, socket: UdpSocket) -> Result<()> {
        let mut buffer = [0; 1500];
        loop {
            let (length, peer) = socket.recv_from(&mut buffer).await?;
            if let Some(reply) = self.answer(&buffer[..length]) {
                // A peer that has gone is its own loss.
                let _ = socket.send_to(&reply, peer).await;
            }
        }
    }
}

/// Name and type of the one question, and where it ends.
fn question(query: &[u8]) -> Option<(String, u16, usize)> {
    let is_query = query.get(2)? & 0xf8 == 0;
    if !is_query || query.get(4..6)? != [0, 1] {
        return None;
    }
    let mut name = String::new();
    let mut at = 12;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        // Above 63 would be a pointer, which a question does not have.
        if length > 63 {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(&std::str::from_utf8(query.get(at..at + length)?).ok()?.to_ascii_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
    query.get(at + 4 - 1)?;
    Some((name, kind, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            query.push(u8::try_from(label.len()).expect("short label"));
            query.extend(label.as_bytes());
        }
        query.extend([0]);
        query.extend(kind.to_be_bytes());
        query.extend([0, 1]);
        query
    }

    #[test]
    fn answers_by_family_and_denies_unknown_names() {
        let zone = Zone::default();
        let addresses = vec!["10.96.0.1".parse().expect("v4"), "fd00::1".parse().expect("v6")];
        zone.publish(Names::from([("api.shop.svc.cluster.local".into(), addresses)]));
        let reply = zone.answer(&query("API.shop.svc.cluster.local", A)).expect("an answer");
        assert_eq!((reply[3] & 15, reply[7]), (0, 1));
        assert!(reply.ends_with(&[0, 4, 10, 96, 0, 1]));
        let reply = zone.answer(&query("api.shop.svc.cluster.local", AAAA)).expect("an answer");
        assert_eq!(reply.last(), Some(&1));
        let reply = zone.answer(&query("nobody.shop.svc.cluster.local", A)).expect("an answer");
        assert_eq!((reply[3] & 15, reply[7]), (3, 0));
    }

    #[test]
    fn every_cut_of_a_query_is_survived() {
        let zone = Zone::default();
        let whole = query("a.b", A);
        for length in 0..whole.len() {
            assert_eq!(zone.answer(&whole[..length]), None);
        }
    }
}
