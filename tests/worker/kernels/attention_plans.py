"""Reads attention_plan's buffers as paged_attention does, in Python: which block does which part of which item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROW_FIELDS = (
    *("start", "stride", "num_tiles", "first_tile", "context_len", "query_start", "query_len", "slot"),
    *("first_ticket", "first_partial", "fixed_tiles", "min_tail"),
)
BLOCK_WORDS, ROW_WORDS = 20, 12


@dataclass(frozen=True)
class Part:
    """Tiles [begin, end) of an item, by a block; `count` is None for an item that nobody splits."""

    block: int
    row: int
    item: int
    begin: int
    end: int
    number: int
    count: int | None
    ticket: int
    partial: int


def cut_tile(tile: int, num_tiles: int, min_head: int, min_tail: int) -> int:
    if tile >= num_tiles:
        return num_tiles
    if tile < min_head:
        return 0
    return num_tiles if tile > num_tiles - min_tail else tile // 4 * 4


def read_plan(
    buffer: np.ndarray, num_blocks: int, num_kv_heads: int, group: int
) -> tuple[list[dict], list[list[Part]]]:
    """The rows with tokens, and of each block the parts that it does, in order.

    buffer  int32, attention_plan's
    """
    blocks = buffer[: num_blocks * BLOCK_WORDS].reshape(num_blocks, BLOCK_WORDS)
    num_rows = int(blocks[0, 3])
    records = buffer[num_blocks * BLOCK_WORDS :][: num_rows * ROW_WORDS].reshape(num_rows, ROW_WORDS)
    rows = [dict(zip(ROW_FIELDS, map(int, record), strict=False)) for record in records]
    parts: list[list[Part]] = []
    for block in range(num_blocks):
        row_number, item, begin, _, chunk, cost, min_head = map(int, blocks[block, :7])
        parts.append([])
        if row_number < num_rows:
            assert (blocks[block, 8:] == records[row_number]).all()
        while row_number < num_rows:
            row = rows[row_number]
            row_items = num_kv_heads * -(-row["query_len"] * group // 16)
            start = row["start"] + item * row["stride"]
            tile = (block + 1) * chunk - start - cost
            end = cut_tile(tile, row["num_tiles"], min_head, row["min_tail"])
            while begin < end:
                fixed = row["fixed_tiles"]
                if fixed:
                    part_end = min(end, begin + fixed)
                    count = -(-row["num_tiles"] // fixed)
                    ticket, number = row["first_ticket"] + item, begin // fixed
                    partial = row["first_partial"] + item * count + number
                    parts[-1].append(
                        Part(
                            block,
                            row_number,
                            item,
                            begin,
                            part_end,
                            number,
                            None if count == 1 else count,
                            ticket,
                            partial,
                        )
                    )
                else:
                    part_end = end
                    first_cut = -(-(start + cost + min_head) // chunk)
                    last_cut = int((start + cost + row["num_tiles"] - row["min_tail"]) / chunk)
                    number, count = block - (first_cut - 1), last_cut - first_cut + 2
                    whole = begin == 0 and end == row["num_tiles"]
                    parts[-1].append(
                        Part(
                            *(block, row_number, item, begin, end, 0 if whole else number, None if whole else count),
                            *(first_cut - 1, 2 * block + (number == 0)),
                        )
                    )
                begin = part_end
            if end < row["num_tiles"]:
                break
            begin, item = 0, item + 1
            if item == row_items:
                row_number, item = row_number + 1, 0
    return rows, parts
