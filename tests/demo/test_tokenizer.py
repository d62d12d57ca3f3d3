"""The demo model's tokenizer: any text comes back, digits stand alone, specials are where they belong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from zmqexec.demo import CHECKPOINT, tasks
from zmqexec.demo.tokenizer import BOS, VOCAB_SIZE, build_tokenizer

TOKENIZER = build_tokenizer()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    token_ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert all(0 <= token_id < VOCAB_SIZE for token_id in token_ids)
    assert TOKENIZER.decode(token_ids, skip_special_tokens=False) == text


def test_building_it_again_gives_the_stored_one():
    assert TOKENIZER.to_str() == Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).to_str()


def test_every_digit_is_one_token_and_text_starts_with_bos():
    assert TOKENIZER.encode("12+30=").tokens == [BOS, "1", "2", "+", "3", "0", "="]


@pytest.mark.parametrize("make", [tasks.held_out_additions, tasks.held_out_sorts, tasks.held_out_counts])
def test_prompt_and_answer_split_the_same_way_apart_and_together(make):
    for problem in make():
        parts = [TOKENIZER.encode(text, add_special_tokens=False).ids for text in (problem.prompt, problem.answer)]
        together = TOKENIZER.encode(problem.prompt + problem.answer, add_special_tokens=False)
        assert TOKENIZER.decode(parts[0] + parts[1]) == TOKENIZER.decode(together.ids)


def test_the_vocabulary_divides_among_eight_workers():
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    assert VOCAB_SIZE % 8 == 0
