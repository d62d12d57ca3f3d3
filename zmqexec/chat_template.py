"""Chat messages → the prompt text of a model, by the jinja template that comes with its checkpoint.

Runs in: driver | server. A template is code from a stranger, so it runs in jinja's immutable sandbox, in the same
environment that transformers' `apply_chat_template` gives it (its tests compare the two).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zmqexec.errors import CheckpointError, RequestError

MAX_ERROR_CHARS = 500


class ChatTemplate:
    """A compiled template; `render` may be called any number of times, also from several threads.

    `variables` are the names that the template finds besides the messages: bos_token, eos_token and their like.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self._reads_parts = _iterates_content(environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template is not valid jinja: {_bounded(error)}") from None
        self._variables = variables

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text. `RequestError` where the template refuses the messages.

        Content that is a list of `{"type": "text", "text": ...}` parts is joined with newlines, unless the template
        reads such lists itself.
        """
        if not messages:
            raise RequestError("messages is empty: a chat needs at least one message", "messages")
        if not self._reads_parts:
            messages = [_with_joined_content(message) for message in messages]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a sandboxed template may fail in any way; whatever it is, the chat is refused
            raise RequestError(f"the chat template refuses these messages: {_bounded(error)}", "messages") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's part for training; here it renders its body."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - jinja declares it as an instance variable

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML characters, which a model must see as they are.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _iterates_content(tree: jinja2.nodes.Template) -> bool:
    """True where a loop of the template runs over some message's `content`, directly or through a variable."""
    aliases = {
        assign.target.name
        for assign in tree.find_all(jinja2.nodes.Assign)
        if isinstance(assign.target, jinja2.nodes.Name) and _is_content(assign.node)
    }
    return any(
        _is_content(loop.iter) or (isinstance(loop.iter, jinja2.nodes.Name) and loop.iter.name in aliases)
        for loop in tree.find_all(jinja2.nodes.For)
    )


def _is_content(node: jinja2.nodes.Node | None) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, jinja2.nodes.Getitem)
        and isinstance(node.arg, jinja2.nodes.Const)
        and node.arg.value == "content"
    )


def _with_joined_content(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content if part.get("type") == "text")}


def _bounded(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …"
