"""How a tokenizer's decoder makes text of tokens, one token at a time.

Runs in: driver | server. The `tokenizers` library decodes whole sequences only; its streaming decoder stops with an
error at bytes that are not UTF-8, and sampled tokens may be any bytes.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MAX_HELD_TOKENS = 8
"""A character spans at most 4 bytes and so 4 tokens; a window that still ends unfinished after this many is garbage."""

Value = TypeVar("Value")


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE (GPT-2): printable ones stand for themselves, the others for U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()


class ByToken(dict[int, Value]):
    """Something of every token id, computed when it is first asked for."""

    def __init__(self, compute: Callable[[int], Value]) -> None:
        self._compute = compute

    def __missing__(self, token_id: int) -> Value:
        value = self[token_id] = self._compute(token_id)
        return value


class TokenTable:
    """The tokens of a tokenizer by id, as the decoder sees them.

    bytes   the UTF-8 bytes of a token, possibly a part of a character; empty for an id without a token
    texts   the same as text; None where they are not whole characters
    pieces  of sentencepiece: the text of a token, or the byte that it stands for; None for an id without a token
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.shape = DecoderShape.of(backend)
        self.bytes = ByToken(self._bytes_of)
        self.texts = ByToken(self._text_of)
        self.pieces = ByToken(self._piece_of)

    def longest_token(self) -> int:
        """Characters of text that one token can stand for at most; 0 if that is unknown."""
        added = self.backend.get_added_tokens_decoder().values()
        # Such tokens swallow any number of spaces, and other decoders may drop or merge text.
        if self.shape.kind == "other" or any(token.lstrip or token.rstrip for token in added):
            return 0
        if self.shape.kind == "pieces" and not self.shape.byte_tokens:
            return 0
        parts = msgspec.json.decode(self.backend.to_str(), type=_Before)
        shrinkage = _shrinkage(parts.normalizer) * _shrinkage(parts.pre_tokenizer)
        return shrinkage * max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    def new_stream(self) -> Stream:
        """A fresh decoder of one sequence."""
        match self.shape.kind:
            case "bytes":
                return ByteStream(self)
            case "pieces":
                return PieceStream(self)
            case _:
                return WindowStream(self)

    def _raw(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    def _text_of(self, token_id: int) -> str | None:
        try:
            return self.bytes[token_id].decode()
        except UnicodeDecodeError:
            return None

    def _piece_of(self, token_id: int) -> str | int | None:
        token = self._raw(token_id)
        if token is None:
            return None
        byte = self.shape.byte_of(token)
        return self.shape.piece_of(token) if byte is None else byte

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._raw(token_id)
        if token is None:
            return b""
        if self.shape.kind == "bytes":
            data = [BYTE_OF_CHAR.get(char, -1) for char in token]
            # A token with a character outside the byte alphabet was added by hand and stands for itself.
            return token.encode() if -1 in data else bytes(data)
        if self.shape.kind == "pieces":
            byte = self.shape.byte_of(token)
            return self.shape.piece_of(token).encode() if byte is None else bytes([byte])
        text: str = self.backend.decode([token_id], skip_special_tokens=False)
        return text.encode()


class _Before(msgspec.Struct):
    """What a tokenizer does to a text before it becomes tokens."""

    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


def _shrinkage(part: dict[str, Any] | None) -> int:
    """How many characters a normalizer or pre-tokenizer may make one of; 0 if that is unknown."""
    match part:
        case None | {"type": "Prepend" | "ByteLevel" | "Digits" | "Metaspace" | "NFD" | "NFKD"}:
            return 1
        case {"type": "NFC" | "NFKC"}:
            return 4  # no character decomposes into more
        case {"type": "Split", "behavior": behavior}:
            return int(behavior != "Removed")
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return int(len(content) >= len(pattern))
        case {"type": "Sequence", "normalizers": [*steps]} | {"type": "Sequence", "pretokenizers": [*steps]}:
            return math.prod(map(_shrinkage, steps))
    return 0


class DecoderShape(msgspec.Struct, frozen=True):
    """How a tokenizer's decoder makes text of tokens, read from its JSON.

    kind          bytes: byte-level BPE, each token is some bytes
                  pieces: sentencepiece style, tokens are text, with <0xNN> for single bytes
                  other: known to the library only
    replacements  (pattern, text) replaced in each piece
    byte_tokens   whether <0xNN> stands for a byte
    strip         up to so many of `strip_char` are cut from the start of the text
    """

    kind: str
    replacements: tuple[tuple[str, str], ...] = ()
    byte_tokens: bool = False
    strip: int = 0
    strip_char: str = " "

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> DecoderShape:
        """The shape of `backend`'s decoder."""
        decoder = msgspec.json.decode(backend.to_str()).get("decoder") or {}
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        names = [step.get("type") for step in steps]
        if names == ["ByteLevel"]:
            return cls("bytes")
        # Each step reads the output of the one before, so only the usual order has the usual meaning.
        expected = ["Replace", "ByteFallback", "Fuse", "Strip"]
        if not names or names != [name for name in expected if name in names]:
            return cls("other")
        by_name = dict(zip(names, steps, strict=True))
        replace, strip = by_name.get("Replace"), by_name.get("Strip")
        if (replace and "String" not in replace["pattern"]) or (strip and ("Fuse" not in names or strip["stop"])):
            return cls("other")
        return cls(
            "pieces",
            replacements=((replace["pattern"]["String"], replace["content"]),) if replace else (),
            byte_tokens="ByteFallback" in names,
            strip=strip["start"] if strip else 0,
            strip_char=strip["content"] if strip else " ",
        )

    def byte_of(self, token: str) -> int | None:
        """The byte that a token like <0x0A> stands for."""
        byte = BYTE_TOKEN.fullmatch(token) if self.byte_tokens else None
        return int(byte[1], 16) if byte else None

    def piece_of(self, token: str) -> str:
        """The text of a token that is not a byte."""
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token


class Stream(Protocol):
    """Tokens in, text out. `start_after` comes first, with tokens that are text but not to be shown."""

    def start_after(self, context: Sequence[int]) -> None: ...
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class ByteStream:
    """Byte-level BPE: the tokens' bytes are one UTF-8 stream."""

    def __init__(self, table: TokenTable) -> None:
        self._bytes = table.bytes
        self._texts = table.texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False
        """Whether `_utf8` holds the beginning of a character."""

    def start_after(self, context: Sequence[int]) -> None:
        # A character that the prompt begins and the output ends comes out whole.
        for token in context:
            self.push(token)

    def push(self, token_id: int) -> str:
        text = None if self._is_inside else self._texts[token_id]
        if text is None:
            text = self._utf8.decode(self._bytes[token_id])
            self._is_inside = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class PieceStream:
    """Sentencepiece style. Byte tokens are held until their run ends: the library writes one U+FFFD for each byte of a
    run that is not valid UTF-8 as a whole, also for the characters in it that were complete."""

    def __init__(self, table: TokenTable) -> None:
        self._pieces = table.pieces
        self._strip_char = table.shape.strip_char
        self._run = bytearray()
        self._strip = table.shape.strip

    def start_after(self, context: Sequence[int]) -> None:
        for token in context:
            self.push(token)
        self.flush()

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            return self._stripped(self._take_run() + piece) if self._run or self._strip else piece
        if piece is not None:
            self._run.append(piece)
        return ""

    def flush(self) -> str:
        return self._stripped(self._take_run())

    def _take_run(self) -> str:
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while text and self._strip:
            if text[0] != self._strip_char:
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class WindowStream:
    """Any other decoder: decode the last few tokens with and without the new one, and take the difference."""

    def __init__(self, table: TokenTable) -> None:
        self._backend = table.backend
        self._window: list[int] = []
        self._num_shown = 0
        self._shown = ""

    def start_after(self, context: Sequence[int]) -> None:
        self._restart(list(context))

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        unfinished = text.endswith(REPLACEMENT) and len(self._window) - self._num_shown < MAX_HELD_TOKENS
        if unfinished or len(text) <= len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._restart(self._window[self._num_shown :])
        return new

    def flush(self) -> str:
        new = self._decode(self._window)[len(self._shown) :]
        self._restart(self._window[self._num_shown :])
        return new

    def _restart(self, window: list[int]) -> None:
        self._window, self._num_shown, self._shown = window, len(window), self._decode(window)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text
