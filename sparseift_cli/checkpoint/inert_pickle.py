"""Reads a pickle as data: nothing is imported, called or built but plain containers.

Why not `pickle.load`: a pickle is a program for a small stack machine. Its instructions GLOBAL (import a name) and
REDUCE (call it) run whatever the file says, so loading a file from a stranger can run any code.
`torch.load(weights_only=True)` allows only the names on a list, but still calls them (`bytearray(1 << 40)` is on it),
and needs torch.

Here `PickleMachine` executes the same instructions, but a global stays a name (`Global`) and a call becomes what
`PickleRules.called` returns: the description of a tensor, a plain dict, or `Opaque`. A name that the rules do not allow
is an error. The number of bytes and of instructions is limited. Instructions are those of the standard library's
pickletools, protocols 0 to 5.

>>> import io, pickle
>>> from sparseift_cli.checkpoint.torch_rules import TorchRules
>>> data = pickle.dumps({"epoch": 3, "loss": [0.5]})
>>> read_pickle(Window(io.BytesIO(data), len(data)), TorchRules())
{'epoch': 3, 'loss': [0.5]}
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, BinaryIO, Protocol, cast

from .untrusted import Malformed, printable

MAX_BYTES = 32 << 20
MAX_INSTRUCTIONS = 2_000_000  # at most about 150 MB of objects; a checkpoint of 10,000 tensors has half as many

Key = str | int | float | bytes | bool | None


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function, never the object itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}", 100)


@dataclass(slots=True, eq=False)
class Opaque:
    """An object of the file that is not built: the name of its kind is kept and, of a subclass of dict, its items."""

    kind: str
    items: dict[object, object] = field(default_factory=dict)


class PickleRules(Protocol):
    """Decides which names may occur in a pickle, and what calling them means."""

    def named(self, module: str, name: str) -> object:
        """The value of a global. Raises Malformed for a name that is not allowed."""
        ...

    def called(self, function: object, args: Sequence[object]) -> object:
        """The value of a call of `function` (a value of `named`). Raises Malformed where it may not be called."""
        ...

    def persistent(self, saved_id: object) -> object:
        """The value of a persistent id: a reference to something outside the pickle, as the storages of torch are."""
        ...


class Window:
    """A file from its current position, up to `limit` bytes: no length in the file can make us read more."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self.left = limit

    def read(self, n: int) -> bytes:
        return self._taken(self._file.read(min(n, self.left)))

    def readline(self) -> bytes:
        return self._taken(self._file.readline(self.left))

    def _taken(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


def read_pickle(window: Window, rules: PickleRules) -> object:
    """The object that the next pickle in `window` describes; the file is then positioned right behind that pickle.

    Raises:
        Malformed: the pickle is damaged, too large, or has something that `rules` does not allow.
    """
    machine = PickleMachine(rules)
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes in a damaged string
            for done, (opcode, arg, _) in enumerate(pickletools.genops(cast("IO[bytes]", window))):
                if done >= MAX_INSTRUCTIONS:
                    raise Malformed(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions: no plain state dict")
                machine.step(opcode.name, arg)
        return machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        if window.left == 0:
            raise Malformed("its pickle is truncated, or larger than a state dict needs") from None
        raise Malformed(f"its pickle is damaged ({printable(str(error), 60)})") from None


class PickleMachine:
    """The stack machine of pickle. `stack` is the part above the last MARK instruction, `marks` the parts below."""

    def __init__(self, rules: PickleRules) -> None:
        self.rules = rules
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def step(self, name: str, arg: object) -> None:
        if name in _LITERALS:
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _READS:
            assert isinstance(arg, int)
            self.stack.append(self.memo[arg])
        elif name in _WRITES:
            assert isinstance(arg, int)
            self.memo[arg] = self.stack[-1]
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name in ("GLOBAL", "INST"):
            self._global(name, str(arg))
        elif name == "PERSID":
            self.stack.append(self.rules.persistent(arg))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Malformed(f"its pickle uses the instruction {name}, which no state dict needs")

    def popped_mark(self) -> list[object]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.popped_mark()

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def fold(self, n: int) -> None:
        """Replace the top `n` values by one tuple of them."""
        if len(self.stack) < n:
            raise ValueError("the stack is empty")
        self.stack[-n:] = [tuple(self.stack[-n:])]

    def append(self) -> None:
        self._extend([self.stack.pop()])

    def appends(self) -> None:
        self._extend(self.popped_mark())

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_items(self) -> None:
        self._update(self.popped_mark())

    def make_dict(self) -> None:
        items = self.popped_mark()
        self.stack.append({})
        self._update(items)

    def make_list(self) -> None:
        items = self.popped_mark()
        self.stack.append(items)

    def make_tuple(self) -> None:
        items = self.popped_mark()
        self.stack.append(tuple(items))

    def make_set(self) -> None:
        self.popped_mark()
        self.stack.append(Opaque("frozenset"))

    def add_items(self) -> None:
        self.popped_mark()

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a global without a name")
        self.stack.append(self.rules.named(module, name))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.rules.called(function, args if isinstance(args, tuple) else ()))

    def new_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def obj(self) -> None:
        function, *args = self.popped_mark()
        self.stack.append(self.rules.called(function, args))

    def build(self) -> None:
        """Drop the state of an object (its attributes): objects are not built here."""
        self.stack.pop()
        if not self.stack:
            raise ValueError("the stack is empty")

    def persistent(self) -> None:
        self.stack.append(self.rules.persistent(self.stack.pop()))

    def _global(self, opcode: str, arg: str) -> None:
        args = self.popped_mark() if opcode == "INST" else None
        module, _, name = arg.partition(" ")
        found = self.rules.named(module, name)
        self.stack.append(found if args is None else self.rules.called(found, args))

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise TypeError("items for something that is no list")

    def _update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if len(items) % 2 or not isinstance(target, dict | Opaque):
            raise TypeError("keys for something that is no dict")
        held = cast("dict[object, object]", target) if isinstance(target, dict) else target.items
        for key, value in zip(items[::2], items[1::2], strict=True):
            held[plain_key(key)] = value


def plain_key(key: object) -> Key | tuple[Key, ...]:
    """A dict key that is safe to hash: hashing tuples nested a million deep would overflow Python's C stack."""
    if isinstance(key, tuple) and all(_is_plain(k) for k in key):
        return key
    if _is_plain(key):
        return cast("Key", key)
    if isinstance(key, Global | Opaque):
        return str(key) if isinstance(key, Global) else key.kind
    raise TypeError(f"a dict with a key of type {type(key).__name__}")


def _is_plain(key: object) -> bool:
    """Whether a key is a plain, short value; Python refuses to print integers of thousands of digits."""
    return isinstance(key, str | float | bytes | None) or (isinstance(key, int) and key.bit_length() <= 64)


_LITERALS = {
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "BININT",
    "BININT1",
    "BININT2",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Opaque("set"),
}
_READS = {"GET", "BINGET", "LONG_BINGET"}
_WRITES = {"PUT", "BINPUT", "LONG_BINPUT"}
_ACTIONS: dict[str, Callable[[PickleMachine], None]] = {
    "MARK": PickleMachine.mark,
    "POP": PickleMachine.pop,
    "POP_MARK": lambda m: (m.popped_mark(), None)[1],
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "MEMOIZE": PickleMachine.memoize,
    "TUPLE1": lambda m: m.fold(1),
    "TUPLE2": lambda m: m.fold(2),
    "TUPLE3": lambda m: m.fold(3),
    "TUPLE": PickleMachine.make_tuple,
    "LIST": PickleMachine.make_list,
    "DICT": PickleMachine.make_dict,
    "FROZENSET": PickleMachine.make_set,
    "ADDITEMS": PickleMachine.add_items,
    "APPEND": PickleMachine.append,
    "APPENDS": PickleMachine.appends,
    "SETITEM": PickleMachine.set_item,
    "SETITEMS": PickleMachine.set_items,
    "STACK_GLOBAL": PickleMachine.stack_global,
    "REDUCE": PickleMachine.reduce,
    "NEWOBJ": PickleMachine.reduce,
    "NEWOBJ_EX": PickleMachine.new_with_keywords,
    "OBJ": PickleMachine.obj,
    "BUILD": PickleMachine.build,
    "BINPERSID": PickleMachine.persistent,
}
