"""Chat templates: compiled, rendered as `apply_chat_template` renders them, and read for their control tokens.

This is the only file that touches the private parts of transformers' template code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, Macro, new_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

from hf_objectives.errors import TemplateError
from hf_objectives.labels import template_budget as budget
from hf_objectives.labels import template_limits as limits
from hf_objectives.labels.messages import ROLES
from hf_objectives.labels.template_bounds import Bounds

# What looks like a control token in a template's output, whatever the tokenizer: <|im_end|>, </s>, <end_of_turn>,
# <｜Assistant｜>, [/INST]. The tokenizer's own added tokens count as well.
_MARKER = r"<+[^<>\s]{1,80}>+|\[/?[A-Z][A-Z_]*\]"

_DICT_ATTRIBUTES, _MISSING = frozenset(dir(dict)), object()
# Strings that templates compare with roles, kinds and keys, not with what is said.
_KEYS = ROLES | {
    "role",
    "content",
    "type",
    "text",
    "image",
    "video",
    "audio",
    "name",
    "function",
    "tool_calls",
    "arguments",
}


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers with a short way to what chat templates read most; the tests hold both against each other.

    The sandbox looks for an attribute first, so that it raises and catches an error for each key of a message, and asks of
    what kind each value is. None of that can refuse a key of a dict, or a public attribute of a loop, namespace or string.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What `obj.attribute` is in a template; see the class."""
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (kind is LoopContext or kind is str or isinstance(obj, Namespace)) and attribute[:1] != "_":
            found = getattr(obj, attribute, _MISSING)
            if found is not _MISSING and attribute not in ("format", "format_map"):  # those two the sandbox replaces
                return found
        return super().getattr(obj, attribute)

    # What follows bounds the cost of a template; see template_budget.py and template_limits.py.

    intercepted_binops = frozenset(("*", "**", "%"))
    concat = staticmethod(budget.gathered)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left * right`, `left ** right` or `left % right`, unless that is too large."""
        if operator == "%" and type(left) is int:
            return left % right
        limits.operate(operator, left, right)
        return budget.made(self.binop_table[operator](left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What a call in a template gives, unless the sandbox or a limit refuses it."""
        if limits.is_free(function):
            kwargs.pop("_loop_vars", None)  # these two are for functions that take a context; see `Context.call`
            kwargs.pop("_block_vars", None)
            return function(*args, **kwargs)
        if type(function) is Macro:  # pays for what it gathers, in `concat`
            budget.spend(budget.CALL)
            return context.call(function, *args, **kwargs)
        if not self.is_safe_callable(function):
            raise jinja2.exceptions.SecurityError(f"{function!r:.80} is not safely callable")
        args = limits.called(function, args, kwargs)
        return budget.made(context.call(function, *args, **kwargs))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(Bounds(self).visit(source), *args, **kwargs)


@lru_cache(maxsize=64)
def compile_template(template: str) -> jinja2.Template:
    """The compiled template, from transformers' own sandboxed environment.

    Raises:
        TemplateError: the template is not valid Jinja.
    """
    if len(template) > budget.MAX_TEMPLATE:
        raise TemplateError(
            f"the chat template has {len(template):,} characters; expected at most {budget.MAX_TEMPLATE:,}"
        )
    budget.begin()  # constants are computed here
    try:
        return _environment().from_string(template)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template is not valid Jinja: {error}") from error
    except Exception as error:  # of jinja2 and of Python's compiler: RecursionError, SyntaxError, MemoryError
        raise TemplateError(f"the chat template is not valid Jinja: {type(error).__name__}: {error!s:.200}") from error


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """The environment of transformers, with limits. An empty template gives it: others may cost before a limit is set."""
    environment = copy.copy(chat_template_utils._compile_jinja_template("").environment)
    environment.__class__ = _Environment
    environment.filters = limits.bound_filters(environment.filters)
    environment.tests = limits.bound_tests(environment.tests)
    environment.globals = limits.bound_globals(environment.globals)
    return environment


def syntax_tree(template: str) -> nodes.Template:
    """The parsed template; see `compile_template`."""
    return compile_template(template).environment.parse(template)


def literal_text(template: str) -> str:
    """The literal strings of a template, NUL-joined: what it can write without anything from a message."""
    tree = syntax_tree(template)
    literals = {node.data for node in tree.find_all(nodes.TemplateData)}
    literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(literals))


@lru_cache(maxsize=64)
def searched_strings(template: str) -> re.Pattern[str] | None:
    """A pattern of the strings that a template looks for in texts, upper case or lower; None for none."""
    found: set[Any] = set()
    for node in syntax_tree(template).find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        match node:
            case nodes.Compare():
                found |= {getattr(side, "value", "") for side in (node.expr, *(operand.expr for operand in node.ops))}
            case nodes.Filter(name="replace") | nodes.Call(node=nodes.Getattr()):
                found |= {getattr(argument, "value", "") for argument in node.args[:1]}
    strings = {string for string in found if isinstance(string, str) and string.strip()} - _KEYS
    longest_first = sorted(strings, key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE) if strings else None


def template_of(tokenizer: Any, chat_template: str | None, tools: Sequence | None) -> str:
    """The template text that `apply_chat_template` would use: the argument, a named one, or the tokenizer's own.

    Raises:
        TemplateError: the tokenizer has no chat template and none was given.
    """
    own = getattr(tokenizer, "chat_template", None)
    if not isinstance(own, dict) and (chat_template or own):
        return str(chat_template or own)
    if chat_template is None and own is None:
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


def surroundings(render: Renderer) -> tuple[str, str]:
    """What a template prints around a short exchange, the source of the tokens that open and close turns.

    Returns:
        What it prints around the user's text and after a reply, and what it prints before a reply.
    """
    hello = "Hello, hello"
    for content in (hello, [{"type": "text", "text": hello}]):
        user, reply = ({"role": role, "content": content} for role in ("user", "assistant"))
        for exchange in ([user, reply, user], [user, reply], [user]):
            try:
                around = render(exchange).split(hello)
                prompt = render(exchange[:1], generation_prompt=True).split(hello)
            except TemplateError:
                continue
            if len(around) != len(exchange) + 1 or len(prompt) != 2 or len(exchange) == 1:
                return "".join(around + prompt), ""
            return "".join([around[0], *around[2:], prompt[0]]), around[1] + prompt[1]
    return "", ""


class Renderer:
    """Renders conversations under one template, one set of tools and one set of template arguments.

    Args:
        tokenizer: gives the special tokens that the template may print.
        template: the template text.
        tools: JSON schemas, or Python functions, which are converted to schemas as `apply_chat_template` does.
        template_kwargs: variables that are passed to the template, e.g. `{"enable_thinking": False}`.

    Raises:
        TemplateError: the template is not valid Jinja, or a tool is neither a schema nor a function that has one.
    """

    def __init__(
        self, tokenizer: Any, template: str, tools: Sequence | None, template_kwargs: Mapping[str, Any]
    ) -> None:
        self.source = template
        self._template = compile_template(template)
        # `Template.render` copies globals and arguments for each call; a context that holds them all is the same at a third
        # of the cost.
        variables = {**tokenizer.special_tokens_map, "documents": None, **template_kwargs}
        self.given = frozenset(variables)
        self._context = {
            **self._template.globals,
            **variables,
            "tools": None if tools is None else [tool_schema(tool) for tool in tools],
        }

    def with_tools(self, tools: Sequence | None) -> Renderer:
        """This renderer with other tools."""
        other = copy.copy(self)
        other._context = {**self._context, "tools": None if tools is None else [tool_schema(tool) for tool in tools]}
        return other

    @property
    def tools(self) -> list[Mapping[str, Any]] | None:
        """The schemas of the tools that the template is given."""
        return self._context["tools"]

    def __call__(self, messages: list[dict], *, generation_prompt: bool = False) -> str:
        """The render of `messages`.

        Raises:
            TemplateError: the template refuses the conversation or fails on it; the message quotes its own words.
        """
        context = {**self._context, "messages": messages, "add_generation_prompt": generation_prompt}
        budget.begin()
        try:
            return budget.joined(
                self._template.root_render_func(
                    new_context(self._template.environment, None, self._template.blocks, context, shared=True)
                )
            )
        except TemplateError:  # of a limit
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses this conversation: {error}") from error
        except Exception as error:  # of whatever the template computes
            raise TemplateError(
                f"the chat template fails on this conversation: {type(error).__name__}: {error!s:.200}"
            ) from error


def tool_schema(tool: Any) -> Mapping[str, Any]:
    """The JSON schema of a tool: itself, or what `transformers` reads from a function's signature and docstring.

    Raises:
        TemplateError: the tool is neither, or the function lacks type hints or a docstring.
    """
    if isinstance(tool, Mapping):
        return tool
    if not callable(tool):
        raise TemplateError(f"tool {tool!r:.80} is neither a JSON schema nor a function")
    try:
        return chat_template_utils.get_json_schema(tool)
    except (chat_template_utils.DocstringParsingException, chat_template_utils.TypeHintParsingException) as error:
        raise TemplateError(f"no schema can be read from the function {tool.__name__!r}: {error}") from error
