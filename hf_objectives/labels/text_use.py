"""What a chat template does with the texts of messages, read from its syntax tree.

A template that only prints a text, strips it, and looks for fixed strings in it renders every conversation with the same
roles in the same way, as long as no text holds one of these strings. The render is then fixed text with the messages' texts
in between: it can be put together without the template.

    {% for m in messages %}<u>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}    looks for `</think>` alone
    {% for m in messages %}<u>{{ m.content[:100] }}</s>{% endfor %}                    prints a part: nothing is known
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import nodes

from hf_objectives.labels.templates import syntax_tree

_STRIPS = frozenset({"strip", "lstrip", "rstrip"})
_SEARCHES = frozenset({"startswith", "endswith", "split", "rsplit", "replace"})
_LENGTHS = frozenset({"length", "count"})
# Tests that ask what kind of value a text is, not what it says.
_KIND_TESTS = frozenset({"string", "none", "defined", "undefined", "mapping", "iterable", "sequence", "boolean"})
_PLAIN_FILTERS = frozenset({"string", "safe", "default", "tojson", "join", *_LENGTHS})


@dataclass(frozen=True, slots=True)
class TextUse:
    """What a template does with texts.

    Attributes:
        searched: the strings that it looks for in texts.
        known: whether it does nothing with the texts of plain messages but print them, strip white space and search.
        strips: whether it strips white space of a text.
        compares: whether it compares two texts with each other.
    """

    searched: frozenset[str]
    known: bool
    strips: bool
    compares: bool


@lru_cache(maxsize=64)
def text_use(template: str, key: str) -> TextUse:
    """What a template does with the texts of messages that have a role and a content alone.

    Args:
        template: the template text.
        key: "content" for contents that are strings, "text" for contents that are lists of one text block.
    """
    reader = _Reader(syntax_tree(template), key)
    return TextUse(frozenset(reader.searched), not reader.unknown, reader.strips, reader.compares)


@lru_cache(maxsize=64)
def searched_strings(template: str) -> frozenset[str]:
    """Every string that a template may look for in any text: a superset of `TextUse.searched`, words alone left out."""
    found: set[str] = set()
    for node in syntax_tree(template).find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        values: Sequence[nodes.Node] = ()
        if isinstance(node, nodes.Compare) and node.ops[0].op in ("in", "notin"):
            values = [node.expr]
        elif (isinstance(node, nodes.Filter) and node.name == "replace") or (
            isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES
        ):
            values = node.args[:1]
        found |= {value.value for value in values if isinstance(value, nodes.Const) and isinstance(value.value, str)}
    return frozenset(value for value in found if value.strip() and not value.isidentifier())


class _Reader:
    """Walks a syntax tree; the names that may hold a text, and those that may hold a message, are found first."""

    def __init__(self, tree: nodes.Template, key: str) -> None:
        self.tree = tree
        self.texts: set[str] = set()  # names of variables, macros and parameters
        self.keys = {key}  # keys and attributes
        self.messages = {"messages"}
        self.searched: set[str] = set()
        self.unknown = self.strips = self.compares = False
        self.macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        size = -1
        while size != (size := len(self.texts) + len(self.keys) + len(self.messages)):
            for node in self.reached(tree):
                self._spread(node)
        for node in self.reached(tree):
            check = _CHECKS.get(type(node))
            if check is not None:
                check(self, node)

    # -- what is reached when messages have a role and a text alone ------------------------------------------------------

    def reached(self, node: nodes.Node) -> Iterator[nodes.Node]:
        """A node and what stands under it, without the branches for messages that are not plain."""
        yield node
        if not isinstance(node, (nodes.If, nodes.CondExpr)):
            for child in node.iter_child_nodes():
                yield from self.reached(child)
            return
        yield from self.reached(node.test)
        known = self.outcome(node.test)
        for branch in node.iter_child_nodes(exclude=("test",)):
            first = branch in node.body if isinstance(node, nodes.If) else branch is node.expr1
            if known is None or known is first:
                yield from self.reached(branch)

    def outcome(self, test: nodes.Node) -> bool | None:
        """What a test says of plain messages, None where it is not known."""
        if isinstance(test, nodes.Not):
            value = self.outcome(test.node)
            return None if value is None else not value
        if isinstance(test, (nodes.And, nodes.Or)):
            sides = self.outcome(test.left), self.outcome(test.right)
            decisive = isinstance(test, nodes.Or)
            return decisive if decisive in sides else sides[0] if sides[0] == sides[1] else None
        if isinstance(test, nodes.Test) and test.name in ("string", "mapping") and self.is_text(test.node):
            return test.name == "string"
        if isinstance(test, nodes.Test) and test.name in ("defined", "undefined") and self._lacks(test.node):
            return test.name == "undefined"
        return False if self._lacks(test) else None

    def _lacks(self, node: nodes.Node) -> bool:
        """Whether an expression asks a message for something that is neither its role nor its content."""
        found: Any
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
            holder, found = node.node.node, node.args[0] if node.args else None
        elif isinstance(node, (nodes.Getattr, nodes.Getitem)):
            holder, found = node.node, node.attr if isinstance(node, nodes.Getattr) else node.arg
        else:
            return False
        found = found.value if isinstance(found, nodes.Const) else found
        return isinstance(found, str) and self.is_message(holder) and found not in ("role", "content")

    # -- which expressions are texts or messages -------------------------------------------------------------------------

    def is_text(self, node: nodes.Node | None) -> bool:
        """Whether an expression may be a text, or a list or string made of one."""
        match node:
            case None | nodes.Compare() | nodes.Test() | nodes.Not():
                return False
            case nodes.Filter() if node.name in _LENGTHS:
                return False
            case nodes.Name():
                return node.name in self.texts
            case nodes.Getattr():
                return node.attr in self.keys or self.is_text(node.node)
            case nodes.Getitem():
                return _constant(node.arg) in self.keys or self.is_text(node.node)
            case nodes.Call(node=nodes.Getattr() as method):
                if method.attr == "get" and node.args and _constant(node.args[0]) in self.keys:
                    return True
                return method.attr not in ("startswith", "endswith") and self.is_text(method.node)
            case nodes.Call():
                return isinstance(node.node, nodes.Name) and node.node.name in self.texts
            case nodes.CondExpr():
                return self.is_text(node.expr1) or self.is_text(node.expr2)
        return any(map(self.is_text, node.iter_child_nodes()))

    def is_message(self, node: nodes.Node | None) -> bool:
        """Whether an expression may be a message or a list of messages."""
        if isinstance(node, nodes.Name):
            return node.name in self.messages
        if isinstance(node, nodes.Getattr):
            return node.attr in ("previtem", "nextitem")
        return (
            isinstance(node, nodes.Getitem) and self.is_message(node.node) and not isinstance(_constant(node.arg), str)
        )

    def _prints(self, body: Sequence[nodes.Node]) -> bool:
        outputs = (node for part in body for node in self.reached(part) if isinstance(node, nodes.Output))
        return any(self.is_text(child) for output in outputs for child in output.nodes)

    def _spread(self, node: nodes.Node) -> None:
        """Note the names that a statement gives a text or a message."""
        match node:
            case nodes.Assign() | nodes.For():
                value = node.node if isinstance(node, nodes.Assign) else node.iter
                self._bind(node.target, self.is_text(value), self.is_message(value))
            case nodes.AssignBlock():
                self._bind(node.target, self._prints(node.body), False)
            case nodes.Macro() if self._prints(node.body):
                self.texts.add(node.name)
            case nodes.Call(node=nodes.Name(name=name)):
                pairs: list[tuple[nodes.Node, nodes.Node]] = []
                if name in self.macros:
                    pairs = list(zip(self.macros[name].args, node.args, strict=False))
                    pairs += [(nodes.Name(argument.key, "param"), argument.value) for argument in node.kwargs]
                elif name == "namespace":
                    pairs = [(nodes.NSRef("", argument.key), argument.value) for argument in node.kwargs]
                for target, value in pairs:
                    self._bind(target, self.is_text(value), self.is_message(value))

    def _bind(self, target: nodes.Node, text: bool, message: bool) -> None:
        if isinstance(target, nodes.NSRef):
            if text:
                self.keys.add(target.attr)
            return
        names = {target.name} if isinstance(target, nodes.Name) else {n.name for n in target.find_all(nodes.Name)}
        if text:
            self.texts |= names
        if message:
            self.messages |= names

    # -- what is done with them ------------------------------------------------------------------------------------------

    def _compare(self, node: nodes.Compare) -> None:
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        for operand, left, right in zip(node.ops, sides, sides[1:], strict=False):
            for side, other in ((left, right), (right, left)):
                if isinstance(side, nodes.Filter) and side.name in _LENGTHS and self.is_text(side.node):
                    # Only whether there is a text at all.
                    self.unknown |= _constant(other) != 0 and not _is_split(side.node)
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
                    self.unknown |= operand.op not in ("eq", "ne")
                else:
                    self._search([other])

    def _filter(self, node: nodes.Filter) -> None:
        if self.is_message(node.node):
            self.unknown |= node.name not in _LENGTHS | {"list", "first", "last"}
        if not self.is_text(node.node):
            return
        if node.name == "trim":
            self._strip(node.args)
        elif node.name == "replace":
            self._search(node.args[:1])
        else:
            self.unknown |= node.name not in _PLAIN_FILTERS

    def _test(self, node: nodes.Test) -> None:
        self.unknown |= self.is_text(node.node) and node.name not in _KIND_TESTS

    def _call(self, node: nodes.Call) -> None:
        called = node.node
        if isinstance(called, nodes.Getattr):
            self.unknown |= self.is_message(called.node) and called.attr != "get"
            if not self.is_text(called.node):
                self.unknown |= called.attr != "append" and any(map(self.is_text, node.args))
            elif called.attr in _STRIPS:
                self._strip(node.args)
            elif called.attr in _SEARCHES and node.args:
                self._search(node.args[:1])
            else:
                self.unknown = True
        elif isinstance(called, nodes.Name) and called.name not in (*self.macros, "namespace", "raise_exception"):
            self.unknown |= any(map(self.is_text, node.args))

    def _part(self, node: nodes.Getitem | nodes.For) -> None:
        value = node.iter if isinstance(node, nodes.For) else node.node
        self.unknown |= self.is_text(value) and not _is_split(value)

    def _arithmetic(self, node: nodes.Node) -> None:
        self.unknown |= self.is_text(node)

    def _block(self, node: nodes.CallBlock | nodes.FilterBlock) -> None:
        # `{% generation %}` is parsed into a call that prints its body as it is.
        generation = isinstance(node, nodes.CallBlock) and getattr(node.call.node, "name", "") == "_generation_support"
        self.unknown |= self._prints(node.body) and not generation

    def _output(self, node: nodes.Output) -> None:
        self.unknown |= any(map(self.is_message, node.nodes))

    def _strip(self, arguments: Sequence[nodes.Node]) -> None:
        self.strips = True
        self.unknown |= not all(str(_constant(argument)).isspace() for argument in arguments)

    def _search(self, arguments: Sequence[nodes.Node]) -> None:
        for argument in arguments:
            values = [argument]
            if isinstance(argument, nodes.Name):  # a variable that is given constants alone
                assigned = (node for node in self.tree.find_all(nodes.Assign) if isinstance(node.target, nodes.Name))
                values = [node.node for node in assigned if node.target.name == argument.name] or values  # type: ignore[attr-defined]
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
    nodes.CallBlock: _Reader._block,
    nodes.FilterBlock: _Reader._block,
    nodes.Output: _Reader._output,
}


def _constant(node: nodes.Node | None) -> Any:
    return node.value if isinstance(node, nodes.Const) else None


def _is_split(node: nodes.Node | None) -> bool:
    return (
        isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in ("split", "rsplit")
    )
