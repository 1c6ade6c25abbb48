"""Rewrites a parsed chat template, so that its loops, joined texts and comparisons pay from the budget of the render.

Each goes through a filter that `template_limits.py` gives the environment. What goes straight to the output is counted there.
"""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from hf_objectives.labels.template_budget import JOINED

_UNCOUNTED = 4  # variables that one piece may add up, as long as each may be
# No template can name such filters.
LOOP, JOIN, TEXT, COMPARED, PRINTED = "loop over", "join of", "text of", "comparison of", "print of"


class Bounds(NodeTransformer):
    """Puts the counting filters into a parsed template: around what loops go through, joined texts and comparisons."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment, self._streams, self._gathering = environment, True, False

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """A chain of `+` that is written at once, as most are, is counted where the render is joined."""
        written: list[nodes.Expr] = []
        for child in node.nodes:
            if (
                self._streams
                and isinstance(child, nodes.Add)
                and _variables(operands := _operands(child)) <= _UNCOUNTED
            ):
                child = self._chain([self.visit(operand) for operand in operands])
            else:
                child = self.visit(child)
            written.append(child if _is_text(child) else self._filter(child, PRINTED))
        node.nodes = written
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Also: what a loop writes is only counted as it goes where it is not gathered first."""
        streams, self._streams = self._streams, self._streams and not self._gathering and not node.recursive
        self.generic_visit(node)
        self._streams = streams
        node.iter = self._filter(node.iter, LOOP)
        return node

    def _gathers(self, node: nodes.Node) -> nodes.Node:
        before = self._streams, self._gathering
        few = len(list(node.find_all(nodes.Output))) <= JOINED
        self._streams, self._gathering = self._streams and few, True
        self.generic_visit(node)
        self._streams, self._gathering = before
        return node

    visit_Macro = visit_CallBlock = visit_AssignBlock = visit_FilterBlock = visit_Block = _gathers

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        """A chain of `+` is counted as a whole, one of many texts also text by text."""
        operands = [self.visit(operand) for operand in _operands(node)]
        if _variables(operands) > _UNCOUNTED:
            operands = [
                operand if isinstance(operand, nodes.Const) else self._filter(operand, JOIN) for operand in operands
            ]
        return self._filter(self._chain(operands), JOIN)

    def _chain(self, operands: list[nodes.Expr]) -> nodes.Expr:
        chain, *others = operands
        for operand in others:
            chain = nodes.Add(chain, operand, lineno=operand.lineno, environment=self._environment)
        return chain

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~` makes texts of what it joins."""
        self.generic_visit(node)
        node.nodes = [n if isinstance(n, nodes.Const) else self._filter(n, TEXT) for n in node.nodes]
        return self._filter(node, JOIN)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice is a new text or list."""
        self.generic_visit(node)
        return self._filter(node, JOIN) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """A comparison with a constant ends at once."""
        self.generic_visit(node)
        if not _is_constant(node.expr) and not all(_is_constant(operand.expr) for operand in node.ops):
            node.expr = self._filter(node.expr, COMPARED)
        return node

    def _filter(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self._environment)


def _operands(node: nodes.Expr) -> list[nodes.Expr]:
    """The operands of a chain of `+`, from left to right."""
    found = []
    while isinstance(node, nodes.Add):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def _variables(operands: list[nodes.Expr]) -> int:
    return sum(not isinstance(operand, nodes.Const) for operand in operands)


def _is_text(node: nodes.Expr) -> bool:
    """Whether what is written is a text for certain, which needs no look at what it holds."""
    if isinstance(node, nodes.Add):
        return any(isinstance(operand, nodes.Const) and isinstance(operand.value, str) for operand in _operands(node))
    texts = ("trim", "upper", "lower", "tojson", "capitalize", "title")
    return isinstance(node, (nodes.TemplateData, nodes.Const)) or (
        isinstance(node, nodes.Filter) and node.name in texts
    )


def _is_constant(node: nodes.Expr) -> bool:
    """Whether a comparison with it ends at once."""
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, (nodes.Const, nodes.Compare, nodes.Not, nodes.Test))
