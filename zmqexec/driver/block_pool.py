"""The blocks of the KV cache: who owns them, and which still hold a prefix worth keeping.

Runs in: driver. Paged KV cache: Kwon et al. 2023 (arXiv:2309.06180).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from zmqexec.errors import InternalError


def chain_hash(parent: bytes, token_bytes: bytes) -> bytes:
    """The identity of a full block: its own tokens (packed int32) and, through `parent`, all tokens before it.

    256 bits of BLAKE2b: two different prefixes must never collide, since one tenant would read another's KV.
    """
    return hashlib.blake2b(parent + token_bytes, digest_size=32).digest()


def root_hash(cache_salt: str | None, prompt_len: int | None = None) -> bytes:
    """The parent of first blocks. Requests with different salts share nothing.

    `prompt_len` is given where the KV of a prompt depends on its length: then different lengths share nothing either.
    """
    length = b"" if prompt_len is None else b"length:%d;" % prompt_len
    salt = b"" if cache_salt is None else b"salt:" + cache_salt.encode()
    return hashlib.blake2b(length + salt, digest_size=32).digest()


class BlockPool:
    """Hands out blocks [0, num_blocks).

    A block is either owned (`_owners[block] >= 1` sequences have it in their block table) or free (`_owners` 0, and it
    stands in `_free`). A free block may still be cached under its hash; `_free` is in order of release, so the first
    one is the least recently used and loses its content first. `_cached` and `_hash_of` are inverse to each other.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._owners = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence owns; `allocate` can give all of them."""
        return len(self._free)

    @property
    def num_owned(self) -> int:
        """Blocks in at least one block table."""
        return self.num_blocks - len(self._free)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest run of `hashes` from the first. Nothing is owned by this."""
        blocks = []
        for digest in hashes:
            block = self._cached.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_after_sharing(self, matched: Sequence[int]) -> int:
        """`num_free` once the matched blocks are owned."""
        return len(self._free) - sum(self._owners[block] == 0 for block in matched)

    def share(self, blocks: Iterable[int]) -> None:
        """Own blocks that `match` returned, besides whoever owns them already."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._free[block]
            self._owners[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for new content; the least recently used ones, whose cached content is forgotten."""
        if count > len(self._free):
            raise InternalError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._cached[digest]
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, digest: bytes) -> None:
        """Offer an owned, full block to later prompts. The first block of a content stays the shared one."""
        if digest not in self._cached and block not in self._hash_of:
            self._cached[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a whole block table. Its end is forgotten before its beginning, which more prompts share."""
        for block in reversed(blocks):
            if self._owners[block] < 1:
                raise InternalError(f"block {block} released, but nobody owns it")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free[block] = None
