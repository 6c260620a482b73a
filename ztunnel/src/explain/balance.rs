//! Which endpoints of a service may be picked, and why the others are not.

use std::sync::Arc;

use mesh::model::{Service, Workload};
use serde::Serialize;

use super::View;
use crate::resolve::{self, Wanted};

/// The endpoints of one service, as a source's load balancing sees them.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Balancing {
    pub service: String,
    /// `Standard`, `Strict`, …, and the scopes it goes by.
    pub mode: String,
    pub candidates: Vec<Candidate>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    pub workload: Arc<str>,
    /// That it would be called on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Of being picked, from 0 to 1.
    pub probability: f64,
    /// Why it is out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<String>,
}

/// An endpoint that may be picked: its weight, and what the weights before it add up to.
pub(super) struct Share {
    pub(super) before: u64,
    pub(super) weight: u32,
    pub(super) total: u64,
}

impl Share {
    pub(super) fn probability(&self) -> f64 {
        f64::from(self.weight) / self.total as f64
    }
}

pub(super) fn balance(
    view: &View<'_>,
    source: &Workload,
    service: &Arc<Service>,
    wanted: Wanted,
) -> (Balancing, Vec<Share>) {
    let key = service.key();
    // An unknown port: nobody is usable, and the route says so.
    let usable = resolve::usable(view.world, service, source, wanted).unwrap_or_default();
    let healthy: Vec<&Arc<Workload>> = view.world.endpoints(&key).map(|(workload, _)| workload).collect();
    let preferred = resolve::prefer(service, source, usable.clone());
    let total: u64 = preferred.iter().map(|(workload, _)| u64::from(workload.capacity)).sum();
    let mut shares = Vec::new();
    let mut before = 0;
    for (workload, _) in preferred.iter().filter(|(workload, _)| workload.capacity > 0) {
        shares.push(Share { before, weight: workload.capacity, total });
        before += u64::from(workload.capacity);
    }
    let lb = &service.load_balancing;
    let is =
        |list: &[(&Arc<Workload>, u16)], of: &Workload| list.iter().find(|(w, _)| w.uid == of.uid).map(|(_, p)| *p);
    let candidates = view.world.all_endpoints(&key).map(|(workload, _)| {
        let out = if !healthy.iter().any(|w| w.uid == workload.uid) {
            Some("unhealthy".to_owned())
        } else if is(&usable, workload).is_none() {
            let nowhere = workload.addresses.is_empty() && workload.hostname.is_empty();
            Some(if nowhere { "it has no address".into() } else { format!("it does not serve port {}", wanted.port()) })
        } else if is(&preferred, workload).is_none() {
            Some(format!("others match more of {:?} ({:?})", lb.routing_preferences, lb.mode))
        } else if workload.capacity == 0 {
            Some("its capacity is 0".to_owned())
        } else {
            None
        };
        let probability = match out {
            None => f64::from(workload.capacity) / total as f64,
            Some(_) => 0.0,
        };
        Candidate { workload: workload.uid.clone(), port: is(&usable, workload), probability, out }
    });
    let scopes = &lb.routing_preferences;
    let mode = if scopes.is_empty() { format!("{:?}", lb.mode) } else { format!("{:?} by {scopes:?}", lb.mode) };
    (Balancing { service: key.to_string(), mode, candidates: candidates.collect() }, shares)
}
