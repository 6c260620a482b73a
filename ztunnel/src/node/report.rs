//! Tells the control plane what became of the pods it wanted enrolled: all of them, after each change and after each
//! reconnect, because a report stands for everything. By the connection of the xDS stream: of several replicas the one
//! that has said what to enrol is told what became of it.

use std::time::Duration;

use mesh::drain::DrainWatcher;
use mesh::grpc::AuthChannel;
use mesh_proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use mesh_proto::enrolment::{EnrolmentReport, PodState};
use tokio::sync::watch;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(15);
/// A report is small; a server that takes longer is not there.
const DEADLINE: Duration = Duration::from_secs(5);

/// Reports until the drain begins. `link` is the connection of the xDS stream while that is up: a control plane that comes
/// back has forgotten what it was told.
pub async fn run(
    mut link: watch::Receiver<Option<AuthChannel>>,
    mut states: watch::Receiver<Vec<PodState>>,
    drain: DrainWatcher,
) {
    let mut retry = FIRST_RETRY;
    loop {
        let pods = states.borrow_and_update().clone();
        let channel = link.borrow_and_update().clone();
        let failed = match channel {
            Some(channel) => {
                let mut client = EnrolmentServiceClient::new(channel);
                match tokio::time::timeout(DEADLINE, client.report(EnrolmentReport { pods })).await {
                    Ok(Ok(_)) => None,
                    Ok(Err(status)) => Some(status.to_string()),
                    Err(_) => Some(format!("no answer within {} s", DEADLINE.as_secs())),
                }
            }
            None => None,
        };
        match &failed {
            Some(error) => {
                tracing::warn!(%error, "reporting enrolled pods");
                retry = (retry * 2).min(LONGEST_RETRY);
            }
            None => retry = FIRST_RETRY,
        }
        tokio::select! {
            () = tokio::time::sleep(retry), if failed.is_some() => {}
            Ok(()) = states.changed() => {}
            Ok(()) = link.changed() => {}
            () = drain.draining() => return,
        }
    }
}
