"""Equations of word problems: read without ``eval``, evaluated, written with few parentheses and short numbers."""

from __future__ import annotations

import ast
import math
import operator
import re

ROUNDING = 1e-3  # relative; numbers in the data are rounded by hand: 0.6667 for two thirds
LONGEST = 500

OPERATORS = {
    ast.Add: ("+", operator.add, 1),
    ast.Sub: ("-", operator.sub, 1),
    ast.Mult: ("*", operator.mul, 2),
    ast.Div: ("/", operator.truediv, 2),
}
SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")", "{": "(", "}": ")"})


class EquationError(ValueError):
    """A text that is no equation in ``+ - * /``, numbers and names."""


def parse(text: str) -> ast.expr:
    """The syntax tree of ``((22.0-14.0)/4.0)``; only numbers, names, ``+ - * /`` and parentheses are let through."""
    text = re.sub(r"(?<![\w.])0+(?=\d)|(?<=\d),(?=\d{3})", "", text.translate(SPELLINGS).strip())
    try:
        if len(text) > LONGEST:
            raise EquationError(f"longer than {LONGEST} characters")
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two of nested brackets
        raise EquationError(f"cannot read {text[:60]!r}") from error
    for node in ast.walk(tree):
        number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        signs = (*OPERATORS, ast.USub, ast.UAdd, ast.Load)
        if not number and not isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Name, *signs)):
            raise EquationError(f"no arithmetic: {text[:60]!r}")
    return tree


def evaluate(node: ast.expr, unknown: float | None = None) -> float:
    """The value of a tree, with ``unknown`` in the place of every name."""
    if isinstance(node, ast.BinOp):
        apply = OPERATORS[type(node.op)][1]
        try:
            return _finite(apply(evaluate(node.left, unknown), evaluate(node.right, unknown)))
        except ZeroDivisionError as error:
            raise EquationError("division by zero") from error
    if isinstance(node, ast.UnaryOp):
        value = evaluate(node.operand, unknown)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant):
        return _finite(node.value)  # type: ignore[arg-type]
    if unknown is None:
        raise EquationError("it has an unknown")
    return unknown


def _finite(value: float) -> float:
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        value = math.inf
    if not math.isfinite(value):
        raise EquationError("too large")
    return value


def render(node: ast.expr) -> str:
    """A tree as text: ``(22 - 14) / 4``; every name becomes ``x``."""
    if isinstance(node, ast.BinOp):
        sign, _, rank = OPERATORS[type(node.op)]
        left, right = render(node.left), render(node.right)
        if _rank(node.left) < rank:
            left = f"({left})"
        associative = type(node.op) in (ast.Add, ast.Mult) and type(getattr(node.right, "op", None)) is type(node.op)
        if right.startswith("-") or (_rank(node.right) <= rank and not associative):
            right = f"({right})"
        return f"{left} {sign} {right}"
    if isinstance(node, ast.UnaryOp):
        inner = f"({render(node.operand)})" if isinstance(node.operand, ast.BinOp) else render(node.operand)
        return f"-{inner}" if isinstance(node.op, ast.USub) else inner
    return format_number(float(node.value)) if isinstance(node, ast.Constant) else "x"  # type: ignore[arg-type]


def _rank(node: ast.expr) -> int:
    return OPERATORS[type(node.op)][2] if isinstance(node, ast.BinOp) else 3


def format_number(value: float) -> str:
    """``2.0`` as ``2``, ``1.8333333`` as ``1.8333``: four decimals, below one four significant digits."""
    if value == int(value):
        return str(int(value))
    digits = 4
    if abs(value) < 1:
        digits += -math.floor(math.log10(abs(value))) - 1
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def working(equation: str, answer: float) -> list[str]:
    """The lines that lead from ``equation`` to ``answer``, empty for a bare number.

    ``x = (22-14)/4`` (either way round, or without ``x =``) gives ``(22 - 14) / 4 = 2``. Any other equation in one
    unknown is kept as it is, ``x - 6 = 52``, if the answer solves it.

    Raises:
        EquationError: it cannot be read, or it does not give the answer: within a relative 1e-3, as people round what
            they compute, but exactly where both are integers.
    """
    sides = [parse(side) for side in equation.split("=")]
    names = {node.id for side in sides for node in ast.walk(side) if isinstance(node, ast.Name)}
    if len(sides) > 2 or len(names) > 1 or (names and len(sides) == 1):
        raise EquationError(f"not one equation in one unknown: {equation[:60]!r}")
    values = [evaluate(side, answer) for side in sides]
    wanted = values[-1] if names else answer
    if not all(_agree(value, wanted) for value in values):
        raise EquationError(f"it does not give {format_number(answer)}: {equation[:60]!r}")
    solved = [side for side in sides if not any(isinstance(node, ast.Name) for node in ast.walk(side))]
    if names and not (solved and any(isinstance(side, ast.Name) for side in sides)):
        return [f"{render(sides[0])} = {render(sides[1])}"]
    return [] if isinstance(solved[0], ast.Constant) else [f"{render(solved[0])} = {format_number(answer)}"]


def _agree(value: float, wanted: float) -> bool:
    if value == int(value) and wanted == int(wanted):
        return value == wanted
    return abs(value - wanted) <= max(ROUNDING * abs(wanted), 1e-9)
