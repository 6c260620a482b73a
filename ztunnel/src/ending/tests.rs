use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use mesh::identity::Identity;
use mesh::model::{NamespacedHostname, NamespacedName, Template, Workload};
use mesh::net::OriginalDst;
use mesh::store::{Store, Update};
use mesh::tls::TlsError;

use super::*;
use crate::resolve;

/// One way to end: what it is, what it must be flagged as, what its text must say.
struct Row {
    variant: &'static str,
    /// The sample is the variant of its row.
    is_it: bool,
    ending: Ending,
    flag: ResponseFlag,
    says: &'static str,
}

/// Rows for every variant of an error, with the way it becomes an ending. A variant without a row does not compile, as the
/// `match` has no other arm.
macro_rules! rows {
    ($rows:ident, $error:ty, $into:expr, { $($variant:pat => $sample:expr, $flag:ident, $says:literal;)+ }) => {
        fn variant(error: &$error) -> &'static str {
            match error { $($variant => stringify!($variant),)+ }
        }
        $({
            let sample: $error = $sample;
            let name = stringify!($variant);
            let is_it = variant(&sample) == name;
            let (flag, says) = (ResponseFlag::$flag, $says);
            $rows.push(Row { variant: name, is_it, ending: $into(sample), flag, says });
        })+
    };
}

fn io() -> io::Error {
    io::Error::from(io::ErrorKind::ConnectionRefused)
}

fn id(name: &str) -> Identity {
    Identity::new("td", "shop", name).expect("an identity")
}

fn addr() -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 80))
}

fn tunnel(source: TunnelError) -> Ending {
    Ending::Tunnel { to: addr(), source }
}

fn tls(error: TlsError) -> Ending {
    tunnel(TunnelError::Tls(error))
}

fn service() -> NamespacedHostname {
    NamespacedHostname::new("shop", "web")
}

/// Nobody but `resolve` makes one.
fn by_name() -> NoRoute {
    let workload = |uid: &str, hostname: &str, ip: &str| Workload {
        uid: uid.into(),
        addresses: ip.parse().into_iter().collect(),
        template: Arc::new(Template { hostname: hostname.into(), ..Template::default() }),
        ..Workload::default()
    };
    let mut db = workload("db", "db.example", "");
    let port = mesh::model::EndpointPort { service_port: 80, target_port: 80, app_protocol: Default::default() };
    db.services.insert(service(), [port].into_iter().collect());
    let vip = mesh::model::NetworkAddress { network: "".into(), address: addr().ip() };
    let web = mesh::model::Service {
        namespace: "shop".into(),
        hostname: "web".into(),
        vips: vec![vip],
        ports: [(80, mesh::model::ServicePort::default())].into(),
        ..Default::default()
    };
    let store = Store::new();
    store.apply(Update::new().workload(db).service(web));
    let client = workload("client", "", "10.0.0.9");
    resolve::outbound(&store.snapshot(), &client, OriginalDst(addr()), &mut rand::rng()).expect_err("a name is lacking")
}

fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    routes(&mut rows);
    tunnels(&mut rows);
    sessions(&mut rows);
    identities(&mut rows);
    policies(&mut rows);
    endings(&mut rows);
    rows
}

fn routes(rows: &mut Vec<Row>) {
    let (waypoint, workload, port) = (|| "istio-system/wp".to_owned(), || "w".into(), 80);
    rows!(rows, NoRoute, Ending::NoRoute, {
        NoRoute::NoHealthyUpstream { .. } => NoRoute::NoHealthyUpstream { service: service(), port }, NoHealthyUpstream, "no healthy endpoint of service shop/web";
        NoRoute::UnknownPort { .. } => NoRoute::UnknownPort { service: service(), port }, NoHealthyUpstream, "does not define port 80";
        NoRoute::UnknownWaypoint { .. } => NoRoute::UnknownWaypoint { waypoint: waypoint() }, WaypointUnavailable, "not known";
        NoRoute::WaypointUnavailable { .. } => NoRoute::WaypointUnavailable { waypoint: waypoint() }, WaypointUnavailable, "no ready endpoint";
        NoRoute::Unanswered { .. } => NoRoute::Unanswered { unknown: "/10.0.0.1".into(), seconds: 5 }, Connect, "whether /10.0.0.1 is of the mesh";
        NoRoute::NoAddress { .. } => NoRoute::NoAddress { workload: workload() }, Connect, "has no address this source can use";
        NoRoute::ByName(_) => by_name(), Connect, "known by its hostname db.example only";
        NoRoute::NameFailed { .. } => NoRoute::NameFailed { workload: workload(), hostname: "h".into(), reason: "r".into() }, Connect, "looking up h";
        NoRoute::BadIdentity { .. } => NoRoute::BadIdentity { workload: workload(), reason: "odd".into() }, IdentityError, "workload w: odd";
        NoRoute::NotByService { .. } => NoRoute::NotByService { workload: workload(), network: "far".into() }, Connect, "only endpoints and waypoints of services";
        NoRoute::Unrecognisable { .. } => NoRoute::Unrecognisable { service: service(), network: "far".into() }, IdentityError, "no identity that tells them";
        NoRoute::UnknownGateway { .. } => NoRoute::UnknownGateway { gateway: "gw".into(), network: "far".into() }, Connect, "gateway gw to network \"far\" is not known";
        NoRoute::GatewayUnavailable { .. } => NoRoute::GatewayUnavailable { gateway: "gw".into(), network: "far".into() }, NoHealthyUpstream, "gateway gw to network \"far\" has no ready";
        NoRoute::OtherNetwork { .. } => NoRoute::OtherNetwork { workload: workload(), network: "far".into() }, Connect, "on network \"far\"";
    });
    bad_targets(rows);
}

fn bad_targets(rows: &mut Vec<Row>) {
    rows!(rows, BadTarget, Ending::BadTarget, {
        BadTarget::WrongAddress { .. } => BadTarget::WrongAddress { asked: addr(), here: addr().ip() }, BadRequest, "10.0.0.1:80 arrived at";
        BadTarget::UnknownService { .. } => BadTarget::UnknownService { host: "h".into(), port: 80 }, BadRequest, "does not serve";
        BadTarget::OwnPort(_) => BadTarget::OwnPort(15008), BadRequest, "the proxy's own";
        BadTarget::NoAddress(_) => BadTarget::NoAddress("h".into()), BadRequest, "no address to announce";
    });
}

fn tunnels(rows: &mut Vec<Row>) {
    let h2 = || h2::Error::from(h2::Reason::PROTOCOL_ERROR);
    rows!(rows, TunnelError, tunnel, {
        TunnelError::Connect(_) => TunnelError::Connect(io()), Connect, "connecting: connection refused";
        TunnelError::ConnectTimeout => TunnelError::ConnectTimeout, NetworkPolicy, "NetworkPolicy allow port 15008";
        TunnelError::Tls(_) => TunnelError::Tls(TlsError::NoIdentity), TlsFailure, "no SPIFFE identity";
        TunnelError::H2(_) => TunnelError::H2(h2()), H2HandshakeFailure, "http/2: ";
        TunnelError::Stream(_) => TunnelError::Stream(h2()), Connect, "tunnel: ";
        TunnelError::Status(StatusCode::UNAUTHORIZED) => TunnelError::Status(StatusCode::UNAUTHORIZED), Deny, "answered 401";
        TunnelError::Status(_) => TunnelError::Status(StatusCode::BAD_GATEWAY), UpstreamRejected, "answered 502";
        TunnelError::ResponseTimeout => TunnelError::ResponseTimeout, Timeout, "did not answer the CONNECT";
        TunnelError::PeerGone => TunnelError::PeerGone, Timeout, "neither the CONNECT nor a PING";
        TunnelError::Shared(_) => TunnelError::Shared(std::sync::Arc::new(TunnelError::Status(StatusCode::NOT_FOUND))), UpstreamRejected, "404";
        TunnelError::Authority(_) => TunnelError::Authority("h:80".parse().expect("an authority")), BadRequest, "h:80 is not an authority";
        TunnelError::Unstable => TunnelError::Unstable, Connect, "keep closing";
    });
}

fn sessions(rows: &mut Vec<Row>) {
    rows!(rows, TlsError, tls, {
        TlsError::UntrustedRoot => TlsError::UntrustedRoot, TlsFailure, "does not chain to a root";
        TlsError::WrongTrustDomain { .. } => TlsError::WrongTrustDomain { expected: "td".into(), got: vec![] }, TlsFailure, "another trust domain";
        TlsError::IdentityMismatch { .. } => TlsError::IdentityMismatch { expected: vec![id("a")], got: vec![id("b")] }, TlsFailure, "not who was expected";
        TlsError::NoIdentity => TlsError::NoIdentity, TlsFailure, "no SPIFFE identity";
        TlsError::Expired => TlsError::Expired, TlsFailure, "has expired";
        TlsError::NotYetValid => TlsError::NotYetValid, TlsFailure, "not valid yet";
        TlsError::Revoked => TlsError::Revoked, CertRevoked, "revoked";
        TlsError::NoCertificate => TlsError::NoCertificate, TlsFailure, "sent no certificate";
        TlsError::BadCertificate(_) => TlsError::BadCertificate("x".into()), TlsFailure, "not acceptable: x";
        TlsError::NoAlpn => TlsError::NoAlpn, TlsFailure, "does not speak h2";
        TlsError::Rejected(_) => TlsError::Rejected("BadCertificate".into()), TlsFailure, "refused us: BadCertificate";
        TlsError::Protocol(_) => TlsError::Protocol("x".into()), TlsFailure, "broke the protocol";
        TlsError::Io(_) => TlsError::Io(io()), TlsFailure, "tls: connection refused";
        TlsError::NoKeyExchange => TlsError::NoKeyExchange, TlsFailure, "key exchange";
        TlsError::Timeout => TlsError::Timeout, Timeout, "handshake took too long";
    });
}

fn identities(rows: &mut Vec<Row>) {
    let reason = || "why".to_owned();
    rows!(rows, IdentityError, Ending::Identity, {
        IdentityError::Request { .. } => IdentityError::Request { identity: id("a"), reason: reason() }, IdentityError, "signing request";
        IdentityError::Refused { .. } => IdentityError::Refused { identity: id("a"), reason: reason() }, IdentityError, "authority answered";
        IdentityError::Unreachable { .. } => IdentityError::Unreachable { identity: id("a"), reason: reason() }, IdentityError, "not reachable";
        IdentityError::Malformed(_) => IdentityError::Malformed(reason()), IdentityError, "certificate: why";
        IdentityError::WrongIdentity { .. } => IdentityError::WrongIdentity { expected: id("a"), got: id("b") }, IdentityError, "was asked for";
        IdentityError::Expired { .. } => IdentityError::Expired { identity: id("a"), at: SystemTime::UNIX_EPOCH }, IdentityError, "expired at 1970";
        IdentityError::CaFiles { .. } => IdentityError::CaFiles { path: "/ca".into(), reason: reason() }, IdentityError, "authority in /ca";
        IdentityError::Forgotten(_) => IdentityError::Forgotten(id("a")), IdentityError, "no workload here has it any more";
        IdentityError::Stopped(_) => IdentityError::Stopped(id("a")), IdentityError, "rotation has ended";
    });
}

fn policies(rows: &mut Vec<Row>) {
    let policy = || NamespacedName::new("shop", "p");
    rows!(rows, Denial, Ending::Denied, {
        Denial::Policy(_) => Denial::Policy(policy()), Deny, "explicitly denied by policy shop/p";
        Denial::Unreadable { .. } => Denial::Unreadable { policy: policy(), reason: "r".into() }, Deny, "not understood";
        Denial::NoAllowMatched => Denial::NoAllowMatched, Deny, "allow policies exist, but none matched";
    });
    copies(rows);
}

fn copies(rows: &mut Vec<Row>) {
    rows!(rows, CopyError, Ending::Copy, {
        CopyError::Downstream(_) => CopyError::Downstream(io()), Reset, "downstream: ";
        CopyError::Upstream(_) => CopyError::Upstream(io()), Reset, "upstream: ";
    });
}

/// Those that only wrap another error have other content than above, so that texts can be compared.
fn endings(rows: &mut Vec<Row>) {
    let workload = || "w".to_owned();
    let parse = || "x".parse::<Identity>().expect_err("no identity");
    rows!(rows, Ending, std::convert::identity, {
        Ending::NoRoute(_) => NoRoute::NoAddress { workload: "z".into() }.into(), Connect, "workload z";
        Ending::BadTarget(_) => BadTarget::OwnPort(15001).into(), BadRequest, "15001";
        Ending::UnknownWorkload(_) => Ending::UnknownWorkload(workload()), Connect, "not known from the control plane";
        Ending::WorkloadMismatch { .. } => Ending::WorkloadMismatch { workload: workload(), found: "f".into(), enrolled: "e".into() }, IdentityError, "was enrolled here";
        Ending::BadIdentity { .. } => Ending::BadIdentity { workload: workload(), source: parse() }, IdentityError, "not of the form";
        Ending::Identity(_) => IdentityError::Malformed("z".into()).into(), IdentityError, "certificate: z";
        Ending::Tunnel { .. } => tunnel(TunnelError::Status(StatusCode::GONE)), UpstreamRejected, "410";
        Ending::Connect { .. } => Ending::Connect { to: addr(), source: no_descriptor() }, Exhausted, "connecting to 10.0.0.1:80: Too many open files";
        Ending::ConnectTimeout { .. } => Ending::ConnectTimeout { to: addr(), seconds: 10 }, Connect, "no answer within 10 s";
        Ending::Beyond { .. } => Ending::Beyond { gateway: addr(), source: TunnelError::ResponseTimeout }, Timeout, "through gateway 10.0.0.1:80";
        Ending::Announce { .. } => Ending::Announce { to: addr(), source: io() }, Connect, "telling the application's proxy";
        Ending::NoSource(_) => Ending::NoSource(addr()), Connect, "no address of the family";
        Ending::Denied(_) => Denial::Policy(NamespacedName::new("shop", "z")).into(), Deny, "shop/z";
        Ending::DeniedLater => Ending::DeniedLater, Deny, "no longer allows";
        Ending::Revoked => Ending::Revoked, CertRevoked, "the peer's certificate has been revoked";
        Ending::Drained => Ending::Drained, Drained, "going away";
        Ending::GivenUp => Ending::GivenUp, Cancelled, "gave the tunnel up";
        Ending::Answer(_) => Ending::Answer(TunnelError::Unstable), Connect, "answering the tunnel request";
        Ending::Copy(_) => CopyError::Upstream(io::ErrorKind::StorageFull.into()).into(), Reset, "upstream: ";
    });
}

#[test]
fn every_ending_has_its_flag_and_a_text_of_its_own() {
    let mut texts = HashMap::new();
    for Row { variant, is_it, ending, flag, says } in all() {
        assert!(is_it, "the sample of {variant} is another variant");
        assert_eq!(ending.flag(), flag, "{variant}");
        let failure = Failure::from(ending);
        assert_eq!(failure.flag, flag, "{variant}");
        assert!(failure.message.contains(says), "{variant}: {}", failure.message);
        // The only row that stands for another one: what TLS says is in the table of TLS.
        if variant != "TunnelError::Tls(_)"
            && let Some(other) = texts.insert(failure.message.clone(), variant)
        {
            panic!("{variant} and {other} say the same: {}", failure.message);
        }
    }
}

fn no_descriptor() -> io::Error {
    nix::errno::Errno::EMFILE.into()
}

/// Whose fault it is that there is no connection.
#[test]
fn what_we_have_no_descriptor_for_is_told_apart_from_what_was_refused() {
    let flags = |error: fn() -> io::Error| {
        [Ending::Connect { to: addr(), source: error() }.flag(), TunnelError::Connect(error()).flag()]
    };
    assert_eq!(flags(no_descriptor), [ResponseFlag::Exhausted; 2]);
    assert_eq!(flags(io), [ResponseFlag::Connect; 2]);
}

/// Where Istio has a name for it, the flag is that name.
#[test]
fn flags_of_istio_keep_their_names() {
    let istio = [
        "-",
        "DENY",
        "CONNECT",
        "TLS_FAILURE",
        "H2_HANDSHAKE_FAILURE",
        "NETWORK_POLICY",
        "IDENTITY_ERROR",
        "CERT_REVOKED",
    ];
    let mut used: Vec<&str> = all().iter().map(|row| row.flag.as_str()).collect();
    used.sort_unstable();
    used.dedup();
    for name in istio.iter().filter(|name| **name != "-") {
        assert!(used.contains(name), "no ending is flagged {name}");
    }
    let ours: Vec<&str> = used.into_iter().filter(|name| !istio.contains(name)).collect();
    let documented = [
        "BAD_REQUEST",
        "CANCELLED",
        "DRAINED",
        "EXHAUSTED",
        "NO_HEALTHY_UPSTREAM",
        "RESET",
        "TIMEOUT",
        "UPSTREAM_REJECTED",
        "WAYPOINT_UNAVAILABLE",
    ];
    assert_eq!(ours, documented, "ARCHITECTURE.md lists those that Istio does not have");
}
