"""The demo model's tasks: right answers, and a split that training can never cross."""

import random
import subprocess
import sys

import pytest

from zmqexec.demo import tasks


def parse_addition(prompt: str) -> tuple[int, int]:
    left, right = prompt.removesuffix("=").split("+")
    return int(left), int(right)


def test_a_held_out_pair_is_held_out_in_both_orders():
    assert all(tasks.is_held_out(a, b) == tasks.is_held_out(b, a) for a in range(100) for b in range(100))


def test_about_one_pair_in_ten_is_held_out():
    num_held_out = sum(tasks.is_held_out(a, b) for a in range(100) for b in range(a, 100))
    assert 0.08 < num_held_out / 5050 < 0.12


def test_training_never_draws_a_held_out_problem():
    rng = random.Random(0)
    held_out = {p.prompt for p in tasks.held_out_additions()}
    held_out |= {f"{b}+{a}=" for a, b in map(parse_addition, held_out)}
    sorts = {p.answer for p in tasks.held_out_sorts()}
    counts = {p.prompt for p in tasks.held_out_counts()}
    for _ in range(20_000):
        assert tasks.training_addition(rng).prompt not in held_out
        assert tasks.training_sort(rng).answer not in sorts
        assert tasks.training_count(rng).prompt not in counts


def test_validation_shares_no_problem_with_the_tests():
    validation = tasks.validation_sets()
    test_pairs = {frozenset(parse_addition(p.prompt)) for p in tasks.held_out_additions()}
    assert len(test_pairs) == 200
    assert test_pairs.isdisjoint(frozenset(parse_addition(p.prompt)) for p in validation["addition"])
    assert {p.answer for p in tasks.held_out_sorts()}.isdisjoint(p.answer for p in validation["sorting"])
    assert {p.prompt for p in tasks.held_out_counts()}.isdisjoint(p.prompt for p in validation["counting"])
    assert all(len(problems) >= 40 for problems in validation.values())


def test_validation_is_held_out_too():
    assert all(tasks.is_held_out(*parse_addition(p.prompt)) for p in tasks.validation_sets()["addition"])


def test_every_held_out_answer_is_right():
    for problem in tasks.held_out_additions():
        assert problem.answer == str(sum(parse_addition(problem.prompt)))
    for problem in tasks.held_out_sorts():
        numbers = [int(word) for word in problem.prompt.removeprefix("sort:").removesuffix("=").split()]
        assert [int(word) for word in problem.answer.split()] == sorted(numbers)
    for problem in tasks.held_out_counts():
        shown = [int(word) for word in problem.prompt.removeprefix("count:").split()]
        assert [int(word) for word in problem.answer.split()] == list(range(shown[-1] + 1, shown[-1] + 5))


def test_the_test_sets_have_the_promised_sizes_and_formats():
    assert len(tasks.held_out_additions(200)) == 200
    assert len(tasks.held_out_sorts(50)) == len(tasks.held_out_counts(50)) == 50
    assert tasks.addition(12, 30) == tasks.Problem("12+30=", "42")
    assert tasks.sorting([7, 3, 9, 1]) == tasks.Problem("sort: 7 3 9 1 =", " 1 3 7 9")
    assert tasks.counting(17) == tasks.Problem("count: 17 18 19", " 20 21 22 23")
    with pytest.raises(ValueError, match="holds 200 problems"):
        tasks.held_out_additions(201)


def test_the_split_is_the_one_the_checkpoint_was_trained_on():
    # A change of the hash would silently move trained problems into the test sets of the stored checkpoint.
    assert [p.prompt for p in tasks.held_out_additions(5)] == ["14+49=", "99+19=", "43+45=", "32+18=", "27+64="]
    assert [p.prompt for p in tasks.held_out_sorts(2)] == ["sort: 7 5 4 2 3 =", "sort: 9 9 3 6 7 2 ="]
    assert [p.prompt for p in tasks.held_out_counts(2)] == ["count: 810 811 812", "count: 615 616 617"]


def test_the_tasks_need_no_torch():
    code = "import sys, zmqexec.demo.tasks; print('torch' in sys.modules, 'tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
