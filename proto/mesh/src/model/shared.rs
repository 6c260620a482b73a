//! How resources are read where there are very many of them: what they have in common is kept once, and is not even made
//! anew to be found the same.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mesh_proto::workload as wire;
use prost::Message;

use super::*;
use crate::fields::{self, Value};
use crate::text::{NameHasher, Texts};

/// What the resources known have in common. What nobody uses any more is let go of in time.
#[derive(Debug, Default)]
pub struct Shared {
    templates: HashSet<Arc<Template>, NameHasher>,
    texts: Texts,
    ports: HashSet<EndpointPorts, NameHasher>,
    /// How many there were of all when they were last looked through.
    kept: usize,
}

/// What is remembered for the time of one delivery: the encoded forms of templates.
#[derive(Debug, Default)]
pub struct Sharing {
    templates: HashMap<Box<[u8]>, Arc<Template>, NameHasher>,
    /// Spares an allocation for each workload.
    rest: Vec<u8>,
}

/// The numbers of the fields of `istio.workload.Workload` that are not of its template, and of `Address`' workload.
const NAME: u32 = 1;
const ADDRESSES: u32 = 3;
const NODE: u32 = 9;
const STATUS: u32 = 17;
const UID: u32 = 20;
const OF_ADDRESS: u32 = 1;

/// Encoded templates, before they are forgotten.
const REMEMBERED: usize = 16 * 1024;

/// Things that came since they were last looked through, before they are again.
const UNSEEN: usize = 4096;

impl Shared {
    /// Reads the `istio.workload.Address` that came under `name`.
    ///
    /// # Errors
    /// What is wrong with it, naming the field; also when it belongs under another name.
    pub fn read(&mut self, name: &Text, encoded: &[u8], sharing: &mut Sharing) -> Result<Resource, String> {
        if let Some(workload) = self.workload(name, encoded, sharing) {
            return Ok(Resource::Workload(workload));
        }
        // Services, and whatever is unusual.
        let address = wire::Address::decode(encoded).map_err(|error| error.to_string())?;
        let mut resource = Resource::try_from(address).map_err(|error| error.to_string())?;
        if resource.name() != **name {
            return Err(format!("content is {}", resource.name()));
        }
        match &mut resource {
            Resource::Workload(workload) => self.share_workload(workload),
            Resource::Service(service) => self.share_service(service),
        }
        Ok(resource)
    }

    /// A workload as they nearly all are. `None` for all else, and where anything is wrong: it is then read by the rules.
    fn workload(&mut self, name: &Text, encoded: &[u8], sharing: &mut Sharing) -> Option<Workload> {
        let address = fields::first(encoded).ok()??;
        let (OF_ADDRESS, Value::Bytes(message)) = (address.tag, address.value) else { return None };
        if address.encoded.len() < encoded.len() {
            return None;
        }
        let (mut uid, mut own_name, mut node) = ("", "", "");
        let (mut addresses, mut status) = (Vec::new(), HealthStatus::default());
        sharing.rest.clear();
        for field in fields::all(message) {
            let field = field.ok()?;
            let text = |bytes| std::str::from_utf8(bytes).ok();
            match (field.tag, field.value) {
                (UID, Value::Bytes(bytes)) => uid = text(bytes)?,
                (NAME, Value::Bytes(bytes)) => own_name = text(bytes)?,
                (NODE, Value::Bytes(bytes)) => node = text(bytes)?,
                (ADDRESSES, Value::Bytes(bytes)) => {
                    // One is the rule, and a list that grows by itself makes room for four.
                    if addresses.is_empty() {
                        addresses.reserve_exact(1);
                    }
                    addresses.push(ip_from_bytes("addresses", bytes).ok()?);
                }
                (STATUS, Value::Varint(number)) => {
                    status = super::wire::status(i32::try_from(number).ok()?).ok()?;
                }
                (UID | NAME | NODE | ADDRESSES | STATUS, _) => return None,
                _ => sharing.rest.extend_from_slice(field.encoded),
            }
        }
        if uid.is_empty() || uid != &**name {
            return None;
        }
        let template = match sharing.templates.get(&*sharing.rest) {
            Some(known) => known.clone(),
            None => {
                let message = wire::Workload::decode(&*sharing.rest).ok()?;
                let template = self.template(message.try_into().ok()?);
                // Where few have anything in common it would only take room.
                if sharing.templates.len() >= REMEMBERED {
                    sharing.templates.clear();
                }
                sharing.templates.insert(sharing.rest.as_slice().into(), template.clone());
                template
            }
        };
        let (own_name, node) = (own_name.into(), self.texts.get(node));
        Some(Workload { uid: name.clone(), name: own_name, addresses, node, status, template })
    }

    fn share_workload(&mut self, workload: &mut Workload) {
        self.texts.share(&mut workload.node);
        workload.template = self.template(Template::clone(&workload.template));
        workload.addresses.shrink_to_fit();
    }

    fn share_service(&mut self, service: &mut Service) {
        self.texts.share(&mut service.namespace);
        self.texts.share(&mut service.hostname);
    }

    /// The one that is equal to `template`, which becomes that one if it is the first.
    fn template(&mut self, mut template: Template) -> Arc<Template> {
        if let Some(known) = self.templates.get(&template) {
            return known.clone();
        }
        let Locality { region, zone, subzone } = &mut template.locality;
        let own = [
            &mut template.namespace,
            &mut template.trust_domain,
            &mut template.service_account,
            &mut template.network,
            &mut template.workload_name,
            &mut template.canonical_name,
            &mut template.canonical_revision,
            &mut template.cluster_id,
            region,
            zone,
            subzone,
        ];
        own.into_iter().chain(&mut template.authorization_policies).for_each(|text| self.texts.share(text));
        for (service, ports) in template.services.each_mut() {
            self.texts.share(&mut service.namespace);
            self.texts.share(&mut service.hostname);
            match self.ports.get(ports) {
                Some(known) => *ports = known.clone(),
                None => drop(self.ports.insert(ports.clone())),
            }
        }
        let template = Arc::new(template);
        self.templates.insert(template.clone());
        template
    }

    /// To be called before each delivery: lets go of what nobody uses, once that may be much.
    pub fn sweep(&mut self) {
        if self.len() < 2 * self.kept + UNSEEN {
            return;
        }
        self.templates.retain(|template| Arc::strong_count(template) > 1);
        self.ports.retain(EndpointPorts::is_shared);
        self.texts.sweep();
        self.kept = self.len();
    }

    fn len(&self) -> usize {
        self.templates.len() + self.ports.len() + self.texts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(n: u8) -> wire::Workload {
        let name = format!("cart-{n}");
        wire::Workload {
            uid: format!("Kubernetes//Pod/shop/{name}"),
            name,
            namespace: "shop".to_owned(),
            addresses: vec![vec![10, 0, 0, n].into(), vec![n; 16].into()],
            node: "node-a".to_owned(),
            tunnel_protocol: 1,
            status: i32::from(n % 2),
            services: [("shop/cart.shop".to_owned(), wire::PortList::default())].into(),
            ..Default::default()
        }
    }

    fn encoded(workload: wire::Workload) -> (Text, Vec<u8>) {
        let name = workload.uid.as_str().into();
        (name, wire::Address { r#type: Some(wire::address::Type::Workload(workload)) }.encode_to_vec())
    }

    #[test]
    fn what_is_shared_is_what_was_sent() {
        let (mut shared, mut sharing) = (Shared::default(), Sharing::default());
        for n in 0..6 {
            let wire = wire::Workload { canonical_name: format!("c{}", n % 3), ..pod(n) };
            let (name, bytes) = encoded(wire.clone());
            let read = shared.read(&name, &bytes, &mut sharing);
            assert_eq!(read, Ok(Resource::Workload(wire.try_into().unwrap())));
        }
        assert_eq!((shared.templates.len(), sharing.templates.len()), (3, 3));
        // The next delivery knows them still.
        let (name, bytes) = encoded(wire::Workload { canonical_name: "c1".to_owned(), ..pod(9) });
        shared.read(&name, &bytes, &mut Sharing::default()).unwrap();
        assert_eq!(shared.templates.len(), 3);
    }

    #[test]
    fn mistakes_are_told_as_for_any_resource() {
        let read = |name: &str, workload: wire::Workload| {
            let (_, bytes) = encoded(workload);
            Shared::default().read(&name.into(), &bytes, &mut Sharing::default()).unwrap_err()
        };
        let uid = pod(1).uid;
        assert_eq!(read("other", pod(1)), format!("content is {uid}"));
        assert_eq!(read("", wire::Workload { uid: String::new(), ..pod(1) }), "uid is empty");
        assert_eq!(read(&uid, wire::Workload { status: 9, ..pod(1) }), "status: 9 is not a known value");
        assert_eq!(read(&uid, wire::Workload { status: -1, ..pod(1) }), "status: -1 is not a known value");
        let short = vec![vec![1, 2, 3].into()];
        let said = read(&uid, wire::Workload { addresses: short, ..pod(1) });
        assert_eq!(said, "addresses: 3 bytes are neither an IPv4 nor an IPv6 address");
        assert_eq!(
            read(&uid, wire::Workload { tunnel_protocol: 2, ..pod(1) }),
            "tunnel_protocol: LEGACY_ISTIO_MTLS is not supported"
        );
        let cut = &encoded(pod(1)).1[..9];
        assert!(Shared::default().read(&"x".into(), cut, &mut Sharing::default()).is_err());
    }

    #[test]
    fn a_field_that_comes_twice_counts_as_the_last_of_them() {
        let (name, mut bytes) = encoded(pod(2));
        let wire::Address { r#type: Some(wire::address::Type::Workload(mut one)) } =
            wire::Address::decode(&*bytes).unwrap()
        else {
            panic!("a workload");
        };
        // A second message for the same field is merged into the first, by the rules.
        bytes.extend(wire::Address::encode_to_vec(&wire::Address {
            r#type: Some(wire::address::Type::Workload(wire::Workload {
                node: "node-b".to_owned(),
                ..Default::default()
            })),
        }));
        one.node = "node-b".to_owned();
        let read = Shared::default().read(&name, &bytes, &mut Sharing::default());
        assert_eq!(read, Ok(Resource::Workload(one.clone().try_into().unwrap())));

        // Within the message, of all that is the workload's own: that is the quick way's business.
        let again =
            wire::Workload { node: "node-c".to_owned(), name: "other".to_owned(), status: 1, ..Default::default() };
        let again = [wire::Workload { uid: "first".to_owned(), ..Default::default() }, one, again];
        let message = again.iter().flat_map(wire::Workload::encode_to_vec).collect::<Vec<_>>();
        let mut bytes = vec![0x0a];
        prost::encoding::encode_varint(message.len() as u64, &mut bytes);
        bytes.extend(&message);
        let wire::Address { r#type: Some(wire::address::Type::Workload(reference)) } =
            wire::Address::decode(&*bytes).unwrap()
        else {
            panic!("a workload");
        };
        assert_eq!((&*reference.node, reference.addresses.len()), ("node-c", 2));
        let mut sharing = Sharing::default();
        let read = Shared::default().read(&name, &bytes, &mut sharing);
        assert_eq!(read, Ok(Resource::Workload(reference.try_into().unwrap())));
        assert_eq!(sharing.templates.len(), 1, "it went the quick way");
    }

    #[test]
    fn what_nobody_uses_is_let_go_of() {
        let mut shared = Shared::default();
        let mut kept = None;
        for n in 0..UNSEEN {
            let wire = wire::Workload { canonical_name: n.to_string(), node: format!("n{n}"), ..pod(1) };
            let (name, bytes) = encoded(wire);
            let read = shared.read(&name, &bytes, &mut Sharing::default()).unwrap();
            kept.get_or_insert(read);
        }
        shared.sweep();
        assert_eq!(shared.templates.len(), 1, "the one that is in use");
        assert!(shared.texts.len() < 10, "{}", shared.texts.len());
    }
}
