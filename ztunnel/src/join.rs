//! The short cut between two pods of one node.
//!
//! Encryption between a process and itself protects nothing, but the way over the wire carries meaning: NetworkPolicy, authorization,
//! telemetry. So the CONNECT goes the ordinary way, TLS and port 15008 included, and only the bytes are spared it:
//!
//! ```text
//!  client's worker                               acceptor's worker
//!  offers (session, stream)  ── CONNECT ──►  authorizes, dials the application,
//!                                            finds the offer of its own stream, hands its socket over
//!  takes the socket          ◄─── 200 ────   keeps its record, its policy and the tunnel
//!  copies application ◄─► application        waits
//! ```
//!
//! Whoever ends it (either application, policy, drain, the tunnel itself) ends it for both. An offer is found by the name of its TLS
//! stream, which only the two ends of the session know: another ztunnel, also another generation on this node, finds none.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh::hbone::StreamName;
use mesh::telemetry::ByteCounts;
use tokio::sync::oneshot;

/// Offers of clients that wait for the answer to a CONNECT.
#[derive(Default)]
pub struct Joins(Mutex<HashMap<StreamName, Slot>>);

type Slot = Arc<Mutex<Option<Handed>>>;

/// A client that would take the application's socket in place of the tunnel; withdrawn by dropping it.
pub struct Offer<'a> {
    joins: &'a Joins,
    name: Option<StreamName>,
    slot: Slot,
}

/// The acceptor's side of an offer that was found.
pub struct Found(Slot);

/// What the client's side gets.
pub struct Handed {
    /// The last leg. Belongs to no runtime until it is taken.
    pub app: TcpStream,
    /// The acceptor's record.
    pub bytes: Arc<ByteCounts>,
    pub tie: ClientTie,
}

/// The client's hold on the acceptor.
pub struct ClientTie {
    /// Until it is.
    over: Option<oneshot::Sender<()>>,
    cut: oneshot::Receiver<Infallible>,
}

/// The acceptor's hold on the client; dropping it cuts.
pub struct AcceptorTie {
    over: oneshot::Receiver<()>,
    _cut: oneshot::Sender<Infallible>,
}

impl Joins {
    /// An offer that nobody can find yet.
    #[must_use]
    pub fn offer(&self) -> Offer<'_> {
        Offer { joins: self, name: None, slot: Slot::default() }
    }

    /// The offer made for this stream, which is nobody else's from now on.
    #[must_use]
    pub fn find(&self, name: StreamName) -> Option<Found> {
        self.table().remove(&name).map(Found)
    }

    fn table(&self) -> MutexGuard<'_, HashMap<StreamName, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Offer<'_> {
    /// The CONNECT goes out on this stream, and on no other any more.
    pub fn announce(&mut self, name: StreamName) {
        self.withdraw();
        self.name = Some(name);
        self.joins.table().insert(name, self.slot.clone());
    }

    /// Once the CONNECT is answered with success: was the socket handed over?
    #[must_use]
    pub fn taken(self) -> Option<Handed> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn withdraw(&mut self) {
        if let Some(name) = self.name.take() {
            self.joins.table().remove(&name);
        }
    }
}

impl Drop for Offer<'_> {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Found {
    /// Hands the socket over. To be done before the CONNECT is answered.
    pub fn hand_over(self, app: TcpStream, bytes: Arc<ByteCounts>) -> AcceptorTie {
        let (over, is_over) = oneshot::channel();
        let (cut, is_cut) = oneshot::channel();
        let handed = Handed { app, bytes, tie: ClientTie { over: Some(over), cut: is_cut } };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(handed);
        AcceptorTie { over: is_over, _cut: cut }
    }
}

impl ClientTie {
    /// Resolves when the acceptor's side wants it ended.
    pub async fn cut(&mut self) {
        // Nothing is ever sent: the end of the other side is the message.
        let _ = (&mut self.cut).await;
    }

    /// Both applications are done.
    pub fn over(&mut self) {
        // Nobody is told who has ended it himself.
        let _ = self.over.take().map(|over| over.send(()));
    }
}

impl AcceptorTie {
    /// Resolves when the client's side has ended, well or not.
    pub async fn over(&mut self) {
        // Dropped unsent, it says the same.
        let _ = (&mut self.over).await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn name(stream: u32) -> StreamName {
        StreamName { session: [7; 32], stream }
    }

    fn socket() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn an_offer_is_found_by_its_stream_alone_and_once() {
        let joins = Joins::default();
        let mut offer = joins.offer();
        offer.announce(name(1));
        assert!(joins.find(name(3)).is_none());
        let found = joins.find(name(1)).expect("it stands");
        assert!(joins.find(name(1)).is_none());
        let mut acceptor = found.hand_over(socket(), Arc::default());
        let mut handed = offer.taken().expect("it was handed over");
        handed.tie.over();
        acceptor.over().await;
    }

    #[tokio::test]
    async fn an_offer_moves_with_its_connect_and_goes_with_its_client() {
        let joins = Joins::default();
        let mut offer = joins.offer();
        offer.announce(name(1));
        offer.announce(name(5));
        assert!(joins.find(name(1)).is_none(), "that connection did not take it");
        drop(offer);
        assert!(joins.table().is_empty());
    }

    #[tokio::test]
    async fn either_side_that_goes_ends_it_for_the_other() {
        let joins = Joins::default();
        let (mut first, mut second) = (joins.offer(), joins.offer());
        first.announce(name(1));
        second.announce(name(3));
        let acceptor = joins.find(name(1)).unwrap().hand_over(socket(), Arc::default());
        let mut handed = first.taken().unwrap();
        drop(acceptor);
        handed.tie.cut().await;

        let mut acceptor = joins.find(name(3)).unwrap().hand_over(socket(), Arc::default());
        drop(second.taken().unwrap());
        acceptor.over().await;
    }

    #[test]
    fn a_socket_for_a_client_that_has_given_up_is_closed() {
        let joins = Joins::default();
        let mut offer = joins.offer();
        offer.announce(name(1));
        let found = joins.find(name(1)).unwrap();
        drop(offer);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let app = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        drop(found.hand_over(app, Arc::default()));
        assert_eq!(std::io::Read::read(&mut far, &mut [0]).unwrap(), 0);
    }
}
