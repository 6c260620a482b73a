//! Who is connected to this replica and how far each is, as JSON for `istiod-lite proxy-status`.
//!
//! Whoever reaches the port may ask, so it holds names, addresses and generations, and what proxies say of what they refuse:
//! nothing that was sent to them. It is of bounded size, and made once a second at most however often it is asked for.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use crate::resources::{Acks, ClientInfo, ResourceStore, TypeStatus, lock};

/// Where it is served.
pub const PATH: &str = "/debug/proxies";
/// Clients that are listed: about 1 KiB each, and several times that where they refuse much.
const MOST_CLIENTS: usize = 10_000;
/// An answer is given again for so long.
const KEPT: Duration = Duration::from_secs(1);

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connected {
    pub version: String,
    /// Of what is published now.
    pub generation: u64,
    pub proxies: Vec<Proxy>,
    /// How many more there are.
    #[serde(default)]
    pub omitted: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proxy {
    pub namespace: String,
    /// The pod of its token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    pub service_account: String,
    /// Of a node proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Of a waypoint: its Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// RFC 3339.
    pub connected_since: String,
    /// By name.
    pub types: Vec<Type>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Type {
    /// The last part of the type's URL, such as `Authorization`.
    pub name: String,
    /// Generation of the last response; 0 = none was sent.
    pub sent: u64,
    /// Generation that it has.
    pub acked: u64,
    /// What it says of what it did not take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
}

#[derive(Debug, Clone)]
pub(super) struct Proxies {
    store: Arc<ResourceStore>,
    acks: Arc<Acks>,
    last: Arc<Mutex<Option<(Instant, Bytes)>>>,
}

impl Proxies {
    pub(super) fn new(store: Arc<ResourceStore>, acks: Arc<Acks>) -> Self {
        Self { store, acks, last: Arc::default() }
    }

    pub(super) fn render(&self) -> Bytes {
        let mut last = lock(&self.last);
        if let Some((at, bytes)) = &*last
            && at.elapsed() < KEPT
        {
            return bytes.clone();
        }
        let json = serde_json::to_vec(&self.connected()).expect("names and numbers can be written as JSON");
        let bytes = Bytes::from(json);
        *last = Some((Instant::now(), bytes.clone()));
        bytes
    }

    fn connected(&self) -> Connected {
        // First, so that nobody seems to be behind who has what was published meanwhile.
        let generation = self.store.generation();
        let (clients, omitted) = self.acks.clients(MOST_CLIENTS);
        let mut proxies: Vec<Proxy> = clients.into_iter().map(|(info, types)| proxy(&info, types)).collect();
        proxies.sort_by(|a, b| {
            (&a.namespace, &a.pod, &a.connected_since).cmp(&(&b.namespace, &b.pod, &b.connected_since))
        });
        Connected { version: env!("CARGO_PKG_VERSION").to_owned(), generation, proxies, omitted }
    }
}

fn proxy(info: &ClientInfo, types: Vec<TypeStatus>) -> Proxy {
    let text = |text: &Option<Arc<str>>| text.as_deref().map(str::to_owned);
    let mut types: Vec<Type> = types
        .into_iter()
        .map(|TypeStatus { type_url, sent, acked, rejected }| Type {
            name: type_url.rsplit('.').next().unwrap_or_default().to_owned(),
            sent,
            acked,
            rejected,
        })
        .collect();
    types.sort_by(|a, b| a.name.cmp(&b.name));
    Proxy {
        namespace: info.namespace.to_string(),
        pod: text(&info.pod),
        service_account: info.service_account.to_string(),
        node: text(&info.node),
        waypoint: text(&info.waypoint),
        address: info.address.map(|address| address.to_string()),
        connected_since: rfc3339(info.since),
        types,
    }
}

fn rfc3339(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time).replace_nanosecond(0);
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn says_who_is_connected_and_says_the_same_for_a_second() {
        let (store, acks) = (Arc::new(ResourceStore::new()), Arc::new(Acks::default()));
        store.publish([]);
        let client = acks.client();
        client.describe(ClientInfo {
            namespace: "istio-system".into(),
            service_account: "ztunnel".into(),
            pod: Some("ztunnel-a".into()),
            node: Some("a".into()),
            waypoint: None,
            address: Some(([10, 0, 0, 1], 999).into()),
            since: SystemTime::UNIX_EPOCH + Duration::from_millis(1500),
        });
        client.subscribed("type.googleapis.com/istio.workload.Address");
        let proxies = Proxies::new(store, Arc::clone(&acks));
        let told = || serde_json::from_slice::<Connected>(&proxies.render()).expect("what was written");
        let first = told();
        assert_eq!((first.generation, first.omitted, first.proxies.len()), (1, 0, 1));
        let Proxy { pod, node, connected_since, types, .. } = &first.proxies[0];
        assert_eq!(
            (pod.as_deref(), node.as_deref(), &**connected_since),
            (Some("ztunnel-a"), Some("a"), "1970-01-01T00:00:01Z")
        );
        assert_eq!(types[..], [Type { name: "Address".into(), sent: 0, acked: 0, rejected: None }]);
        drop(client);
        assert_eq!(told(), first);
        tokio::time::advance(KEPT).await;
        assert!(told().proxies.is_empty());
    }
}
