"""Text ↔ token ids: the tokenizer, decoding token by token, and stop strings.

Runs in: driver | server. Only the `tokenizers` library: importing transformers would take seconds and pull in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from zmqexec.chat_template import ChatTemplate
from zmqexec.convert_tokenizer import converted_tokenizer
from zmqexec.decoding import TokenTable
from zmqexec.errors import CheckpointError, RequestError

CONTEXT_TOKENS = 8
"""Tokens of the prompt that decide how the output's first token is written; one with text is enough."""
LONG_TEXT_CHARS = 4096
NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """A checkpoint's tokenizer and chat template: the same results as transformers' AutoTokenizer.

    vocab_size         number of token ids, added tokens included
    special_token_ids  ids left out of text by `skip_special_tokens`
    """

    def __init__(self, backend: tokenizers.Tokenizer, named_tokens: dict[str, str], chat_template: str | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = None if chat_template is None else ChatTemplate(chat_template, named_tokens)
        self.table = TokenTable(backend)
        self._longest_token: int | None = None
        self.named_tokens = named_tokens
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def load(cls, folder: Path, chat_template: str | None = None, *, cache_dir: Path | None = None) -> Tokenizer:
        """The tokenizer in `folder`; `chat_template` (jinja text) replaces the one found there.

        A folder without tokenizer.json is converted once by transformers in a child process and kept in `cache_dir`
        (default: ~/.cache/zmqexec). `CheckpointError` where there is no tokenizer that can be read.
        """
        if not folder.is_dir():
            raise CheckpointError(f"tokenizer folder {str(folder)!r} does not exist or is not a folder")
        source = folder if (folder / "tokenizer.json").exists() else converted_tokenizer(folder, cache_dir)
        try:
            backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{source / 'tokenizer.json'} cannot be read as a tokenizer: {error}") from None
        config = _read_object(source / "tokenizer_config.json")
        named = _named_tokens(config, _read_object(source / "special_tokens_map.json"))
        try:
            _add_missing_tokens(backend, config, named)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source / 'tokenizer_config.json'}: wrong added_tokens_decoder: {error!r}"
            ) from None
        return cls(backend, named, chat_template or _find_chat_template(source, folder, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `RequestError` for text that is not Unicode (half of a surrogate pair)."""
        try:
            # The library's `encode` holds the GIL, for seconds when a text is long; its `encode_batch` does not.
            if len(text) > LONG_TEXT_CHARS:
                ids: list[int] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
            else:
                ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise RequestError("text holds half of a surrogate pair, which is no Unicode character", "prompt") from None
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A bound that costs nothing: `text` has at least so many tokens. 0 where the tokenizer gives no bound."""
        if self._longest_token is None:
            self._longest_token = self.table.longest_token()
        return len(text) // self._longest_token if self._longest_token else 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids without a token (a padded vocabulary has some) decode to nothing."""
        try:
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise RequestError("token ids must be in [0, 2**32)", "tokens") from None
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; a part of a character for some. Empty for ids without a token."""
        return self.table.bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token alone as text, its leading space kept, U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._chat_template is not None

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Prompt text of a chat; encode it with `add_special_tokens=False`, since templates write those themselves."""
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template; use a completion, or give a template with --chat-template", "messages"
            )
        return self._chat_template.render(messages, add_generation_prompt)


class IncrementalDecoder:
    """Text of a growing sequence, token by token, at a cost that does not grow with its length.

    The pieces together are what `Tokenizer.decode` makes of all tokens. A piece is '' while a character is unfinished.
    `prompt_token_ids` come before the output and are not decoded: they decide whether its leading space is kept.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._stream = tokenizer.table.new_stream()
        context = [token for token in prompt_token_ids[-CONTEXT_TOKENS:] if token not in self._skipped]
        if context:
            self._stream.start_after(context)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes."""
        return "" if token_id in self._skipped else self._stream.push(token_id)

    def flush(self) -> str:
        """What is still held back, as `decode` would write it at the end of the text."""
        return self._stream.flush()


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, however it is split.

    The match that ends first counts; of two that end together, the longer. `max(len(stop)) - 1` characters are held
    back, since a stop string may have begun in them.
    """

    def __init__(self, stops: Sequence[str], include_stop_str: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_stop_str
        self._hold = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""

    def feed(self, text: str, allow_stop: bool = True) -> tuple[str, str | None]:
        """(text to release, the stop string that ends here or None).

        With `allow_stop` False (too few tokens so far) matches that end in `text` do not count. After a match all
        text up to it has been released, with the stop string itself only if it is to be included.
        """
        if not self._stops:
            return text, None
        begin, text = len(self._held), self._held + text
        if allow_stop and len(text) > begin:
            match = self._first_match(text, begin)
            if match is not None:
                start, stop = match
                self._held = ""
                return text[: start + len(stop) if self._include else start], stop
        cut = max(len(text) - self._hold, 0)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """The text still held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, begin: int) -> tuple[int, str] | None:
        """(start, stop) of the match that ends first behind `begin`."""
        found = []
        for stop in self._stops:
            start = text.find(stop, max(begin - len(stop) + 1, 0))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop


# ── the files of a tokenizer folder ─────────────────────────────────────────────────────────────────────────────────


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as a JSON object: {error}") from None


def _content(token: Any) -> str | None:
    """A token is spelled as a string, or as an object with its flags."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _named_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    """bos_token and its like. special_tokens_map.json counts only for folders older than `added_tokens_decoder`."""
    merged = config if "added_tokens_decoder" in config else {**config, **special_map}
    found = {name: _content(merged.get(name)) for name in NAMED_SPECIAL_TOKENS}
    return {name: token for name, token in found.items() if token is not None}


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """What tokenizer_config.json declares beyond tokenizer.json, and the `special` flag of the named tokens."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if _content(entry) not in known:
            token = tokenizers.AddedToken(**{name: entry[name] for name in ADDED_TOKEN_FIELDS if name in entry})
            backend.add_tokens([token])
            known[token.content] = token
    for content in named.values():
        existing = known.get(content)
        if existing is None or not existing.special:
            backend.add_special_tokens([existing or tokenizers.AddedToken(content, normalized=False)])


def _find_chat_template(source: Path, folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja where there is one, else the template of tokenizer_config.json (the one named default)."""
    for path in (source / "chat_template.jinja", folder / "chat_template.jinja"):
        if path.exists():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
