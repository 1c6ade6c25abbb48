"""Chat templates: compiled, rendered as `apply_chat_template` renders them, and read for their control tokens.

This is the only file that touches the private parts of transformers' template code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from hf_objectives.errors import TemplateError

# What looks like a control token in a template's output, whatever the tokenizer: <|im_end|>, </s>, <end_of_turn>,
# <｜Assistant｜>, [/INST]. The tokenizer's own added tokens count as well.
_MARKER = r"<+[^<>\s]{1,80}>+|\[/?[A-Z][A-Z_]*\]"


def compile_template(template: str) -> jinja2.Template:
    """The compiled template, from transformers' own sandboxed and cached environment.

    Raises:
        TemplateError: the template is not valid Jinja.
    """
    try:
        return chat_template_utils._compile_jinja_template(template)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template is not valid Jinja: {error}") from error


def literal_text(template: str) -> str:
    """The literal strings of a template, NUL-joined: what it can write without anything from a message."""
    tree = compile_template(template).environment.parse(template)
    literals = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    literals |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(literals))


def template_of(tokenizer: Any, chat_template: str | None, tools: Sequence | None) -> str:
    """The template text that `apply_chat_template` would use: the argument, a named one, or the tokenizer's own.

    Raises:
        TemplateError: the tokenizer has no chat template and none was given.
    """
    if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
        raise TemplateError(
            "the tokenizer has no chat template; set tokenizer.chat_template, pass chat_template=..., or start from an "
            "instruction-tuned tokenizer"
        )
    try:
        return tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise TemplateError(f"no usable chat template: {error}") from error


def control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """The control tokens of a tokenizer under a template, longest first.

    These are its special tokens, what it lists in `chat_control_tokens`, the added tokens that the template itself
    writes, and added tokens of the shape `<|...|>`. White-space tokens and ordinary words are not (`\\n\\n`, `<table>`).
    """
    listed = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    literals = literal_text(template)
    found = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip()
        and (
            token.special
            or token.content in listed
            or token.content in literals
            or re.fullmatch(r"<[|｜].*[|｜]>", token.content)
        )
    }
    return tuple(sorted(found, key=lambda token: (-len(token), token)))


def marker_pattern(tokenizer: Any) -> re.Pattern[str]:
    """A pattern for control tokens in rendered text: the tokenizer's added tokens and whatever has their shape."""
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip() and len(t.content) > 1]
    longest_first = sorted(added, key=lambda token: (-len(token), token))
    return re.compile("|".join([*map(re.escape, longest_first), _MARKER]))


class Renderer:
    """Renders conversations under one template, one set of tools and one set of template arguments.

    Args:
        tokenizer: gives the special tokens that the template may print.
        template: the template text.
        tools: JSON schemas or functions, as `apply_chat_template` takes them.
        template_kwargs: passed to the template (`enable_thinking=False`, say).
    """

    def __init__(
        self, tokenizer: Any, template: str, tools: Sequence | None, template_kwargs: Mapping[str, Any]
    ) -> None:
        self._template = compile_template(template)
        self.tools = None if tools is None else [tool if isinstance(tool, Mapping) else _schema(tool) for tool in tools]
        # `Template.render` copies globals and arguments for each call; a shared context built from one dict is the same
        # at a third of the cost.
        self._context = {
            **self._template.globals,
            **tokenizer.special_tokens_map,
            "documents": None,
            **template_kwargs,
        }

    def __call__(self, messages: list[dict], *, generation_prompt: bool = False) -> str:
        """The render of `messages`.

        Raises:
            TemplateError: the template refuses the conversation or fails on it; the message quotes its own words.
        """
        try:
            context = self._template.new_context(
                {
                    **self._context,
                    "messages": messages,
                    "tools": self.tools,
                    "add_generation_prompt": generation_prompt,
                },
                shared=True,
            )
            return "".join(self._template.root_render_func(context))
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses this conversation: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise TemplateError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from error


def _schema(tool: Any) -> dict:
    if not callable(tool):
        raise TemplateError(f"tool {tool!r:.80} is neither a JSON schema nor a function")
    return chat_template_utils.get_json_schema(tool)
