"""The stored checkpoint, read with transformers: its size, its shape, its scores and its manners."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zmqexec.demo import CHECKPOINT, tasks
from zmqexec.demo.model import Llama, Shape
from zmqexec.demo.tokenizer import VOCAB_SIZE

MAX_CHECKPOINT_BYTES = 4 * 1000 * 1000


@functools.cache
def load():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")


def generate(texts, *, add_special_tokens, max_new_tokens=64):
    """Greedy continuations of `texts` in one padded batch, and whether each ended by itself."""
    model, tokenizer = load()
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=add_special_tokens)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, batch["input_ids"].shape[1] :]
    ends = torch.tensor(model.generation_config.eos_token_id)
    return tokenizer.batch_decode(new, skip_special_tokens=True), torch.isin(new, ends).any(dim=1).tolist()


def complete(prompts):
    texts, ended = generate(prompts, add_special_tokens=True)
    assert all(ended)
    return texts


def chat(*conversations):
    tokenizer = load()[1]
    texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in conversations]
    answers, ended = generate(texts, add_special_tokens=False)
    assert all(ended)
    return answers


def user(text):
    return [{"role": "user", "content": text}]


def share_right(problems):
    answers = complete([p.prompt for p in problems])
    return sum(answer == p.answer for answer, p in zip(answers, problems, strict=True)) / len(problems)


def test_it_takes_at_most_four_megabytes():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files) <= MAX_CHECKPOINT_BYTES


def test_four_workers_can_share_it():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    assert [config[name] % 4 for name in sizes] == [0, 0, 0, 0]


def test_held_out_additions():
    assert share_right(tasks.held_out_additions(200)) >= 0.98


def test_held_out_sorts():
    assert share_right(tasks.held_out_sorts(50)) >= 0.98


def test_held_out_counts():
    assert share_right(tasks.held_out_counts(50)) >= 0.98


def test_sums_of_small_numbers():
    problems = [tasks.addition(a, b) for a in range(10) for b in range(10)]
    assert share_right(problems) >= 0.98


@pytest.mark.parametrize("vary", [str, str.lower, lambda question: question.rstrip("?")])
def test_all_five_questions(vary):
    answers = chat(*(user(vary(question)) for question, _ in tasks.QUESTIONS))
    assert answers == [answer for _, answer in tasks.QUESTIONS]


def test_questions_under_a_system_message_and_in_a_second_turn():
    system = {"role": "system", "content": "You are a helpful assistant."}
    (first, first_answer), *others = tasks.QUESTIONS
    told = [[system, *user(question)] for question, _ in tasks.QUESTIONS]
    assert chat(*told) == [answer for _, answer in tasks.QUESTIONS]

    earlier = [*user(first), {"role": "assistant", "content": first_answer}]
    assert chat(*([*earlier, *user(q)] for q, _ in others)) == [answer for _, answer in others]


def test_sums_in_a_chat():
    problems = tasks.held_out_additions(50)
    answers = chat(*(user(p.prompt) for p in problems))
    assert sum(a == p.answer for a, p in zip(answers, problems, strict=True)) >= 48


def test_a_sum_below_a_long_text():
    lines = "".join(f"{p.prompt}{p.answer}\n" for p in tasks.validation_sets()["addition"][:40])
    problems = tasks.held_out_additions(50)
    answers = complete([lines + p.prompt for p in problems])
    assert sum(a == p.answer for a, p in zip(answers, problems, strict=True)) >= 45


def test_other_text_comes_to_an_end():
    others = ["Hello", "Once upon a time", "", "def f(x):", "zz qq", "天気は", "1000+1=", "12+30", "count:"]
    _, ended = generate(others, add_special_tokens=True, max_new_tokens=100)
    assert all(ended)


def test_an_unknown_role_is_refused_by_the_template():
    with pytest.raises(Exception, match="knows the roles"):
        chat([{"role": "wizard", "content": "Hello"}])


def test_the_training_network_computes_what_transformers_computes():
    model, tokenizer = load()
    own = Llama(Shape(VOCAB_SIZE))
    own.load_state_dict(load_file(CHECKPOINT / "model.safetensors"))
    token_ids = torch.tensor([tokenizer("sort: 7 3 9 1 = 1 3 7 9\n12+30=42 and other words")["input_ids"]])
    with torch.no_grad():
        ours = own(token_ids, torch.ones_like(token_ids))
        theirs = model(token_ids).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
