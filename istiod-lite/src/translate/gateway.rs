//! Status of GatewayClasses and of the Gateways that are waypoints.

use super::binding::HBONE_PORT;
use super::verdict::{Kind, ListenerReport, Report, Status, Verdict, Wanted};
use super::world::World;
use crate::types::gateway::{GROUP, GatewayClassSpec, GatewaySpec, Listener, MESH_CONTROLLER, RouteKind};
use crate::types::{Key, Object};

/// What waypoints carry out of the Gateway API.
const HTTP_ROUTE: &str = "HTTPRoute";

/// `None` for classes of other controllers.
pub fn class(key: &Key, class: &Object<GatewayClassSpec>) -> Option<Verdict> {
    let spec = class.spec.as_ref().ok()?;
    if spec.controller_name != MESH_CONTROLLER {
        return None;
    }
    let accepted = match &spec.parameters_ref {
        None => Wanted::new("Accepted", Status::True, "Accepted", "Handled by the mesh controller"),
        Some(_) => {
            Wanted::new("Accepted", Status::False, "InvalidParameters", "spec.parametersRef: is not supported yet")
        }
    };
    let report = Report::Conditions { owned: &["Accepted"], wanted: vec![accepted] };
    Some(Verdict { kind: Kind::GatewayClass, key: key.clone(), generation: class.generation(), report })
}

/// Longest name of a Service, and longest value of a label.
const LONGEST_NAME: usize = 63;

/// Why this Gateway is not deployed; `None` = it is.
pub fn refusal(key: &Key, spec: &GatewaySpec) -> Option<(&'static str, String)> {
    if !is_service_name(&key.name) {
        let message = format!(
            "metadata.name: the Service of the same name cannot exist: at most {LONGEST_NAME} of a-z, 0-9 and -, \
             with a letter first and no - last"
        );
        return Some(("Invalid", message));
    }
    if spec.infrastructure.parameters_ref.is_some() {
        return Some(("InvalidParameters", "spec.infrastructure.parametersRef: is not supported yet".into()));
    }
    if !spec.addresses.is_empty() {
        return Some(("UnsupportedAddress", "spec.addresses: cannot be asked for".into()));
    }
    if !spec.listeners.iter().any(is_hbone) {
        let message = format!("spec.listeners: a waypoint needs one with protocol HBONE and port {HBONE_PORT}");
        return Some(("ListenersNotValid", message));
    }
    None
}

/// As RFC 1035 has labels, which is what Services are called by.
fn is_service_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    name.len() <= LONGEST_NAME
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(plain)
}

fn is_hbone(listener: &Listener) -> bool {
    listener.protocol == "HBONE" && u32::from(listener.port) == HBONE_PORT
}

/// `attached` is the number of routes that this waypoint carries out.
pub fn gateway(world: &World, key: &Key, gateway: &Object<GatewaySpec>, attached: usize) -> Option<Verdict> {
    let spec = gateway.spec.as_ref().ok()?;
    let refusal = refusal(key, spec);
    let obstacle = world.obstacles.get(key);
    let ready = world
        .deployments
        .get(key)
        .and_then(|deployment| deployment.status.as_ref()?.ready_replicas)
        .is_some_and(|ready| ready > 0);
    let accepted = match &refusal {
        None => Wanted::new("Accepted", Status::True, "Accepted", "Deployed by the mesh controller"),
        Some((reason, message)) => Wanted::new("Accepted", Status::False, reason, message.clone()),
    };
    let was_ready = gateway.status["addresses"].as_array().is_some_and(|addresses| !addresses.is_empty());
    let programmed = match (refusal.as_ref().map(|(_, message)| message).or(obstacle), ready) {
        (Some(message), _) => Wanted::new("Programmed", Status::False, "Invalid", message.clone()),
        (None, true) => Wanted::new("Programmed", Status::True, "Programmed", "A waypoint pod is ready"),
        (None, false) if was_ready => Wanted::new("Programmed", Status::False, "Pending", "No waypoint pod is ready"),
        (None, false) => {
            Wanted::new("Programmed", Status::False, "AddressNotAssigned", "Waiting for the first waypoint pod")
        }
    };
    let serves = ready && refusal.is_none();
    let listeners = spec.listeners.iter().map(|listener| listener_report(listener, serves, attached)).collect();
    let report = Report::Gateway {
        conditions: vec![accepted, programmed],
        addresses: ready.then(|| addresses(world, key)).flatten(),
        listeners,
    };
    Some(Verdict { kind: Kind::Gateway, key: key.clone(), generation: gateway.generation(), report })
}

/// The name and the cluster IP; `None` until the Service has one.
fn addresses(world: &World, key: &Key) -> Option<Vec<(&'static str, String)>> {
    let service = world.services.get(key)?;
    let ip = service.spec.as_ref()?.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None")?;
    Some(vec![("IPAddress", ip.to_owned()), ("Hostname", world.hostname(key))])
}

fn listener_report(listener: &Listener, ready: bool, attached: usize) -> ListenerReport {
    let supported = is_hbone(listener);
    let refused = format!("only protocol HBONE on port {HBONE_PORT}, not {} on {}", listener.protocol, listener.port);
    let unused: Vec<&str> = [("hostname", listener.hostname.is_some()), ("tls", listener.tls.is_some())]
        .into_iter()
        .filter_map(|(field, set)| set.then_some(field))
        .collect();
    let note = match unused.is_empty() {
        true => String::new(),
        false => format!("{}: means nothing to a waypoint, whose clients come by HBONE", unused.join(", ")),
    };
    let accepted = match supported {
        true => Wanted::new("Accepted", Status::True, "Accepted", note),
        false => Wanted::new("Accepted", Status::False, "UnsupportedProtocol", refused),
    };
    let programmed = match supported && ready {
        true => Wanted::new("Programmed", Status::True, "Programmed", ""),
        false => Wanted::new("Programmed", Status::False, if supported { "Pending" } else { "Invalid" }, ""),
    };
    let asked = &listener.allowed_routes.kinds;
    let carried =
        |kind: &&RouteKind| kind.kind == HTTP_ROUTE && kind.group.as_deref().is_none_or(|group| group == GROUP);
    let others: Vec<&str> = asked.iter().filter(|kind| !carried(kind)).map(|kind| kind.kind.as_str()).collect();
    let resolved = match others.is_empty() {
        true => Wanted::new("ResolvedRefs", Status::True, "ResolvedRefs", ""),
        false => {
            let message = format!("allowedRoutes.kinds: only {HTTP_ROUTE} is carried out, not {}", others.join(", "));
            Wanted::new("ResolvedRefs", Status::False, "InvalidRouteKinds", message)
        }
    };
    ListenerReport {
        name: listener.name.clone(),
        kinds: if supported && (asked.is_empty() || asked.iter().any(|kind| carried(&kind))) {
            &[HTTP_ROUTE]
        } else {
            &[]
        },
        attached: if supported { i32::try_from(attached).unwrap_or(i32::MAX) } else { 0 },
        conditions: vec![accepted, Wanted::new("Conflicted", Status::False, "NoConflicts", ""), programmed, resolved],
    }
}
