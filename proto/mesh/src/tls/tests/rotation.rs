//! From one root to another, A, A+B, B, while sessions live on.

use super::authority::Authority;
use super::*;

/// Two ends of one session.
struct Session(TlsStream<tokio::io::DuplexStream>, TlsStream<tokio::io::DuplexStream>);

impl Session {
    async fn open(client: &WorkloadCertificate, server: &WorkloadCertificate) -> Result<Self, String> {
        let (near, far) = tokio::io::duplex(1 << 16);
        let expected = [server_id()];
        let (near, far) = tokio::join!(connect(client, &expected, near, addr()), accept(server, far, addr()));
        match (near, far) {
            (Ok((near, _)), Ok((far, _))) => Ok(Self(near, far)),
            (near, far) => Err(format!("{:?} / {:?}", near.err(), far.err())),
        }
    }

    /// A word there, a word back.
    async fn lives(&mut self) {
        let mut word = [0; 4];
        self.0.write_all(b"ping").await.unwrap();
        self.0.flush().await.unwrap();
        self.1.read_exact(&mut word).await.unwrap();
        self.1.write_all(&word).await.unwrap();
        self.1.flush().await.unwrap();
        self.0.read_exact(&mut word).await.unwrap();
        assert_eq!(&word, b"ping");
    }
}

#[tokio::test]
async fn a_root_is_replaced_by_way_of_a_bundle_without_a_cut_or_a_refusal() {
    // The authorities have one name, as those of one control plane do.
    let (a, b) = (Authority::root("mesh"), Authority::root("mesh"));
    let both = a.root.clone() + &b.root;
    // Each step is what a proxy gets with its next certificate: who signed it, and which roots came along.
    let steps: [(&Authority, &str); 4] = [(&a, &a.root), (&a, &both), (&b, &both), (&b, &b.root)];
    let cert = |step: usize, id: &Identity| {
        let (issuer, roots) = steps[step];
        issuer.identity(id).trusting(roots)
    };
    let mut sessions = Vec::new();
    for now in 0..steps.len() {
        // Proxies renew at half-life, each at its own time: neighbouring steps meet, in both roles.
        for (client, server) in [(now, now), (now, now.saturating_sub(1)), (now.saturating_sub(1), now)] {
            let opened = Session::open(&cert(client, &client_id()), &cert(server, &server_id())).await;
            sessions.push(opened.unwrap_or_else(|error| panic!("step {client} to step {server}: {error}")));
        }
        for session in &mut sessions {
            session.lives().await;
        }
    }
    // Once A is gone, so is who was signed by it, on either side; what is open lives on.
    let (old_client, old_server) = (cert(1, &client_id()), cert(1, &server_id()));
    let refused = [
        Session::open(&old_client, &cert(3, &server_id())).await,
        Session::open(&cert(3, &client_id()), &old_server).await,
    ];
    for error in refused.map(|opened| opened.err().expect("a certificate of A is of no use any more")) {
        assert!(error.contains("UntrustedRoot"), "{error}");
    }
    // Skipping the bundle would have refused: B's certificates are nobody's while A's alone is trusted.
    assert!(Session::open(&cert(2, &client_id()), &cert(0, &server_id())).await.is_err());
    for session in &mut sessions {
        session.lives().await;
    }
}
