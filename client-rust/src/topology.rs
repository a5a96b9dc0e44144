//! What the client knows of the cluster, and which node it asks next. Pure: time and randomness are passed in.
//!
//! Three sources feed it: the seeds (never forgotten), the member lists that nodes answer, and what each attempt
//! showed about an address. A hint about the leader counts only if its term is newer than the one known, so that a
//! node with an old view cannot send the client back to a deposed leader.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{Epoch, NodeId, Term, v1};
use tokio::time::Instant;

use crate::cluster::{Leader, Member};
use crate::retry::backoff;

/// A normalized endpoint, `host:port`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Address(Arc<str>);

impl Address {
    /// Accepts `host:port`, `[v6]:port`, and the same after `http://` or `https://`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let bare = text.trim();
        let bare = bare.strip_prefix("http://").or_else(|| bare.strip_prefix("https://")).unwrap_or(bare);
        let bare = bare.strip_suffix('/').unwrap_or(bare);
        let malformed = || format!("endpoint {text:?} is not of the form host:port");
        if bare.contains("://") {
            return Err(format!("endpoint {text:?} names a scheme; only https://, http:// or none is supported"));
        }
        let authority: tonic::codegen::http::uri::Authority = bare.parse().map_err(|_| malformed())?;
        match authority.port_u16() {
            Some(port) if port != 0 && !authority.host().is_empty() && !bare.contains('@') => Ok(Self(bare.into())),
            _ => Err(malformed()),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which nodes may serve a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The leader only: writes and lease reads.
    Leader,
    /// The leader if it can be reached, else any node: linearizable reads, which followers serve too.
    PreferLeader,
    /// The nearest, least loaded node: eventual reads.
    Any,
}

/// Where to send the next attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pick {
    /// To this node.
    Node(Address),
    /// Nowhere now. Look again when the topology changes, or at this moment.
    Wait(Option<Instant>),
}

/// What is known about one address.
#[derive(Debug, Default)]
struct Node {
    /// Who answered there.
    id: Option<NodeId>,
    in_flight: u32,
    /// Smoothed time of successful answers.
    latency: Option<Duration>,
    /// Failures in a row.
    failures: u32,
    /// Not asked before this moment.
    avoid_until: Option<Instant>,
    /// Why the last attempt failed; empty after an answer.
    problem: String,
}

impl Node {
    fn available(&self, now: Instant) -> bool {
        self.avoid_until.is_none_or(|until| until <= now)
    }
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Topology {
    seeds: Vec<Address>,
    members: BTreeMap<NodeId, Option<Address>>,
    nodes: BTreeMap<Address, Node>,
    leader: Option<(Leader, Option<Address>)>,
    /// The newest term in which a leader was known. Invariant: at least the term of `leader`.
    term: Term,
    /// After the leader itself denied leading `term`: from when on others may name it for that term again.
    denied_until: Option<Instant>,
    /// Cluster id and epoch of the first answer; answers with others are refused.
    identity: Option<(u64, u64)>,
    /// Set while whoever answers belongs to another cluster.
    estranged: Option<String>,
    leader_changes: u64,
}

/// An answer came from another cluster or another restore epoch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Foreign(pub(crate) String);

/// A leader that denied being one may win its term back, once it reaches its quorum again.
const DENIAL: Duration = Duration::from_millis(100);

impl Topology {
    pub(crate) fn new(seeds: Vec<Address>) -> Self {
        let nodes = seeds.iter().map(|seed| (seed.clone(), Node::default())).collect();
        Self {
            seeds,
            members: BTreeMap::new(),
            nodes,
            leader: None,
            term: Term(0),
            denied_until: None,
            identity: None,
            estranged: None,
            leader_changes: 0,
        }
    }

    /// The leader, if one is known.
    pub(crate) fn leader(&self) -> Option<&Leader> {
        self.leader.as_ref().map(|(leader, _)| leader)
    }

    /// The restore epoch of the cluster; 0 before the first answer.
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.identity.map_or(0, |(_, epoch)| epoch))
    }

    /// How often a leader of a newer term took the place of one known before.
    pub(crate) fn leader_changes(&self) -> u64 {
        self.leader_changes
    }

    /// Every address worth asking: members and seeds.
    pub(crate) fn addresses(&self) -> Vec<Address> {
        let mut addresses: Vec<_> = self.members.values().flatten().chain(&self.seeds).cloned().collect();
        addresses.sort();
        addresses.dedup();
        addresses
    }

    /// Whether a call that only the leader serves could be sent now.
    pub(crate) fn leader_is_usable(&self, now: Instant) -> bool {
        self.leader_addresses().any(|address| self.available(address, now))
    }

    /// Chooses the node for the next attempt of a call; `tried` were asked before in the same call.
    pub(crate) fn pick(&self, route: Route, tried: &[Address], now: Instant, rng: &mut fastrand::Rng) -> Pick {
        match route {
            Route::Leader => self.pick_leader(now),
            Route::PreferLeader => match self.pick_leader(now) {
                Pick::Node(leader) if !tried.contains(&leader) => Pick::Node(leader),
                _ => self.pick_any(tried, now, rng),
            },
            Route::Any => self.pick_any(tried, now, rng),
        }
    }

    fn pick_leader(&self, now: Instant) -> Pick {
        match self.leader_addresses().find(|address| self.available(address, now)) {
            Some(address) => Pick::Node(address.clone()),
            None => Pick::Wait(self.leader_addresses().filter_map(|address| self.avoided_until(address)).min()),
        }
    }

    fn pick_any(&self, tried: &[Address], now: Instant, rng: &mut fastrand::Rng) -> Pick {
        let untried = |address: &Address| !tried.contains(address);
        let fresh = self.pick_least_loaded(now, rng, untried);
        match fresh.or_else(|| self.pick_least_loaded(now, rng, |_| true)) {
            Some(address) => Pick::Node(address),
            None => Pick::Wait(self.candidates(now).filter_map(|(_, node)| node.avoid_until).min()),
        }
    }

    /// One of those with the fewest calls in flight, and the fastest of these.
    fn pick_least_loaded(
        &self,
        now: Instant,
        rng: &mut fastrand::Rng,
        wanted: impl Fn(&Address) -> bool,
    ) -> Option<Address> {
        let load = |node: &Node| (node.in_flight, node.latency.unwrap_or_default());
        let mut best: Option<(&Address, &Node)> = None;
        let mut equals = 0;
        for (address, node) in self.candidates(now) {
            if !node.available(now) || !wanted(address) {
                continue;
            }
            match best.map(|(_, best)| load(node).cmp(&load(best))) {
                Some(Ordering::Greater) => continue,
                Some(Ordering::Equal) => equals += 1,
                Some(Ordering::Less) | None => equals = 1,
            }
            // Each of the equals is left over with the same probability.
            if equals == 1 || rng.u32(0..equals) == 0 {
                best = Some((address, node));
            }
        }
        best.map(|(address, _)| address.clone())
    }

    /// Members and seeds, without a seed that is but another name of a member that can be asked directly.
    fn candidates(&self, now: Instant) -> impl Iterator<Item = (&Address, &Node)> {
        let is_alias = move |address: &Address, node: &Node| {
            let advertised = node.id.and_then(|id| self.members.get(&id)).and_then(Option::as_ref);
            advertised.is_some_and(|advertised| advertised != address && self.available(advertised, now))
        };
        let listed = |address: &Address| {
            self.seeds.contains(address) || self.members.values().flatten().any(|member| member == address)
        };
        self.nodes.iter().filter(move |(address, node)| listed(address) && !is_alias(address, node))
    }

    /// Ways to reach the leader, best first: as the hint says, as the members say, as a seed that turned out to be it.
    fn leader_addresses(&self) -> impl Iterator<Item = &Address> {
        let leader = self.leader.as_ref();
        let hinted = leader.and_then(|(_, address)| address.as_ref());
        let id = leader.map(|(leader, _)| leader.id);
        let listed = id.and_then(|id| self.members.get(&id)).and_then(Option::as_ref);
        let aliases = self.nodes.iter().filter(move |(_, node)| id.is_some() && node.id == id);
        hinted.into_iter().chain(listed).chain(aliases.map(|(address, _)| address))
    }

    fn available(&self, address: &Address, now: Instant) -> bool {
        self.nodes.get(address).is_none_or(|node| node.available(now))
    }

    fn avoided_until(&self, address: &Address) -> Option<Instant> {
        self.nodes.get(address).and_then(|node| node.avoid_until)
    }

    /// Counts an attempt as in flight; [`end`](Self::end) is its counterpart.
    pub(crate) fn begin(&mut self, address: &Address) {
        self.nodes.entry(address.clone()).or_default().in_flight += 1;
    }

    /// Counts an attempt as over.
    pub(crate) fn end(&mut self, address: &Address) {
        if let Some(node) = self.nodes.get_mut(address) {
            node.in_flight = node.in_flight.saturating_sub(1);
        }
    }

    /// Takes note of an answer: the identity behind it, who gave it and how fast.
    pub(crate) fn answered(
        &mut self,
        address: &Address,
        header: &v1::ResponseHeader,
        latency: Duration,
    ) -> Result<(), Foreign> {
        // 0 is the identity of a node that belongs to no cluster yet: it has none to compare.
        if header.cluster_id != 0 {
            let answered = (header.cluster_id, header.epoch);
            let (cluster_id, epoch) = *self.identity.get_or_insert(answered);
            if (cluster_id, epoch) != answered {
                return Err(Foreign(format!(
                    "the node belongs to cluster {:016x}, restore epoch {}; this client talks to cluster \
                     {cluster_id:016x}, restore epoch {epoch}",
                    header.cluster_id, header.epoch
                )));
            }
        }
        let node = self.nodes.entry(address.clone()).or_default();
        if header.node_id != 0 {
            node.id = Some(NodeId(header.node_id));
        }
        self.estranged = None;
        node.failures = 0;
        node.avoid_until = None;
        node.problem.clear();
        node.latency = Some(node.latency.map_or(latency, |smoothed| (smoothed * 7 + latency) / 8));
        Ok(())
    }

    /// Backs an address off. Failures of attempts that were already under way do not prolong it.
    pub(crate) fn failed(&mut self, address: &Address, problem: &str, now: Instant, rng: &mut fastrand::Rng) {
        let node = self.nodes.entry(address.clone()).or_default();
        problem.clone_into(&mut node.problem);
        if node.available(now) {
            // Jitter alone may be next to nothing, and a dead node would be asked again at once.
            node.avoid_until = Some(now + Self::AVOID_MIN + backoff(node.failures, rng));
            node.failures = node.failures.saturating_add(1);
        }
    }

    const AVOID_MIN: Duration = Duration::from_millis(20);

    /// Takes note that a node of another cluster answered, and nobody of this one.
    pub(crate) fn estrange(&mut self, foreign: String) {
        self.estranged = Some(foreign);
    }

    /// Why nobody of this cluster answers, if others do in its place.
    pub(crate) fn estranged(&self) -> Option<&str> {
        self.estranged.as_deref()
    }

    /// What is wrong with each address that failed last time, for people.
    pub(crate) fn problems(&self) -> Vec<String> {
        let failed = self.nodes.iter().filter(|(_, node)| !node.problem.is_empty());
        failed.map(|(address, node)| format!("{address}: {}", node.problem)).collect()
    }

    /// Takes note of a leader that some node named. True if it is news.
    pub(crate) fn hint(&mut self, leader: Leader, now: Instant) -> bool {
        let denied = self.denied_until.is_some_and(|until| now < until);
        let newer = leader.term > self.term || (leader.term == self.term && self.leader.is_none() && !denied);
        if !newer || leader.id.get() == 0 {
            return false;
        }
        if self.term.get() != 0 && leader.term > self.term {
            self.leader_changes += 1;
        }
        self.term = leader.term;
        self.denied_until = None;
        let address = Address::parse(&leader.client_address).ok();
        self.leader = Some((leader, address));
        true
    }

    /// The node at `address` said that it does not lead. If it was taken for the leader, there is none known now.
    pub(crate) fn denied(&mut self, address: &Address, now: Instant) {
        if self.leader_addresses().any(|known| known == address) {
            self.leader = None;
            self.denied_until = Some(now + DENIAL);
        }
    }

    /// A node of another cluster answered at `address`. If it was taken for the leader, so was the term by which it
    /// came to that: errors do not tell whose they are.
    pub(crate) fn foreign(&mut self, address: &Address) {
        if self.leader_addresses().any(|known| known == address) {
            self.leader = None;
            self.term = Term(0);
            self.denied_until = None;
        }
    }

    /// Takes over a member list. Seeds stay, and so does what is known about addresses still in use.
    pub(crate) fn learn(&mut self, members: impl IntoIterator<Item = Member>) {
        let members: BTreeMap<_, _> =
            members.into_iter().map(|member| (member.id, Address::parse(&member.client_address).ok())).collect();
        if members.is_empty() {
            return;
        }
        self.members = members;
        for address in self.addresses() {
            self.nodes.entry(address).or_default();
        }
        let keep = self.addresses();
        let leader = self.leader.as_ref().and_then(|(_, address)| address.clone());
        self.nodes.retain(|address, node| {
            node.in_flight > 0 || keep.binary_search(address).is_ok() || leader.as_ref() == Some(address)
        });
    }

    /// Whether anything is known about `address`, so that a connection to it is worth keeping.
    pub(crate) fn knows(&self, address: &Address) -> bool {
        self.nodes.contains_key(address)
    }
}

#[cfg(test)]
#[path = "topology_tests.rs"]
mod tests;
