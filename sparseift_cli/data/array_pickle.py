"""Pickles of lists and numpy arrays of bytes, as CIFAR's python archives are: described, never executed.

The stack machine of the checkpoint reader does the work. It leaves out the state of objects, which is where an array
keeps its bytes; here that one instruction, BUILD, is read too.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from ..checkpoint.inert_pickle import MAX_INSTRUCTIONS, Global, _Machine
from ..checkpoint.untrusted import Malformed, printable

_NUMPY = {
    **{f"{core}.multiarray _reconstruct": "array" for core in ("numpy.core", "numpy._core")},
    "numpy ndarray": "class",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # how Python 3 writes bytes in protocol 2
}


@dataclass(slots=True, eq=False)
class Array:
    """A numpy array as the pickle describes it: `data` holds its elements of type `dtype`, in row-major order."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


def read_arrays(pickle: bytes | bytearray) -> dict[str, object]:
    """The dict that a pickle holds, with text keys: of lists, numbers, text and `Array`.

    Raises:
        Malformed: it is damaged, or names anything but numpy's arrays.
    """
    machine = _ArrayMachine(_ArrayRules())
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes in a damaged string
            for done, (opcode, arg, _) in enumerate(pickletools.genops(io.BytesIO(pickle))):
                if done >= MAX_INSTRUCTIONS:
                    raise Malformed(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
                machine.step(opcode.name, arg)
        top = machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise Malformed(f"its pickle is damaged ({printable(str(error), 60)})") from None
    if not isinstance(top, dict):
        raise Malformed("its pickle holds no dict")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in top.items()}


class _ArrayRules:
    """Names stay names; the three calls that make an array make a description of it."""

    def named(self, module: str, name: str) -> object:
        if f"{module} {name}" not in _NUMPY:
            raise Malformed(f"its pickle wants {Global(module, name)}, which no data set needs: not opened")
        return Global(module, name)

    def called(self, function: object, args: Sequence[object]) -> object:
        kind = _NUMPY[f"{function.module} {function.name}"] if isinstance(function, Global) else ""
        if kind == "array":
            return Array()
        if kind == "dtype":
            return _Dtype(str(args[0]))
        if kind == "encode" and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            return args[0].encode("latin-1")
        raise Malformed("its pickle makes a call that no data set needs: not opened")

    def persistent(self, saved_id: object) -> object:
        raise Malformed("its pickle refers to other files")


class _ArrayMachine(_Machine):
    def step(self, name: str, arg: object) -> None:
        if name != "BUILD" or not isinstance(self.stack[-2], Array):
            super().step(name, arg)
            return
        state, array = self.stack.pop(), cast("Array", self.stack[-1])
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("the state of an array has five parts")
        _, shape, dtype, by_columns, data = state
        if isinstance(data, str):  # Python 2 wrote bytes so
            data = data.encode("latin-1")
        plain = isinstance(shape, tuple) and all(isinstance(n, int) for n in shape)
        if not plain or not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or by_columns:
            raise ValueError("an array of an unknown layout")
        array.shape, array.dtype, array.data = shape, dtype.name, data
