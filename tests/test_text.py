"""Tokenizer, incremental decoding, stop strings and chat templates; the truth is transformers' AutoTokenizer."""

import json
import random
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from zmqexec.errors import CheckpointError, RequestError
from zmqexec.text import LONG_TEXT_CHARS, IncrementalDecoder, StopMatcher, Tokenizer

CORPUS = [
    "The driver decides each step, a message bus carries it, and one worker process per GPU runs its shard.",
    "12+30=42, 7+5=12; naïve café, Grüße, 你好世界, привет мир, 😀 emoji 👩‍👩‍👧 and\ttabs\nand newlines.",
    "    indented code():\n        return x != y  # comment",
] * 20

LLAMA2_STYLE_TEMPLATE = """\
{%- if messages[0].role == 'system' -%}{{ bos_token }}<<SYS>>{{ messages[0].content }}<</SYS>>
{%- set rest = messages[1:] -%}{%- else -%}{{ bos_token }}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
    {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('role ' + m.role + ' is unknown') }}{% endif -%}
    [{{ m.role | upper }}] {{ m.content | trim }}{% if m.role == 'assistant' %}{% generation %}!{% endgeneration %}\
{{ eos_token }}{% endif %}
{%- if loop.index > 8 %}{% break %}{% endif -%}
{%- endfor -%}
{{ {'a': '<é>'} | tojson }}{% if add_generation_prompt %}[ASSISTANT]{% endif %}
"""
PARTS_TEMPLATE = """\
{% for message in messages %}<|{{ message['role'] }}|>{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}({{ part['text'] }}){% endfor %}{% endif %}
{% endfor %}"""
CHAT = [
    {"role": "system", "content": "Be <brief> & exact."},
    {"role": "user", "content": "  What is 12+30?  "},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And the café?"},
]


def byte_level_tokenizer():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|bos|>", "<|eos|>", "<|end of turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.add_tokens(["<plain added>"])
    return tokenizer, {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": LLAMA2_STYLE_TEMPLATE}


def sentencepiece_style_tokenizer():
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=specials, limit_alphabet=70, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", " ▁") for text in CORPUS], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizer, names | {"chat_template": PARTS_TEMPLATE}


def metaspace_unigram_tokenizer():
    """A decoder that only the library knows, for the general way of decoding."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer, {"unk_token": "<unk>"}


def save(folder, backend, config):
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece_style"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make = byte_level_tokenizer if request.param == "byte_level" else sentencepiece_style_tokenizer
    save(path, *make())
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def truth(folder):
    return AutoTokenizer.from_pretrained(folder)


def pieces_of(tokenizer, token_ids, **options):
    decoder = IncrementalDecoder(tokenizer, **options)
    return [*(decoder.push(token) for token in token_ids), decoder.flush()]


texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ▁\n😀é你<|>")), max_size=60)
many = settings(max_examples=150, deadline=None)


@many
@given(text=texts, special=st.booleans())
def test_encode_and_decode_agree_with_transformers(ours, truth, text, special):
    text = text + "<|eos|></s>" if len(text) % 3 == 0 else text
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == truth.encode(text, add_special_tokens=special)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == truth.decode(ids, skip_special_tokens=skip)


@many
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_the_text_of_any_tokens(ours, truth, data, skip):
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=40))
    pieces = pieces_of(ours, ids, skip_special_tokens=skip)
    assert "".join(pieces) == ours.decode(ids, skip_special_tokens=skip)
    known = [token for token in ids if token < ours.vocab_size]
    assert "".join(pieces) == truth.decode(known, skip_special_tokens=skip)


@many
@given(text=texts)
def test_pieces_add_up_to_the_text_of_real_text(ours, text):
    ids = ours.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(ours, ids)) == ours.decode(ids)


@many
@given(prompt=texts, output=texts)
def test_output_continues_the_text_of_its_prompt(ours, prompt, output):
    prompt_ids = ours.encode(prompt)
    ids = ours.encode(output, add_special_tokens=False)
    whole = ours.decode(prompt_ids + ids)
    pieces = pieces_of(ours, ids, prompt_token_ids=prompt_ids)
    assert ours.decode(prompt_ids) + "".join(pieces) == whole


def test_leading_space_of_the_output_is_kept_after_a_prompt(tmp_path):
    save(tmp_path, *sentencepiece_style_tokenizer())
    tokenizer = Tokenizer.load(tmp_path)
    prompt = tokenizer.encode("each step")
    ids = tokenizer.encode("a message", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids, prompt_token_ids=prompt)) == " a message"
    assert "".join(pieces_of(tokenizer, ids, prompt_token_ids=prompt[:1])) == "a message"  # <s> is no text


def test_text_comes_as_soon_as_its_character_is_complete(tmp_path):
    save(tmp_path, *byte_level_tokenizer())
    tokenizer = Tokenizer.load(tmp_path)
    ids = [tokenizer.encode(char, add_special_tokens=False) for char in "a\U0001f9ea"]
    pieces = pieces_of(tokenizer, [*ids[0], *ids[1]])
    assert pieces[0] == "a"
    assert len(ids[1]) > 1 and pieces[1:-2] == [""] * (len(ids[1]) - 1)
    assert pieces[-2:] == ["\U0001f9ea", ""]


def test_other_decoders_stream_through_a_window(tmp_path):
    save(tmp_path, *metaspace_unigram_tokenizer())
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("The driver decides each step, naïve café.")
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(map(bool, pieces)) > 3
    rng = random.Random(7)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(200)]
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=False)) == tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_token_bytes_are_exact(ours):
    text = "Grüße 你好 😀"
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(ours.token_bytes(token) for token in ids).lstrip() == text.encode()
    assert ours.token_bytes(ours.vocab_size + 100) == b""
    assert all(ours.token_text(token) == ours.token_bytes(token).decode("utf-8", "replace") for token in ids)


@many
@given(text=texts)
def test_a_text_has_no_fewer_tokens_than_said(ours, text):
    assert ours.fewest_tokens(text) <= len(ours.encode(text, add_special_tokens=False))


def test_long_texts_are_encoded_the_same(ours, truth):
    text = " ".join(CORPUS)
    assert len(text) > LONG_TEXT_CHARS and ours.encode(text) == truth.encode(text)
    assert 0 < ours.fewest_tokens(text) <= len(ours.encode(text))


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.Replace(tokenizers.Regex(" +"), " "), "a" + " " * 5000),
        (normalizers.Replace("  ", ""), " " * 5000),
        (normalizers.Strip(), "a" + " " * 5000),
        (normalizers.NFC(), "\u1112\u1161\u11ab" * 1000),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), "\u1112\u1161\u11ab" * 1000),
    ],
)
def test_the_bound_on_tokens_holds_where_text_shrinks_before_it_becomes_tokens(normalizer, text):
    backend = byte_level_tokenizer()[0]
    backend.normalizer = normalizer
    backend.add_tokens(["\ud55c" * 40])  # with it, the shrunk Korean text has fewer tokens than its length says
    ours = Tokenizer(backend, {}, None)
    assert ours.fewest_tokens(text) <= len(ours.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("declared", [3, {"x": {}}, {"900": 1}, {"900": {"content": "<odd>", "special": "perhaps"}}])
def test_added_tokens_that_cannot_be_read_are_an_error_of_the_checkpoint(tmp_path, declared):
    byte_level_tokenizer()[0].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        Tokenizer.load(tmp_path)


def test_special_tokens_are_known(ours, truth):
    assert ours.special_token_ids == frozenset(truth.all_special_ids) | {
        token for token, added in truth.added_tokens_decoder.items() if added.special
    }
    assert ours.vocab_size == len(truth)


def test_half_a_surrogate_pair_is_refused(ours):
    with pytest.raises(RequestError, match="surrogate"):
        ours.encode("broken \ud83d text")


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], CHAT[1:2]], ids=["system", "turns", "user"])
def test_chat_template_agrees_with_transformers(ours, truth, chat, generate):
    expected = truth.apply_chat_template(chat, add_generation_prompt=generate, tokenize=False)
    assert ours.apply_chat_template(chat, add_generation_prompt=generate) == expected
    ids = truth.apply_chat_template(chat, add_generation_prompt=generate, return_dict=False)
    assert ours.encode(expected, add_special_tokens=False) == ids


def test_content_parts_are_joined_unless_the_template_reads_them(tmp_path):
    save(tmp_path, *byte_level_tokenizer())
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "[USER] a\nb" in Tokenizer.load(tmp_path).apply_chat_template(parts)
    assert "(a)(b)" in Tokenizer.load(tmp_path, chat_template=PARTS_TEMPLATE).apply_chat_template(parts)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ raise_exception('x' * 100000) }}", "…"),
    ],
)
def test_a_template_that_fails_refuses_the_chat(tmp_path, template, message):
    save(tmp_path, *byte_level_tokenizer())
    with pytest.raises(RequestError, match=message) as caught:
        Tokenizer.load(tmp_path, chat_template=template).apply_chat_template(CHAT)
    assert caught.value.param == "messages" and len(str(caught.value)) < 1000


def test_a_template_that_is_no_jinja_is_refused_when_loaded(tmp_path):
    save(tmp_path, *byte_level_tokenizer())
    with pytest.raises(CheckpointError, match="jinja"):
        Tokenizer.load(tmp_path, chat_template="{% for %}")


def test_chat_template_file_wins_over_the_configuration(tmp_path):
    save(tmp_path, *byte_level_tokenizer())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, tokenize=False)
    assert Tokenizer.load(tmp_path).apply_chat_template(CHAT) == expected == "<|bos|>file"


def test_a_model_without_a_template_refuses_chats(tmp_path):
    save(tmp_path, *metaspace_unigram_tokenizer())
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="chat template"):
        tokenizer.apply_chat_template(CHAT)


def test_tokens_that_only_the_configuration_declares_are_added(tmp_path):
    backend, config = byte_level_tokenizer()
    size = backend.get_vocab_size()
    extra = {str(size): {"content": "<|late|>", "special": True, "normalized": False}}
    save(tmp_path, backend, config | {"eos_token": "<|late|>", "added_tokens_decoder": extra})
    ours, truth = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "a<|late|>b"
    assert ours.encode(text) == truth.encode(text)
    assert size in ours.special_token_ids and ours.decode(ours.encode(text)) == "ab"


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"model": 3}'])
def test_damaged_tokenizer_file_is_a_clear_error(tmp_path, damage):
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"copy tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_checkpoint_without_tokenizer_json_is_converted_once(tmp_path, monkeypatch):
    backend, _ = byte_level_tokenizer()
    folder, cache = tmp_path / "slow", tmp_path / "cache"
    folder.mkdir()
    backend.model.save(str(folder))  # vocab.json and merges.txt
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|bos|>", "eos_token": "<|eos|>"})
    )
    ours, truth = Tokenizer.load(folder, cache_dir=cache), AutoTokenizer.from_pretrained(folder)
    for text in (*CORPUS[:3], "<|eos|>"):
        assert ours.encode(text) == truth.encode(text)
        assert ours.decode(ours.encode(text)) == truth.decode(truth.encode(text), skip_special_tokens=True)
    assert (cache / "tokenizers").stat().st_mode & 0o077 == 0

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("converted again"))
    assert Tokenizer.load(folder, cache_dir=cache).encode("step") == ours.encode("step")


def test_a_tokenizer_that_cannot_be_converted_is_a_clear_error(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match="transformers cannot make one"):
        Tokenizer.load(tmp_path, cache_dir=tmp_path / "cache")


def test_loading_text_imports_neither_torch_nor_transformers():
    code = "import sys, zmqexec.text; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


# ── stop strings ────────────────────────────────────────────────────────────────────────────────────────────────────


def first_stop(text, stops, allowed_from):
    """Brute force: (text before the stop, stop) for the first character that completes one, the longest there."""
    for end in range(allowed_from + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    num_free=st.integers(0, 6),
    include=st.booleans(),
)
def test_stop_strings_are_found_however_the_text_is_split(pieces, stops, num_free, include):
    matcher = StopMatcher(stops, include)
    released, stop = "", None
    hold = max(map(len, stops), default=1) - 1
    for n, piece in enumerate(pieces):
        text, stop = matcher.feed(piece, allow_stop=n >= num_free)
        released += text
        if stop is not None:
            break
        assert len(released) == max(len("".join(pieces[: n + 1])) - hold, 0)
    if stop is None:
        released += matcher.flush()
    expected, expected_stop = first_stop("".join(pieces), stops, len("".join(pieces[:num_free])))
    assert stop == expected_stop
    assert released == (expected + stop if include and stop else expected)
    assert matcher.flush() == ""
