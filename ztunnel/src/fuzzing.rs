//! What the fuzz targets (`tests/fuzz`) reach and nobody else may. It exists in their builds only.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use hickory_proto::op::Message;
use hickory_proto::rr::{Name, RecordType};
use mesh::identity::Identity;

use crate::inbound::proxy_protocol;
use crate::names::stub;
use crate::node::find::{KubeletRoot, pod_uid, v2_prefix};
use crate::node::marked;

/// What a DNS server's answer says of `name`.
#[must_use]
pub fn addresses(answer: &Message, name: &Name, kind: RecordType) -> (Vec<IpAddr>, Duration) {
    let found = stub::read(answer, name, kind);
    (found.addresses, found.ttl)
}

/// The pod of a process by its `/proc/PID/cgroup`, for a ztunnel whose own file is `own`.
#[must_use]
pub fn pod(cgroups: &str, v2: &str, own: &str) -> Option<String> {
    pod_uid(cgroups, &KubeletRoot::new(v2.to_owned(), own))
}

/// Where `CGROUP_ROOT` is in the v2 hierarchy.
#[must_use]
pub fn prefix(mountinfo: &str, root: &Path) -> Option<String> {
    v2_prefix(mountinfo, root)
}

/// The marks in an answer of sock_diag.
#[must_use]
pub fn marks(answer: &[u8]) -> Vec<Option<u32>> {
    marked::messages(answer).map(|message| (message.kind, marked::mark(message.body)).1).collect()
}

/// A header of the PROXY protocol.
#[must_use]
pub fn proxy_header(source: SocketAddr, destination: SocketAddr, identity: &Identity) -> Vec<u8> {
    proxy_protocol::header(source, destination, identity)
}
