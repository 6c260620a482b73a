//! The node's CNI configuration, as text: our plugin in, our plugin out. Nothing here touches a file.
//!
//! What others have written stays as it is, in its order; we add an entry at the end of the chain and later take exactly
//! that away.

use serde_json::{Map, Value, json};
use thiserror::Error;

use ztunnel_cni::plugin::NAME;

/// Kept beside a list that was made from a single plugin's configuration: that configuration. No runtime reads such a name.
pub const SAVED: &str = ".ztunnel-saved";

/// Why a configuration is left alone.
#[derive(Debug, Error)]
pub enum BadConf {
    #[error("it is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it has neither a list of plugins nor a type")]
    Shape,
    #[error("its cniVersion {0:?} is older than 0.3.0, with which plugins cannot be chained")]
    Version(String),
}

/// What is to be done with a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Edit {
    /// It is as it should be.
    Nothing,
    /// New content.
    Rewrite(String),
    /// It configures a single plugin: a list takes its place, and its name gets the ending [`SAVED`].
    Replace { list: String },
}

/// Files a runtime reads, in its order: the first is the one it takes.
#[must_use]
pub fn in_order(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| [".conf", ".conflist", ".json"].iter().any(|ending| name.ends_with(ending)));
    names.sort();
    names
}

/// The file that a list made from `name` goes to.
#[must_use]
pub fn list_name(name: &str) -> String {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    format!("{stem}.conflist")
}

/// Adds `entry` to the chain, or brings the one that is there up to date if `refresh`. Two versions of ztunnel on a node
/// would otherwise undo each other's work for ever.
///
/// # Errors
/// When the text is no configuration that a plugin can be added to.
pub fn add(text: &str, entry: &Value, refresh: bool) -> Result<Edit, BadConf> {
    let mut conf: Map<String, Value> = serde_json::from_str(text)?;
    let version = conf.get("cniVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    if ["", "0.1.0", "0.2.0"].contains(&version.as_str()) {
        return Err(BadConf::Version(version));
    }
    if let Some(plugins) = conf.get_mut("plugins") {
        let plugins = plugins.as_array_mut().filter(|plugins| !plugins.is_empty()).ok_or(BadConf::Shape)?;
        match plugins.iter_mut().find(|plugin| is_ours(plugin)) {
            Some(ours) if !refresh || ours == entry => return Ok(Edit::Nothing),
            Some(ours) => *ours = entry.clone(),
            None => plugins.push(entry.clone()),
        }
        return Ok(Edit::Rewrite(render(&conf.into())));
    }
    if conf.get("type").and_then(Value::as_str).is_none() {
        return Err(BadConf::Shape);
    }
    Ok(Edit::Replace { list: render(&list_of(conf, Some(entry))) })
}

/// A single plugin's configuration as a list, and perhaps our entry behind it.
fn list_of(mut conf: Map<String, Value>, entry: Option<&Value>) -> Value {
    let mut list = json!({ "cniVersion": conf.shift_remove("cniVersion") });
    if let Some(name) = conf.shift_remove("name") {
        list["name"] = name;
    }
    list["plugins"] = [Value::Object(conf)].into_iter().chain(entry.cloned()).collect();
    list
}

/// Is `list`, whether or not our entry is in it, what was made of the single plugin's configuration `single`? If not, it
/// has another author.
#[must_use]
pub fn is_made_of(list: &str, single: &str) -> bool {
    let without = remove(list).unwrap_or_else(|| list.to_owned());
    match (serde_json::from_str::<Value>(&without), serde_json::from_str(single)) {
        (Ok(list), Ok(single)) => list == list_of(single, None),
        _ => false,
    }
}

/// Takes our entry out; `None` where there is none.
#[must_use]
pub fn remove(text: &str) -> Option<String> {
    let mut conf: Value = serde_json::from_str(text).ok()?;
    let plugins = conf.get_mut("plugins")?.as_array_mut()?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    (plugins.len() != before).then(|| render(&conf))
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(NAME)
}

fn render(conf: &Value) -> String {
    // Maps with text as keys can always be written.
    serde_json::to_string_pretty(conf).unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "mtu": 0,
      "ipam": {
        "type": "calico-ipam"
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"#;

    fn entry() -> Value {
        json!({ "type": NAME, "socket": "/var/run/ztunnel/cni.sock" })
    }

    fn rewritten(edit: Edit) -> String {
        match edit {
            Edit::Rewrite(text) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn goes_to_the_end_of_a_list_once_and_comes_out_without_a_trace() {
        let with = rewritten(add(LIST, &entry(), false).unwrap());
        let plugins = serde_json::from_str::<Value>(&with).unwrap()["plugins"].clone();
        let types: Vec<&str> = plugins.as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["calico", "portmap", NAME]);
        assert_eq!(add(&with, &entry(), false).unwrap(), Edit::Nothing);
        assert_eq!(remove(&with).as_deref(), Some(LIST));
        assert_eq!(remove(LIST), None);
    }

    #[test]
    fn an_older_entry_is_replaced_only_where_it_is_asked_for() {
        let with = rewritten(add(LIST, &json!({ "type": NAME, "socket": "/old" }), false).unwrap());
        assert_eq!(add(&with, &entry(), false).unwrap(), Edit::Nothing, "another version's ztunnel may still run");
        let new = rewritten(add(&with, &entry(), true).unwrap());
        assert!(new.contains("cni.sock") && !new.contains("/old"), "{new}");
        assert_eq!(remove(&new).as_deref(), Some(LIST));
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let single = r#"{"cniVersion":"0.4.0","name":"lab","type":"bridge","bridge":"cni0"}"#;
        let Edit::Replace { list } = add(single, &entry(), false).unwrap() else { panic!("no list") };
        let list: Value = serde_json::from_str(&list).unwrap();
        assert_eq!(
            list,
            json!({"cniVersion": "0.4.0", "name": "lab", "plugins": [{"type": "bridge", "bridge": "cni0"}, entry()]})
        );
        assert_eq!(list_name("10-lab.conf"), "10-lab.conflist");
    }

    #[test]
    fn a_list_is_known_by_what_it_was_made_of() {
        let single = r#"{"cniVersion":"0.4.0","name":"lab","type":"bridge","bridge":"cni0"}"#;
        let Edit::Replace { list } = add(single, &entry(), false).unwrap() else { panic!("no list") };
        let without = remove(&list).unwrap();
        assert!(is_made_of(&list, single) && is_made_of(&without, single));
        assert!(!is_made_of(&list, &single.replace("cni0", "cni1")));
        assert!(!is_made_of(&rewritten(add(LIST, &entry(), false).unwrap()), single));
        for broken in ["", "[]", "{"] {
            assert!(!is_made_of(broken, single) && !is_made_of(&list, broken), "{broken}");
        }
    }

    #[test]
    fn what_cannot_be_chained_is_left_alone() {
        for text in [
            "",
            "[]",
            "{",
            r#"{"cniVersion":"1.0.0"}"#,
            r#"{"cniVersion":"1.0.0","plugins":[]}"#,
            r#"{"cniVersion":"1.0.0","plugins":7}"#,
            r#"{"cniVersion":"0.2.0","plugins":[{"type":"x"}]}"#,
            r#"{"plugins":[{"type":"x"}]}"#,
        ] {
            assert!(add(text, &entry(), true).is_err(), "{text}");
            assert_eq!(remove(text), None, "{text}");
        }
    }

    #[test]
    fn runtimes_take_the_first_name() {
        let names = [
            "20-b.conflist",
            "10-a.conf.ztunnel-saved",
            ".10-a.conflist.7.new",
            "10-a.conflist",
            "05.txt",
            "10-a.conf",
        ];
        let names = in_order(names.map(str::to_owned).to_vec());
        assert_eq!(names, ["10-a.conf", "10-a.conflist", "20-b.conflist"]);
    }
}
