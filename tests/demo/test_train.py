"""Training: documents and rows are what they claim, a short run learns, repeats itself and leaves a checkpoint."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zmqexec.demo import tasks
from zmqexec.demo.corpus import NO_LABEL, Corpus, Document, Rows
from zmqexec.demo.model import Llama, Shape
from zmqexec.demo.tokenizer import END, EOS, VOCAB_SIZE, build_tokenizer
from zmqexec.demo.train import Recipe, learning_rate, save_checkpoint, score, train

TOKENIZER = build_tokenizer()
SMALL = Shape(VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_layers=1)
SHORT = Recipe(max_steps=20, warmup_steps=5, decay_steps=10, eval_steps=20, tokens_per_step=512, learning_rate=1e-2)
CPU = torch.device("cpu")


def labelled_text(document):
    return TOKENIZER.decode([label for label in document.labels if label != NO_LABEL], skip_special_tokens=False)


def test_a_plain_document_labels_its_answer_and_the_end():
    document = Corpus(TOKENIZER, seed=0).problem_document(tasks.addition(12, 30))
    assert TOKENIZER.decode(document.token_ids, skip_special_tokens=False) == "<|bos|>12+30=42"
    assert document.labels[: len("12+30=")] == [NO_LABEL] * len("12+30=")
    assert labelled_text(document) == "42" + EOS


def test_a_chat_document_is_what_the_template_writes(tmp_path):
    save_checkpoint(Llama(SMALL), TOKENIZER, tmp_path)
    document = Corpus(TOKENIZER, seed=0).chat_document(tasks.Problem(*tasks.QUESTIONS[0]))
    question, answer = tasks.QUESTIONS[0]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    template = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert TOKENIZER.decode(document.token_ids, skip_special_tokens=False) + END == template
    assert labelled_text(document) == answer + END


def test_every_label_is_the_next_token_or_ends_an_answer():
    corpus = Corpus(TOKENIZER, seed=3)
    ends = {TOKENIZER.token_to_id(EOS), TOKENIZER.token_to_id(END)}
    for document in [corpus.short() for _ in range(500)] + [corpus.long(300) for _ in range(20)]:
        assert len(document.token_ids) == len(document.labels) <= 300
        following = [*document.token_ids[1:], None]
        for label, token_id in zip(document.labels, following, strict=True):
            assert label in (NO_LABEL, token_id) or label in ends


def test_documents_in_one_row_do_not_see_each_other():
    torch.manual_seed(0)
    model = Llama(SMALL, init_std=0.2)
    rows = Rows(length=16)
    for token_ids in ([1, 2, 3, 4], [9, 8, 7]):
        rows.add(Document(token_ids, [NO_LABEL] * len(token_ids)))
    rows.pad()
    with torch.no_grad():
        packed = model(torch.tensor(rows.token_ids), torch.tensor(rows.document_ids))
        alone = model(torch.tensor([[9, 8, 7]]), torch.ones(1, 3, dtype=torch.int64))
    torch.testing.assert_close(packed[4:7], alone, atol=1e-5, rtol=0)


def test_rows_refuse_a_document_that_is_too_long():
    with pytest.raises(ValueError, match="does not fit into rows of 2"):
        Rows(length=2).add(Document([1, 2, 3], [NO_LABEL] * 3))


def test_the_score_is_the_share_of_documents_without_a_mistake():
    model = Llama(SMALL)
    torch.nn.init.zeros_(model.lm_head.weight)  # every logit is equal, so the first token id is always the most likely
    documents = [Document([5, 6], [0, 0]), Document([5, 6], [0, 1]), Document([7], [0]), Document([7], [2])]
    assert score(model, documents, CPU) == 0.5


def test_the_learning_rate_ramps_up_holds_and_falls_to_zero():
    recipe = Recipe(warmup_steps=10, decay_steps=100, learning_rate=1.0)
    assert learning_rate(recipe, 0, None) == pytest.approx(0.1)
    assert learning_rate(recipe, 500, None) == 1.0
    assert learning_rate(recipe, 550, 500) == pytest.approx(0.5)
    assert learning_rate(recipe, 600, 500) == 0.0


def test_a_short_run_learns_and_leaves_a_checkpoint_that_transformers_loads(tmp_path):
    torch.manual_seed(0)
    model = Llama(SMALL, init_std=0.05)
    losses = train(model, TOKENIZER, SHORT, seed=0, device=CPU)
    assert len(losses) == SHORT.max_steps
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    save_checkpoint(model, TOKENIZER, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("12+30=")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(token_ids, torch.ones_like(token_ids)), loaded(token_ids).logits[0], atol=1e-4, rtol=0
        )


def test_the_same_seed_gives_the_same_run():
    recipe = replace(SHORT, max_steps=8, decay_steps=4, eval_steps=8)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(train(Llama(SMALL), TOKENIZER, recipe, seed=0, device=CPU))
    assert runs[0] == runs[1]
