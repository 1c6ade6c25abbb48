"""Chat templates: compiled, rendered as `apply_chat_template` renders them, and read for their control tokens.

This is the only file that touches the private parts of transformers' template code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
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


# Tests that ask what kind of value content is, not what it says.
_KIND_TESTS = frozenset({"string", "none", "defined", "undefined", "mapping", "iterable", "sequence"})
_EDGE_METHODS = frozenset({"strip", "lstrip", "rstrip"})


@lru_cache(maxsize=64)
def text_steers(template: str) -> bool:
    """Whether what a message says can change anything but its own place in the render.

    True unless the template provably only prints content, trimmed at most: no comparison, search, condition or method
    on it or on anything made of it. For such a template the literal text around contents depends on roles alone.
    """
    tree = compile_template(template).environment.parse(template)
    made = {"content"}
    while True:  # names assigned from content speak of content as well
        grown = made | {
            name
            for node in tree.find_all((nodes.Assign, nodes.AssignBlock))
            if _speaks(node.node if isinstance(node, nodes.Assign) else node, made)
            for name in _targets(node.target)  # type: ignore[attr-defined]
        }
        if grown == made:
            break
        made = grown
    if any(
        _speaks(node, made) and not _is_generation(node)
        for node in tree.find_all((nodes.Macro, nodes.CallBlock, nodes.FilterBlock))
    ):
        return True
    conditions: list[nodes.Node] = [node.test for node in tree.find_all((nodes.If, nodes.CondExpr))]  # type: ignore[attr-defined]
    conditions += [node.iter for node in tree.find_all(nodes.For)] + list(
        tree.find_all((nodes.Compare, nodes.And, nodes.Or))
    )
    if any(_speaks(condition, made, _KIND_TESTS) for condition in conditions):
        return True
    for node in tree.find_all((nodes.Filter, nodes.Call, nodes.Test, nodes.Mul, nodes.Mod, nodes.Not)):
        harmless = (
            (isinstance(node, nodes.Filter) and node.name == "trim" and not node.args)
            or (isinstance(node, nodes.Test) and node.name in _KIND_TESTS)
            or (
                isinstance(node, nodes.Call)
                and isinstance(node.node, nodes.Getattr)
                and node.node.attr in _EDGE_METHODS
                and not node.args
            )
        )
        if not harmless and _speaks(node, made):
            return True
    return False


def _is_generation(node: nodes.Node) -> bool:
    """Whether a block is `{% generation %}`, which transformers parses into a call that prints its body as it is."""
    return (
        isinstance(node, nodes.CallBlock)
        and isinstance(node.call.node, nodes.ExtensionAttribute)
        and node.call.node.name == "_generation_support"
    )


def _speaks(node: nodes.Node, made: set[str], harmless: frozenset[str] = frozenset()) -> bool:
    """Whether an expression reads content, outside of tests of its kind."""
    if isinstance(node, nodes.Test) and node.name in harmless:
        return False
    if isinstance(node, nodes.Getattr) and node.attr in made:
        return True
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value in made:
        return True
    if isinstance(node, nodes.Name) and node.name in made:
        return True
    return any(_speaks(child, made, harmless) for child in node.iter_child_nodes())


def _targets(target: nodes.Node) -> list[str]:
    names = [node.name for node in target.find_all(nodes.Name)]
    names += [target.name] if isinstance(target, nodes.Name) else []
    return names + ([target.attr] if isinstance(target, nodes.NSRef) else [])


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
        self.source = template
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
            raise TemplateError(
                f"the chat template fails on this conversation: {type(error).__name__}: {error}"
            ) from error


def _schema(tool: Any) -> dict:
    if not callable(tool):
        raise TemplateError(f"tool {tool!r:.80} is neither a JSON schema nor a function")
    return chat_template_utils.get_json_schema(tool)
