//! Tells the control plane what became of the pods it wanted enrolled: all of them, after each change and after each
//! reconnect, because a report stands for everything.

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

/// Reports until the drain begins. `connected` is the state of the xDS stream: a control plane that comes back has
/// forgotten what it was told.
pub async fn run(
    channel: AuthChannel,
    mut states: watch::Receiver<Vec<PodState>>,
    mut connected: watch::Receiver<bool>,
    drain: DrainWatcher,
) {
    let mut client = EnrolmentServiceClient::new(channel);
    let mut retry = FIRST_RETRY;
    loop {
        let pods = states.borrow_and_update().clone();
        let up = *connected.borrow_and_update();
        let failed = if up {
            let report = client.report(EnrolmentReport { pods });
            match tokio::time::timeout(DEADLINE, report).await {
                Ok(Ok(_)) => None,
                Ok(Err(status)) => Some(status.to_string()),
                Err(_) => Some(format!("no answer within {} s", DEADLINE.as_secs())),
            }
        } else {
            None
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
            Ok(()) = connected.changed() => {}
            () = drain.draining() => return,
        }
    }
}
