"""What a chat template does with the texts of messages, read from its syntax tree.

A template that only prints a text, strips it, and looks for fixed strings in it renders every conversation with the same
roles in the same way, as long as no text holds one of these strings. The render is then fixed text with the messages' texts
in between: it can be put together without the template.

    {% for m in messages %}<u>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}    looks for `</think>` alone
    {% for m in messages %}<u>{{ m.content[:100] }}</s>{% endfor %}                    prints a part: nothing is known
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import nodes

from hf_objectives.labels.template_names import LENGTHS, SEARCHES, STRIPS, Names, bound_arguments, constant, is_split
from hf_objectives.labels.templates import syntax_tree

# Tests that ask what kind of value a text is, not what it says.
_KIND_TESTS = frozenset({"string", "none", "defined", "undefined", "mapping", "iterable", "sequence", "boolean"})
_PLAIN_FILTERS = frozenset({"string", "safe", "default", "tojson", "join", *LENGTHS})


@dataclass(frozen=True, slots=True)
class TextUse:
    """What a template does with texts.

    Attributes:
        searched: the strings that it looks for in texts.
        known: whether it does nothing with the texts of plain messages but print them, strip white space and search.
        strips: whether it strips white space of a text.
        compares: whether it compares two texts with each other.
        dates: the formats in which it prints the date.
    """

    searched: frozenset[str]
    known: bool
    strips: bool
    compares: bool
    dates: tuple[str, ...]


@lru_cache(maxsize=64)
def text_use(template: str, key: str, given: frozenset[str] = frozenset()) -> TextUse:
    """What a template does with the texts of messages that have a role and a content alone.

    Args:
        template: the template text.
        key: "content" for contents that are strings, "text" for contents that are lists of one text block.
        given: names of variables that the template is given beside `messages`.
    """
    reader = _Reader(syntax_tree(template), key, given)
    return TextUse(
        frozenset(reader.searched),
        not reader.unknown,
        reader.strips,
        reader.compares,
        tuple(sorted(reader.dates)),
    )


@lru_cache(maxsize=64)
def searched_strings(template: str) -> frozenset[str]:
    """Every string that a template may look for in any text: a superset of `TextUse.searched`, words alone left out."""
    found: set[str] = set()
    for node in syntax_tree(template).find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        values: Sequence[nodes.Node] = ()
        if isinstance(node, nodes.Compare) and node.ops[0].op in ("in", "notin"):
            values = [node.expr]
        elif (isinstance(node, nodes.Filter) and node.name == "replace") or (
            isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in SEARCHES
        ):
            values = node.args[:1]
        found |= {value.value for value in values if isinstance(value, nodes.Const) and isinstance(value.value, str)}
    return frozenset(value for value in found if value.strip() and not value.isidentifier())


class _Reader(Names):
    """Walks a syntax tree, and notes what is done with texts."""

    def __init__(self, tree: nodes.Template, key: str, given: frozenset[str]) -> None:
        super().__init__(tree, key, given)
        self.searched: set[str] = set()
        self.dates: set[str] = set()
        self.unknown = self.strips = self.compares = False
        self.presence: set[int] = set()  # lengths of which only is asked whether they are 0
        for node in self.reached(tree):
            check = _CHECKS.get(type(node))
            if check is not None:
                check(self, node)

    def _compare(self, node: nodes.Compare) -> None:
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        for operand, left, right in zip(node.ops, sides, sides[1:], strict=False):
            for side, other in ((left, right), (right, left)):
                if constant(other) == 0:  # only whether there is a text at all
                    self.presence.add(id(side))
                if self.is_message(side):
                    self.unknown |= operand.op not in ("in", "notin") or side is not right
                if not self.is_text(side):
                    continue
                if operand.op not in ("eq", "ne", "in", "notin"):
                    self.unknown = True
                elif isinstance(other, (nodes.List, nodes.Tuple)):
                    self._search(other.items)
                elif self.is_text(other):
                    self.compares = True
                    self.unknown |= operand.op not in ("eq", "ne") or not (_bare(side) and _bare(other))
                else:
                    self._search([other])

    def _filter(self, node: nodes.Filter) -> None:
        self.unknown |= node.name == "random" or (node.name != "default" and self._takes(node))
        if self.is_message(node.node):
            by_kind = node.name in ("selectattr", "rejectattr") and constant(node.args[0]) in ("role", "type")
            self.unknown |= node.name not in LENGTHS | {"list", "first", "last"} and not by_kind
            self.unknown |= isinstance(node.node, (nodes.Concat, nodes.Add))
        if not self.is_text(node.node):
            return
        if node.name == "trim":
            self._strip(node.args)
            self.unknown |= bool(node.kwargs)
        elif node.name == "replace":
            self._search(node.args[:1])
            self.unknown |= not node.args
        elif node.name in LENGTHS:
            self.unknown |= id(node) not in self.presence and not is_split(node.node)
        else:
            self.unknown |= node.name not in _PLAIN_FILTERS

    def _test(self, node: nodes.Test) -> None:
        holds = self.is_text(node.node) or self.is_message(node.node)
        self.unknown |= (holds and node.name not in _KIND_TESTS) or self._takes(node)

    def _takes(self, node: nodes.Filter | nodes.Test | nodes.Call) -> bool:
        """Whether a text or a message is among the arguments."""
        given = [*node.args, *(argument.value for argument in node.kwargs), node.dyn_args, node.dyn_kwargs]
        return any(self.is_text(argument) or self.is_message(argument) for argument in given)

    def _call(self, node: nodes.Call) -> None:
        called = node.node
        if isinstance(called, nodes.Getattr):
            self.unknown |= self.is_message(called.node) and called.attr != "get"
            if not self.is_text(called.node):
                self.unknown |= self._takes(node)
            elif called.attr in STRIPS:
                self._strip(node.args)
            elif called.attr in SEARCHES and node.args:
                self._search(node.args[:1])
                self.unknown |= not all(constant(value) or isinstance(value, nodes.Name) for value in node.args[:1])
            else:
                self.unknown = True
            return
        name = called.name if isinstance(called, nodes.Name) else None
        if name == "strftime_now":
            self.dates |= {str(constant(argument)) for argument in node.args}
            self.unknown |= len(node.args) != 1 or not isinstance(constant(node.args[0]), str)
        elif name in self.macros:
            bound = sum(1 for _ in bound_arguments(self.macros[name], node))
            self.unknown |= bound < len(node.args) + len(node.kwargs) or bool(node.dyn_args or node.dyn_kwargs)
        elif name == "namespace":
            self.unknown |= any(self.is_text(argument) or self.is_message(argument) for argument in node.args)
        elif name != "raise_exception":
            self.unknown |= self._takes(node) or name == "lipsum"

    def _part(self, node: nodes.Getitem | nodes.For) -> None:
        value = node.iter if isinstance(node, nodes.For) else node.node
        self.unknown |= self.is_text(value) and not is_split(value)
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, (nodes.Const, nodes.Slice)):
            self.unknown |= self.is_item(value)  # any of its keys

    def _refuse(self, node: nodes.Node) -> None:
        self.unknown = True

    def _arithmetic(self, node: nodes.Node) -> None:
        self.unknown |= self.is_text(node)

    def _block(self, node: nodes.CallBlock | nodes.FilterBlock) -> None:
        # `{% generation %}` is parsed into a call that prints its body as it is.
        generation = isinstance(node, nodes.CallBlock) and getattr(node.call.node, "name", "") == "_generation_support"
        self.unknown |= self._prints(node.body) and not generation

    def _set_block(self, node: nodes.AssignBlock) -> None:
        self.unknown |= node.filter is not None and self._prints(node.body)

    def _output(self, node: nodes.Output) -> None:
        self.unknown |= any(map(self.is_message, node.nodes))

    def _strip(self, arguments: Sequence[nodes.Node]) -> None:
        self.strips = True
        self.unknown |= not all(str(constant(argument)).isspace() for argument in arguments)

    def _search(self, arguments: Sequence[nodes.Node]) -> None:
        for argument in arguments:
            values: Sequence[nodes.Node | None] = [argument]
            if isinstance(argument, nodes.Name):  # a variable that is given constants alone
                values = self.values.get(argument.name, [None]) if argument.name not in self.given else [None]
            for value in values:
                if not isinstance(value, nodes.Const):
                    self.unknown = True
                elif isinstance(value.value, str) and value.value:
                    self.searched.add(value.value)


_CHECKS: dict[type[nodes.Node], Callable[[_Reader, Any], None]] = {
    nodes.Compare: _Reader._compare,
    nodes.Filter: _Reader._filter,
    nodes.Test: _Reader._test,
    nodes.Call: _Reader._call,
    nodes.Getitem: _Reader._part,
    nodes.For: _Reader._part,
    nodes.Mul: _Reader._arithmetic,
    nodes.Mod: _Reader._arithmetic,
    nodes.Sub: _Reader._arithmetic,
    nodes.AssignBlock: _Reader._set_block,
    nodes.Block: _Reader._refuse,
    nodes.CallBlock: _Reader._block,
    nodes.FilterBlock: _Reader._block,
    nodes.Output: _Reader._output,
}


def _bare(node: nodes.Node) -> bool:
    """Whether an expression is a text as it is, or without its white space."""
    if isinstance(node, nodes.Filter):
        return node.name == "trim" and node.node is not None and _bare(node.node)
    return isinstance(node, (nodes.Getattr, nodes.Getitem)) and constant(getattr(node, "arg", None)) != ""
