//! Status of GatewayClasses and of the Gateways that are waypoints.

use super::binding::HBONE_PORT;
use super::parameters;
use super::verdict::{Kind, ListenerReport, Report, Status, Verdict, Wanted};
use super::waypoint::{self, Unfit, is_hbone};
use super::world::World;
use crate::types::gateway::{GROUP, GatewayClassSpec, GatewaySpec, Listener, MESH_CONTROLLER, RouteKind};
use crate::types::{Key, Object};

/// What waypoints carry out of the Gateway API.
const HTTP_ROUTE: &str = "HTTPRoute";
/// What is done of the Gateway API, by the names it has for that (GEP-2162), sorted. Those that begin with `Mesh` are not a
/// class's to claim (GEP-3949).
pub const FEATURES: &[&str] = &[
    "GatewayInfrastructurePropagation",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendRequestHeaderModification",
    "HTTPRouteBackendTimeout",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite",
    "HTTPRoutePortRedirect",
    "HTTPRouteQueryParamMatching",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteSchemeRedirect",
];

/// `None` for classes of other controllers.
pub fn class(key: &Key, class: &Object<GatewayClassSpec>) -> Option<Verdict> {
    let spec = class.spec.as_ref().ok()?;
    if spec.controller_name != MESH_CONTROLLER {
        return None;
    }
    let accepted = match &spec.parameters_ref {
        None => Wanted::new("Accepted", Status::True, "Accepted", "Handled by the mesh controller"),
        Some(_) => {
            let message = format!(
                "spec.parametersRef: means nothing here: take it out, and label a ConfigMap of the mesh's namespace \
                 {}: {}",
                parameters::DEFAULTS_FOR,
                key.name
            );
            Wanted::new("Accepted", Status::False, "InvalidParameters", message)
        }
    };
    let report = Report::Class { wanted: vec![accepted], features: FEATURES };
    Some(Verdict { kind: Kind::GatewayClass, key: key.clone(), generation: class.generation(), report })
}

/// `attached` is the number of routes that this waypoint carries out. `None`: nothing can be said yet.
pub fn gateway(world: &World, key: &Key, gateway: &Object<GatewaySpec>, attached: usize) -> Option<Verdict> {
    let spec = gateway.spec.as_ref().ok()?;
    let refusal = match waypoint::check(world, key, gateway, spec) {
        Ok(()) => None,
        Err(Unfit::Refused(reason, message)) => Some((reason, message)),
        Err(Unfit::NotYet) => return None,
    };
    let obstacle = world.obstacles.get(key);
    let ready = world
        .deployments
        .get(key)
        .and_then(|deployment| deployment.status.as_ref()?.ready_replicas)
        .is_some_and(|ready| ready > 0);
    let accepted = match &refusal {
        None => Wanted::new("Accepted", Status::True, "Accepted", deployed(world, key, spec)),
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

fn deployed(world: &World, key: &Key, spec: &GatewaySpec) -> String {
    let ignored = parameters::of(world, key, spec).map(|applying| applying.ignored).unwrap_or_default();
    let mut message = "Deployed by the mesh controller".to_owned();
    for other in ignored {
        message.push_str(&format!("; ConfigMap {other} is ignored, as an older one has the defaults of the class"));
    }
    for note in unused(spec) {
        message.push_str(&format!("; {note}"));
    }
    message
}

/// Fields of the Gateway itself that do nothing, and why.
fn unused(spec: &GatewaySpec) -> Vec<String> {
    let listeners = &spec.allowed_listeners.namespaces.from;
    let set = [
        ("tls", spec.tls.is_some(), "means nothing to a waypoint, whose clients come by HBONE"),
        ("allowedListeners", !["", "None"].contains(&listeners.as_str()), "ListenerSets are not read"),
        (
            "defaultScope",
            spec.default_scope.as_deref().is_some_and(|scope| scope != "None"),
            "routes name their parents",
        ),
    ];
    set.into_iter().filter(|(_, is_set, _)| *is_set).map(|(field, _, why)| format!("spec.{field}: {why}")).collect()
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
    let mut notes = Vec::new();
    if !unused.is_empty() {
        notes.push(format!("{}: means nothing to a waypoint, whose clients come by HBONE", unused.join(", ")));
    }
    if listener.filters.is_some() {
        notes.push("filters: are not supported at a listener: write them in routes".to_owned());
    }
    let note = notes.join("; ");
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
