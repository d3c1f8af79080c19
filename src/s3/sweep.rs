//! The pages of one listing, fetched ahead of who reads them: a listing that goes on is asked for in several ranges at once
//! (`start-after`), because each page of a sequence costs a round trip.
//!
//! Where the ranges begin is guessed from the names so far. A guess costs at most one request more than the names need, and is never
//! wrong: a range ends where the next one begins.

mod names;
mod packed;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::task::JoinSet;

use self::names::{Names, Span, first_of};
use self::packed::Packed;
use super::{ErrorKind, ListPage, ListRequest, Result, S3Error};

/// Pages of a listing that come one after the other. Most listings are no longer, and a guess would be of too little.
const IN_ORDER: usize = 5;
/// Pages that wait to be read, at most.
const AHEAD: usize = 96;
/// What the 1,000 names of a page take of memory, about.
const PAGE_BYTES: u64 = 100_000;
/// Requests under way, at most, whatever the connections allow.
const LANES: usize = 32;
/// Guesses at once where nothing is known to follow: those that are in vain are the price of a listing that is hardly longer.
const FIRST_GUESSES: usize = 16;
/// So many more ranges were found empty than not, after which no more is guessed.
const FRUITLESS: i32 = 8;

/// Asks for one page.
pub type Lister = Arc<dyn Fn(ListRequest) -> BoxFuture<'static, Result<ListPage>> + Send + Sync>;

/// How a page can be asked for again.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// The request.
    pub request: ListRequest,
    /// Only names up to this one: after it another range begins.
    until: Option<String>,
}

impl Ask {
    /// Of a page that is the first of all.
    pub fn first(request: ListRequest) -> Self {
        Self { request, until: None }
    }

    /// Leaves out what belongs to the next range. True when that was anything.
    pub fn cut(&self, page: &mut ListPage) -> bool {
        let Some(until) = &self.until else { return false };
        let before = page.entries.len() + page.prefixes.len();
        page.entries.retain(|entry| entry.key <= *until);
        page.prefixes.retain(|prefix| prefix <= until);
        before > page.entries.len() + page.prefixes.len()
    }
}

/// A page, and how it was asked for.
#[derive(Debug)]
pub struct Swept {
    /// The request.
    pub ask: Ask,
    /// What it brought, without what belongs to other ranges; its `next` says whether more follows at all.
    pub page: ListPage,
}

/// A range of names.
struct Range {
    id: u64,
    /// What to ask for next.
    ask: Ask,
    /// Its last page.
    span: Span,
    pages: VecDeque<(Ask, Packed)>,
    asked: bool,
    /// Its first page has not come: those before it do not end where it begins yet.
    guessed: bool,
    /// A page of it has come, and more is to come.
    goes_on: bool,
    done: bool,
    failed: Option<S3Error>,
}

/// A listing that is read from its second page on.
pub struct Sweep {
    lister: Lister,
    lanes: usize,
    /// Pages that may wait.
    ahead: usize,
    ranges: VecDeque<Range>,
    under_way: JoinSet<(u64, Ask, Result<Packed>)>,
    names: Names,
    pages: usize,
    fruitless: i32,
    next_id: u64,
}

impl Sweep {
    /// Of what follows `first`, the page that `request` brought; `None` where nothing does. At most: `lanes` requests at once, `memory`
    /// bytes of names that wait.
    pub fn after(request: &ListRequest, first: &ListPage, lanes: usize, memory: u64, lister: Lister) -> Option<Self> {
        let continuation = Some(first.next.clone()?);
        let mut names = Names::new(request.prefix.len());
        let in_order = names.take(first);
        let request = ListRequest { continuation, start_after: None, ..request.clone() };
        let mut sweep = Self {
            lister,
            lanes: lanes.clamp(1, LANES),
            ahead: (memory / PAGE_BYTES).clamp(2, AHEAD as u64) as usize,
            ranges: VecDeque::new(),
            under_way: JoinSet::new(),
            names,
            pages: 1,
            fruitless: if in_order { 0 } else { FRUITLESS },
            next_id: 0,
        };
        let whole = sweep.range(Ask { request, until: None }, Span::of(first).unwrap_or_default());
        sweep.ranges.push_back(whole);
        sweep.ask();
        Some(sweep)
    }

    fn range(&mut self, ask: Ask, span: Span) -> Range {
        self.next_id += 1;
        Range {
            id: self.next_id,
            ask,
            span,
            pages: VecDeque::new(),
            asked: false,
            guessed: false,
            goes_on: false,
            done: false,
            failed: None,
        }
    }

    /// The next page in the order of names; `None` after the last.
    ///
    /// # Errors
    /// As [`super::Store::list`]; called again, it goes on where it was.
    pub async fn next(&mut self) -> Result<Option<Swept>> {
        loop {
            self.ask();
            let Some(front) = self.ranges.front_mut() else { return Ok(None) };
            if let Some((ask, packed)) = front.pages.pop_front() {
                if front.done && front.pages.is_empty() {
                    self.ranges.pop_front();
                }
                let next = (!self.ranges.is_empty()).then(String::new);
                self.ask();
                return Ok(Some(Swept { ask, page: ListPage { next, ..packed.unpacked() } }));
            }
            if front.done {
                self.ranges.pop_front();
                continue;
            }
            if let Some(error) = front.failed.take() {
                return Err(error);
            }
            match self.under_way.join_next().await {
                Some(Ok((id, ask, result))) => self.arrived(id, ask, result),
                // A request that panicked, and nobody knows whose: all are sent again.
                Some(Err(_)) => {
                    self.under_way = JoinSet::new();
                    self.ranges.iter_mut().for_each(|range| range.asked = false);
                    let place = self.names.first.clone().unwrap_or_default();
                    return Err(S3Error::local(ErrorKind::Protocol, "ListObjectsV2", place, "the listing broke off".to_owned()));
                }
                None => {}
            }
        }
    }

    fn arrived(&mut self, id: u64, ask: Ask, result: Result<Packed>) {
        let Some(at) = self.ranges.iter().position(|range| range.id == id) else { return };
        self.ranges[at].asked = false;
        let mut packed = match result {
            Ok(packed) => packed,
            Err(error) => {
                self.ranges[at].failed = Some(error);
                return;
            }
        };
        self.pages += 1;
        let mut page = packed.unpacked();
        let in_order = self.names.take(&page);
        let begin = ask.request.start_after.clone();
        if let Some(begin) = &begin
            && !(in_order && self.accept(at, begin, &page))
        {
            self.ranges.remove(at);
            return;
        }
        if !in_order {
            self.fruitless = FRUITLESS;
        }
        let range = &mut self.ranges[at];
        range.guessed = false;
        // It ends sooner than when it was asked for where another range was found since.
        let ask = Ask { until: range.ask.until.clone(), ..ask };
        let next = page.next.take();
        let cut = ask.cut(&mut page);
        if cut {
            packed = Packed::of(&page);
        }
        let ended = cut || next.is_none();
        (range.done, range.goes_on) = (ended, !ended);
        if let Some(span) = Span::of(&page) {
            range.span = span;
        }
        range.ask.request = ListRequest { continuation: next, start_after: None, ..ask.request.clone() };
        let empty = page.entries.is_empty() && page.prefixes.is_empty();
        if begin.is_some() {
            self.fruitless = (self.fruitless + if empty { 1 } else { -1 }).max(-FRUITLESS);
        }
        if !(empty && ended) {
            range.pages.push_back((ask, packed));
        }
        // What was guessed within it is here.
        while ended && self.ranges.get(at + 1).is_some_and(|next| next.guessed) {
            self.ranges.remove(at + 1);
        }
    }

    /// A range that was guessed has come: those before it end where it begins. False where it is of no use: the store does not know
    /// `start-after`, or what is before it has gone past its beginning.
    fn accept(&mut self, at: usize, begin: &str, page: &ListPage) -> bool {
        if first_of(page).is_some_and(|first| first <= begin) {
            self.fruitless = FRUITLESS;
            return false;
        }
        if self.ranges.iter().take(at).any(|range| range.span.last.as_str() > begin) {
            self.fruitless += 1;
            return false;
        }
        for range in self.ranges.iter_mut().take(at) {
            if range.ask.until.as_deref().is_none_or(|until| until > begin) {
                range.ask.until = Some(begin.to_owned());
            }
        }
        true
    }

    /// Sends what there is room for; what is to be read next always.
    fn ask(&mut self) {
        let waiting: usize = self.ranges.iter().map(|range| range.pages.len()).sum();
        if self.ranges.front().is_some_and(|front| front.is_idle() && front.pages.is_empty()) {
            self.send(0);
        }
        if self.pages < IN_ORDER || self.fruitless >= FRUITLESS && self.ranges.len() == 1 {
            return;
        }
        let mut room = self.lanes.min(self.ahead.saturating_sub(waiting)).saturating_sub(self.under_way.len());
        let idle: Vec<usize> =
            (0..self.ranges.len()).filter(|at| self.ranges[*at].is_idle() && self.ranges[*at].failed.is_none()).collect();
        for at in idle.into_iter().take(room) {
            self.send(at);
            room -= 1;
        }
        if room > 0 && self.fruitless < FRUITLESS {
            self.divide(room);
        }
    }

    fn send(&mut self, at: usize) {
        let range = &mut self.ranges[at];
        range.asked = true;
        let (id, ask, lister) = (range.id, range.ask.clone(), Arc::clone(&self.lister));
        self.under_way.spawn(async move {
            let result = lister(ask.request.clone()).await;
            // Here and not where it is read: what has come waits for that.
            (id, ask, result.map(|page| Packed::of(&page)))
        });
    }

    /// Guesses more ranges within those that were found to be longer than a page.
    fn divide(&mut self, mut room: usize) {
        let long: Vec<u64> = self.ranges.iter().filter(|range| range.goes_on).map(|range| range.id).collect();
        // Those that are divided later are to have their part.
        let each = self.lanes / self.ranges.iter().filter(|range| !range.done).count().max(1);
        for id in long {
            if room == 0 {
                return;
            }
            let Some(at) = self.ranges.iter().position(|range| range.id == id) else { continue };
            if self.ranges.get(at + 1).is_some_and(|next| next.guessed) {
                continue;
            }
            // Not again before another page of it has come.
            self.ranges[at].goes_on = false;
            let Ask { request, until } = self.ranges[at].ask.clone();
            let most = if until.is_none() { room.min(FIRST_GUESSES) } else { room };
            let begins = self.names.between(&self.ranges[at].span, until.as_deref(), each.clamp(1, most));
            room -= begins.len();
            for (nth, begin) in begins.into_iter().enumerate() {
                let request = ListRequest { start_after: Some(begin.clone()), continuation: None, ..request.clone() };
                let range = self.range(Ask { request, until: until.clone() }, Span::at(&begin));
                self.ranges.insert(at + 1 + nth, Range { guessed: true, ..range });
                self.send(at + 1 + nth);
            }
        }
    }
}

impl Range {
    fn is_idle(&self) -> bool {
        !self.asked && !self.done
    }
}
