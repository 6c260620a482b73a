//! What `translate` produces and `push` sends, and the small interfaces through which the two halves of the control
//! plane know each other: the store of mesh resources, who has acknowledged which generation, which pod runs where,
//! and what node proxies report. Nothing here knows Kubernetes or gRPC.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::{Buf, BufMut, Bytes};
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use internment::ArcIntern;
use mesh_proto::enrolment::resolve_response::Verdict;
use mesh_proto::enrolment::{POD_ENROLMENT_TYPE, PodEnrolment, PodState, ResolveRequest};
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::{HTTP_POLICY_TYPE, ROUTE_TYPE};
use mesh_proto::workload::{ADDRESS_TYPE, WORKLOAD_TYPE, Workload};
use prost::Message;
use prost::encoding::{WireType, decode_varint, encode_key, encode_varint, encoded_len_varint, key_len};
use tokio::sync::watch;
use xxhash_rust::xxh64::Xxh64;

/// Who may see a resource.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Audience {
    /// Every authenticated proxy.
    All,
    /// The node proxy whose pod runs on this node (`spec.nodeName` of the pod in the caller's bound token).
    Node(Arc<str>),
    /// The pods of one waypoint: `namespace` of the caller's token and the Gateway it belongs to.
    Waypoint { namespace: Arc<str>, name: Arc<str> },
}

/// xxh64 of a resource's bytes: equal bytes have equal versions, across restarts too. On the wire it is written in hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(u64);

impl Version {
    /// In bytes, as text.
    pub const LENGTH: usize = 16;

    /// None: it is none of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let version = Self(u64::from_str_radix(text, 16).ok()?);
        (version.to_string() == text).then_some(version)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// One mesh resource, encoded. There are two for each pod, so what the pods of one template have in common is kept once: the
/// fields of a protobuf message may come in any order, and two messages one behind the other are one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    kind: Kind,
    pub name: Arc<str>,
    pub version: Version,
    /// Other names, a line each: almost always there is one.
    aliases: Option<Box<str>>,
    form: Form,
    /// What of the message is this resource's own.
    own: Box<[u8]>,
    /// The rest of it.
    common: Option<ArcIntern<Vec<u8>>>,
    /// `None`: every proxy.
    audience: Option<ArcIntern<Vec<Audience>>>,
}

/// The types of resources, in a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Address,
    Authorization,
    PodEnrolment,
    Route,
    HttpPolicy,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Address, Self::Authorization, Self::PodEnrolment, Self::Route, Self::HttpPolicy];

    fn type_url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
            Self::PodEnrolment => POD_ENROLMENT_TYPE,
            Self::Route => ROUTE_TYPE,
            Self::HttpPolicy => HTTP_POLICY_TYPE,
        }
    }
}

/// What of a message is not written down, as the resource's name says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Nothing.
    Whole,
    /// The UID of a workload, and the Address around it.
    Workload,
    /// The UID of a pod.
    Enrolment,
}

impl Form {
    /// The field that is the resource's name.
    fn name_field(self) -> Option<u32> {
        match self {
            Self::Whole => None,
            Self::Workload => Some(WORKLOAD_UID),
            Self::Enrolment => Some(POD_UID),
        }
    }
}

/// Field numbers.
const WORKLOAD_UID: u32 = 20;
const POD_UID: u32 = 1;
/// Of `Address.workload`, the first and only field of an Address that holds a workload.
const ADDRESS_WORKLOAD: u32 = 1;
/// The same with its wire type, as it is written.
const ADDRESS_WORKLOAD_KEY: u8 = 0x0a;

impl Resource {
    /// Encodes `message` as a resource that every proxy may see.
    ///
    /// # Panics
    /// If there are no resources of that type.
    pub fn new(type_url: &'static str, name: impl Into<Arc<str>>, message: &impl Message) -> Self {
        let kind = Kind::ALL.into_iter().find(|kind| kind.type_url() == type_url).expect("a type that is pushed");
        Self::encoded(kind, name.into(), Form::Whole, message.encode_to_vec(), None)
    }

    /// An Address that is a workload: `own` and `common` together, of which neither has the UID.
    pub fn workload(uid: impl Into<Arc<str>>, own: &Workload, common: &Workload) -> Self {
        debug_assert!(own.uid.is_empty() && common.uid.is_empty());
        let common = ArcIntern::new(common.encode_to_vec());
        Self::encoded(Kind::Address, uid.into(), Form::Workload, own.encode_to_vec(), Some(common))
    }

    /// The enrolment of a pod: `own` and `common` together, of which neither has the UID.
    pub fn enrolment(uid: impl Into<Arc<str>>, own: &PodEnrolment, common: &PodEnrolment) -> Self {
        debug_assert!(own.uid.is_empty() && common.uid.is_empty());
        let common = ArcIntern::new(common.encode_to_vec());
        Self::encoded(Kind::PodEnrolment, uid.into(), Form::Enrolment, own.encode_to_vec(), Some(common))
    }

    fn encoded(kind: Kind, name: Arc<str>, form: Form, own: Vec<u8>, common: Option<ArcIntern<Vec<u8>>>) -> Self {
        let (version, aliases, own) = (Version(0), None, own.into());
        let mut this = Self { kind, name, version, aliases, form, own, common, audience: None };
        let mut hasher = Xxh64::new(0);
        this.message().pieces().into_iter().for_each(|piece| hasher.update(piece));
        this.version = Version(hasher.digest());
        this
    }

    /// Gives it other names an on-demand client may ask for (`<network>/<ip>` of workloads and VIPs). One with a line break in it,
    /// which no network has, is left out.
    pub fn with_aliases(self, mut aliases: Vec<String>) -> Self {
        aliases.retain(|alias| !alias.contains('\n'));
        Self { aliases: (!aliases.is_empty()).then(|| aliases.join("\n").into()), ..self }
    }

    pub fn aliases(&self) -> impl Iterator<Item = &str> + Clone {
        self.aliases.iter().flat_map(|names| names.split('\n'))
    }

    /// Restricts who may see it.
    pub fn for_audience(mut self, audience: Vec<Audience>) -> Self {
        self.audience = Some(ArcIntern::new(audience));
        self
    }

    pub fn type_url(&self) -> &'static str {
        self.kind.type_url()
    }

    /// Any of these may see it; never empty.
    pub fn audience(&self) -> &[Audience] {
        self.audience.as_deref().map_or(&[Audience::All], Vec::as_slice)
    }

    /// The protobuf message (value of the `Any`).
    pub fn message(&self) -> Encoded<'_> {
        let head = match self.form {
            Form::Workload => Head::default().wrap(ADDRESS_WORKLOAD, self.inner().len()),
            Form::Whole | Form::Enrolment => Head::default(),
        };
        self.behind(head)
    }

    /// The message as a resource of `type_url`, which a Workload may be that is the inside of an Address. `None`: it has no such
    /// form.
    pub fn message_as(&self, type_url: &str) -> Option<Encoded<'_>> {
        if type_url != WORKLOAD_TYPE {
            return Some(self.message());
        }
        match self.form {
            Form::Workload => Some(self.inner()),
            Form::Enrolment => None,
            Form::Whole => {
                let (key, mut rest) = self.own.split_first()?;
                if *key != ADDRESS_WORKLOAD_KEY {
                    return None;
                }
                let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
                (rest.len() == length).then_some(Encoded { head: Head::default(), name: "", own: rest, common: &[] })
            }
        }
    }

    /// The message in one piece.
    pub fn body(&self) -> Bytes {
        let message = self.message();
        let mut body = Vec::with_capacity(message.len());
        message.put(&mut body);
        body.into()
    }

    /// The message without the Address around it.
    fn inner(&self) -> Encoded<'_> {
        self.behind(Head::default())
    }

    fn behind(&self, head: Head) -> Encoded<'_> {
        let common = self.common.as_deref().map_or(&[][..], Vec::as_slice);
        match self.form.name_field() {
            Some(field) => {
                Encoded { head: head.wrap(field, self.name.len()), name: &self.name, own: &self.own, common }
            }
            None => Encoded { head, name: "", own: &self.own, common },
        }
    }
}

/// A message as it is written, piece by piece.
#[derive(Debug, Clone, Copy)]
pub struct Encoded<'a> {
    head: Head,
    name: &'a str,
    own: &'a [u8],
    common: &'a [u8],
}

impl Encoded<'_> {
    fn pieces(&self) -> [&[u8]; 4] {
        [self.head.as_slice(), self.name.as_bytes(), self.own, self.common]
    }

    /// In bytes; never empty of content that is not.
    #[allow(clippy::len_without_is_empty, reason = "an empty message is one, too")]
    pub fn len(&self) -> usize {
        self.pieces().iter().map(|piece| piece.len()).sum()
    }

    pub fn put(&self, out: &mut impl BufMut) {
        self.pieces().into_iter().for_each(|piece| out.put_slice(piece));
    }

    /// To be decoded.
    pub fn reader(&self) -> impl Buf + '_ {
        let [head, name, own, common] = self.pieces();
        head.chain(name).chain(own).chain(common)
    }
}

/// Keys and lengths of fields whose content follows; of two at most.
#[derive(Debug, Clone, Copy, Default)]
struct Head {
    bytes: [u8; 2 * Head::FIELD],
    length: u8,
}

impl Head {
    /// A key of a field below 2048 and the longest length there is.
    const FIELD: usize = 2 + 10;

    /// Behind what is there, the beginning of a field with so many bytes.
    fn wrap(mut self, field: u32, length: usize) -> Self {
        let start = usize::from(self.length);
        let mut free = &mut self.bytes[start..];
        encode_key(field, WireType::LengthDelimited, &mut free);
        encode_varint(length as u64, &mut free);
        self.length += (key_len(field) + encoded_len_varint(length as u64)) as u8;
        self
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// The resources of one type by name. Equality of what is shared costs nothing.
type ByName = OrdMap<Arc<str>, Arc<Resource>>;

/// Every second one, and then the others. What comes sorted leaves each leaf of a tree half full as it splits off; what comes
/// in between fills it. For what has no key twice, as the last is not the last here.
pub(crate) fn interleaved<T>(sorted: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for (at, item) in sorted.into_iter().enumerate() {
        if at % 2 == 0 { &mut first } else { &mut second }.push(item);
    }
    first.into_iter().chain(second)
}

/// All resources of one generation. Cheap to hold; never changes. What did not change is shared with the one before.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    generation: u64,
    types: BTreeMap<&'static str, ByName>,
}

impl Snapshot {
    /// 0 until the first publication: nothing is known yet and nothing may be answered.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The resources of a type by name.
    pub fn of_type(&self, type_url: &str) -> impl Iterator<Item = &Arc<Resource>> + '_ {
        self.types.get(type_url).into_iter().flat_map(OrdMap::values)
    }

    pub fn get(&self, type_url: &str, name: &str) -> Option<&Arc<Resource>> {
        self.types.get(type_url)?.get(name)
    }

    pub fn len(&self) -> usize {
        self.types.values().map(OrdMap::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The names of one type under which `newer` has something else, or one of the two nothing. Costs what differs.
    pub fn differing(&self, newer: &Self, type_url: &str) -> Vec<Arc<str>> {
        let none = ByName::new();
        let of = |snapshot: &Self| snapshot.types.get(type_url).unwrap_or(&none).clone();
        let (old, new) = (of(self), of(newer));
        let names = old.diff(&new).map(|item| match item {
            DiffItem::Add(name, _) | DiffItem::Update { new: (name, _), .. } | DiffItem::Remove(name, _) => {
                Arc::clone(name)
            }
        });
        names.collect()
    }
}

/// The published resources. Readers take a snapshot; one writer publishes.
#[derive(Debug)]
pub struct ResourceStore {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
    publishing: Mutex<()>,
}

impl Default for ResourceStore {
    fn default() -> Self {
        Self::new()
    }
}

impl ResourceStore {
    pub fn new() -> Self {
        Self {
            current: ArcSwap::from_pointee(Snapshot::default()),
            generation: watch::Sender::new(0),
            publishing: Mutex::new(()),
        }
    }

    /// Makes `resources` the whole content, as [`Self::change`] would.
    pub fn publish(&self, resources: impl IntoIterator<Item = Resource>) -> u64 {
        let resources: Vec<Resource> = resources.into_iter().collect();
        let last = self.current.load_full();
        let removed = {
            let kept: HashSet<(&str, &str)> =
                resources.iter().map(|resource| (resource.type_url(), &*resource.name)).collect();
            let all = last.types.iter().flat_map(|(type_url, by_name)| by_name.keys().map(|name| (*type_url, name)));
            let gone = all.filter(|(type_url, name)| !kept.contains(&(*type_url, &**name)));
            gone.map(|(type_url, name)| (type_url, Arc::clone(name))).collect::<Vec<_>>()
        };
        self.change(resources, removed)
    }

    /// Takes out those `removed` and puts in `resources`. One whose version, audience and aliases did not change keeps its
    /// identity (`Arc::ptr_eq`), so a reader can tell cheaply. Wakes subscribers when anything changed; the first
    /// publication always does. Returns the generation that holds the outcome. Costs what is given, not what is there.
    pub fn change(
        &self,
        resources: impl IntoIterator<Item = Resource>,
        removed: impl IntoIterator<Item = (&'static str, Arc<str>)>,
    ) -> u64 {
        let _one_writer = lock(&self.publishing);
        let last = self.current.load_full();
        let mut next = Snapshot::clone(&last);
        let mut changed = last.generation == 0;
        for (type_url, name) in removed {
            changed |= next.types.get_mut(type_url).and_then(|by_name| by_name.remove(&*name)).is_some();
        }
        for resource in interleaved(resources) {
            let by_name = next.types.entry(resource.type_url()).or_default();
            if by_name.get(&*resource.name).is_none_or(|old| **old != resource) {
                by_name.insert(Arc::clone(&resource.name), Arc::new(resource));
                changed = true;
            }
        }
        if !changed {
            return last.generation;
        }
        next.generation += 1;
        let generation = next.generation;
        self.current.store(Arc::new(next));
        self.generation.send_replace(generation);
        generation
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Changes to the current generation. The snapshot read after a wake-up is at least as new as the value seen.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    pub fn generation(&self) -> u64 {
        self.current.load().generation
    }
}

/// Of what a client says of a response, in bytes.
const LONGEST_REASON: usize = 1024;
/// How long acknowledgements are gathered before they are looked at.
const GATHER: Duration = Duration::from_millis(5);

/// What each connected client has acknowledged and refused.
#[derive(Debug)]
pub struct Acks {
    clients: Mutex<HashMap<u64, Answers>>,
    next: AtomicU64,
    changed: watch::Sender<()>,
    refusals: watch::Sender<()>,
}

/// Who a client is, for those who look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientInfo {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub pod: Option<Arc<str>>,
    /// Of a node proxy.
    pub node: Option<Arc<str>>,
    /// Of a waypoint's pod: the Gateway's name.
    pub waypoint: Option<Arc<str>>,
    pub address: Option<SocketAddr>,
    pub since: SystemTime,
}

/// Who a client is, and how far it is with each type.
pub type ClientStatus = (Arc<ClientInfo>, Vec<TypeStatus>);

/// How far a client is with one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeStatus {
    pub type_url: String,
    /// The generation of the last response that was sent; 0 = none was.
    pub sent: u64,
    /// The generation that it has, as far as it has said; 0 = none.
    pub acked: u64,
    /// What it says of what it did not take.
    pub rejected: Option<String>,
}

/// One client's.
#[derive(Debug, Default)]
struct Answers {
    info: Option<Arc<ClientInfo>>,
    types: HashMap<String, Progress>,
    /// Why, by type and name of a resource.
    refused: BTreeMap<(&'static str, Arc<str>), String>,
}

/// Generations of one type.
#[derive(Debug, Default)]
struct Progress {
    acked: u64,
    sent: u64,
    /// What was said of the last response that was not taken as a whole, and which that was.
    rejected: Option<(u64, String)>,
}

impl Answers {
    fn rejected(&self, type_url: &str) -> Option<String> {
        let mut by_name = self.refused.iter().filter(|((of, _), _)| *of == type_url);
        match by_name.next() {
            Some(((_, name), reason)) => {
                let more = by_name.count();
                let others = if more == 0 { String::new() } else { format!(" (and {more} more)") };
                Some(format!("{name}: {reason}{others}"))
            }
            None => self.types.get(type_url)?.rejected.as_ref().map(|(_, reason)| reason.clone()),
        }
    }
}

impl Default for Acks {
    fn default() -> Self {
        Self {
            clients: Mutex::default(),
            next: AtomicU64::new(0),
            changed: watch::Sender::new(()),
            refusals: watch::Sender::new(()),
        }
    }
}

impl Acks {
    /// Registers a connected client; it counts for a type from its first [`ClientAcks::subscribed`] on, until dropped.
    pub fn client(self: &Arc<Self>) -> ClientAcks {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.clients).insert(id, Answers::default());
        ClientAcks { acks: Arc::clone(self), id }
    }

    /// Waits until every client that listens to `type_url` has acknowledged `generation` or has gone; false when the
    /// deadline passed first.
    pub async fn wait_acked(&self, type_url: &str, generation: u64, deadline: Duration) -> bool {
        let mut changed = self.changed.subscribe();
        tokio::time::timeout(deadline, async {
            while !self.all_acked(type_url, generation) {
                if changed.changed().await.is_err() {
                    return;
                }
                // Each look is at all clients, and they all answer at about the same time.
                tokio::time::sleep(GATHER).await;
                changed.mark_unchanged();
            }
        })
        .await
        .is_ok()
    }

    fn all_acked(&self, type_url: &str, generation: u64) -> bool {
        lock(&self.clients).values().filter_map(|of| of.types.get(type_url)).all(|of| of.acked >= generation)
    }

    /// How far each client is, of `most` of them, and how many there are beyond. Those count that have said who they are.
    pub fn clients(&self, most: usize) -> (Vec<ClientStatus>, usize) {
        let clients = lock(&self.clients);
        let known = || clients.values().filter_map(|of| Some((of, of.info.as_ref()?)));
        let status = |(of, info): (&Answers, &Arc<ClientInfo>)| {
            let types = of.types.iter().map(|(type_url, progress)| TypeStatus {
                type_url: type_url.clone(),
                sent: progress.sent,
                acked: progress.acked,
                rejected: of.rejected(type_url),
            });
            (Arc::clone(info), types.collect::<Vec<_>>())
        };
        (known().take(most).map(status).collect(), known().count().saturating_sub(most))
    }

    /// How many clients have refused what they were sent last of a resource, and what one of them says of it.
    pub fn refused(&self, type_url: &'static str, name: &str) -> Option<(usize, String)> {
        let place = (type_url, Arc::from(name));
        let clients = lock(&self.clients);
        let mut reasons = clients.values().filter_map(|of| of.refused.get(&place));
        let first = reasons.next()?.clone();
        Some((1 + reasons.count(), first))
    }

    pub fn any_refused(&self) -> bool {
        lock(&self.clients).values().any(|of| !of.refused.is_empty())
    }

    /// Changes when [`Self::refused`] may have.
    pub fn refusals(&self) -> watch::Receiver<()> {
        self.refusals.subscribe()
    }
}

/// One client's entries in [`Acks`]; dropping it takes them out.
#[derive(Debug)]
pub struct ClientAcks {
    acks: Arc<Acks>,
    id: u64,
}

impl ClientAcks {
    /// Says who it is.
    pub fn describe(&self, info: ClientInfo) {
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id) {
            of.info = Some(Arc::new(info));
        }
    }

    /// The client asked for `type_url` and is waited for from now on.
    pub fn subscribed(&self, type_url: &str) {
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id) {
            of.types.entry(type_url.to_owned()).or_default();
        }
    }

    /// A response is on its way. Of a type that is not served nothing is kept.
    pub fn sent(&self, type_url: &str, generation: u64) {
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id)
            && let Some(progress) = of.types.get_mut(type_url)
        {
            progress.sent = generation;
        }
    }

    /// The client did not take all of the last response. Before the acknowledgement.
    pub fn rejected(&self, type_url: &str, reason: &str) {
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id)
            && let Some(progress) = of.types.get_mut(type_url)
        {
            progress.rejected = Some((progress.sent, reason[..reason.floor_char_boundary(LONGEST_REASON)].to_owned()));
        }
    }

    /// The client has acknowledged everything of `type_url` up to `generation`, or that generation holds no change for
    /// it. A NACK counts: the good resources were applied.
    pub fn acked(&self, type_url: &str, generation: u64) {
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id) {
            let progress = of.types.entry(type_url.to_owned()).or_default();
            progress.acked = generation.max(progress.acked);
            let sent = progress.sent;
            // A later response was taken as it was.
            if progress.rejected.as_ref().is_some_and(|(of, _)| *of < sent.min(generation)) {
                progress.rejected = None;
            }
        }
        self.acks.changed.send_replace(());
    }

    /// Of the resources `names` of one response the client has refused these, and taken the others.
    pub fn answered(&self, type_url: &'static str, names: Vec<Arc<str>>, mut refused: BTreeMap<Arc<str>, String>) {
        let mut changed = false;
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id) {
            for name in names {
                let now = refused.remove(&name);
                let place = (type_url, name);
                changed |= of.refused.get(&place) != now.as_ref();
                match now {
                    Some(reason) => _ = of.refused.insert(place, reason),
                    None => _ = of.refused.remove(&place),
                }
            }
        }
        if changed {
            self.acks.refusals.send_replace(());
        }
    }
}

impl Drop for ClientAcks {
    fn drop(&mut self) {
        let gone = lock(&self.acks.clients).remove(&self.id);
        self.acks.changed.send_replace(());
        if gone.is_some_and(|of| !of.refused.is_empty()) {
            self.acks.refusals.send_replace(());
        }
    }
}

/// What authorization needs to know of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInfo {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    /// Empty until scheduled.
    pub node: Arc<str>,
    /// `status.phase`, empty if unset.
    pub phase: Arc<str>,
    /// The Gateway that it is a proxy of, by its label; empty if it is of none.
    pub gateway: Arc<str>,
}

/// Whether an identity is a machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    Somebody,
    Nobody,
    /// Not all that could have it has been listed.
    Unknown,
}

/// Which pods run where, as the control plane knows it now.
pub trait PodDirectory: Send + Sync {
    /// True once the pods have been listed; until then callers are told to come back.
    fn synced(&self) -> bool;
    fn pod(&self, namespace: &str, name: &str) -> Option<PodInfo>;
    /// Whether some pod with `spec.nodeName == node`, not Failed and not Succeeded, has this identity.
    fn node_runs(&self, node: &str, namespace: &str, service_account: &str) -> bool;
    /// Whether some WorkloadEntry has this identity.
    fn holder(&self, namespace: &str, service_account: &str) -> Holder;
}

/// Which pods are to be captured, as decided now: ahead of what has been pushed.
pub trait Placements: Send + Sync {
    /// About a pod that is placed on `node`; any other is unknown.
    fn resolve(&self, node: &str, pod: &ResolveRequest) -> Verdict;
    /// Changes whenever an answer may have changed.
    fn news(&self) -> watch::Receiver<u64>;
}

/// Where enrolment reports arrive. `node` is that of the pod in the caller's token, never what the caller says.
pub trait ReportSink: Send + Sync {
    /// The complete list of the node: a pod that is not named is not enrolled.
    fn report(&self, node: &str, states: Vec<PodState>);
    /// The node's last stream ended. Its capture outlives that: what it reported is true until it, here or at another replica,
    /// reports anew.
    fn disconnected(&self, _node: &str) {}
}

/// A poisoned lock guards plain maps whose every state is valid, so the data is used on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use mesh_proto::workload::{Address, address};
    use xxhash_rust::xxh64::xxh64;

    use super::*;

    const T: &str = ROUTE_TYPE;

    fn resource(name: &str, body: &str) -> Resource {
        Resource::new(T, name, &body.to_owned())
    }

    #[test]
    fn a_workload_in_two_parts_is_the_workload_and_takes_little() {
        let (uid, name) = ("Kubernetes//Pod/shop/cart-1", "cart-1");
        let own = Workload { name: name.into(), node: "n1".into(), ..Workload::default() };
        let common = Workload { namespace: "shop".into(), canonical_name: "c".repeat(300), ..Workload::default() };
        let resource = Resource::workload(uid, &own, &common);
        let whole = Workload { uid: uid.into(), name: name.into(), node: "n1".into(), ..common.clone() };
        let inner = resource.message_as(WORKLOAD_TYPE).unwrap();
        assert_eq!(Workload::decode(inner.reader()).unwrap(), whole);
        let outer = Address { r#type: Some(address::Type::Workload(whole)) };
        assert_eq!(Address::decode(resource.message().reader()).unwrap(), outer);
        assert_eq!(Address::decode(resource.body()).unwrap(), outer);
        assert_eq!(resource.body().len(), outer.encoded_len());
        assert_eq!(resource.version, Version(xxh64(&resource.body(), 0)));

        let other = Resource::workload("Kubernetes//Pod/shop/cart-2", &own, &common);
        assert!(std::ptr::eq(&**resource.common.as_ref().unwrap(), &**other.common.as_ref().unwrap()));
        assert!(size_of::<Resource>() <= 80, "{}", size_of::<Resource>());

        let named = resource.with_aliases(vec!["/10.0.0.1".into(), "a\n/10.0.0.2".into(), "/fd00::1".into()]);
        assert!(named.aliases().eq(["/10.0.0.1", "/fd00::1"]), "none is made of another's pieces");

        let enrolment = Resource::enrolment("u", &PodEnrolment::default(), &PodEnrolment::default());
        assert_eq!(PodEnrolment::decode(enrolment.body()).unwrap().uid, "u");
        assert!(enrolment.message_as(WORKLOAD_TYPE).is_none());
    }

    #[test]
    fn publishing_the_same_content_wakes_nobody() {
        let store = ResourceStore::new();
        let mut seen = store.subscribe();
        assert_eq!(store.publish([resource("a", "1")]), 1);
        assert!(seen.has_changed().unwrap());
        seen.mark_unchanged();
        assert_eq!(store.publish([resource("a", "1")]), 1);
        assert!(!seen.has_changed().unwrap());
    }

    #[test]
    fn versions_are_read_as_they_are_written() {
        for version in [Version(0), Version(0xab), Version(u64::MAX)] {
            let text = version.to_string();
            assert_eq!((text.len(), Version::parse(&text)), (Version::LENGTH, Some(version)));
        }
        for text in ["", "1", "+00000000000000a", "00000000000000AB", "00000000000000ab0"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_first_publication_counts_even_when_empty() {
        let store = ResourceStore::new();
        assert_eq!(store.publish([]), 1);
        assert_eq!(store.publish([]), 1);
    }

    #[test]
    fn a_change_leaves_the_other_resources_shared() {
        let store = ResourceStore::new();
        store.publish([resource("a", "1"), resource("b", "1")]);
        let before = store.snapshot();
        store.publish([resource("a", "2"), resource("b", "1")]);
        let after = store.snapshot();
        assert!(Arc::ptr_eq(before.get(T, "b").unwrap(), after.get(T, "b").unwrap()));
        assert_ne!(before.get(T, "a").unwrap().version, after.get(T, "a").unwrap().version);
        assert_eq!(store.publish([resource("b", "1")]), 3, "a removal is a change");
    }

    #[test]
    fn a_changed_audience_is_a_change() {
        let store = ResourceStore::new();
        store.publish([resource("a", "1")]);
        let moved = resource("a", "1").for_audience(vec![Audience::Node("n".into())]);
        assert_eq!(store.publish([moved]), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_every_listening_client_and_forgets_those_that_left() {
        let acks = Arc::new(Acks::default());
        let (one, two, other) = (acks.client(), acks.client(), acks.client());
        one.subscribed("t");
        two.subscribed("t");
        other.subscribed("else");
        one.acked("t", 5);
        assert!(!acks.wait_acked("t", 5, Duration::from_secs(5)).await);
        drop(two);
        assert!(acks.wait_acked("t", 5, Duration::from_secs(5)).await);
    }

    #[test]
    fn tells_how_far_each_client_is_and_what_it_did_not_take() {
        let acks = Arc::new(Acks::default());
        let (client, _unknown) = (acks.client(), acks.client());
        let info = ClientInfo {
            namespace: "istio-system".into(),
            service_account: "ztunnel".into(),
            pod: Some("ztunnel-a".into()),
            node: Some("a".into()),
            waypoint: None,
            address: None,
            since: SystemTime::UNIX_EPOCH,
        };
        client.describe(info.clone());
        client.subscribed("t");
        let status = || {
            let (clients, more) = acks.clients(10);
            let [(found, types)] = &clients[..] else { panic!("{clients:?}") };
            assert_eq!((&**found, more), (&info, 0));
            let [TypeStatus { type_url, sent, acked, rejected }] = &types[..] else { panic!("{types:?}") };
            assert_eq!(type_url, "t");
            (*sent, *acked, rejected.clone())
        };
        assert_eq!(status(), (0, 0, None));
        client.sent("t", 3);
        client.sent("nobody's", 3);
        assert_eq!(status(), (3, 0, None));
        client.rejected("t", "no");
        client.acked("t", 3);
        assert_eq!(status(), (3, 3, Some("no".into())));
        client.acked("t", 4);
        assert_eq!(status(), (3, 4, Some("no".into())), "what it refused has not been replaced");
        client.sent("t", 5);
        assert_eq!(status(), (5, 4, Some("no".into())));
        client.acked("t", 5);
        assert_eq!(status(), (5, 5, None));
        client.answered("t", vec!["x".into(), "y".into()], [("x".into(), "bad".into())].into());
        assert_eq!(status(), (5, 5, Some("x: bad".into())));
        assert_eq!(acks.clients(0), (Vec::new(), 1));
    }
}
