//! A kubelet's side of the Container Runtime Interface, version 1: the few calls and fields that the tests use.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use hyper_util::rt::TokioIo;
use prost::Message;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, Message)]
pub struct Metadata {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub uid: String,
    #[prost(string, tag = "3")]
    pub namespace: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<Metadata>,
    #[prost(string, tag = "3")]
    pub log_directory: String,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<Linux>,
}

/// Present and empty: the defaults, and a network namespace of its own.
#[derive(Clone, PartialEq, Message)]
pub struct Linux {}

#[derive(Clone, PartialEq, Message)]
struct RunSandbox {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct Sandbox {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<SandboxStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<SandboxNetwork>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxNetwork {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<Image>,
    #[prost(string, repeated, tag = "4")]
    arguments: Vec<String>,
    #[prost(string, tag = "11")]
    log_path: String,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    sandbox: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<SandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<ContainerStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatus {
    /// 2 is "exited".
    #[prost(int32, tag = "3")]
    state: i32,
    #[prost(int32, tag = "7")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {
    #[prost(bool, tag = "1")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<Condition>,
}

#[derive(Clone, PartialEq, Message)]
struct Condition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bool, tag = "2")]
    status: bool,
    #[prost(string, tag = "4")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

/// A connection to a runtime.
#[derive(Clone)]
pub struct Runtime(Channel);

impl Runtime {
    /// Connects when it is first used.
    pub fn at(socket: &Path) -> Self {
        let socket: PathBuf = socket.to_owned();
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
        });
        // The name means nothing: the connector knows where to go.
        Self(Endpoint::from_static("http://runtime").timeout(PATIENCE).connect_with_connector_lazy(connect))
    }

    async fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.0.clone());
        grpc.ready().await?;
        let path = PathAndQuery::from_static(method);
        let codec = tonic_prost::ProstCodec::default();
        Ok(grpc.unary(tonic::Request::new(request), path, codec).await?.into_inner())
    }

    /// The network the runtime puts pods into, as it has read it; an error while it has none.
    pub async fn network(&self) -> Result<String> {
        let request = StatusRequest { verbose: true };
        let response: StatusResponse = self.call("/runtime.v1.RuntimeService/Status", request).await?;
        let conditions = response.status.unwrap_or_default().conditions;
        match conditions.into_iter().find(|condition| condition.kind == "NetworkReady") {
            Some(condition) if condition.status => Ok(response.info.get("cniconfig").cloned().unwrap_or_default()),
            other => anyhow::bail!("the network is not ready: {other:?}"),
        }
    }

    /// Makes a pod's sandbox: its ID and its address.
    pub async fn run_sandbox(&self, config: &SandboxConfig) -> Result<(String, String)> {
        let request = RunSandbox { config: Some(config.clone()) };
        let Sandbox { id } = self.call("/runtime.v1.RuntimeService/RunPodSandbox", request).await?;
        let request = Sandbox { id: id.clone() };
        let response: SandboxStatusResponse = self.call("/runtime.v1.RuntimeService/PodSandboxStatus", request).await?;
        Ok((id, response.status.unwrap_or_default().network.unwrap_or_default().ip))
    }

    /// Starts a container in a sandbox.
    pub async fn start(&self, sandbox: &str, pod: &SandboxConfig, image: &str, arguments: &[&str]) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".into() }),
            image: Some(Image { image: image.into() }),
            arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
            log_path: "main.log".into(),
        };
        let request =
            CreateContainer { sandbox: sandbox.into(), config: Some(config), sandbox_config: Some(pod.clone()) };
        let Container { id } = self.call("/runtime.v1.RuntimeService/CreateContainer", request).await?;
        let _: Nothing = self.call("/runtime.v1.RuntimeService/StartContainer", Container { id: id.clone() }).await?;
        Ok(id)
    }

    /// The exit code, once it has ended.
    pub async fn exit_code(&self, container: &str) -> Result<Option<i32>> {
        let request = Container { id: container.into() };
        let response: ContainerStatusResponse =
            self.call("/runtime.v1.RuntimeService/ContainerStatus", request).await?;
        let status = response.status.unwrap_or_default();
        Ok((status.state == 2).then_some(status.exit_code))
    }

    /// Ends and forgets a sandbox and what is in it.
    pub async fn remove(&self, sandbox: &str) -> Result<()> {
        let request = || Sandbox { id: sandbox.into() };
        let _: Nothing = self.call("/runtime.v1.RuntimeService/StopPodSandbox", request()).await?;
        let _: Nothing = self.call("/runtime.v1.RuntimeService/RemovePodSandbox", request()).await?;
        Ok(())
    }
}
