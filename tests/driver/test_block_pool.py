"""The block pool against a model of it that keeps everything in plain lists."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zmqexec.driver.block_pool import BlockPool, chain_hash, root_hash
from zmqexec.errors import InternalError
from zmqexec.protocol import pack


def hashes(contents: list[int]) -> list[bytes]:
    """A chain of one hash per block, whose content is a number."""
    chain, last = [], root_hash(None)
    for content in contents:
        last = chain_hash(last, pack([content]))
        chain.append(last)
    return chain


class PoolMachine(RuleBasedStateMachine):
    """Sequences come with a prompt, share what is cached of it, fill blocks and leave.

    tables  of the sequences, each with the contents of its blocks
    free    blocks in the order in which they will be given out
    cached  which block answers for a hash
    """

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[tuple[list[int], list[int]]] = []
        self.free = list(range(num_blocks))
        self.cached: dict[bytes, int] = {}

    def take_free(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        self.cached = {digest: block for digest, block in self.cached.items() if block not in taken}
        return taken

    @rule(contents=st.lists(st.integers(0, 1), min_size=1, max_size=4), num_registered=st.integers(0, 4))
    def enter(self, contents: list[int], num_registered: int) -> None:
        chain = hashes(contents)
        expected = []
        for digest in chain:
            if digest not in self.cached:
                break
            expected.append(self.cached[digest])
        matched = self.pool.match(chain)
        assert matched == expected
        remaining = [block for block in self.free if block not in matched]
        assert self.pool.num_free_after_sharing(matched) == len(remaining)
        missing = len(contents) - len(matched)
        if missing > len(remaining):
            return
        self.pool.share(matched)
        self.free = remaining
        table = matched + self.take_free(missing)
        assert matched + self.pool.allocate(missing) == table
        self.tables.append((table, contents))
        for block, digest in list(zip(table, chain, strict=True))[:num_registered]:
            self.pool.register(block, digest)
            if block not in self.cached.values():
                self.cached.setdefault(digest, block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        owned = {block for other, _ in self.tables for block in other}
        self.free += [block for block in reversed(table) if block not in owned]

    @rule(extra=st.integers(1, 3))
    def ask_for_too_many(self, extra: int) -> None:
        with pytest.raises(InternalError, match="blocks asked for"):
            self.pool.allocate(len(self.free) + extra)

    @invariant()
    def nothing_is_lost_or_owned_twice_without_a_shared_prefix(self) -> None:
        assert self.pool.num_free == len(self.free) == len(set(self.free))
        assert self.pool.num_owned == self.pool.num_blocks - len(self.free)
        owners = Counter(block for table, _ in self.tables for block in table)
        assert set(owners) | set(self.free) == set(range(self.pool.num_blocks)) and not set(owners) & set(self.free)
        for (table, contents), (other, other_contents) in combinations(self.tables, 2):
            for index, (block, same) in enumerate(zip(table, other, strict=False)):
                assert block != same or contents[: index + 1] == other_contents[: index + 1]
            assert all(table.index(block) == other.index(block) for block in set(table) & set(other))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_releasing_what_nobody_owns_is_our_bug() -> None:
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(InternalError, match="nobody owns it"):
        pool.release(table)


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    pool = BlockPool(3)
    chain = hashes([1, 2, 3])
    table = pool.allocate(3)
    for block, digest in zip(table, chain, strict=True):
        pool.register(block, digest)
    pool.release(table)
    for kept in (2, 1, 0):
        assert pool.allocate(1) == [table[kept]]
        assert pool.match(chain) == table[:kept]


def test_prefixes_of_different_tokens_tenants_and_lengths_have_different_hashes() -> None:
    roots = [root_hash(salt, length) for salt in (None, "", "a", "b", "salt:") for length in (None, 1, 11)]
    chains = [chain_hash(root, pack(tokens)) for root in roots for tokens in ([1], [1, 1], [256], [2])]
    assert len({*roots, *chains}) == len(roots) + len(chains)
