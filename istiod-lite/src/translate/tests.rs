//! Golden cases: `testdata/translate/<case>/in.yaml` → `out.txt`. `UPDATE_GOLDEN=1` rewrites; review the diff. Addresses
//! and authorization are shown as the proxies' own decoder understands them, so a case also proves that they accept it.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use mesh_proto::enrolment::{POD_ENROLMENT_TYPE, PodEnrolment};
use mesh_proto::security::{AUTHORIZATION_TYPE, Authorization};
use mesh_proto::waypoint::{HTTP_POLICY_TYPE, HttpPolicy, ROUTE_TYPE, Route};
use mesh_proto::workload::{ADDRESS_TYPE, Address};
use prost::Message;

use super::fixture::world;
use super::verdict::{Kind, Report, Verdict, Wanted};
use super::world::MeshSettings;
use super::{Translation, translate};
use crate::resources::Resource;

fn golden(case: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/translate").join(case);
    let input = std::fs::read_to_string(directory.join("in.yaml")).expect("in.yaml");
    let actual = render(&translate(&world(&input)));
    let golden = directory.join("out.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &actual).expect("out.txt");
    }
    let expected = std::fs::read_to_string(&golden).expect("out.txt");
    assert!(actual == expected, "{case} differs from {}; UPDATE_GOLDEN=1 rewrites it\n{actual}", golden.display());
}

fn render(translation: &Translation) -> String {
    let mut resources: Vec<&Resource> = translation.resources.iter().collect();
    resources.sort_by_key(|resource| (resource.type_url(), resource.name.clone()));
    let mut out = String::new();
    for resource in resources {
        let kind = resource.type_url().rsplit('.').next().unwrap_or_default();
        writeln!(out, "== {kind} {} to {:?}", resource.name, resource.audience()).expect("strings take all");
        let aliases: Vec<&str> = resource.aliases().collect();
        if !aliases.is_empty() {
            writeln!(out, "aliases {aliases:?}").expect("strings take all");
        }
        writeln!(out, "{}", body(resource)).expect("strings take all");
    }
    for verdict in &translation.verdicts {
        out.push_str(&render_verdict(verdict));
    }
    out
}

fn body(resource: &Resource) -> String {
    let bytes = resource.body();
    let json = |value: serde_json::Result<String>| value.expect("models serialize");
    match resource.type_url() {
        ADDRESS_TYPE => {
            let address = Address::decode(bytes).expect("an Address");
            match mesh::model::Resource::try_from(address).expect("proxies accept it") {
                mesh::model::Resource::Workload(workload) => json(serde_json::to_string_pretty(&workload)),
                mesh::model::Resource::Service(service) => json(serde_json::to_string_pretty(&service)),
            }
        }
        AUTHORIZATION_TYPE => {
            let authorization = Authorization::decode(bytes).expect("an Authorization");
            let policy = mesh::policy::Policy::try_from(authorization).expect("proxies accept it");
            json(serde_json::to_string_pretty(&policy))
        }
        ROUTE_TYPE => format!("{:#?}", Route::decode(bytes).expect("a Route")),
        HTTP_POLICY_TYPE => format!("{:#?}", HttpPolicy::decode(bytes).expect("an HttpPolicy")),
        POD_ENROLMENT_TYPE => format!("{:#?}", PodEnrolment::decode(bytes).expect("a PodEnrolment")),
        other => panic!("no such type: {other}"),
    }
}

fn render_verdict(verdict: &Verdict) -> String {
    let mut out = String::new();
    let mut lines = |prefix: &str, conditions: &[Wanted]| {
        for wanted in conditions {
            let Wanted { r#type, reason, message, .. } = wanted;
            let status = wanted.status.as_str();
            writeln!(out, "{:?} {}{prefix}: {type}={status} {reason} {message:?}", verdict.kind, verdict.key)
                .expect("strings take all");
        }
    };
    match &verdict.report {
        Report::Conditions { wanted, .. } | Report::Class { wanted, .. } => lines("", wanted),
        Report::Addressed { wanted, addresses, .. } => lines(&format!(" addresses {addresses:?}"), wanted),
        Report::Gateway { conditions, addresses, listeners } => {
            lines(&format!(" addresses {addresses:?}"), conditions);
            for listener in listeners {
                lines(&format!(" listener {} attached {}", listener.name, listener.attached), &listener.conditions);
            }
        }
        Report::Parents(parents) => {
            for parent in parents {
                lines(&format!(" parent {}", parent.parent), &parent.conditions);
            }
        }
    }
    out
}

/// One port that is none would make proxies refuse the whole Service.
#[test]
fn a_port_that_is_none_is_left_out() {
    let translation = translate(&world(
        "
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  ports:
    - {name: a, port: 80, targetPort: 83306}
    - {name: b, port: 70000}
    - {name: c, port: 81, targetPort: -1}
    - {name: d, port: 82, targetPort: 8082}
    - {name: e, port: 83, targetPort: 0}
",
    ));
    let resource =
        translation.resources.iter().find(|resource| resource.type_url() == ADDRESS_TYPE).expect("the Service");
    let address = Address::decode(resource.body()).expect("an Address");
    let mesh::model::Resource::Service(service) = mesh::model::Resource::try_from(address).expect("proxies accept it")
    else {
        panic!("a Service is no workload");
    };
    let ports: Vec<u16> = service.ports.into_keys().collect();
    assert_eq!(ports, [82, 83]);
}

#[test]
fn pods_services_and_endpoints_become_addresses() {
    golden("addresses");
}

#[test]
fn a_canary_takes_its_share_and_has_all_routes_and_policies() {
    golden("waypoint-canary");
}

#[test]
fn a_waypoint_of_another_revision_is_used_and_not_spoken_of() {
    golden("revisions");
}

/// What proxies are told is the same, whoever tells it.
#[test]
fn the_revision_changes_nothing_but_whose_gateways_are_spoken_of() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/translate/revisions");
    let mut world = world(&std::fs::read_to_string(directory.join("in.yaml")).expect("in.yaml"));
    let mut spoken_of = Vec::new();
    let mut others: Vec<Translation> = Vec::new();
    for revision in ["default", "canary", "gone"] {
        world.mesh = Arc::new(MeshSettings { revision: revision.parse().expect("one"), ..MeshSettings::default() });
        let mut translation = translate(&world);
        translation.verdicts.retain(|verdict| {
            let is_gateway = verdict.kind == Kind::Gateway;
            if is_gateway {
                spoken_of.push(format!("{revision} {}", verdict.key));
            }
            !is_gateway
        });
        others.push(translation);
    }
    for other in &others[1..] {
        assert_eq!((&other.resources, &other.verdicts), (&others[0].resources, &others[0].verdicts));
    }
    let expected = [
        "default later/back",
        "default shop/ours",
        "canary later/unready",
        "canary shop/tagged",
        "canary shop/theirs",
        "gone shop/of-nobody",
    ];
    assert_eq!(spoken_of, expected);
}

#[test]
fn a_waypoint_that_cannot_be_used_binds_closed() {
    golden("waypoint-binding");
}

#[test]
fn connection_policies_keep_only_what_a_node_proxy_can_see() {
    golden("authorization-l4");
}

#[test]
fn request_policies_go_to_their_waypoints_and_close_the_way_around() {
    golden("authorization-l7");
}

#[test]
fn a_policy_of_the_class_closes_the_way_around_every_waypoint() {
    golden("authorization-class");
}

#[test]
fn policies_and_routes_of_a_service_entry_reach_each_of_its_hosts() {
    golden("attached-to-entries");
}

#[test]
fn peer_authentication_refuses_where_it_is_strict() {
    golden("peer-authentication");
}

#[test]
fn parameters_of_waypoints_that_cannot_be_done_are_refused_with_a_reason() {
    golden("waypoint-parameters");
}

#[test]
fn routes_are_resolved_and_what_is_wrong_is_answered_500() {
    golden("routes");
}

#[test]
fn pods_are_enrolled_by_label_and_only_on_their_node() {
    golden("enrolment");
}

#[test]
fn service_entries_become_services_with_endpoints_and_addresses() {
    golden("service-entries");
}

#[test]
fn workload_entries_become_workloads_behind_what_selects_them() {
    golden("workload-entries");
}

#[test]
fn workloads_of_other_networks_name_the_gateway_that_leads_there() {
    golden("networks");
}

#[test]
fn mesh_config_names_the_trust_domain_and_limits_how_far_entries_are_seen() {
    golden("mesh-config");
}

#[test]
fn what_a_service_or_pod_has_no_entry_of_another_namespace_gets() {
    golden("not-theirs");
}

#[test]
fn endpoints_that_a_service_entry_lists_are_under_policy() {
    golden("endpoint-policies");
}

#[test]
fn an_endpoint_serves_the_ports_it_names_else_what_the_service_says() {
    let ports = |case: &str, name: &str| -> Vec<(u32, u32)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/translate").join(case).join("in.yaml");
        let translation = translate(&world(&std::fs::read_to_string(path).expect("in.yaml")));
        let resource = translation.resources.iter().find(|resource| resource.name.ends_with(name)).expect(name);
        let address = Address::decode(resource.body()).expect("an Address");
        let Some(mesh_proto::workload::address::Type::Workload(workload)) = address.r#type else { panic!("{name}") };
        assert_eq!(workload.services.len(), 1, "{name}");
        let ports = workload.services.into_values().flat_map(|list| list.ports);
        ports.map(|port| (port.service_port, port.target_port)).collect()
    };
    for (case, name, expected) in [
        ("service-entries", "ServiceEntry/shop/api/www.example.com", &[(443, 443), (80, 8080)][..]),
        ("service-entries", "ServiceEntry/other/api/Mirror.example.net", &[(443, 8443)]),
        ("service-entries", "ServiceEntry/shop/db/203.0.113.1", &[(3306, 23306)]),
        ("service-entries", "ServiceEntry/shop/db/203.0.113.1/2", &[(3306, 33306)]),
        ("service-entries", "ServiceEntry/shop/db/2001:db8::2", &[(3306, 13306)]),
        ("service-entries", "Pod/shop/cart-1", &[(80, 8080)]),
        ("service-entries", "WorkloadEntry/shop/cart-vm", &[(80, 18080)]),
        ("workload-entries", "WorkloadEntry/vms/db-1", &[(3306, 23306), (81, 8081), (83, 83)]),
        ("workload-entries", "WorkloadEntry/vms/db-3", &[(3306, 13306), (83, 83)]),
    ] {
        assert_eq!(ports(case, name), expected, "{name}");
    }
}
