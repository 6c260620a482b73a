//! Several control planes in one cluster, each of a revision: for its own Gateways each is the only one, for the rest one
//! of them acts. Here is what a revision is called, and what is called by it.

use std::fmt;
use std::str::FromStr;

/// On a Gateway, or its namespace: whose it is. On a Service of the mesh's namespace: whom it belongs to.
pub const LABEL: &str = "istio.io/rev";
/// On a Service of the mesh's namespace: another name for the revision in its [`LABEL`].
pub const TAG: &str = "istio.io/tag";
const DEFAULT: &str = "default";
/// Longest name of a Service, without what precedes the revision in it.
const LONGEST: usize = 63 - "istiod-".len();

/// One that a control plane can be of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(String);

impl Revision {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whose Gateways need no label.
    pub fn is_default(&self) -> bool {
        self.0 == DEFAULT
    }

    /// `base`, with the revision where that is not the default.
    pub fn named(&self, base: &str) -> String {
        if self.is_default() { base.to_owned() } else { format!("{base}-{}", self.0) }
    }
}

impl Default for Revision {
    fn default() -> Self {
        Self(DEFAULT.to_owned())
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Revision {
    type Err = String;

    /// Empty is the default, as with Istio.
    fn from_str(text: &str) -> Result<Self, String> {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let plain =
            text.bytes().all(|byte| inner(byte) || byte == b'-') && !text.starts_with('-') && !text.ends_with('-');
        match text {
            "" => Ok(Self::default()),
            _ if plain && text.len() <= LONGEST => Ok(Self(text.to_owned())),
            _ => Err(format!(
                "no Service can be called istiod-{text}: at most {LONGEST} of a-z, 0-9 and -, with no - first or last"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::admission::CONFIGURATION;
    use crate::leader::LEASE;

    #[test]
    fn a_revision_is_what_a_service_can_be_called_after() {
        let named = |text: &str| text.parse::<Revision>().map(|revision| revision.named("istiod"));
        for (text, name) in
            [("", "istiod"), ("default", "istiod"), ("1-30", "istiod-1-30"), ("canary", "istiod-canary")]
        {
            assert_eq!(named(text), Ok(name.to_owned()));
        }
        assert!(named(&"x".repeat(56)).is_ok());
        for bad in ["1.30", "Canary", "-x", "x-", "a_b", &"x".repeat(57)] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }

    fn objects(file: &str) -> Vec<Value> {
        let path = format!("{}/../manifests/{file}.yaml", env!("CARGO_MANIFEST_DIR"));
        serde_saphyr::from_multiple(&std::fs::read_to_string(path).expect("a manifest")).expect("YAML")
    }

    fn of<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
        let mut found = objects.iter().filter(|it| it["kind"] == kind);
        let wanted = |it: &&Value| it["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("istiod"));
        found.find(wanted).expect("it is there")
    }

    /// Without what tells a revision from the default.
    fn as_default(object: &Value) -> Value {
        fn strip(value: &mut Value) {
            match value {
                Value::Object(fields) => {
                    fields.remove(LABEL);
                    fields.values_mut().for_each(strip);
                }
                Value::Array(values) => {
                    values.retain(|value| value["name"] != "REVISION");
                    values.iter_mut().for_each(strip);
                }
                _ => {}
            }
        }
        let text = object.to_string().replace("istiod-canary", "istiod").replace("-canary", "");
        let mut object = serde_json::from_str(&text).expect("JSON");
        strip(&mut object);
        object
    }

    #[test]
    fn a_revision_is_installed_as_the_default_is() {
        let (install, added) = (objects("install"), objects("revision"));
        for kind in ["Service", "PodDisruptionBudget", "Deployment"] {
            assert_eq!(as_default(of(&added, kind)), *of(&install, kind), "{kind}");
        }
        let deployment = of(&added, "Deployment");
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["env"][0], json!({"name": "REVISION", "value": "canary"}));
        // Neither Service, budget nor Deployment of the one has pods of the other.
        let labels =
            |objects: &[Value]| of(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]["app"].clone();
        for (selecting, selected) in [(&install, &added), (&added, &install)] {
            assert_ne!(of(selecting, "Service")["spec"]["selector"]["app"], labels(selected));
        }
        // Of the webhook only whom it asks about is its own.
        let mut webhook = as_default(of(&added, "ValidatingWebhookConfiguration"));
        let mut asked = of(&install, "ValidatingWebhookConfiguration").clone();
        let [rules, all] = [&mut webhook, &mut asked].map(|it| it["webhooks"][0]["rules"].take());
        assert_eq!(webhook, asked);
        assert_eq!((&rules[0]["resources"], rules.as_array().map(Vec::len)), (&json!(["gateways"]), Some(1)));
        let gateways = all.as_array().into_iter().flatten().find(|rule| rule["apiGroups"] == rules[0]["apiGroups"]);
        assert_eq!(gateways.map(|rule| &rule["apiVersions"]), Some(&rules[0]["apiVersions"]));
    }

    #[test]
    fn a_revision_may_do_what_the_default_may_and_has_its_own_names() {
        let added = objects("revision");
        let revision: Revision = "canary".parse().expect("a revision");
        for (kind, resource, name) in
            [("Role", "leases", LEASE), ("ClusterRole", "validatingwebhookconfigurations", CONFIGURATION)]
        {
            let theirs = objects("install")
                .iter()
                .filter(|it| it["kind"] == kind)
                .flat_map(|role| role["rules"].as_array().expect("rules").clone())
                .find(|rule| rule["resources"] == json!([resource]) && !rule["resourceNames"].is_null());
            let rules = of(&added, kind)["rules"].as_array().expect("rules");
            let [rule] = &rules[..] else { panic!("{rules:?}") };
            assert_eq!(
                (&rule["resources"], &rule["resourceNames"]),
                (&json!([resource]), &json!([revision.named(name)]))
            );
            assert_eq!(rule["verbs"], theirs.expect("the same for the default")["verbs"]);
        }
        for binding in added.iter().filter(|it| it["kind"].as_str().is_some_and(|kind| kind.ends_with("Binding"))) {
            assert_eq!(binding["subjects"][0]["name"], "istiod", "by one account replicas know each other");
            assert_eq!(binding["roleRef"]["name"], binding["metadata"]["name"]);
        }
    }
}
