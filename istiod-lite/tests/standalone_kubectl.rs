//! The embedded API server as people meet it: through kubectl, today's and the one of Debian 12.

mod standalone_support;

use std::io::{BufRead as _, BufReader};

use standalone_support::{Kubectl, Server};

const NAMESPACE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
";

const APP: &str = "
apiVersion: v1
kind: Service
metadata: {name: server, namespace: shop, labels: {app: server}}
spec: {selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: conf, namespace: shop, labels: {app: server}}
data: {a: '1', b: '2'}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server, namespace: shop, labels: {app: server}}
spec:
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec:
      containers:
      - {name: main, image: 'nginx:1', ports: [{containerPort: 8080}], resources: {limits: {cpu: 1}}}
      - {name: side, image: curl}
";

const CRD: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.org}
spec:
  group: example.org
  scope: Namespaced
  names: {plural: widgets, kind: Widget, shortNames: [wd], categories: [mesh]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns:
    - {name: Mode, type: string, jsonPath: .spec.mode}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [mode]
            properties:
              mode: {type: string, enum: [A, B], description: How it goes.}
              count: {type: integer, default: 2, minimum: 0}
              free: {type: object, x-kubernetes-preserve-unknown-fields: true}
";

const WIDGET: &str = "
apiVersion: example.org/v1
kind: Widget
metadata: {name: w, namespace: shop}
spec: {mode: A, free: {any: {thing: 1}}}
";

/// Runs a story once per kubectl there is, each on a server of its own.
fn with_each_kubectl(story: impl Fn(&Kubectl)) {
    for (name, binary) in Kubectl::versions() {
        eprintln!("kubectl {name}");
        let server = Server::start();
        let kubectl = Kubectl::new(&server, name, &binary);
        kubectl.apply(NAMESPACE);
        story(&kubectl);
    }
}

#[test]
fn apply_creates_updates_and_takes_out_what_is_no_longer_there() {
    with_each_kubectl(|kubectl| {
        assert!(kubectl.apply(APP).contains("deployment.apps/server created"));
        assert_eq!(kubectl.apply(APP).matches("unchanged").count(), 3);
        let changed = APP
            .replace("b: '2'", "c: '3'")
            .replace("nginx:1", "nginx:2")
            .replace("      - {name: side, image: curl}\n", "");
        assert_eq!(kubectl.apply(&changed).matches("configured").count(), 2);
        let data = kubectl.ok("get configmap conf -n shop -o jsonpath={.data}");
        assert_eq!(data, r#"{"a":"1","c":"3"}"#);
        let images = kubectl.ok("get deploy server -n shop -o jsonpath={.spec.template.spec.containers[*].image}");
        assert_eq!(images, "nginx:2");
        let defaults = kubectl.ok("get deploy server -n shop -o jsonpath={.spec.replicas},{.spec.strategy.type}");
        assert_eq!(defaults, "1,RollingUpdate");

        let flag = if kubectl.is_old { "--prune-whitelist" } else { "--prune-allowlist" };
        let prune = format!("apply --prune -l app=server -n shop {flag}=core/v1/ConfigMap -f -");
        let pruned = kubectl.with_input(&prune, APP.split("---").next().unwrap());
        assert!(pruned.ok && pruned.out.contains("configmap/conf pruned"), "{} {}", pruned.out, pruned.err);
        assert!(!kubectl.run("get configmap conf -n shop").ok);
        assert!(kubectl.run("get deploy server -n shop").ok);
    });
}

#[test]
fn services_get_an_address_of_each_family() {
    with_each_kubectl(|kubectl| {
        kubectl.apply(APP);
        let addresses = kubectl.ok("get svc server -n shop -o jsonpath={.spec.clusterIPs[*]}");
        let addresses: Vec<std::net::IpAddr> = addresses.split(' ').map(|ip| ip.parse().unwrap()).collect();
        assert!(matches!(addresses.as_slice(), [v4, v6] if v4.is_ipv4() && v6.is_ipv6()), "{addresses:?}");
        kubectl.apply(APP);
        let again = kubectl.ok("get svc server -n shop -o jsonpath={.spec.clusterIP}");
        assert_eq!(again, addresses[0].to_string());
        let taken = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: thief, namespace: shop}}\nspec: {{clusterIP: {again}, ports: [{{port: 1}}]}}"
        );
        let refused = kubectl.with_input("create -f -", &taken);
        assert!(!refused.ok && refused.err.contains("already allocated"), "{}", refused.err);
    });
}

#[test]
fn labels_annotations_selectors_and_patches() {
    with_each_kubectl(|kubectl| {
        kubectl.apply(APP);
        kubectl.ok("label ns shop istio.io/dataplane-mode=ambient");
        assert_eq!(kubectl.ok("get ns -l istio.io/dataplane-mode=ambient -o name"), "namespace/shop\n");
        kubectl.ok("label ns shop istio.io/dataplane-mode-");
        assert_eq!(kubectl.ok("get ns -l istio.io/dataplane-mode -o name"), "");
        kubectl.ok("annotate svc server -n shop note=x");
        assert_eq!(kubectl.ok("get svc server -n shop -o jsonpath={.metadata.annotations.note}"), "x");
        kubectl.ok("set image deploy/server -n shop side=curl:9");
        kubectl.ok("scale deploy/server -n shop --replicas=3");
        kubectl.ok(r#"patch deploy server -n shop --type=json -p [{"op":"add","path":"/spec/paused","value":true}]"#);
        let spec = kubectl
            .ok("get deploy server -n shop -o jsonpath={.spec.replicas},{.spec.template.spec.containers[*].image}");
        assert_eq!(spec, "3,nginx:1 curl:9");
        let field = kubectl.ok("get cm -n shop --field-selector metadata.name=conf -o name");
        assert_eq!(field, "configmap/conf\n");
    });
}

#[test]
fn dry_run_and_diff_change_nothing() {
    with_each_kubectl(|kubectl| {
        kubectl.apply(APP);
        let before = kubectl.ok("get deploy,cm,svc -n shop -o jsonpath={.items[*].metadata.resourceVersion}");
        let dry = kubectl.with_input("apply --dry-run=server -f -", &APP.replace("nginx:1", "nginx:2"));
        assert!(
            dry.ok && dry.out.contains("deployment.apps/server configured (server dry run)"),
            "{} {}",
            dry.out,
            dry.err
        );
        assert!(kubectl.ok("create configmap never -n shop --dry-run=server").contains("created (server dry run)"));
        assert!(kubectl.ok("delete cm conf -n shop --dry-run=server").contains("deleted"));
        assert_eq!(kubectl.ok("get deploy,cm,svc -n shop -o jsonpath={.items[*].metadata.resourceVersion}"), before);
        let same = kubectl.with_input("diff -f -", APP);
        assert!(same.ok && same.out.is_empty(), "{}", same.out);
        assert!(!kubectl.with_input("diff -f -", &APP.replace("nginx:1", "nginx:2")).ok);
    });
}

#[test]
fn server_side_apply_finds_conflicts_and_can_be_forced() {
    with_each_kubectl(|kubectl| {
        assert!(kubectl.with_input("apply --server-side -f -", APP).ok);
        kubectl.ok("set image deploy/server -n shop main=nginx:9");
        let conflict = kubectl.with_input("apply --server-side -f -", APP);
        assert!(
            !conflict.ok && conflict.err.contains("conflict") && conflict.err.contains(".image"),
            "{}",
            conflict.err
        );
        let forced = kubectl.with_input("apply --server-side --force-conflicts -f -", APP);
        assert!(forced.ok, "{}", forced.err);
        assert!(kubectl.with_input("apply --server-side -f -", &APP.replace(", b: '2'", "")).ok);
        assert_eq!(kubectl.ok("get cm conf -n shop -o jsonpath={.data}"), r#"{"a":"1"}"#);
        let images = kubectl.ok("get deploy server -n shop -o jsonpath={.spec.template.spec.containers[*].image}");
        assert_eq!(images, "nginx:1 curl");
    });
}

#[test]
fn a_custom_resource_is_validated_defaulted_pruned_and_printed() {
    with_each_kubectl(|kubectl| {
        kubectl.apply(CRD);
        kubectl.ok("wait --for=condition=Established crd/widgets.example.org --timeout=10s");
        kubectl.apply(WIDGET);
        let spec = kubectl.ok("get wd w -n shop -o jsonpath={.spec.count},{.spec.free.any.thing}");
        assert_eq!(spec, "2,1");
        let table = kubectl.ok("get mesh -n shop");
        assert!(table.contains("MODE") && table.lines().count() == 2, "{table}");
        for (from, to, complaint) in [
            ("mode: A", "mode: C", "spec.mode"),
            ("mode: A", "mode: A, count: -1", "spec.count"),
            ("mode: A", "mode: 5", "spec.mode"),
            ("mode: A, ", "", "mode"),
        ] {
            let refused = kubectl.with_input("apply --validate=false -f -", &WIDGET.replace(from, to));
            assert!(!refused.ok && refused.err.contains(complaint), "{to}: {} {}", refused.out, refused.err);
        }
        let unknown = kubectl.with_input("apply -f -", &WIDGET.replace("mode: A", "mode: A, colour: red"));
        assert!(!unknown.ok && unknown.err.contains("colour"), "{}", unknown.err);
        let lenient =
            kubectl.with_input("apply --validate=false -f -", &WIDGET.replace("mode: A", "mode: A, colour: red"));
        assert!(lenient.ok, "{}", lenient.err);
        assert_eq!(kubectl.ok("get wd w -n shop -o jsonpath={.spec.colour}"), "", "unknown fields are pruned");
        assert!(kubectl.ok("explain widget.spec.mode").contains("How it goes."));
        kubectl.ok("delete crd widgets.example.org");
        assert!(!kubectl.run("get wd -n shop").ok);
        kubectl.apply(CRD);
        assert_eq!(
            kubectl.ok("get widgets.example.org -n shop -o name"),
            "",
            "the old ones went with the old definition"
        );
    });
}

#[test]
fn rules_of_definitions_refuse_in_their_own_words() {
    const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{name: gateway}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /shop}}]
    backendRefs: [{name: web, port: 80}]
";
    const ENTRY: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: bank, namespace: shop}
spec: {hosts: [bank.example.com], addresses: [192.0.2.0/24], resolution: STATIC, ports: [{number: 443, name: tls}]}
";
    with_each_kubectl(|kubectl| {
        for crd in standalone_support::crds() {
            kubectl.apply(&crd.to_string());
            let name = crd["metadata"]["name"].as_str().unwrap();
            let conditions = kubectl.ok(&format!("get crd {name} -o jsonpath={{.status.conditions[*].type}}"));
            assert!(!conditions.contains("ValidationRulesIgnored"), "{name}: {conditions}");
        }
        for (good, from, to, field, sentence) in [
            (ROUTE, "/shop", "/shop/../bank", "spec.rules[0].matches[0].path", "no path has /../"),
            (ROUTE, ", port: 80", "", "spec.rules[0].backendRefs[0]", "a Service has several ports; write which"),
            (ENTRY, "STATIC", "DNS", "spec", "only resolution STATIC and NONE go with CIDRs; write single addresses"),
            (ENTRY, "bank.example.com", "'*'", "spec.hosts[0]", "a wildcard stands before a name"),
        ] {
            let bad = kubectl.with_input("apply -f -", &good.replace(from, to));
            assert!(!bad.ok && bad.err.contains(field) && bad.err.contains(sentence), "{to}: {} {}", bad.out, bad.err);
        }
        kubectl.apply(ROUTE);
        kubectl.apply(ENTRY);
        let worse = kubectl.with_input("apply -f -", &ENTRY.replace("number: 443", "number: 0"));
        assert!(!worse.ok && worse.err.contains("a port is a number from 1 to 65535"), "{}", worse.err);
        let rules = "required: [mode]\n            x-kubernetes-validations: [{rule: 'self.mode =='}]";
        let unreadable = kubectl.with_input("apply -f -", &CRD.replace("required: [mode]", rules));
        assert!(!unreadable.ok && unreadable.err.contains("compilation failed"), "{}", unreadable.err);
        let rules =
            "required: [mode]\n            x-kubernetes-validations: [{rule: 'quantity(self.mode).isInteger()'}]";
        kubectl.apply(&CRD.replace("required: [mode]", rules));
        let ignored = kubectl.ok("get crd widgets.example.org -o jsonpath={.status.conditions[*].message}");
        assert!(ignored.contains("does not evaluate spec: quantity(self.mode).isInteger()"), "{ignored}");
        kubectl.apply(WIDGET);
    });
}

/// What users have lying about is mostly of v1beta1; clients of either version see the same object.
#[test]
fn kinds_of_the_mesh_are_served_in_the_versions_they_were_written_for() {
    const OLDER: &str = "
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {name: older, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {namespaces: [other]}}]}]}
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {name: older, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: Gateway
metadata: {name: older, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: HTTPRoute
metadata: {name: older, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: web}]}
---
apiVersion: networking.istio.io/v1alpha3
kind: ServiceEntry
metadata: {name: older, namespace: shop}
spec: {hosts: [a.example.org], ports: [{name: http, number: 80}], resolution: DNS}
";
    with_each_kubectl(|kubectl| {
        kubectl.ok(&format!("apply -f {}/../manifests/crds", env!("CARGO_MANIFEST_DIR")));
        kubectl.ok("wait --for=condition=Established crd --all --timeout=10s");
        kubectl.apply(OLDER);
        for (plural, group, field, value) in [
            ("authorizationpolicies", "security.istio.io", ".spec.action", "DENY"),
            ("peerauthentications", "security.istio.io", ".spec.mtls.mode", "STRICT"),
            ("gateways", "gateway.networking.k8s.io", ".spec.gatewayClassName", "istio-waypoint"),
            ("httproutes", "gateway.networking.k8s.io", ".spec.parentRefs[0].name", "web"),
            ("serviceentries", "networking.istio.io", ".spec.resolution", "DNS"),
        ] {
            for version in ["v1", "v1beta1"] {
                let get =
                    format!("get {plural}.{version}.{group} older -n shop -o jsonpath={{.apiVersion}},{{{field}}}");
                assert_eq!(kubectl.ok(&get), format!("{group}/{version},{value}"));
            }
        }
        let again = kubectl.apply(&OLDER.replace("v1beta1", "v1"));
        assert!(!again.contains("created") && again.lines().count() == 5, "{again}");
    });
}

#[test]
fn built_in_kinds_are_explained_and_checked() {
    with_each_kubectl(|kubectl| {
        let text = kubectl.ok("explain deployment.spec.strategy");
        assert!(text.contains("rollingUpdate"), "{text}");
        assert!(kubectl.ok("explain pod.spec.containers --recursive").contains("volumeMounts"));
        let typo = kubectl.with_input("apply -f -", &APP.replace("containers:", "contaners:"));
        assert!(!typo.ok && typo.err.contains("contaners"), "{}", typo.err);
        let wrong = kubectl.with_input(
            "apply --validate=false -f -",
            &APP.replace("matchLabels: {app: server}", "matchLabels: {app: x}"),
        );
        assert!(!wrong.ok && wrong.err.contains("spec.template.metadata.labels"), "{}", wrong.err);
        let name = kubectl.run("create configmap Upper -n shop");
        assert!(!name.ok && name.err.contains("RFC 1123"), "{}", name.err);
        for resource in ["pods", "deploy", "ds", "svc", "nodes", "ns", "gatewayclasses"] {
            let known = kubectl.run(&format!("get {resource} -A"));
            assert_eq!(known.ok, resource != "gatewayclasses", "{resource}: {}", known.err);
        }
        assert!(kubectl.ok("describe svc kubernetes").contains("10.96.0.1"));
    });
}

#[test]
fn rbac_denies_by_name_of_user_verb_and_resource() {
    with_each_kubectl(|kubectl| {
        kubectl.ok("create sa robot -n shop");
        let robot = "--as=system:serviceaccount:shop:robot";
        let denied = kubectl.run(&format!("get pods -n shop {robot}"));
        assert!(
            !denied.ok && denied.err.contains(r#"User "system:serviceaccount:shop:robot" cannot list resource "pods" in API group "" in the namespace "shop""#),
            "{}",
            denied.err
        );
        assert!(!kubectl.run(&format!("auth can-i list pods -n shop {robot}")).ok);
        kubectl.ok("create role reader -n shop --verb=get,list --resource=pods");
        kubectl.ok("create rolebinding robot-reads -n shop --role=reader --serviceaccount=shop:robot");
        assert_eq!(kubectl.ok(&format!("auth can-i list pods -n shop {robot}")).trim(), "yes");
        kubectl.ok(&format!("get pods -n shop {robot}"));
        assert!(!kubectl.run(&format!("get pods -A {robot}")).ok, "a role reaches no further than its namespace");
        // Rights over roles are not the right to hand out what one does not have.
        kubectl.ok("create role granter -n shop --verb=create --resource=roles.rbac.authorization.k8s.io");
        kubectl.ok("create rolebinding robot-grants -n shop --role=granter --serviceaccount=shop:robot");
        let more = kubectl.run(&format!("create role more -n shop --verb=get --resource=secrets {robot}"));
        assert!(!more.ok && more.err.contains("not currently held"), "{}", more.err);
        kubectl.ok(&format!("create role less -n shop --verb=get --resource=pods {robot}"));
    });
}

#[test]
fn objects_made_by_kubectls_typed_clients_arrive_whole() {
    with_each_kubectl(|kubectl| {
        kubectl.ok("create deployment d -n shop --image=x:1 --replicas=0");
        let made =
            kubectl.ok("get deploy d -n shop -o jsonpath={.spec.replicas},{.spec.template.spec.containers[0].image}");
        assert_eq!(made, "0,x:1");
        kubectl.ok("create secret generic s -n shop --from-literal=a=b");
        assert_eq!(kubectl.ok("get secret s -n shop -o jsonpath={.data},{.type}"), r#"{"a":"Yg=="},Opaque"#);
        kubectl.ok("create service clusterip c -n shop --tcp=80:named");
        assert_eq!(kubectl.ok("get svc c -n shop -o jsonpath={.spec.ports[0].targetPort}"), "named");
        if !kubectl.is_old {
            assert_eq!(kubectl.ok("create token default -n shop --audience=istio-ca").trim().split('.').count(), 3);
            assert!(kubectl.ok("auth whoami").contains("kubernetes-admin"));
            let refused = kubectl.run("create job j -n shop --image=x");
            assert!(!refused.ok && refused.err.contains("application/json for a Job"), "{}", refused.err);
        }
    });
}

#[test]
fn watches_print_changes_as_they_happen() {
    with_each_kubectl(|kubectl| {
        let mut watch = kubectl.start("get configmaps -n shop -w --no-headers");
        let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines().map(|l| l.unwrap());
        assert!(lines.next().unwrap().starts_with("kube-root-ca.crt"));
        kubectl.ok("create configmap fresh -n shop --from-literal=a=b");
        assert!(lines.next().unwrap().starts_with("fresh"));
        watch.kill().unwrap();
        watch.wait().unwrap();
    });
}

#[test]
fn a_deleted_namespace_takes_its_content_along() {
    with_each_kubectl(|kubectl| {
        kubectl.apply(APP);
        kubectl.ok("delete ns shop --timeout=20s");
        kubectl.apply(NAMESPACE);
        assert_eq!(kubectl.ok("get deploy,svc -n shop -o name"), "");
        kubectl.ok("get sa default -n shop");
        let protected = kubectl.run("delete ns default");
        assert!(!protected.ok && protected.err.contains("forbidden"), "{}", protected.err);
    });
}

#[test]
fn what_this_server_cannot_do_it_says() {
    with_each_kubectl(|kubectl| {
        kubectl.ok("run p -n shop --image=nginx --restart=Never");
        for command in ["logs p -n shop", "exec p -n shop -- true"] {
            let refused = kubectl.run(command);
            assert!(!refused.ok && refused.err.contains("runs no containers"), "{command}: {}", refused.err);
        }
        kubectl.ok("delete pod p -n shop");
    });
}
