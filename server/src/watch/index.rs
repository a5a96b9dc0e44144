//! Finds the groups a key concerns without looking at the others: single keys by a map, intervals by a tree.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::group::Group;
use super::interest::{Interest, Span};

/// The groups there are, by the keys they watch.
#[derive(Default)]
pub(super) struct Index {
    keys: HashMap<Bytes, usize>,
    spans: Tree,
    slots: Vec<Slot>,
    /// Slots without groups.
    free: Vec<usize>,
}

/// The groups of one span: one for each combination of options in use.
#[derive(Default)]
struct Slot {
    span: Option<Span>,
    groups: Vec<Arc<Group>>,
}

impl Index {
    pub(super) fn find(&self, interest: &Interest) -> Option<&Arc<Group>> {
        let slot = self.slot_of(&interest.span)?;
        self.slots[slot].groups.iter().find(|group| group.interest.options == interest.options)
    }

    pub(super) fn insert(&mut self, group: Arc<Group>) {
        let span = &group.interest.span;
        let slot = self.slot_of(span).unwrap_or_else(|| {
            let slot = self.free.pop().unwrap_or_else(|| {
                self.slots.push(Slot::default());
                self.slots.len() - 1
            });
            self.slots[slot].span = Some(span.clone());
            if span.is_one_key() {
                self.keys.insert(span.start.clone(), slot);
            } else {
                self.spans.insert(span.clone(), slot);
            }
            slot
        });
        self.slots[slot].groups.push(group);
    }

    pub(super) fn remove(&mut self, group: &Arc<Group>) {
        let span = &group.interest.span;
        let Some(slot) = self.slot_of(span) else { return };
        self.slots[slot].groups.retain(|member| !Arc::ptr_eq(member, group));
        if self.slots[slot].groups.is_empty() {
            if span.is_one_key() {
                self.keys.remove(&span.start);
            } else {
                self.spans.remove(span);
            }
            self.slots[slot] = Slot::default();
            self.free.push(slot);
        }
    }

    /// Adds the slots whose span holds a key.
    pub(super) fn slots_with(&self, key: &[u8], found: &mut Vec<usize>) {
        found.extend(self.keys.get(key));
        self.spans.holding(key, found);
    }

    pub(super) fn groups_of(&self, slot: usize) -> &[Arc<Group>] {
        &self.slots[slot].groups
    }

    pub(super) fn groups(&self) -> impl Iterator<Item = &Arc<Group>> {
        self.slots.iter().flat_map(|slot| &slot.groups)
    }

    fn slot_of(&self, span: &Span) -> Option<usize> {
        if span.is_one_key() { self.keys.get(&span.start).copied() } else { self.spans.get(span) }
    }
}

/// Spans in the order of their starts, each node knowing how far the spans below it reach: an interval tree, kept
/// balanced by random priorities (a treap), so that no choice of spans makes it deep.
#[derive(Default)]
struct Tree {
    root: Link,
}

type Link = Option<Box<Node>>;

struct Node {
    span: Span,
    slot: usize,
    /// Never smaller than its children's.
    priority: u64,
    /// The greatest end in this subtree; `None`: one has no end.
    reach: Option<Bytes>,
    left: Link,
    right: Link,
}

impl Tree {
    fn get(&self, span: &Span) -> Option<usize> {
        let mut link = &self.root;
        while let Some(node) = link {
            link = match order(span, &node.span) {
                Ordering::Equal => return Some(node.slot),
                Ordering::Less => &node.left,
                Ordering::Greater => &node.right,
            };
        }
        None
    }

    fn insert(&mut self, span: Span, slot: usize) {
        let (left, right) = split(self.root.take(), &span);
        let reach = span.end.clone();
        let node = Box::new(Node { span, slot, priority: fastrand::u64(..), reach, left: None, right: None });
        self.root = join(join(left, Some(node)), right);
    }

    fn remove(&mut self, span: &Span) {
        self.root = without(self.root.take(), span);
    }

    fn holding(&self, key: &[u8], found: &mut Vec<usize>) {
        holding(&self.root, key, found);
    }
}

impl Node {
    fn with(mut self: Box<Self>, left: Link, right: Link) -> Link {
        let below = [&left, &right].into_iter().flatten().map(|node| &node.reach);
        let reach = below.fold(&self.span.end, |furthest, reach| match (furthest, reach) {
            (Some(a), Some(b)) => {
                if a < b {
                    reach
                } else {
                    furthest
                }
            }
            (None, _) => furthest,
            (_, None) => reach,
        });
        self.reach = reach.clone();
        self.left = left;
        self.right = right;
        Some(self)
    }
}

/// By start, then by end, where none is the greatest.
fn order(a: &Span, b: &Span) -> Ordering {
    let ends = || match (&a.end, &b.end) {
        (Some(a), Some(b)) => a.cmp(b),
        (a, b) => a.is_none().cmp(&b.is_none()),
    };
    a.start.cmp(&b.start).then_with(ends)
}

/// What comes before a span, and what does not.
fn split(link: Link, span: &Span) -> (Link, Link) {
    let Some(mut node) = link else { return (None, None) };
    let (left, right) = (node.left.take(), node.right.take());
    if order(&node.span, span).is_lt() {
        let (middle, right) = split(right, span);
        (node.with(left, middle), right)
    } else {
        let (left, middle) = split(left, span);
        (left, node.with(middle, right))
    }
}

/// One tree of two, all of the first before all of the second.
fn join(a: Link, b: Link) -> Link {
    match (a, b) {
        (None, link) | (link, None) => link,
        (Some(mut a), Some(mut b)) => {
            if a.priority > b.priority {
                let (left, right) = (a.left.take(), a.right.take());
                a.with(left, join(right, Some(b)))
            } else {
                let (left, right) = (b.left.take(), b.right.take());
                b.with(join(Some(a), left), right)
            }
        }
    }
}

fn without(link: Link, span: &Span) -> Link {
    let mut node = link?;
    let (left, right) = (node.left.take(), node.right.take());
    match order(span, &node.span) {
        Ordering::Equal => join(left, right),
        Ordering::Less => node.with(without(left, span), right),
        Ordering::Greater => node.with(left, without(right, span)),
    }
}

fn holding(link: &Link, key: &[u8], found: &mut Vec<usize>) {
    let Some(node) = link else { return };
    if node.reach.as_ref().is_some_and(|reach| **reach <= *key) {
        return;
    }
    holding(&node.left, key, found);
    if *node.span.start <= *key {
        if node.span.contains(key) {
            found.push(node.slot);
        }
        holding(&node.right, key, found);
    }
}

#[cfg(test)]
mod tests {
    use d_engine_proto::Revision;

    use super::*;
    use crate::watch::interest::Options;
    use crate::watch::tests::seeded;

    fn depth(link: &Link) -> usize {
        link.as_ref().map_or(0, |node| 1 + depth(&node.left).max(depth(&node.right)))
    }

    fn random_span(random: &mut fastrand::Rng) -> Span {
        let mut key = || Bytes::from((0..random.usize(..4)).map(|_| random.u8(..3)).collect::<Vec<_>>());
        let (a, b) = (key(), key());
        match a.cmp(&b) {
            Ordering::Less => Span { start: a, end: Some(b) },
            Ordering::Equal if a.len() % 2 == 0 => Span { end: Some([&a[..], b"\0"].concat().into()), start: a },
            Ordering::Equal => Span { start: a, end: None },
            Ordering::Greater => Span { start: b, end: Some(a) },
        }
    }

    /// Groups come and go; whenever a key is looked up, the answer is that of looking at each group.
    #[test]
    fn a_key_finds_exactly_the_groups_that_hold_it() {
        let mut random = seeded();
        let mut index = Index::default();
        let mut present: Vec<Arc<Group>> = Vec::new();
        for _ in 0..4000 {
            if random.u32(..5) < 3 {
                let options = Options { previous: random.bool(), puts: true, deletes: true, keys_only: false };
                let interest = Interest { span: random_span(&mut random), options };
                if index.find(&interest).is_none() {
                    let group = Arc::new(Group::new(interest, Revision(0)));
                    index.insert(Arc::clone(&group));
                    present.push(group);
                }
            } else if !present.is_empty() {
                let gone = present.swap_remove(random.usize(..present.len()));
                index.remove(&gone);
                assert!(index.find(&gone.interest).is_none());
            }
            let key: Vec<u8> = (0..random.usize(..4)).map(|_| random.u8(..3)).collect();
            let mut slots = Vec::new();
            index.slots_with(&key, &mut slots);
            let mut found: Vec<_> = slots.iter().flat_map(|slot| index.groups_of(*slot)).map(Arc::as_ptr).collect();
            let holds = |group: &&Arc<Group>| group.interest.span.contains(&key);
            let mut expected: Vec<_> = present.iter().filter(holds).map(Arc::as_ptr).collect();
            found.sort();
            expected.sort();
            assert_eq!(found, expected);
            assert_eq!(index.groups().count(), present.len());
        }
    }

    #[test]
    fn spans_in_order_make_no_deep_tree() {
        let mut tree = Tree::default();
        for number in 0..10_000_u32 {
            let start = Bytes::copy_from_slice(&number.to_be_bytes());
            tree.insert(Span { start, end: None }, number as usize);
        }
        assert!(depth(&tree.root) < 100, "{}", depth(&tree.root));
    }
}
