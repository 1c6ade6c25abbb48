"""Whether a template frames a turn by what the key of a turn holds (`turns.py`), read from its syntax tree.

A template may count its turns, or measure a text, and give another generation prompt then, without a trace in the render:

    {% if messages | length > 4 %}<a><think>{% else %}<a>{% endif %}

What was learnt from one turn does not hold for another under such a template: each turn is asked about anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import nodes

from hf_objectives.labels.messages import REASONING_FIELDS
from hf_objectives.labels.template_names import LENGTHS, SEARCHES, STRIPS, Names, constant, is_split
from hf_objectives.labels.templates import syntax_tree

_COUNTS = frozenset({"index", "index0", "revindex", "revindex0", "length"})
_STATES = frozenset({"cycle", "changed", "depth", "depth0"})
_TESTS = frozenset({"divisibleby", "odd", "even", "sameas", "filter", "test"})
_PARTS = frozenset({"first", "last", "list", "batch", "slice", "sort", "unique", "wordcount", "int", "sum", "random"})
_MEDIA = frozenset({"image", "image_url", "video", "audio"})


@dataclass(frozen=True, slots=True)
class Steadiness:
    """What turns under a template depend on.

    Attributes:
        steady: whether the key of a turn holds all of it.
        compared: strings that texts are compared with, or that are looked for in them, words included.
        compares: whether two texts are compared with each other.
    """

    steady: bool
    compared: frozenset[str]
    compares: bool


@lru_cache(maxsize=64)
def steadiness(template: str) -> Steadiness:
    """What turns under a template depend on beside their frames."""
    reader = _Reader(syntax_tree(template))
    return Steadiness(not reader.unsteady, frozenset(reader.compared), reader.compares)


class _Reader(Names):
    """Walks the whole tree; branches that only raise an error and those for media are left out."""

    def __init__(self, tree: nodes.Template) -> None:
        super().__init__(tree, "content", frozenset())
        self.parameters = {parameter.name for macro in self.macros.values() for parameter in macro.args}
        self.compared: set[str] = set()
        self.compares = self.unsteady = False
        self.excused: set[int] = set()  # numbers and lengths that count no messages and measure no text
        for node, searched in self._walk(tree, False):
            self._check(node, searched)
        self.states = self._states()
        for branch in tree.find_all((nodes.If, nodes.CondExpr)):
            asked = [branch.test, *branch.test.find_all(nodes.Name)]  # type: ignore[attr-defined]
            if any(isinstance(name, nodes.Name) and name.name == "add_generation_prompt" for name in asked):
                self._prompt(branch, frozenset())

    def outcome(self, test: nodes.Node) -> bool | None:
        """Every branch may be reached: messages may have reasoning and calls."""
        return None

    def _walk(self, node: nodes.Node, searched: bool) -> Iterator[tuple[nodes.Node, bool]]:
        """The nodes that count, each with whether it stands in a branch for texts that hold a certain string."""
        if isinstance(node, nodes.If):
            if any(isinstance(const.value, str) and const.value in _MEDIA for const in node.test.find_all(nodes.Const)):
                left = [*node.elif_, *node.else_]
            else:
                left = [*(() if _raises(node) else (node.test,)), *node.elif_, *node.else_]
                for child in node.body:
                    yield from self._walk(child, searched or self._is_search(node.test))
            for child in left:
                yield from self._walk(child, searched)
            return
        yield node, searched
        for child in node.iter_child_nodes():
            if not (isinstance(node, nodes.Filter) and node.name == "tojson" and child is not node.node):
                yield from self._walk(child, searched)

    def _check(self, node: nodes.Node, searched: bool) -> None:
        match node:
            case nodes.Const() if type(node.value) is int and abs(node.value) > 1:
                self.unsteady |= id(node) not in self.excused
            case nodes.Mod(left=nodes.Const(value=str())):
                pass
            case nodes.Test() if node.name in _TESTS or (node.args and any(map(self.direct, [node.node, *node.args]))):
                self.unsteady = True
            case nodes.Add() | nodes.Sub() if constant(node.left) is not None and constant(node.right) is not None:
                self.unsteady |= isinstance(constant(node.left), int)
            case nodes.Getattr(node=nodes.Name(name="loop")) if node.attr in _STATES:
                self.unsteady = True
            case nodes.Call(node=nodes.Name(name="cycler" | "lipsum")):
                self.unsteady = True
            case nodes.Filter():
                measured = node.name in LENGTHS and not (searched or id(node) in self.excused or is_split(node.node))
                self.unsteady |= (node.name in _PARTS or measured) and self.direct(node.node)
            case nodes.Getitem(arg=nodes.Slice()):
                self.unsteady |= not searched and self.direct(node.node) and not is_split(node.node)
            case nodes.Output():
                self.unsteady |= any(map(self._counts, node.nodes))
            case nodes.Compare():
                self._compare(node)
            case nodes.Call(node=nodes.Getattr() as method) if self.direct(method.node):
                if method.attr in SEARCHES:
                    self._note(node.args[0] if node.args else None)
                else:
                    self.unsteady |= method.attr not in STRIPS | {"get", "lower", "upper", "items"}
            case nodes.Add() | nodes.Sub() if constant(node.right) is not None and isinstance(
                node.left, (nodes.Add, nodes.Sub)
            ):
                self.unsteady |= type(constant(node.right)) is int and type(constant(node.left.right)) is int
            case nodes.Mod() | nodes.Mul() | nodes.Div() | nodes.FloorDiv() | nodes.Pow():
                self.unsteady = True

    def _states(self) -> dict[str, list[nodes.Node | None]]:
        """What is stored in names and in the attributes of namespaces, these written with a dot before them."""
        states = dict(self.values)
        for node in self.tree.find_all((nodes.Assign, nodes.AssignBlock, nodes.Call)):
            if isinstance(node, nodes.Call):
                if isinstance(node.node, nodes.Name) and node.node.name == "namespace":
                    for argument in node.kwargs:
                        states.setdefault(f".{argument.key}", []).append(argument.value)
            elif isinstance(node, (nodes.Assign, nodes.AssignBlock)) and isinstance(node.target, nodes.NSRef):
                value = node.node if isinstance(node, nodes.Assign) else None
                states.setdefault(f".{node.target.attr}", []).append(value)
        return states

    def _prompt(self, node: nodes.Node, seen: frozenset[str]) -> None:
        """Check what the generation prompt depends on: nothing that is gathered from message to message."""
        for part in (node, *node.find_all(nodes.Node)):
            match part:
                case nodes.For():
                    self.unsteady |= self.is_message(part.iter)
                case nodes.Slice():
                    self.unsteady = True
                case nodes.Compare():
                    sides = [part.expr, *(operand.expr for operand in part.ops)]
                    self.unsteady |= any(self._joined(side) and self.direct(side) for side in sides)
                case nodes.Call(node=nodes.Getattr() as method) if method.attr in SEARCHES:
                    self.unsteady |= self._joined(method.node) and self.direct(method.node)
                case nodes.Filter() if self.is_message(part.node):
                    self.unsteady |= part.name not in LENGTHS | {"first", "last"}
                case nodes.Filter() if part.name in LENGTHS:
                    self.unsteady |= self.direct(part.node) or is_split(part.node)
                case nodes.Call(node=nodes.Name(name=name)) if name in self.macros:
                    self.unsteady |= any(self.direct(value) or self.is_message(value) for value in part.args)
                case nodes.Name(ctx="load") | nodes.Getattr():
                    name = part.name if isinstance(part, nodes.Name) else f".{part.attr}"
                    self.unsteady |= name in seen
                    for value in (self.states.get(name) or ()) if name not in seen | self.parameters else ():
                        if value is None:
                            self.unsteady = True
                        elif not _is_plain(value, part) and not self.is_message(value):
                            self._prompt(value, seen | {name})

    def _compare(self, node: nodes.Compare) -> None:
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        for operand, left, right in zip(node.ops, sides, sides[1:], strict=False):
            for side, other in ((left, right), (right, left)):
                if self._counts(side):
                    self.unsteady |= isinstance(other, nodes.Name) and not self.values.get(other.name)
                elif isinstance(side, nodes.Filter) and side.name in LENGTHS:
                    self.excused.add(id(other))  # the length of a name or of a schema
                if constant(other) == 0:
                    self.excused.add(id(side))
                if not self.direct(side):
                    continue
                if operand.op not in ("eq", "ne", "in", "notin") or _is_character(side):
                    self.unsteady = True
                elif isinstance(other, (nodes.List, nodes.Tuple)):
                    for item in other.items:
                        self._note(item)
                elif self.is_text(other):
                    self.compares = True
                    self.unsteady |= isinstance(other, (nodes.Add, nodes.Concat))
                else:
                    self._note(other)

    def _note(self, searched: nodes.Node | None) -> None:
        """A string that a text is compared with."""
        values = [searched]
        if isinstance(searched, nodes.Name):
            values = self.values.get(searched.name) or [searched]
        for value in values:
            if not isinstance(value, nodes.Const):
                self.unsteady = True
            elif isinstance(value.value, str) and value.value.strip():
                self.compared.add(value.value)

    def _is_search(self, test: nodes.Node) -> bool:
        return (
            isinstance(test, nodes.Call)
            and isinstance(test.node, nodes.Getattr)
            and test.node.attr in ("startswith", "endswith")
            and self.is_text(test.node.node)
        )

    def _counts(self, node: nodes.Node | None, seen: frozenset[str] = frozenset()) -> bool:
        """Whether the value of an expression is a count of messages, or made of one."""
        match node:
            case nodes.Getattr(node=nodes.Name(name="loop")):
                return node.attr in _COUNTS
            case nodes.Filter() if node.name in LENGTHS:
                return self.is_message(node.node) or self.direct(node.node)
            case nodes.CondExpr():
                return self._counts(node.expr1, seen) or self._counts(node.expr2, seen)
            case nodes.Name():
                values = (self.values.get(node.name) or ()) if node.name not in seen | self.parameters else ()
                return any(self._counts(value, seen | {node.name}) for value in values)
            case None | nodes.Getitem() | nodes.Compare() | nodes.Test() | nodes.Call():
                return False
        return any(self._counts(child, seen) for child in node.iter_child_nodes())

    def _joined(self, node: nodes.Node) -> bool:
        """Whether a text is joined with another, so that neither need hold what is found in it."""
        values = (self.values.get(node.name) or ()) if isinstance(node, nodes.Name) else (node,)
        return any(isinstance(value, (nodes.Add, nodes.Concat)) for value in values)

    def direct(self, node: nodes.Node | None, seen: frozenset[str] = frozenset()) -> bool:
        """Whether an expression is a message's text, by its key or by a name that was given it outside of macros."""
        match node:
            case nodes.Name():
                if node.name in seen or node.name in self.parameters:
                    return False
                values = self.values.get(node.name) or ()
                return any(self.direct(value, seen | {node.name}) for value in values)
            case nodes.Getattr():
                return node.attr in ("content", *REASONING_FIELDS) and self.is_message(node.node)
            case nodes.Getitem():
                key = constant(node.arg)
                if isinstance(key, str):
                    return key in ("content", *REASONING_FIELDS) and self.is_message(node.node)
                return self.direct(node.node, seen)
            case nodes.Filter():
                return node.name not in LENGTHS and self.direct(node.node, seen)
            case nodes.Call(node=nodes.Getattr() as method):
                if method.attr == "get" and node.args and constant(node.args[0]) in ("content", *REASONING_FIELDS):
                    return self.is_message(method.node)
                return method.attr in {*STRIPS, *SEARCHES, "lower", "upper"} - {"startswith", "endswith"} and (
                    self.direct(method.node, seen)
                )
            case nodes.Add() | nodes.Concat():
                return any(self.direct(child, seen) for child in node.iter_child_nodes())
        return False


def _raises(node: nodes.If) -> bool:
    """Whether a branch only raises an error."""
    calls = [call.node for part in node.body for call in part.find_all(nodes.Call)]
    return any(isinstance(called, nodes.Name) and called.name == "raise_exception" for called in calls)


def _is_plain(value: nodes.Node, name: nodes.Node) -> bool:
    """Whether a value is a namespace, whose attributes are looked at each, or what the name had before, or a constant."""
    match value:
        case nodes.Call(node=nodes.Name(name="namespace")):
            return True
        case nodes.Filter(name="default", node=nodes.Name() as same, args=[nodes.Const()]):
            return isinstance(name, nodes.Name) and same.name == name.name
        case nodes.CondExpr(test=nodes.Test(name="defined"), expr1=nodes.Name() as same, expr2=nodes.Const()):
            return isinstance(name, nodes.Name) and same.name == name.name
    return False


def _is_character(node: nodes.Node) -> bool:
    """Whether an expression is one character of a text, `content[0]`."""
    return isinstance(node, nodes.Getitem) and type(constant(node.arg)) is int and not is_split(node.node)
