//! What the policies of a destination say to a connection.

use mesh::model::Workload;
use mesh::policy::{Connection, Denial, Policy, authorize};
use mesh::store::Snapshot;
use mesh::telemetry::ResponseFlag;
use serde::Serialize;

use super::Refusal;

/// One policy that governs the destination.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    /// `<namespace>/<name>`.
    pub policy: String,
    /// `Allow` or `Deny`.
    pub action: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: String,
    /// Reported by ztunnel, and not enforced.
    pub dry_run: bool,
    /// The first of its rules that matches, counted from 0 as they stand in the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
    /// It is the one that decides.
    pub decides: bool,
}

/// Asks as the data path does, except that dry-run policies are not told of it: they count connections.
pub(super) fn ask(world: &Snapshot, workload: &Workload, conn: &Connection) -> (Vec<Asked>, Option<Refusal>) {
    let policies: Vec<&Policy> = world.policies_for(workload).collect();
    let outcome = authorize(policies.iter().copied().filter(|policy| !policy.is_dry_run()), conn);
    let deciding = match &outcome {
        Ok(permit) => permit.allowed_by(),
        Err(denial) => denial.policy(),
    };
    let asked = policies.iter().map(|policy| Asked {
        policy: policy.key().to_string(),
        action: format!("{:?}", policy.action()),
        scope: format!("{:?}", policy.scope()),
        dry_run: policy.is_dry_run(),
        rule: policy.matching_rule(conn),
        decides: deciding == Some(policy.key()),
    });
    let asked: Vec<Asked> = asked.collect();
    let refused = outcome.err().map(|denial| Refusal {
        by: "destination",
        flag: ResponseFlag::Deny.as_str(),
        reason: reason(&denial, &asked),
    });
    (asked, refused)
}

fn reason(denial: &Denial, asked: &[Asked]) -> String {
    let rule = asked.iter().find(|policy| policy.decides).and_then(|policy| policy.rule);
    match rule {
        Some(rule) => format!("policy: {denial}, rule {rule}"),
        None => format!("policy: {denial}"),
    }
}
