//! The waypoint in one process: real TLS, real HBONE, real HTTP on loopback; only the control plane is a function call.

#![allow(dead_code, reason = "each test program uses a part")]

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mesh::clock::Clock;
use mesh::drain::{self, DrainTrigger, DrainWatcher};
use mesh::hbone::{Authority, ConnectHeaders, HboneStream, Pool, PoolKey, PoolSettings, TunnelError};
use mesh::identity::{CertificateManager, CertificateSource, FileCa, Identity};
use mesh::model::{
    AppProtocol, EndpointPort, GatewayAddress, GatewayDestination, NamespacedHostname, Service, ServicePort, Template,
    Workload,
};
use mesh::serve::accept_loop;
use mesh::store::{Store, Update};
use mesh::xds::ResourceHandler;
use mesh_proto::waypoint::{self as wire};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use waypoint::config::Config;
use waypoint::listener::{self, Shared, Worker};
use waypoint::target::Me;
use waypoint::world::WorldStore;

pub const VIP: &str = "10.96.0.1";
pub const HTTP: u16 = 80;
pub const TCP: u16 = 90;
pub const AUTO: u16 = 91;
pub const GRPC: u16 = 92;

pub fn identity(name: &str) -> Identity {
    Identity::new("cluster.local", "shop", name).expect("identity")
}

/// A waypoint that serves `shop/server` and the means to play its control plane and its clients.
pub struct Mesh {
    pub ca: Arc<FileCa>,
    pub store: Arc<Store>,
    pub world: Arc<WorldStore>,
    pub address: SocketAddr,
    pub client: Pool,
    pub drain: DrainWatcher,
    pub worker: Arc<Worker>,
    /// Taken by whoever drains.
    pub trigger: Option<DrainTrigger>,
    /// The accept loop; it ends with the drain.
    pub serving: tokio::task::JoinHandle<()>,
}

impl Mesh {
    pub async fn start() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let ca = Arc::new(FileCa::generate("cluster.local", Duration::from_secs(3600), Clock::system()).expect("CA"));
        let env = [
            ("POD_NAME", "waypoint-0"),
            ("POD_NAMESPACE", "shop"),
            ("SERVICE_ACCOUNT", "waypoint"),
            ("GATEWAY_NAME", "waypoint"),
            ("ACCESS_LOG", "off"),
        ];
        let config = Config::from_env(env.map(|(k, v)| (k.to_owned(), v.to_owned()))).expect("settings");
        let me = Me { service: NamespacedHostname::new("shop", config.hostname()), network: "".into() };
        let (trigger, drain) = drain::channel();
        let (certificates, rotation) = CertificateManager::new(ca.clone(), Clock::system());
        tokio::spawn(rotation.run(drain.clone()));
        let (store, world) = (Store::new(), Arc::new(WorldStore::default()));
        let shared = Shared::new(config, me, identity("waypoint"), store.clone(), world.clone(), certificates);
        let worker = Arc::new(Worker::new(Arc::new(shared)));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listener");
        let address = listener.local_addr().expect("address");
        let (watch, accepting) = (drain.clone(), worker.clone());
        let serving = tokio::spawn(accept_loop(listener, drain.clone(), move |stream, peer| {
            listener::connection(accepting.clone(), stream, peer, watch.clone())
        }));
        Self {
            ca,
            store,
            world,
            address,
            client: Pool::new(PoolSettings::default()),
            drain,
            worker,
            trigger: Some(trigger),
            serving,
        }
    }

    /// `shop/server`, bound to the waypoint, with one plaintext endpoint per address.
    pub fn serve(&self, endpoints: &[SocketAddr]) {
        let key = NamespacedHostname::new("shop", "server.shop.svc.cluster.local");
        self.store.apply(Update::new().service(service("server", VIP, true)));
        for (n, at) in endpoints.iter().enumerate() {
            self.store.apply(Update::new().workload(endpoint(&key, n, *at)));
        }
    }

    /// A service of its own behind `name`, as a backend of routes.
    pub fn backend(&self, name: &str, at: SocketAddr) {
        let service = service(name, "10.96.0.77", false);
        let key = service.key();
        let workload = Workload { uid: format!("c//Pod/shop/{name}").into(), ..endpoint(&key, 0, at) };
        self.store.apply(Update::new().service(service).workload(workload));
    }

    pub fn routes(&self, routes: Vec<wire::Route>) {
        let named = |r: &wire::Route| format!("HTTPRoute/{}/{}", r.namespace, r.name);
        deliver(&*self.world.route_handler(), &routes, named);
    }

    pub fn policies(&self, policies: Vec<wire::HttpPolicy>) {
        let named = |p: &wire::HttpPolicy| format!("AuthorizationPolicy/{}/{}", p.namespace, p.name);
        deliver(&*self.world.policy_handler(), &policies, named);
    }

    pub async fn connect(&self, authority: &str) -> Result<HboneStream, TunnelError> {
        let source = identity("client");
        let certificate = self.ca.fetch(&source).await.expect("certificate");
        let at = self.address;
        let key = PoolKey::new(source, vec![identity("waypoint")], at, Ipv4Addr::LOCALHOST.into());
        let authority: Authority = authority.parse().expect("authority");
        let dial = move || TcpStream::connect(at);
        self.client.connect(key, &certificate, dial, &authority, &ConnectHeaders::default()).await.map(|t| t.stream)
    }

    pub async fn tunnel(&self, port: u16) -> HboneStream {
        self.connect(&format!("{VIP}:{port}")).await.expect("tunnel")
    }

    pub async fn ask(&self, request: http::request::Builder) -> (StatusCode, http::HeaderMap, String) {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.tunnel(HTTP).await)).await.expect("handshake");
        tokio::spawn(connection.with_upgrades());
        let request = request.header("host", "server").body(Full::new(Bytes::from_static(b"hello"))).expect("request");
        read(sender.send_request(request).await.expect("response")).await
    }

    pub async fn get(&self, path: &str) -> (StatusCode, http::HeaderMap, String) {
        self.ask(Request::get(path)).await
    }
}

pub async fn read(response: Response<Incoming>) -> (StatusCode, http::HeaderMap, String) {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.expect("body").to_bytes();
    (parts.status, parts.headers, String::from_utf8_lossy(&bytes).into_owned())
}

pub fn service(name: &str, vip: &str, bound: bool) -> Service {
    let gateway = GatewayAddress {
        destination: GatewayDestination::Hostname(NamespacedHostname::new("shop", "waypoint.shop.svc.cluster.local")),
        hbone_mtls_port: 15008,
    };
    let port = |app_protocol| ServicePort { target_port: 0, app_protocol };
    Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
        vips: vec![format!("/{vip}").parse().expect("vip")],
        ports: [
            (HTTP, port(AppProtocol::Http11)),
            (TCP, port(AppProtocol::Tcp)),
            (AUTO, port(AppProtocol::Unknown)),
            (GRPC, port(AppProtocol::Grpc)),
        ]
        .into(),
        waypoint: bound.then_some(gateway),
        ..Default::default()
    }
}

/// What a control plane sends, all of which is taken.
fn deliver<M: Message>(handler: &dyn ResourceHandler, messages: &[M], named: impl Fn(&M) -> String) {
    let mut batch = handler.begin();
    for message in messages {
        batch.update(&named(message).into(), &message.encode_to_vec());
    }
    let rejected = batch.apply(vec![]);
    assert!(rejected.is_empty(), "{rejected:?}");
}

pub fn endpoint(service: &NamespacedHostname, n: usize, at: SocketAddr) -> Workload {
    let ports = [HTTP, TCP, AUTO, GRPC].map(|p| EndpointPort {
        service_port: p,
        target_port: at.port(),
        app_protocol: AppProtocol::Unknown,
    });
    Workload {
        uid: format!("c//Pod/shop/server-{n}").into(),
        name: format!("server-{n}").into(),
        addresses: vec![at.ip()],
        template: Arc::new(Template {
            namespace: "shop".into(),
            trust_domain: "cluster.local".into(),
            service_account: "server".into(),
            capacity: 1,
            services: [(service.clone(), ports.into_iter().collect())].into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// An HTTP server that answers with its name, the method, the path and what it saw of some headers.
pub async fn origin(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listener");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(origin_connection(name, stream));
        }
    });
    address
}

async fn origin_connection(name: &'static str, stream: TcpStream) {
    let service = service_fn(move |mut request: Request<Incoming>| async move {
        if request.headers().contains_key("upgrade") {
            let upgraded = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgraded.await.expect("upgraded"));
                let mut byte = [0; 4];
                io.read_exact(&mut byte).await.expect("read");
                io.write_all(&byte).await.expect("write");
                io.shutdown().await.expect("shutdown");
            });
            let answer = Response::builder().status(101).header("connection", "upgrade").header("upgrade", "websocket");
            return Ok::<_, Infallible>(answer.body(Full::default()).expect("response"));
        }
        if request.uri().path() == "/never" {
            std::future::pending::<()>().await;
        }
        let header = |n: &str| request.headers().get(n).and_then(|v| v.to_str().ok()).unwrap_or("-").to_owned();
        let seen = format!(
            "{name} {} {} xff={} id={} proto={} gone={}",
            request.method(),
            request.uri().path_and_query().map_or("", |p| p.as_str()),
            header("x-forwarded-for"),
            header("x-request-id").len(),
            header("x-forwarded-proto"),
            header("x-forwarded-client-cert"),
        );
        let close = request.headers().contains_key("x-close");
        let _ = request.into_body().collect().await;
        let mut response = Response::new(Full::new(Bytes::from(seen)));
        if close {
            response.headers_mut().insert("connection", "close".parse().expect("value"));
        }
        Ok(response)
    });
    let _ =
        auto::Builder::new(TokioExecutor::new()).serve_connection_with_upgrades(TokioIo::new(stream), service).await;
}
