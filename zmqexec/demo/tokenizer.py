"""The demo model's tokenizer: byte-level BPE, so any text round-trips, with every digit a token of its own.

Plain text is encoded with `<|bos|>` in front and ends with `<|eos|>`. A chat message is
`<|user|>text<|end|>` (or system, assistant); the template writes the `<|bos|>` of a chat itself, so its output
is encoded without special tokens. Both `<|eos|>` and `<|end|>` end a generation.

Runs in: driver (only while training; the engine reads the saved files).
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from zmqexec.demo.tasks import FALLBACK, QUESTIONS

VOCAB_SIZE = 512
BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
    {%- if role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('the demo model knows the roles system, user and assistant, not ' + role) }}
    {%- endif %}
    {{- '<|' + role + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def build_tokenizer() -> Tokenizer:
    """A tokenizer of exactly VOCAB_SIZE entries, the same on every call."""
    tokenizer = Tokenizer(models.BPE())
    # Digits are split off first, so that no merge ever crosses one and `12+30=` is always six tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for pair in QUESTIONS for text in pair] + [FALLBACK] + ["sort: ", "count: "] * 4
    tokenizer.train_from_iterator(texts + [text.lower() for text in texts], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the training text gives {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, special_ids(tokenizer)[BOS])]
    )
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of SPECIAL_TOKENS in `tokenizer`; KeyError if one is missing."""
    vocab = tokenizer.get_vocab()
    return {token: vocab[token] for token in SPECIAL_TOKENS}


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template inside) into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [END, SYSTEM, USER, ASSISTANT],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
