//! AdmissionReview of `admission.k8s.io/v1`, as far as it is read and written.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Outcome;

const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// Of a refusal, as for an object that the API server itself finds invalid.
const UNPROCESSABLE: u16 = 422;

/// What the API server asks.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Review {
    api_version: String,
    kind: String,
    request: Option<Request>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// Of this question; the answer bears it.
    pub uid: String,
    #[serde(default)]
    pub kind: GroupVersionKind,
    #[serde(default)]
    pub sub_resource: Option<String>,
    #[serde(default)]
    pub namespace: Option<String>,
    pub operation: String,
    #[serde(default)]
    pub object: Option<Value>,
    #[serde(default)]
    pub old_object: Option<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GroupVersionKind {
    pub group: String,
    pub version: String,
    pub kind: String,
}

impl Review {
    /// # Errors
    /// It is no question that is answered here.
    pub fn request(self) -> Result<Request, String> {
        if self.api_version != API_VERSION || self.kind != KIND {
            return Err(format!("{} of {}: only {KIND} of {API_VERSION} is answered", self.kind, self.api_version));
        }
        self.request.ok_or_else(|| "request: there is none".to_owned())
    }
}

/// What the API server is told.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    api_version: &'static str,
    kind: &'static str,
    response: Response,
}

#[derive(Debug, Serialize)]
struct Response {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

impl Answer {
    pub fn new(uid: String, outcome: Outcome) -> Self {
        let (status, warnings) = match outcome {
            Outcome::Admitted { warnings } => (None, warnings),
            Outcome::Refused { message } => {
                let status =
                    json!({"status": "Failure", "message": message, "reason": "Invalid", "code": UNPROCESSABLE});
                (Some(status), Vec::new())
            }
        };
        let response = Response { uid, allowed: status.is_none(), status, warnings };
        Self { api_version: API_VERSION, kind: KIND, response }
    }
}
