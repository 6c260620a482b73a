//! From the bytes of a delta stream to what handlers have applied, without I/O: each resource goes to the handler of its
//! type while the response it belongs to is still arriving.

use std::sync::Arc;

use mesh_proto::ads::DeltaDiscoveryRequest;

use super::delta::{Content, DeltaClient, Resource, Response, UnknownType};
use super::handlers::Batch;
use super::response::{Part, ResponseError, Responses, Rest};
use super::{Rejected, ResourceHandler};

/// The receiving side of one stream.
pub struct Inbox {
    handlers: Vec<Arc<dyn ResourceHandler>>,
    responses: Responses,
    /// What has arrived of the response that is not complete.
    response: Response,
    /// By type, what is going to be applied. A response says its own type only at its end; that of one is applied.
    batches: Vec<(&'static str, Box<dyn Batch>)>,
}

/// A response that is complete.
#[derive(Debug)]
pub enum Received {
    Applied(Box<Applied>),
    /// Of a type that was not asked for; nothing was applied.
    Unknown {
        error: UnknownType,
        bytes: usize,
    },
}

#[derive(Debug)]
pub struct Applied {
    pub type_url: &'static str,
    pub updated: usize,
    pub removed: usize,
    /// Length of the message.
    pub bytes: usize,
    pub rejected: Vec<Rejected>,
    /// The ACK or NACK.
    pub answer: Option<DeltaDiscoveryRequest>,
}

impl Inbox {
    pub fn new(handlers: Vec<Arc<dyn ResourceHandler>>) -> Self {
        Self { handlers, responses: Responses::default(), response: Response::default(), batches: Vec::new() }
    }

    /// More of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.responses.push(bytes);
    }

    /// Whether the stream may end here.
    pub fn is_between(&self) -> bool {
        self.responses.is_between()
    }

    /// The next response that is complete, applied; `None` when more of the stream is needed.
    ///
    /// # Errors
    /// The stream makes no sense, and is to be given up. Nothing of the response that was arriving was applied.
    pub fn next(&mut self, delta: &mut DeltaClient) -> Result<Option<Received>, ResponseError> {
        while let Some(part) = self.responses.pop()? {
            match part {
                Part::Resource(resource) => {
                    let type_url = resource.content.map(|(type_url, _)| type_url).unwrap_or_default();
                    let name = delta.name(type_url, resource.name);
                    self.response.aliases.extend(resource.aliases.into_iter().map(str::to_owned));
                    let content = match resource.content {
                        Some((type_url, message)) => match batch(&self.handlers, &mut self.batches, type_url) {
                            Some((type_url, batch)) => {
                                batch.update(&name, message);
                                Content::Handled(type_url)
                            }
                            None => Content::Other(type_url.into()),
                        },
                        None => Content::Missing,
                    };
                    self.response.resources.push(Resource { name, version: resource.version.into(), content });
                }
                Part::End(rest) => return Ok(Some(self.complete(rest, delta))),
            }
        }
        Ok(None)
    }

    fn complete(&mut self, rest: Rest, delta: &mut DeltaClient) -> Received {
        let Rest { type_url, nonce, removed, bytes } = rest;
        let batches = std::mem::take(&mut self.batches);
        let response = Response { type_url, nonce, removed, ..std::mem::take(&mut self.response) };
        let is_handled = |resource: &&Resource| match resource.content {
            Content::Handled(type_url) => type_url == response.type_url,
            Content::Other(_) | Content::Missing => false,
        };
        let updated = response.resources.iter().filter(is_handled).count();
        let delivery = match delta.handle_response(response) {
            Ok(delivery) => delivery,
            Err(error) => return Received::Unknown { error, bytes },
        };
        let (type_url, removed) = (delivery.type_url, delivery.removed.len());
        let begun = batches.into_iter().find(|(known, _)| *known == type_url).map(|(_, batch)| batch);
        let batch = begun.or_else(|| handler(&self.handlers, type_url).map(|handler| handler.begin()));
        let rejected = batch.map(|batch| batch.apply(delivery.removed.clone())).unwrap_or_default();
        let said = rejected.clone();
        let answer = delta.handle_applied(delivery, rejected);
        Received::Applied(Box::new(Applied { type_url, updated, removed, bytes, rejected: said, answer }))
    }
}

/// The batch of a type, begun with the first of its resources; `None` where nobody handles it.
fn batch<'a>(
    handlers: &[Arc<dyn ResourceHandler>],
    batches: &'a mut Vec<(&'static str, Box<dyn Batch>)>,
    type_url: &str,
) -> Option<&'a mut (&'static str, Box<dyn Batch>)> {
    if let Some(at) = batches.iter().position(|(known, _)| *known == type_url) {
        return batches.get_mut(at);
    }
    let handler = handler(handlers, type_url)?;
    batches.push((handler.type_url(), handler.begin()));
    batches.last_mut()
}

fn handler<'a>(handlers: &'a [Arc<dyn ResourceHandler>], type_url: &str) -> Option<&'a Arc<dyn ResourceHandler>> {
    handlers.iter().find(|handler| handler.type_url() == type_url)
}

#[cfg(test)]
mod tests {
    use mesh_proto::ads::{DeltaDiscoveryResponse, Node, Resource as WireResource};
    use mesh_proto::workload::{self, ADDRESS_TYPE, Address, address};
    use prost::Message;
    use prost_types::Any;

    use super::super::delta::Interest;
    use super::super::response::tests::framed;
    use super::super::{address_handler, typed_handler};
    use super::*;
    use crate::store::Store;

    const OTHER: &str = "type.googleapis.com/other";

    struct World {
        store: Arc<Store>,
        inbox: Inbox,
        delta: DeltaClient,
    }

    fn world() -> World {
        let store = Store::new();
        let other = typed_handler(OTHER, |updated: Vec<(String, Address)>, _| {
            updated.into_iter().map(|(name, _)| Rejected::new(name, "nobody wants it")).collect()
        });
        let inbox = Inbox::new(vec![address_handler(store.clone()), other]);
        let types = [(ADDRESS_TYPE, Interest::All), (OTHER, Interest::All)];
        let mut delta = DeltaClient::new(Node::default(), types);
        delta.handle_connected();
        World { store, inbox, delta }
    }

    impl World {
        fn receive(&mut self, response: &DeltaDiscoveryResponse) -> Received {
            self.inbox.push(&framed(response));
            let received = self.inbox.next(&mut self.delta).expect("it makes sense").expect("it is complete");
            assert!(self.inbox.is_between());
            received
        }

        fn applied(&mut self, response: &DeltaDiscoveryResponse) -> Box<Applied> {
            match self.receive(response) {
                Received::Applied(applied) => applied,
                Received::Unknown { error, .. } => panic!("{error}"),
            }
        }

        fn uids(&self) -> Vec<String> {
            let mut uids: Vec<_> = self.store.snapshot().workloads().map(|w| w.uid.to_string()).collect();
            uids.sort_unstable();
            uids
        }
    }

    fn workload(type_url: &str, uid: &str) -> WireResource {
        let workload = workload::Workload { uid: uid.to_owned(), ..Default::default() };
        let address = Address { r#type: Some(address::Type::Workload(workload)) };
        let any = Any { type_url: type_url.to_owned(), value: address.encode_to_vec() };
        WireResource { name: uid.to_owned(), version: "1".to_owned(), resource: Some(any), ..Default::default() }
    }

    fn response(type_url: &str, resources: Vec<WireResource>) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse { type_url: type_url.to_owned(), nonce: "n".to_owned(), resources, ..Default::default() }
    }

    #[test]
    fn a_response_counts_when_it_is_complete_and_not_before() {
        let mut world = world();
        let stream = framed(&response(ADDRESS_TYPE, vec![workload(ADDRESS_TYPE, "a"), workload(ADDRESS_TYPE, "b")]));
        let (most, last) = stream.split_at(stream.len() - 1);
        world.inbox.push(most);
        assert!(world.inbox.next(&mut world.delta).unwrap().is_none());
        assert!(!world.inbox.is_between() && world.uids().is_empty());
        world.inbox.push(last);
        let Some(Received::Applied(applied)) = world.inbox.next(&mut world.delta).unwrap() else { panic!("complete") };
        assert_eq!((applied.updated, applied.removed, applied.bytes), (2, 0, stream.len() - 5));
        assert_eq!(applied.answer.unwrap().error_detail, None);
        assert_eq!(world.uids(), ["a", "b"]);
        let removal =
            DeltaDiscoveryResponse { removed_resources: vec!["a".to_owned()], ..response(ADDRESS_TYPE, vec![]) };
        assert_eq!(world.applied(&removal).removed, 1);
        assert_eq!(world.uids(), ["b"]);
    }

    #[test]
    fn only_what_is_of_the_type_of_its_response_is_applied() {
        let mut world = world();
        let stray = workload("type.googleapis.com/nobody's", "stray");
        let mixed = vec![workload(OTHER, "alien"), workload(ADDRESS_TYPE, "a"), stray];
        let applied = world.applied(&response(ADDRESS_TYPE, mixed));
        let rejected: Vec<_> =
            applied.answer.unwrap().error_detail.unwrap().message.split("; ").map(str::to_owned).collect();
        assert_eq!(
            rejected,
            [format!("alien: is a {OTHER:?}"), r#"stray: is a "type.googleapis.com/nobody's""#.to_owned()]
        );
        assert_eq!(world.uids(), ["a"]);
        // A whole response of another type than it says.
        let liar = world.applied(&response(OTHER, vec![workload(ADDRESS_TYPE, "b")]));
        assert_eq!(liar.answer.unwrap().error_detail.unwrap().message, format!("b: is a {ADDRESS_TYPE:?}"));
        assert_eq!(world.uids(), ["a"]);
        // What its handler refuses is told as well.
        let applied = world.applied(&response(OTHER, vec![workload(OTHER, "c")]));
        assert_eq!(applied.rejected, [Rejected::new("c", "nobody wants it")]);
        assert!(applied.answer.unwrap().error_detail.is_some());
    }

    #[test]
    fn a_response_nobody_asked_for_leaves_no_trace() {
        let mut world = world();
        let unknown = response("type.googleapis.com/c", vec![workload(ADDRESS_TYPE, "a")]);
        assert!(matches!(world.receive(&unknown), Received::Unknown { error, .. } if error.0.ends_with("/c")));
        assert!(world.uids().is_empty());
        world.applied(&response(ADDRESS_TYPE, vec![workload(ADDRESS_TYPE, "b")]));
        assert_eq!(world.uids(), ["b"]);
    }
}
