//! Which replica writes about which pod: the one that its node is connected to. About pods of nodes that are connected to
//! nobody the leader writes; it cannot see whom the others have, so it leaves them the time to go first.
//!
//! Both would write the same, as far as they have heard the same; this is about who has heard it first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::{Annotate, Attention, Reports, annotations};
use crate::translate::world::World;
use crate::types::Key;

/// How long the leader leaves a pod of a node that is not its own to whoever has that node.
const COURTESY: Duration = Duration::from_secs(2);

/// What this replica leads, and since when the leader has waited for others.
#[derive(Debug, Default)]
pub struct Turns {
    led: bool,
    waiting: BTreeMap<Key, Instant>,
}

/// What a turn comes to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// The annotations to change now.
    pub changes: Vec<Annotate>,
    /// The pods to tell about what there is to tell. That two tell it is refused by the API.
    pub to_tell: BTreeSet<Key>,
    /// Those to look at again after a while.
    pub later: BTreeSet<Key>,
}

impl Turns {
    /// Of `stale`, the pods that something may have to be written about.
    pub fn take(
        &mut self,
        world: &World,
        reports: &Reports,
        attention: &Attention,
        mut stale: BTreeSet<Key>,
        leads: bool,
    ) -> Turn {
        // What nobody else wrote before it led.
        if leads && !self.led {
            stale.extend(world.pods.keys().cloned());
        }
        self.led = leads;
        let is_ours = |key: &Key| {
            let node = world.pods.get(key).and_then(|pod| pod.node());
            node.is_some_and(|node| reports.last(node).is_some())
        };
        let (mut to_tell, others): (BTreeSet<Key>, BTreeSet<Key>) = stale.into_iter().partition(is_ours);
        let mut changes = annotations(world, reports, attention, &to_tell);
        let mut later = BTreeSet::new();
        let before = std::mem::take(&mut self.waiting);
        if leads {
            let now = Instant::now();
            for change in annotations(world, reports, attention, &others) {
                let key = Key::new(&*change.namespace, &*change.name);
                let since = before.get(&key).copied().unwrap_or(now);
                if now >= since + COURTESY {
                    changes.push(change);
                } else {
                    later.insert(key.clone());
                }
                // Also of what is written now, as that may fail.
                self.waiting.insert(key, since);
            }
            to_tell.extend(others);
        }
        Turn { changes, to_tell, later }
    }
}

#[cfg(test)]
mod tests {
    use mesh_proto::enrolment::PodState;
    use mesh_proto::enrolment::pod_state::State;

    use super::*;
    use crate::resources::ReportSink as _;
    use crate::translate::fixture;

    /// Pod `a` on node-a and `b` on node-b; neither is wanted any more.
    fn world() -> World {
        let pod = |name: &str| {
            format!(
                "kind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}, annotations: \
                 {{ambient.istio.io/redirection: enabled}}}}\nspec: {{nodeName: node-{name}, containers: []}}\n\
                 status: {{phase: Running}}\n---\n"
            )
        };
        let namespace = "kind: Namespace\nmetadata: {name: shop}\n";
        fixture::world(&(pod("a") + &pod("b") + namespace))
    }

    fn reports(node: &str) -> Reports {
        let reports = Reports::default();
        let enrolled = PodState { uid: node.into(), state: State::Enrolled.into(), ..PodState::default() };
        reports.report(node, vec![enrolled]);
        reports
    }

    /// Whose annotations are changed, and whom something is told about.
    fn names(turn: &Turn) -> (Vec<&str>, Vec<&str>) {
        (turn.changes.iter().map(|change| &*change.name).collect(), turn.to_tell.iter().map(|key| &*key.name).collect())
    }

    #[tokio::test(start_paused = true)]
    async fn each_writes_for_its_nodes_and_the_leader_for_those_nobody_has() {
        let (world, reports, attention) = (world(), reports("node-a"), Attention::default());
        let all: BTreeSet<Key> = world.pods.keys().cloned().collect();
        let mut follower = Turns::default();
        for _ in 0..3 {
            let turn = follower.take(&world, &reports, &attention, all.clone(), false);
            assert_eq!((names(&turn), turn.later.len()), ((vec!["a"], vec!["a"]), 0));
            tokio::time::advance(COURTESY).await;
        }
        // It becomes the leader: then it looks at all.
        let turn = follower.take(&world, &reports, &attention, BTreeSet::new(), true);
        assert_eq!(names(&turn), (vec!["a"], vec!["a", "b"]));
        assert_eq!(turn.later, [Key::new("shop", "b")].into(), "whoever has node-b goes first");
        tokio::time::advance(COURTESY / 2).await;
        let turn = follower.take(&world, &reports, &attention, turn.later, true);
        assert_eq!((names(&turn).0, turn.later.len()), (vec![], 1));
        tokio::time::advance(COURTESY / 2).await;
        for _ in 0..2 {
            let turn = follower.take(&world, &reports, &attention, [Key::new("shop", "b")].into(), true);
            assert_eq!((names(&turn).0, turn.later.len()), (vec!["b"], 0), "nobody has");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_leader_waits_anew_for_what_another_has_done_meanwhile() {
        let (world, reports, attention) = (world(), reports("node-a"), Attention::default());
        let b: BTreeSet<Key> = [Key::new("shop", "b")].into();
        let mut leader = Turns { led: true, ..Turns::default() };
        assert_eq!(leader.take(&world, &reports, &attention, b.clone(), true).later, b);
        // Its annotation has gone, by whoever has node-b.
        let mut without = world.clone();
        without.pods.remove(&Key::new("shop", "b"));
        assert_eq!(leader.take(&without, &reports, &attention, b.clone(), true).later.len(), 0);
        tokio::time::advance(COURTESY).await;
        assert_eq!(leader.take(&world, &reports, &attention, b.clone(), true).later, b);
    }
}
