//! RequestAuthentication, where Istio's CRD for it is in the cluster. Nothing here carries it out, which whoever writes one is
//! told (others in the cluster may); and where it names what nobody may ever ask for keys, it is refused already.

use http::Uri;
use serde_json::Value;

use super::Judgement;
use crate::translate::outside::{IS_API, refused_host};
use crate::translate::verdict::Fault;
use crate::translate::world::MeshSettings;

pub const KIND: &str = "RequestAuthentication";
const MEND: &str = "write the URL of a server that hands out keys, or the keys themselves in jwks";

/// The judgement on one, by itself.
pub fn judge(object: &Value, mesh: &MeshSettings) -> Judgement {
    let rules = object["spec"]["jwtRules"].as_array().map(Vec::as_slice).unwrap_or_default();
    let faults = rules.iter().enumerate().flat_map(|(index, rule)| {
        let text = |field: &str| rule[field].as_str().filter(|text| !text.is_empty());
        let has_keys = text("jwks").is_some();
        let given = ["jwksUri", "jwks_uri"].into_iter().filter_map(|field| Some((field, text(field)?)));
        let given: Vec<(&str, &str)> = given.collect();
        // Without keys or their URL they are looked for where the issuer is, if that is a URL.
        let issuer = text("issuer").filter(|issuer| given.is_empty() && !has_keys && issuer.contains("://"));
        let asked = given.into_iter().chain(issuer.map(|issuer| ("issuer", issuer)));
        let faults = asked.filter_map(move |(field, url)| {
            let why = refused_url(url, mesh)?;
            Some(Fault::new(format!("spec.jwtRules[{index}].{field}"), format!("{url:?} {why}; {MEND}")))
        });
        faults.collect::<Vec<_>>()
    });
    let note = "spec: this mesh does not carry it out: its proxies look at no token";
    Judgement { faults: faults.collect(), notes: vec![note.into()] }
}

/// Why keys are never fetched from there.
fn refused_url(url: &str, mesh: &MeshSettings) -> Option<String> {
    let Ok(uri) = url.parse::<Uri>() else { return Some("is not a URL".into()) };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Some("is neither http:// nor https://".into());
    }
    let host = uri.host().unwrap_or_default();
    // The keys of the cluster's own tokens are there.
    let why = refused_host(host, mesh).filter(|why| *why != IS_API)?;
    Some(format!("is never asked: {host:?} {why}"))
}
