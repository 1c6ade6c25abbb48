"""Which names of a template may hold a text or a message, and which branches are reached by plain messages alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import nodes

STRIPS = frozenset({"strip", "lstrip", "rstrip"})
SEARCHES = frozenset({"startswith", "endswith", "split", "rsplit", "replace"})
LENGTHS = frozenset({"length", "count"})


class Names:
    """The names of a template, found from its syntax tree.

    Args:
        tree: the template.
        key: the key of a text: "content" for contents that are strings, "text" for lists of one text block.
        given: names of variables that the template is given beside `messages`.
    """

    def __init__(self, tree: nodes.Template, key: str, given: frozenset[str]) -> None:
        self.tree, self.key, self.given = tree, key, given
        self.texts: set[str] = set()  # names of variables, macros and parameters
        self.keys = {key}  # keys and attributes
        self.messages, self.items = {"messages"}, set[str]()  # messages or lists of them; single ones
        self.message_keys = {"previtem", "nextitem"} | ({"content"} if key == "text" else set())
        self.macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        self.values = _values(tree, self.macros)
        size = -1
        while size != (size := sum(map(len, (self.texts, self.keys, self.messages, self.items, self.message_keys)))):
            for node in self.reached(tree):
                self._spread(node)

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
        if isinstance(test, nodes.Test) and test.name in ("string", "mapping") and self._surely_text(test.node):
            return test.name == "string"
        if isinstance(test, nodes.Test) and test.name in ("defined", "undefined") and self._lacks(test.node):
            return test.name == "undefined"
        return False if self._lacks(test) else None

    def _lacks(self, node: nodes.Node) -> bool:
        """Whether an expression asks a message for something that is neither its role nor its content."""
        found: Any
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
            holder, found = node.node.node, node.args[0] if len(node.args) == 1 else None
        elif isinstance(node, (nodes.Getattr, nodes.Getitem)):
            holder, found = node.node, node.attr if isinstance(node, nodes.Getattr) else node.arg
        else:
            return False
        found = found.value if isinstance(found, nodes.Const) else found
        if not isinstance(found, str) or found in ("role", "content") or hasattr(dict, found) or hasattr(list, found):
            return False
        return self._surely_message(holder)

    def _surely_message(self, node: nodes.Node | None, seen: frozenset[str] = frozenset()) -> bool:
        """Whether an expression is a message or a list of messages wherever it has a value."""
        if isinstance(node, nodes.Name):
            return self._surely(node.name, self._surely_message, seen, "messages")
        if isinstance(node, nodes.Getattr):
            return node.attr in ("previtem", "nextitem")
        return (
            isinstance(node, nodes.Getitem)
            and not isinstance(constant(node.arg), str)
            and self._surely_message(node.node, seen)
        )

    def _surely_text(self, node: nodes.Node | None, seen: frozenset[str] = frozenset()) -> bool:
        """Whether an expression is a string wherever it has a value."""
        match node:
            case nodes.Name():
                return self._surely(node.name, self._surely_text, seen)
            case nodes.Const():
                return isinstance(node.value, str)
            case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
                return self.key == "content" and self._surely_message(node.node)
            case nodes.Add() | nodes.Concat():
                return all(self._surely_text(child, seen) for child in node.iter_child_nodes())
            case nodes.Filter(name="trim"):
                return self._surely_text(node.node, seen)
            case nodes.Call(node=nodes.Name(name=name)):
                return name in self.macros
            case nodes.Call(node=nodes.Getattr(attr="get") as method, args=[nodes.Const(value="content")]):
                return self.key == "content" and self._surely_message(method.node)
            case nodes.Call(node=nodes.Getattr() as method):
                return method.attr in {*STRIPS, "replace"} and self._surely_text(method.node, seen)
            case nodes.Getitem(node=nodes.Call(node=nodes.Getattr(attr="split" | "rsplit") as method)):
                return self._surely_text(method.node, seen)
            case nodes.CondExpr():
                return self._surely_text(node.expr1, seen) and (
                    node.expr2 is None or self._surely_text(node.expr2, seen)
                )
        return False

    def _surely(self, name: str, is_so: Callable[..., bool], seen: frozenset[str], known: str = "") -> bool:
        """Whether every value that the template gives a name is of a kind."""
        if name in seen or name in self.given:
            return name in seen
        values = self.values.get(name, ())
        if not values:
            return name == known
        return all(value is not None and is_so(value, seen | {name}) for value in values)

    # -- which expressions are texts or messages -------------------------------------------------------------------------

    def is_text(self, node: nodes.Node | None) -> bool:
        """Whether an expression may be a text, or a list or string made of one."""
        match node:
            case None | nodes.Compare() | nodes.Test() | nodes.Not():
                return False
            case nodes.Filter() if node.name in LENGTHS:
                return False
            case nodes.Name():
                return node.name in self.texts
            case nodes.Getattr():
                return node.attr in self.keys or self.is_text(node.node)
            case nodes.Getitem():
                return constant(node.arg) in self.keys or self.is_text(node.node)
            case nodes.Call(node=nodes.Getattr() as method):
                if method.attr == "get" and node.args and constant(node.args[0]) in self.keys:
                    return True
                return method.attr not in ("startswith", "endswith") and self.is_text(method.node)
            case nodes.Call():
                return isinstance(node.node, nodes.Name) and node.node.name in self.texts
            case nodes.CondExpr():
                return self.is_text(node.expr1) or self.is_text(node.expr2)
        return any(map(self.is_text, node.iter_child_nodes()))

    def is_message(self, node: nodes.Node | None) -> bool:
        """Whether an expression may be a message, a list of messages or made of one."""
        match node:
            case None | nodes.Compare() | nodes.Test() | nodes.Not():
                return False
            case nodes.Filter() if node.name in LENGTHS:
                return False
            case nodes.Name():
                return node.name in self.messages
            case nodes.Getattr():
                return node.attr in self.message_keys
            case nodes.Getitem():
                key = constant(node.arg)
                return key in self.message_keys if isinstance(key, str) else self.is_message(node.node)
            case nodes.Call():
                key = constant(node.args[0]) if node.args else None
                return isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and key in self.message_keys
            case nodes.CondExpr():
                return self.is_message(node.expr1) or self.is_message(node.expr2)
        return any(map(self.is_message, node.iter_child_nodes()))

    def is_item(self, node: nodes.Node | None) -> bool:
        """Whether an expression may be a single message."""
        if isinstance(node, nodes.Name):
            return node.name in self.items
        return self.is_message(node) and not (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))

    def _prints(self, body: Sequence[nodes.Node]) -> bool:
        outputs = (node for part in body for node in self.reached(part) if isinstance(node, nodes.Output))
        return any(self.is_text(child) for output in outputs for child in output.nodes)

    def _spread(self, node: nodes.Node) -> None:
        """Note the names that a statement gives a text or a message."""
        match node:
            case nodes.Assign():
                self._bind(node.target, node.node)
            case nodes.For():
                self._bind(node.target, node.iter, item=True)
            case nodes.With():
                for target, value in zip(node.targets, node.values, strict=True):
                    self._bind(target, value)
            case nodes.AssignBlock() if self._prints(node.body):
                self.texts |= _names(node.target)
                self.keys |= {node.target.attr} if isinstance(node.target, nodes.NSRef) else set()
            case nodes.Macro():
                self.texts |= {node.name} if self._prints(node.body) else set()
                for target, value in _defaults(node):
                    self._bind(target, value)
            case nodes.Call(node=nodes.Name(name=name)) if name in self.macros:
                for target, value in bound_arguments(self.macros[name], node):
                    self._bind(target, value)
            case nodes.Call(node=nodes.Name(name="namespace")):
                for argument in node.kwargs:
                    self._bind(nodes.NSRef("", argument.key), argument.value)

    def _bind(self, target: nodes.Node, value: nodes.Node, item: bool = False) -> None:
        text, message = self.is_text(value), self.is_message(value)
        if isinstance(target, nodes.NSRef):
            self.keys |= {target.attr} if text else set()
            self.message_keys |= {target.attr} if message else set()
            return
        names = _names(target)
        if text:
            self.texts |= names
        if message:
            self.messages |= names
            if item or (self.is_item(value) and not (isinstance(value, nodes.Name) and value.name == "messages")):
                self.items |= names


def constant(node: nodes.Node | None) -> Any:
    """The value of a constant, None for every other node."""
    return node.value if isinstance(node, nodes.Const) else None


def is_split(node: nodes.Node | None) -> bool:
    """Whether a node is a call of `split` or `rsplit`."""
    return (
        isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in ("split", "rsplit")
    )


def _names(target: nodes.Node) -> set[str]:
    return {target.name} if isinstance(target, nodes.Name) else {name.name for name in target.find_all(nodes.Name)}


def _defaults(macro: nodes.Macro) -> Iterator[tuple[nodes.Name, nodes.Expr]]:
    """The parameters of a macro that have a default, each with it."""
    return zip(macro.args[len(macro.args) - len(macro.defaults) :], macro.defaults, strict=True)


def bound_arguments(macro: nodes.Macro, call: nodes.Call) -> Iterator[tuple[nodes.Name, nodes.Expr]]:
    """The parameters of a macro, each with what a call gives it."""
    yield from zip(macro.args, call.args, strict=False)
    named = {parameter.name: parameter for parameter in macro.args}
    for argument in call.kwargs:
        if argument.key in named:
            yield named[argument.key], argument.value


def _values(tree: nodes.Template, macros: dict[str, nodes.Macro]) -> dict[str, list[nodes.Node | None]]:
    """What a template gives each of its names; None for what is not an expression.

    A loop's variable is given an element of what is looped over, written as its first.
    """
    found: dict[str, list[nodes.Node | None]] = {}

    def note(target: nodes.Node, value: nodes.Node | None) -> None:
        for name in _names(target) if not isinstance(target, nodes.NSRef) else ():
            found.setdefault(name, []).append(value if isinstance(target, nodes.Name) else None)

    for node in tree.find_all((nodes.Assign, nodes.For, nodes.With, nodes.AssignBlock, nodes.Macro, nodes.Call)):
        match node:
            case nodes.Assign():
                note(node.target, node.node)
            case nodes.For():
                note(node.target, nodes.Getitem(node.iter, nodes.Const(0), "load"))
            case nodes.With():
                for target, value in zip(node.targets, node.values, strict=True):
                    note(target, value)
            case nodes.AssignBlock():
                note(node.target, None)
            case nodes.Macro():
                for target, value in _defaults(node):
                    note(target, value)
                for argument in node.args[: len(node.args) - len(node.defaults)]:
                    found.setdefault(argument.name, [])
            case nodes.Call(node=nodes.Name(name=name)) if name in macros:
                for target, value in bound_arguments(macros[name], node):
                    note(target, value)
    return found
