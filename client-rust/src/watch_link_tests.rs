use bytes::Bytes;

use super::*;
use crate::kv::IntoBytes;

fn event(revision: u64, key: &str) -> v1::WatchEvent {
    let kv = v1::KeyValue { key: key.into_bytes(), mod_revision: revision, ..v1::KeyValue::default() };
    v1::WatchEvent { kind: v1::watch_event::Kind::Put.into(), kv: Some(kv), previous: None }
}

fn events(revisions: &[u64], incomplete: bool) -> v1::WatchEvents {
    v1::WatchEvents { events: revisions.iter().map(|revision| event(*revision, "k")).collect(), incomplete }
}

fn assemble(
    assembler: &mut Assembler,
    revisions: &[u64],
    incomplete: bool,
) -> Result<Option<WatchUpdate>, &'static str> {
    assembler.events(&events(revisions, incomplete), &Namespace::default())
}

fn revisions(update: Option<WatchUpdate>) -> Option<(u64, Vec<u64>)> {
    update.map(|update| {
        (update.revision.get(), update.events.iter().map(|event| event.revision().get()).collect::<Vec<_>>())
    })
}

#[test]
fn revisions_leave_only_when_they_are_whole_however_they_are_cut() {
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..2000 {
        let mut whole = Vec::new();
        let mut revision = 10;
        for _ in 0..rng.usize(1..20) {
            revision += rng.u64(1..3);
            whole.extend(std::iter::repeat_n(revision, rng.usize(1..5)));
        }
        let mut assembler = Assembler::starting_at(Revision(10));
        let (mut sent, mut read) = (0, Vec::new());
        while sent < whole.len() {
            let next = rng.usize(sent + 1..=whole.len());
            let incomplete = whole.get(next) == whole.get(next - 1);
            let update = assemble(&mut assembler, &whole[sent..next], incomplete).unwrap();
            sent = next;
            if let Some((revision, events)) = revisions(update) {
                assert_eq!(events.last(), Some(&revision), "seed {seed}");
                read.extend(events);
                let complete = whole.iter().take_while(|event| **event <= revision).count();
                assert_eq!(read, whole[..complete], "seed {seed}: half a revision, or a lost one");
            }
        }
        assert_eq!(read, whole, "seed {seed}");
    }
}

#[test]
fn what_was_delivered_does_not_come_again() {
    let mut assembler = Assembler::starting_at(Revision(5));
    assert_eq!(revisions(assemble(&mut assembler, &[3, 4, 5], false).unwrap()), Some((5, vec![5])));
    assert_eq!(revisions(assemble(&mut assembler, &[5, 5, 6], false).unwrap()), Some((6, vec![6])));
    assert_eq!(revisions(assemble(&mut assembler, &[5, 6], false).unwrap()), None);
    assert_eq!(revisions(assembler.bookmark(Revision(6)).unwrap()), None);
    assert_eq!(revisions(assembler.bookmark(Revision(8)).unwrap()), Some((8, vec![])));
    assert_eq!(revisions(assemble(&mut assembler, &[8, 9], false).unwrap()), Some((9, vec![9])));
}

#[test]
fn an_answer_that_breaks_the_order_is_not_taken() {
    let mut assembler = Assembler::starting_at(Revision(1));
    assert!(assemble(&mut assembler, &[4, 3], false).is_err());
    let mut assembler = Assembler::starting_at(Revision(1));
    assert!(assemble(&mut assembler, &[4], true).unwrap().is_none());
    assert!(assembler.bookmark(Revision(9)).is_err(), "half of revision 4 would be lost");
    let mut assembler = Assembler::starting_at(Revision(1));
    let unreadable = v1::WatchEvent { kind: 7, ..event(2, "k") };
    assert!(
        assembler
            .events(&v1::WatchEvents { events: vec![unreadable], incomplete: false }, &Namespace::default())
            .is_err()
    );
}

fn created(from_revision: u64) -> Kind {
    Kind::Created(v1::WatchCreated { header: None, from_revision })
}

fn big(revision: u64) -> Kind {
    let mut event = event(revision, "k");
    if let Some(kv) = &mut event.kv {
        kv.value = vec![0; MAILBOX_BYTES_MAX / 4].into();
    }
    Kind::Events(v1::WatchEvents { events: vec![event], incomplete: false })
}

#[test]
fn a_full_mailbox_ends_after_what_it_holds() {
    let mailbox = Mailbox::new(&Namespace::default());
    mailbox.accept(&created(1)).unwrap();
    let mut revision = 1;
    let ending = loop {
        match mailbox.accept(&big(revision)) {
            Ok(()) => revision += 1,
            Err(ending) => break ending,
        }
        assert!(revision < 100, "the mailbox has no bound");
    };
    assert!(matches!(ending, Ending::Overrun));
    mailbox.end(ending);
    assert!(matches!(mailbox.take(), Some(Delivery::Created(_))));
    for expected in 1..revision {
        let Some(Delivery::Update(update)) = mailbox.take() else { panic!("revision {expected} is gone") };
        assert_eq!(update.revision, Revision(expected));
    }
    assert!(matches!(mailbox.take(), Some(Delivery::Ended(Ending::Overrun))));
    assert_eq!(mailbox.mail.lock().bytes, 0);
}

#[test]
fn one_update_is_taken_whatever_its_size_and_bookmarks_take_no_room() {
    let mailbox = Mailbox::new(&Namespace::default());
    mailbox.accept(&created(1)).unwrap();
    let giant: Vec<_> = (0..5).map(|_| big(1)).collect();
    for (part, kind) in giant.into_iter().enumerate() {
        let Kind::Events(mut events) = kind else { unreachable!() };
        events.incomplete = part < 4;
        mailbox.accept(&Kind::Events(events)).unwrap();
    }
    for revision in 2..100_000 {
        mailbox.accept(&Kind::Bookmark(v1::WatchBookmark { revision })).unwrap();
    }
    mailbox.take().unwrap();
    let Some(Delivery::Update(update)) = mailbox.take() else { panic!() };
    assert_eq!((update.revision, update.events.len()), (Revision(99_999), 5));
    assert!(mailbox.take().is_none());
}

#[test]
fn a_watch_without_a_creation_is_no_watch() {
    let mailbox = Mailbox::new(&Namespace::default());
    assert!(matches!(mailbox.accept(&big(1)), Err(Ending::Failed(Failure::Lost(_)))));
    mailbox.accept(&created(1)).unwrap();
    assert!(matches!(mailbox.accept(&created(1)), Err(Ending::Failed(Failure::Lost(_)))));
}

fn requests(link: &Link) -> Vec<(u64, bool)> {
    let state = link.state.lock();
    let is_create = |request: &v1::WatchRequest| matches!(request.action, Some(v1::watch_request::Action::Create(_)));
    state.requests.iter().map(|request| (request.watch_id, is_create(request))).collect()
}

#[tokio::test]
async fn what_was_not_sent_yet_is_taken_back_and_what_was_is_cancelled() {
    let link = Arc::new(Link::default());
    let add = || link.state.lock().add(&link, v1::WatchCreate::default(), &Namespace::default());
    let (first, second, _third) = (add(), add(), add());
    assert_eq!(link.next_request().await.map(|request| request.watch_id), Some(1));
    drop(first);
    drop(second);
    assert_eq!(requests(&link), [(3, true), (1, false)]);
    assert_eq!(link.state.lock().phase, Phase::Opening);
}

#[tokio::test]
async fn a_link_ends_with_its_last_watch_and_its_requests_with_it() {
    let link = Arc::new(Link::default());
    let only = link.state.lock().add(&link, v1::WatchCreate::default(), &Namespace::default());
    drop(only);
    assert_eq!(link.state.lock().phase, Phase::Ended);
    assert_eq!(link.next_request().await, None);
}

/// An answer that names several watches is for each of them as if it were alone: by its own namespace, and whatever
/// becomes of the others.
#[test]
fn an_answer_for_several_watches_reaches_each() {
    let link = Arc::new(Link::default());
    let add = |space: &Namespace| link.state.lock().add(&link, v1::WatchCreate::default(), space);
    let whole = Namespace::default();
    let (first, second, gone, full) = (add(&whole), add(&whole.nested(&"ns/".into_bytes())), add(&whole), add(&whole));
    let answer = |watch_id, also, kind| link.deliver(v1::WatchResponse { watch_id, also, kind: Some(kind) });
    for watch in [&first, &second, &gone, &full] {
        answer(watch.id, Vec::new(), created(1));
    }
    for revision in 1..=3 {
        answer(full.id, Vec::new(), big(revision));
    }
    let gone_id = gone.id;
    drop(gone);
    let value = Bytes::from(vec![0; MAILBOX_BYTES_MAX / 4]);
    let kv = v1::KeyValue { key: "ns/k".into_bytes(), value, mod_revision: 9, ..v1::KeyValue::default() };
    let event = v1::WatchEvent { kind: v1::watch_event::Kind::Put.into(), kv: Some(kv), previous: None };
    let events = Kind::Events(v1::WatchEvents { events: vec![event], incomplete: false });
    answer(gone_id, vec![full.id, second.id, first.id], events);

    let key_of = |watch: &Subscription| {
        assert!(matches!(watch.mailbox.take(), Some(Delivery::Created(_))));
        let Some(Delivery::Update(update)) = watch.mailbox.take() else { panic!("nothing came") };
        assert!(watch.mailbox.take().is_none(), "it came twice");
        update.events[0].key().clone()
    };
    assert_eq!(key_of(&first), "ns/k");
    assert_eq!(key_of(&second), "k");
    assert!(matches!(full.mailbox.mail.lock().ending, Some(Ending::Overrun)));
}
