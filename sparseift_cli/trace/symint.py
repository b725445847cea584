"""Symbolic ints: sizes that know how they follow from the width variables of the model.

`torch.SymInt` is PyTorch's int for symbolic shapes. It wraps a *node* that does its arithmetic. The node here,
`WidthNode`, holds an exact integer polynomial (`Poly`) and the value of this run (the *hint*, in PyTorch's words). When
PyTorch needs the truth of a comparison (a *guard*), the node answers by the values of this run, and records the
equality as a fact in `Facts`:

    v5 == v9        at a residual addition, or where a layer reads the output of another
    v8 == v1 + v2   at a concatenation
    v4 == v7 * v6   where v4 // v7 divides exactly: heads and head_dim of an embedding

>>> facts = Facts()
>>> width, heads = facts.symint(facts.new_variable(64)), facts.symint(facts.new_variable(8))
>>> bool(width // heads == 8), list(facts.equations)  # head_dim is the new variable w2
(True, [-1*w0 + w1*w2, -8 + w2])

A size that the forward pass reads as a plain number (`int(x.shape[1])`, an index) cannot change: its variables are
*frozen*. PyTorch's own ShapeEnv finds the same facts with sympy, about six times slower.

This is the only file that uses PyTorch's private API for symbolic ints; checked with torch 2.11 and 2.13. It uses:

- torch.fx.experimental.sym_node.SymNode, as a base class: SymInt accepts no other. `WidthNode` implements its methods
  for arithmetic, comparison, guards (guard_bool, guard_int, guard_or_false, expect_true, statically_known_true, ...),
  conversion (maybe_as_int, sym_float, ...) and memory layout (is_contiguous, is_channels_last_contiguous_2d, ...);
- what FakeTensorMode and SymInt read from a ShapeEnv: the attributes at the top of `Facts`, evaluate_sym_node,
  _maybe_evaluate_static, ignore_fresh_unbacked_symbols and suppress_guards;
- `SymInt.node`, in `poly_of`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch.fx.experimental.sym_node import SymNode

from ..table.poly import Poly
from .scales import TracedFloat

_Layout = tuple[Literal["product", "sum"], tuple[Poly, ...]]  # see `structure.DimLayout`


class Facts:
    """The width variables of one trace, and the facts about them. Passed to FakeTensorMode in place of a ShapeEnv."""

    # What FakeTensorMode reads from a ShapeEnv:
    fake_tensor_cache: dict[Any, Any]
    settings = None
    _translation_validation_enabled = False
    allow_scalar_outputs = False  # x.item() has no value here: refuse it
    allow_dynamic_output_shape_ops = False
    pending_fresh_unbacked_symbols: Sequence[Any] = ()

    def __init__(self) -> None:
        self.sizes: list[int] = []  # variable -> its value in this run
        self.equations: dict[Poly, None] = {}  # each polynomial is 0; a dict as an ordered set
        self.frozen: dict[int, str] = {}  # variable -> why its value must stay
        self.quotients: dict[tuple[Poly, Poly], Poly] = {}  # (a, b) -> a / b
        self.divided: dict[int, tuple[Poly, ...]] = {}  # the variable that is a / b -> (a, b); a - b -> (a - b,)
        self.differences: dict[Poly, Poly] = {}  # a size that is a difference -> the variable that it equals
        self.layouts: dict[Poly, _Layout] = {}  # dim -> the most telling way in which it was seen to be made of others
        self.all_layouts: dict[Poly, dict[_Layout, None]] = {}  # dim -> all ways that were seen
        self.floats: dict[Poly, None] = {}  # sizes that a float was computed from, as head_dim ** -0.5
        self.plain_floats: dict[Poly, None] = {}  # those of them that Python read as a plain float, as math.sqrt does
        self.keys: Literal["sizes", "values"] | None = None  # what a size is as a key of a dict; None: it cannot be one
        self.closed = False  # the run is over: in a cache that outlives it, a size equals nothing
        self.fake_tensor_cache = {}

    def new_variable(self, size: int) -> Poly:
        """A variable whose value in this run is `size`."""
        self.sizes.append(size)
        return Poly.var(len(self.sizes) - 1)

    def symint(self, expr: Poly) -> torch.SymInt | int:
        """`expr` as an int that torch accepts in shapes."""
        if expr.is_constant:
            return expr.constant
        return torch.SymInt(WidthNode(expr, self, int, expr.evaluate(self.sizes)))

    def equal(self, a: Poly, b: Poly) -> None:
        """Record that a == b."""
        difference = (a - b).primitive()
        if difference.terms:
            self.equations.setdefault(difference)

    def freeze(self, expr: Poly, reason: str) -> None:
        """Record that no variable of `expr` may change."""
        for variable in expr.variables:
            self.frozen.setdefault(variable, reason)

    def exact_quotient(self, a: Poly, b: Poly) -> Poly:
        """a / b, which divides in this run: by algebra if possible, else a new variable q with the fact a == b * q."""
        if a.evaluate(self.sizes) == b.evaluate(self.sizes):
            self.equal(a, b)  # channels per group of a depthwise conv: 1, and it stays 1
            return Poly.const(1)
        quotient = a.divided_by(b)
        if quotient is None:
            common = Poly.const(math.gcd(*(c for side in (a, b) for _, c in side.terms)))
            a, b = (side.divided_by(common) or side for side in (a, b))
            quotient = self.quotients.get((a, b))
        if quotient is None:
            quotient = self.new_variable(a.evaluate(self.sizes) // b.evaluate(self.sizes))
            self.quotients[a, b] = quotient
            self.divided[len(self.sizes) - 1] = a, b
            self.equal(a, b * quotient)
        return quotient

    def multiple_of(self, size: Poly, step: int) -> None:
        """Record that `size` is whole steps, as it is in this run."""
        key = size, Poly.const(step)
        if size.divided_by(key[1]) is None and key not in self.quotients:
            self.quotients[key] = self.new_variable(size.evaluate(self.sizes) // step)
            self.divided[len(self.sizes) - 1] = key
            self.equal(size, key[1] * self.quotients[key])

    def not_negative(self, size: Poly) -> None:
        """Record that `size` is that of a tensor: a difference is a new variable, which no solution makes smaller.

        So a part of a width that stays (x[..., :n], of x[..., n:] the rest) does not outgrow it.
        """
        if any(monomial and c < 0 for monomial, c in size.terms) and size not in self.differences:
            self.differences[size] = self.new_variable(size.evaluate(self.sizes))
            self.divided[len(self.sizes) - 1] = (size,)
            self.equal(size, self.differences[size])

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Forget at the end of the block what was recorded in it."""
        stores = [value for value in vars(self).values() if isinstance(value, (list, dict))]
        kept = [(store, store.copy()) for store in (*stores, *self.all_layouts.values())]
        try:
            yield
        finally:
            for store, before in kept:
                store.clear()
                store.extend(before) if isinstance(store, list) else store.update(before)

    # --- the ShapeEnv methods that torch calls ---

    def evaluate_sym_node(self, node: WidthNode, size_oblivious: bool = False, fallback_value: Any = None) -> Any:
        return node.guard_bool() if node.pytype is bool else node.guard_int()

    def _maybe_evaluate_static(self, expr: Any, **_: Any) -> None:
        return None

    def ignore_fresh_unbacked_symbols(self) -> AbstractContextManager[None]:
        return nullcontext()

    def suppress_guards(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Condition:
    """The expression of a symbolic bool: `a == b`, not a, a and b, a or b. Recorded as a fact only when it is evaluated."""

    __slots__ = ("a", "b", "op")
    free_symbols: frozenset[int] = frozenset()

    def __init__(self, op: str, a: Any, b: Any) -> None:
        self.op, self.a, self.b = op, a, b


def concrete(size: Any) -> int:
    """The value of an int or SymInt in this run, as an int.

    int(size) would also fix the width to this value; this does not.
    """
    return size.node.value if isinstance(size, torch.SymInt) else int(size)


def poly_of(value: Any) -> Poly:
    """The polynomial of an int or SymInt."""
    return value.node.expr if isinstance(value, torch.SymInt) else Poly.const(int(value))


def _record_equalities(facts: Facts, node: WidthNode, holds: bool) -> None:
    """Record the equalities that follow from the symbolic bool `node` being true or false."""
    condition = node.expr
    if not isinstance(condition, _Condition):
        return
    if condition.op == "eq" and holds:
        facts.equal(condition.a, condition.b)
    elif condition.op == "not":
        _record_equalities(facts, condition.a, not holds)
    elif (condition.op == "and" and holds) or (condition.op == "or" and not holds):
        _record_equalities(facts, condition.a, holds)
        _record_equalities(facts, condition.b, holds)


class WidthNode(SymNode):
    """A symbolic int (`expr` is a Poly), bool (`expr` is a _Condition) or float (a number: see `scales.TracedFloat`).

    `value` is its value in this run; `constant` the same where it depends on no variable. The names of the methods are
    PyTorch's.
    """

    def __init__(self, expr: Any, facts: Facts, pytype: type, value: Any, constant: Any = None) -> None:
        self._expr = expr
        self.shape_env: Any = facts
        self.pytype = pytype
        self._hint = value
        self.constant = constant
        self.fx_node = None

    @property
    def facts(self) -> Facts:
        return self.shape_env

    @property
    def expr(self) -> Any:
        return self._expr

    @property
    def value(self) -> Any:
        return self._hint

    def _int(self, expr: Poly, value: int) -> WidthNode:
        return WidthNode(expr, self.facts, int, value, value if expr.is_constant else None)

    def wrap_int(self, num: int) -> WidthNode:
        return WidthNode(Poly.const(num), self.facts, int, num, num)

    def wrap_float(self, num: float) -> WidthNode:
        return WidthNode(num, self.facts, float, num, num)

    def wrap_bool(self, num: bool) -> WidthNode:
        return WidthNode(num, self.facts, bool, num, num)

    # --- queries about the node ---

    def has_hint(self) -> bool:
        return True

    def is_nested_int(self) -> bool:
        return False

    def is_constant(self) -> bool:
        return self.constant is not None

    def is_symbolic(self) -> bool:
        return True

    def maybe_as_int(self) -> int | None:
        return int(self.constant) if self.pytype is int and self.constant is not None else None

    def maybe_as_float(self) -> float | None:
        return self.constant

    def maybe_as_bool(self) -> bool | None:
        return None if self.constant is None else bool(self.constant)

    def str(self) -> str:
        return repr(self._expr)

    __str__ = __repr__ = str

    # --- guards: PyTorch needs a plain value ---

    def guard_bool(self, file: Any = "", line: int = 0) -> bool:
        _record_equalities(self.facts, self, self.value)
        return self.value

    def bool_(self) -> bool:
        return self.guard_bool()

    expect_true = guard_or_false = guard_or_true = guard_size_oblivious = guard_bool

    def statically_known_true(self, file: Any = "", line: int = 0) -> bool:
        return self.constant is True

    def guard_int(self, file: Any = "", line: int = 0) -> int:
        if self.constant is None:
            self.facts.freeze(self._expr, "forward reads it as a plain number")
        return self.value

    def int_(self) -> int:
        return self.guard_int()

    def guard_float(self, file: Any = "", line: int = 0) -> float:
        if self.pytype is int and self.constant is None:
            self.facts.plain_floats.setdefault(self._expr)
        return float(self._as_float())

    def _as_float(self) -> float:
        # A float of a size is a scale (head_dim ** -0.5): not frozen, but noted, as the scale changes with the size.
        if self.pytype is not int or self.constant is not None:
            return self.value
        self.facts.floats.setdefault(self._expr)
        return TracedFloat(float(self.value), {self._expr: 1}, self.facts)

    # --- arithmetic ---

    def _has_non_int(self, other: WidthNode) -> bool:
        return self.pytype is not int or other.pytype is not int

    def add(self, other: Any) -> WidthNode:
        if self._has_non_int(other):
            return self.wrap_float(float(self.value + other.value))
        return self._int(self._expr + other.expr, self.value + other.value)

    def sub(self, other: Any) -> WidthNode:
        if self._has_non_int(other):
            return self.wrap_float(float(self.value - other.value))
        return self._int(self._expr - other.expr, self.value - other.value)

    def mul(self, other: Any) -> WidthNode:
        if self._has_non_int(other):
            return self.wrap_float(float(self.value * other.value))
        return self._int(self._expr * other.expr, self.value * other.value)

    def neg(self) -> WidthNode:
        return self.wrap_int(0).sub(self) if self.pytype is int else self.wrap_float(-self.value)

    def int_floordiv(self, other: Any) -> WidthNode:
        if self._has_non_int(other):
            return self.wrap_float(float(self.value // other.value))
        quotient, rest = divmod(self.value, other.value)
        if rest and quotient < 1:  # 0 is no width: no fact to record
            return self.wrap_int(quotient)
        return self._int(self.facts.exact_quotient(self._expr - other.remainder(rest), other.expr), quotient)

    def mod(self, other: Any) -> WidthNode:
        quotient, rest = divmod(self.value, other.value)
        if not self._has_non_int(other) and quotient:
            self.facts.exact_quotient(self._expr - other.remainder(rest), other.expr)
        return self.wrap_int(rest)

    def remainder(self, rest: int) -> Poly:
        """The remainder of a division by this number n: n - 1 in a ceil-division (a + n - 1) // n, else a constant."""
        return self._expr - Poly.const(1) if rest == self.value - 1 else Poly.const(rest)

    def int_truediv(self, other: Any) -> WidthNode:
        return self.wrap_float(self._as_float() / other._as_float())

    float_truediv = int_truediv

    def float_pow(self, other: Any) -> WidthNode:
        return self.wrap_float(self._as_float() ** other.value)

    def _bits(self, op: Callable[[int, int], int], other: Any) -> WidthNode:
        return self.wrap_int(op(self.guard_int(), other.guard_int()))  # `size & (size - 1)`: no width follows from bits

    def bitwise_and(self, other: Any) -> WidthNode:
        return self._bits(operator.and_, other)

    def bitwise_or(self, other: Any) -> WidthNode:
        return self._bits(operator.or_, other)

    def bitwise_xor(self, other: Any) -> WidthNode:
        return self._bits(operator.xor, other)

    def lshift(self, other: Any) -> WidthNode:
        return self._bits(operator.lshift, other)

    def rshift(self, other: Any) -> WidthNode:
        return self._bits(operator.rshift, other)

    def pow_by_natural(self, other: Any) -> WidthNode:
        power = self.wrap_int(1)
        for _ in range(other.value):
            power = power.mul(self)
        return power

    def sym_float(self) -> WidthNode:
        return self.wrap_float(self._as_float())

    def sym_int(self) -> WidthNode:
        return self if self.pytype is int else self.wrap_int(int(self.value))

    trunc = sym_int

    def floor(self) -> WidthNode:
        return self if self.pytype is int else self.wrap_int(math.floor(self.value))

    def ceil(self) -> WidthNode:
        return self if self.pytype is int else self.wrap_int(math.ceil(self.value))

    def round(self, ndigits: int | None = None) -> WidthNode:
        return self if self.pytype is int else self.wrap_float(round(self.value, ndigits))

    def abs(self) -> WidthNode:
        return self if self.value >= 0 else self.neg()

    def pos(self) -> WidthNode:
        return self

    def sym_max(self, other: Any) -> WidthNode:
        return self if self.value >= other.value else other

    def sym_min(self, other: Any) -> WidthNode:
        return self if self.value <= other.value else other

    def sym_sum(self, args: Sequence[Any]) -> WidthNode:
        total = self.wrap_int(0)
        for arg in args:
            total = total.add(arg)
        return total

    def is_integer(self) -> WidthNode:
        return self.wrap_bool(float(self.value).is_integer())

    # --- comparison: only an equality is a fact about widths ---

    def eq(self, other: Any) -> WidthNode:
        same = self.value == other.value and not self.facts.closed
        if self._has_non_int(other) or (self._expr - other.expr).is_constant:
            return self.wrap_bool(same)
        return WidthNode(_Condition("eq", self._expr, other.expr), self.facts, bool, same)

    def ne(self, other: Any) -> WidthNode:
        return self.eq(other).sym_not()

    def lt(self, other: Any) -> WidthNode:
        return self.wrap_bool(self.value < other.value)

    def le(self, other: Any) -> WidthNode:
        return self.wrap_bool(self.value <= other.value)

    def gt(self, other: Any) -> WidthNode:
        return self.wrap_bool(self.value > other.value)

    def ge(self, other: Any) -> WidthNode:
        return self.wrap_bool(self.value >= other.value)

    def sym_not(self) -> WidthNode:
        if self.constant is not None:
            return self.wrap_bool(not self.constant)
        return WidthNode(_Condition("not", self, None), self.facts, bool, not self.value)

    def and_(self, other: Any) -> WidthNode:
        if self.constant is not None:
            return other if self.constant else self
        if other.constant is not None:
            return self if other.constant else other
        return WidthNode(_Condition("and", self, other), self.facts, bool, self.value and other.value)

    def or_(self, other: Any) -> WidthNode:
        if self.constant is not None:
            return self if self.constant else other
        if other.constant is not None:
            return other if other.constant else self
        return WidthNode(_Condition("or", self, other), self.facts, bool, self.value or other.value)

    def sym_ite(self, then_val: Any, else_val: Any) -> WidthNode:
        return then_val if self.guard_bool() else else_val

    # --- memory layout: decided by the values of this run, and no fact about widths ---

    def _packed(self, sizes: Sequence[Any], strides: Sequence[Any], order: Sequence[int]) -> WidthNode:
        """Whether the dims, from innermost to outermost in `order`, fill memory without gaps."""
        expected = 1
        for dim in order if len(order) == len(sizes) else ():
            if sizes[dim].value != 1:
                if strides[dim].value != expected:
                    return self.wrap_bool(False)
                expected *= sizes[dim].value
        return self.wrap_bool(len(order) == len(sizes))

    def _ascending(self, sizes: Sequence[Any], strides: Sequence[Any], order: Sequence[int]) -> WidthNode:
        """Whether strides grow in `order`, the weaker test that torch names "strides like channels_last"."""
        if len(order) != len(sizes) or strides[order[0]].value == 0:
            return self.wrap_bool(False)
        least = 0
        for dim in order:
            if sizes[dim].value == 0 or strides[dim].value < least or (dim == 0 and least == strides[order[0]].value):
                return self.wrap_bool(False)
            least = strides[dim].value * max(1, sizes[dim].value)
        return self.wrap_bool(True)

    def is_contiguous(self, sizes: Sequence[Any], strides: Sequence[Any]) -> WidthNode:
        return self._packed(sizes, strides, range(len(sizes) - 1, -1, -1))

    def is_channels_last_contiguous_2d(self, sizes: Sequence[Any], strides: Sequence[Any]) -> WidthNode:
        return self._packed(sizes, strides, (1, 3, 2, 0))

    def is_channels_last_contiguous_3d(self, sizes: Sequence[Any], strides: Sequence[Any]) -> WidthNode:
        return self._packed(sizes, strides, (1, 4, 3, 2, 0))

    def is_channels_last_strides_2d(self, sizes: Sequence[Any], strides: Sequence[Any]) -> WidthNode:
        return self._ascending(sizes, strides, (1, 3, 2, 0))

    def is_channels_last_strides_3d(self, sizes: Sequence[Any], strides: Sequence[Any]) -> WidthNode:
        return self._ascending(sizes, strides, (1, 4, 3, 2, 0))

    def is_non_overlapping_and_dense(self, sizes: Sequence[Any], strides: Sequence[Any]) -> WidthNode:
        by_stride = sorted(range(len(sizes)), key=lambda d: (strides[d].value, sizes[d].value))
        return self._packed(sizes, strides, by_stride)

    def is_non_overlapping_and_dense_indicator(self, sizes: Sequence[Any], strides: Sequence[Any]) -> WidthNode:
        return self.wrap_int(int(self.is_non_overlapping_and_dense(sizes, strides).value))
