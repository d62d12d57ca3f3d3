"""Which outcomes C11 allows for a small concurrent program, decided by trying every execution.

The memory model is RC11 (Lahav, Vafeiadis, Kang, Hur, Dreyer: Repairing sequential consistency in C/C++11, PLDI 2017,
section 3), the axioms under the names they have there, with one change: NO-THIN-AIR is left out. Arm and POWER let a
relaxed load be delayed past a later store to another word, and that axiom would forbid it. So what is forbidden here is
forbidden in RC11 and on every machine that C11 compiles to (x86, Arm, POWER, RISC-V); x86's store buffers are one of
the reorderings that remain possible. Accesses to slots are plain ones: two of them that conflict without a
happens-before between them are a data race, which C11 leaves undefined, so "race" counts as an outcome.

A thread is a generator: it yields accesses, gets the value of each load, and returns what it saw. An execution is a
choice of the value of every load, of the store that each load reads from (rf) and of the order of the stores to each
word (mo); all are tried, for words that hold 0 or 1 when they are loaded.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

NA, RLX, ACQ, REL, ACQ_REL, SC = "plain", "relaxed", "acquire", "release", "acq_rel", "seq_cst"
ACQUIRES, RELEASES = {ACQ, ACQ_REL, SC}, {REL, ACQ_REL, SC}
VALUES = (0, 1)  # that a word can have when it is loaded

Relation = set[tuple[int, int]]
Thread = Callable[[], Generator["Access", int, Any]]


@dataclass(frozen=True)
class Access:
    """What a thread does next; `kind` is R, W, U (adds `value`) or F."""

    kind: str
    order: str
    word: str = ""
    value: int = 0


@dataclass(frozen=True)
class Event:
    kind: str  # R, W or F: an update is a R and a W, tied by the relation rmw
    order: str
    word: str
    value: int
    thread: int  # -1: the initial zeroes


def load(word: str, order: str) -> Access:
    return Access("R", order, word)


def store(word: str, value: int, order: str) -> Access:
    return Access("W", order, word, value)


def add(word: str, value: int, order: str) -> Access:
    return Access("U", order, word, value)


def fence(order: str) -> Access:
    return Access("F", order)


def runs_of(thread: Thread, number: int) -> Iterator[tuple[list[Event], list[int], Any]]:
    """Every run of a thread alone, with any values for its loads: its events, where updates begin, what it returns."""
    unfinished: list[list[int]] = [[]]
    while unfinished:
        guesses = unfinished.pop()
        events: list[Event] = []
        updates: list[int] = []
        running, left, answer = thread(), list(guesses), None
        while True:
            try:
                access = running.send(answer)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as end:
                yield events, updates, end.value
                break
            answer = 0
            if access.kind in "RU":
                if not left:
                    unfinished += [[*guesses, value] for value in VALUES]
                    break
                answer = left.pop(0)
                if access.kind == "U":
                    updates.append(len(events))
                events.append(Event("R", access.order, access.word, answer, number))
            if access.kind != "R":
                kind = "F" if access.kind == "F" else "W"
                events.append(Event(kind, access.order, access.word, access.value + answer, number))


def then(*relations: Relation) -> Relation:
    """Composition, left to right."""
    result = relations[0]
    for following in relations[1:]:
        successors: dict[int, list[int]] = {}
        for b, c in following:
            successors.setdefault(b, []).append(c)
        result = {(a, c) for a, b in result for c in successors.get(b, ())}
    return result


def closure(relation: Relation) -> Relation:
    result = relation
    while (more := result | then(result, relation)) != result:
        result = more
    return result


def cyclic(relation: Relation) -> bool:
    return any(a == b for a, b in closure(relation))


@dataclass(frozen=True)
class Execution:
    events: list[Event]
    sb: Relation
    rf: Relation
    mo: Relation
    rmw: Relation

    def only(self, test: Callable[[Event], bool]) -> Relation:
        """[test]: the identity on the events that pass."""
        return {(i, i) for i, event in enumerate(self.events) if test(event)}

    def same_word(self, relation: Relation, same: bool = True) -> Relation:
        words = [event.word or None for event in self.events]
        return {(a, b) for a, b in relation if (words[a] is not None and words[a] == words[b]) == same}

    def happens_before(self) -> Relation:
        every = self.only(lambda e: True)
        atomic_write = self.only(lambda e: e.kind == "W" and e.order != NA)
        atomic_read = self.only(lambda e: e.kind == "R" and e.order != NA)
        fences = self.only(lambda e: e.kind == "F")
        acquire = self.only(lambda e: e.order in ACQUIRES and e.kind != "W")
        release = self.only(lambda e: e.order in RELEASES and e.kind != "R")
        writes = self.only(lambda e: e.kind == "W")
        steps = every | closure(then(self.rf, self.rmw))
        rs = then(writes, every | self.same_word(self.sb), atomic_write, steps)  # release sequence
        before, after = every | then(fences, self.sb), every | then(self.sb, fences)
        sw = then(release, before, rs, self.rf, atomic_read, after, acquire)
        return closure(self.sb | sw)

    def consistent(self, hb: Relation) -> bool:
        every = self.only(lambda e: True)
        rb = {(a, b) for a, b in then({(r, w) for w, r in self.rf}, self.mo) if a != b}
        eco = closure(self.rf | self.mo | rb)
        if any(a == b for a, b in then(hb, every | eco)):  # COHERENCE
            return False
        if self.rmw & then(rb, self.mo):  # ATOMICITY
            return False
        sb_other = self.same_word(self.sb, same=False)
        scb = self.sb | then(sb_other, hb, sb_other) | self.same_word(hb) | self.mo | rb
        sc = self.only(lambda e: e.order == SC)
        sc_fence = self.only(lambda e: e.order == SC and e.kind == "F")
        psc_base = then(sc | then(sc_fence, every | hb), scb, sc | then(every | hb, sc_fence))
        psc_fence = then(sc_fence, hb | then(hb, eco, hb), sc_fence)
        return not cyclic(psc_base | psc_fence)  # SC

    def races(self, hb: Relation) -> bool:
        return any(
            a.word and a.word == b.word and "W" in (a.kind, b.kind) and NA in (a.order, b.order)
            and -1 not in (a.thread, b.thread) and a.thread != b.thread and not {(i, j), (j, i)} & hb
            for (i, a), (j, b) in itertools.combinations(enumerate(self.events), 2)
        )  # fmt: skip


def orders_of(writes: list[int]) -> Iterator[Relation]:
    """Every total order of a word's stores; the first in the list is the initial one."""
    for order in itertools.permutations(writes[1:]):
        yield set(itertools.combinations([writes[0], *order], 2))


def outcomes(threads: Iterable[Thread]) -> tuple[set[tuple[Any, ...]], int]:
    """What the threads return, for every consistent execution, "race" added if it has one; and how many there are."""
    found: set[tuple[Any, ...]] = set()
    count = 0
    for runs in itertools.product(*(list(runs_of(thread, number)) for number, thread in enumerate(threads))):
        words = sorted({event.word for events, _, _ in runs for event in events if event.word})
        everything = [Event("W", NA, word, 0, -1) for word in words]
        sb: Relation = set()
        rmw: Relation = set()
        for events, updates, _ in runs:
            start = len(everything)
            everything += events
            sb |= set(itertools.combinations(range(start, len(everything)), 2))
            sb |= {(zero, event) for zero in range(len(words)) for event in range(start, len(everything))}
            rmw |= {(start + at, start + at + 1) for at in updates}
        writes = {w: [i for i, e in enumerate(everything) if e.kind == "W" and e.word == w] for w in words}
        reads = [i for i, e in enumerate(everything) if e.kind == "R"]
        sources = [
            [(w, r) for w in writes[everything[r].word] if everything[w].value == everything[r].value] for r in reads
        ]
        for rf in itertools.product(*sources):
            for order in itertools.product(*(orders_of(writes[word]) for word in words)):
                execution = Execution(everything, sb, set(rf), set().union(*order), rmw)
                hb = execution.happens_before()
                if not execution.consistent(hb):
                    continue
                count += 1
                results = tuple(result for _, _, result in runs)
                found.add((*results, "race") if execution.races(hb) else results)
    return found, count
