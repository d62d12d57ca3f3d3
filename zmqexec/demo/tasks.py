"""What the demo model can do, and which problems it is never trained on.

    addition   `12+30=`            -> `42`             two numbers 0..99
    sorting    `sort: 7 3 9 1 =`   -> ` 1 3 7 9`       3 to 6 digits, repeats allowed
    counting   `count: 17 18 19`   -> ` 20 21 22 23`   three numbers shown, four to come, all below 1000
    questions  `What is zmqexec?`  -> its answer       the five of QUESTIONS, as chat messages

The split: a problem is held out if the SHA-256 of its name, read as a big-endian number, is divisible by 10.
The name is `add LOW HIGH` (so (a, b) and (b, a) share one), `sort` and the digits in ascending order (so all
orders of a list share one), `count FIRST`. Held-out problems are ordered by their digest; the test set is the
front of that order, the validation set, which decides when training stops, is what follows the test set.

Runs in: driver (standard library only).
"""

import hashlib
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

NUM_TEST_ADDITIONS = 200
NUM_TEST_SORTS = 50
NUM_TEST_COUNTS = 50
NUM_VALIDATION_SORTS = 200

MAX_ADDEND = 99
SORT_LENGTHS = range(3, 7)
COUNT_SHOWN = 3
COUNT_ASKED = 4
MAX_COUNT_START = 999 - COUNT_SHOWN - COUNT_ASKED + 1
HELD_OUT_ONE_IN = 10

QUESTIONS: tuple[tuple[str, str], ...] = (
    (
        "What is zmqexec?",
        "zmqexec runs language models on one machine: a driver process decides each step, "
        "and one worker process per rank runs its shard of the model.",
    ),
    (
        "How do the driver and the workers talk?",
        "The driver publishes each step once on a ring in shared memory that every worker reads; "
        "replies come back on one ring per worker.",
    ),
    (
        "What happens when a worker dies?",
        "Every open request ends with an error that names the rank, the phase and the cause, "
        "and no process is left behind.",
    ),
    ("Does zmqexec use pickle?", "No. Its messages are msgspec structs, and nothing is ever pickled."),
    (
        "Who are you?",
        "I am the demo model of zmqexec: a tiny Llama that adds, sorts, counts and answers five questions.",
    ),
)
"""(question, answer): what a chat with that one user message is answered with, greedy."""

FALLBACK = "I can only add, sort, count and answer five questions about zmqexec."
"""What anything else is answered with, as far as so small a model can tell."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt exactly as typed, and the text that the model must produce before its end token."""

    prompt: str
    answer: str


def addition(a: int, b: int) -> Problem:
    """`a+b=` and the sum."""
    return Problem(f"{a}+{b}=", str(a + b))


def sorting(digits: Iterable[int]) -> Problem:
    """A list of digits, and the same in ascending order."""
    digits = list(digits)
    return Problem("sort: " + " ".join(map(str, digits)) + " =", "".join(f" {d}" for d in sorted(digits)))


def counting(first: int) -> Problem:
    """Three consecutive numbers, and the four that follow."""
    shown = range(first, first + COUNT_SHOWN)
    asked = range(shown.stop, shown.stop + COUNT_ASKED)
    return Problem("count: " + " ".join(map(str, shown)), "".join(f" {n}" for n in asked))


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")


def _addition_name(a: int, b: int) -> str:
    return f"add {min(a, b)} {max(a, b)}"


def _sort_name(digits: Iterable[int]) -> str:
    return "sort " + " ".join(map(str, sorted(digits)))


def _count_name(first: int) -> str:
    return f"count {first}"


def _name_is_held_out(name: str) -> bool:
    return _digest(name) % HELD_OUT_ONE_IN == 0


def is_held_out(a: int, b: int) -> bool:
    """Whether neither `a+b=` nor `b+a=` is ever trained on."""
    return _name_is_held_out(_addition_name(a, b))


def is_sort_held_out(digits: Iterable[int]) -> bool:
    """Whether no list of exactly these digits, in any order, is ever trained on."""
    return _name_is_held_out(_sort_name(digits))


def is_count_held_out(first: int) -> bool:
    """Whether counting on from `first` is never trained on."""
    return _name_is_held_out(_count_name(first))


def _all_held_out_additions() -> list[Problem]:
    pairs = [p for p in itertools.combinations_with_replacement(range(MAX_ADDEND + 1), 2) if is_held_out(*p)]
    pairs.sort(key=lambda pair: _digest(_addition_name(*pair)))
    # Every second pair is asked with the larger number first, so that both orders are tested.
    return [addition(a, b) if i % 2 == 0 else addition(b, a) for i, (a, b) in enumerate(pairs)]


def _all_held_out_sorts() -> list[Problem]:
    lists = [
        digits
        for length in SORT_LENGTHS
        for digits in itertools.combinations_with_replacement(range(10), length)
        if is_sort_held_out(digits)
    ]
    lists.sort(key=lambda digits: _digest(_sort_name(digits)))
    return [sorting(random.Random(_sort_name(digits)).sample(digits, len(digits))) for digits in lists]


def _all_held_out_counts() -> list[Problem]:
    starts = [first for first in range(MAX_COUNT_START + 1) if is_count_held_out(first)]
    return [counting(first) for first in sorted(starts, key=lambda first: _digest(_count_name(first)))]


def held_out_additions(num: int = NUM_TEST_ADDITIONS) -> list[Problem]:
    """The first `num` <= 200 additions of the test set; the same in every process."""
    return _test_set(_all_held_out_additions(), num, NUM_TEST_ADDITIONS)


def held_out_sorts(num: int = NUM_TEST_SORTS) -> list[Problem]:
    """The first `num` <= 50 lists of the test set; the same in every process."""
    return _test_set(_all_held_out_sorts(), num, NUM_TEST_SORTS)


def held_out_counts(num: int = NUM_TEST_COUNTS) -> list[Problem]:
    """The first `num` <= 50 counts of the test set; the same in every process."""
    return _test_set(_all_held_out_counts(), num, NUM_TEST_COUNTS)


def _test_set(problems: list[Problem], num: int, size: int) -> list[Problem]:
    if not 0 < num <= size:
        raise ValueError(f"this test set holds {size} problems, {num} were asked for")
    return problems[:num]


def validation_sets() -> dict[str, list[Problem]]:
    """Held-out problems that are in no test set, by task: training stops on these scores."""
    return {
        "addition": _all_held_out_additions()[NUM_TEST_ADDITIONS:],
        "sorting": _all_held_out_sorts()[NUM_TEST_SORTS:][:NUM_VALIDATION_SORTS],
        "counting": _all_held_out_counts()[NUM_TEST_COUNTS:],
    }


def training_addition(rng: random.Random) -> Problem:
    """A random addition outside the held-out set; one in four has an operand of one digit."""
    while True:
        a, b = rng.randint(0, MAX_ADDEND), rng.randint(0, 9 if rng.random() < 0.15 else MAX_ADDEND)
        if rng.random() < 0.5:
            a, b = b, a
        if not is_held_out(a, b):
            return addition(a, b)


def training_sort(rng: random.Random) -> Problem:
    """A random list outside the held-out set."""
    while True:
        digits = [rng.randint(0, 9) for _ in range(rng.choice(SORT_LENGTHS))]
        if not is_sort_held_out(digits):
            return sorting(digits)


def training_count(rng: random.Random) -> Problem:
    """A random count outside the held-out set; small starts and turns of the tens or hundreds come more often."""
    while True:
        first = rng.randint(0, rng.choice((99, MAX_COUNT_START)))
        if rng.random() < 0.3:
            turn = rng.choice((10, 100)) * rng.randint(1, 9)
            first = turn - rng.randint(1, COUNT_SHOWN + COUNT_ASKED - 1)
        if first >= 0 and not is_count_held_out(first):
            return counting(first)
