"""What the names in a pickle of torch.save mean: storages, tensors, ordered dicts, and a few harmless objects.

`inert_pickle` asks `TorchRules` for every name and every call. A call of `torch._utils._rebuild_tensor_v2` becomes a
`PickledTensor`, whose shape and stride are checked against the size of its storage; a persistent id becomes a
`PickledStorage`; a dict class a plain dict; what training scripts save beside the weights (`argparse.Namespace`,
`numpy.ndarray`, an OmegaConf, classes of the script itself) stays `Opaque`. Any other name of Python's own modules and of
torch is refused: none is a setting, and some (`os.system`) are what an attack would call. Argument orders are those of
PyTorch's `torch/_utils.py` (`_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks,
metadata=None)` and its relatives).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import cast

from .facts import BITS, LARGEST
from .inert_pickle import Global, Opaque, plain_key
from .untrusted import Malformed

MAX_DIMS = 64
MAX_EXPANDED = 1 << 26  # elements of a broadcast tensor (stride 0) that its storage does not hold

# torch.FloatStorage and the rest; UntypedStorage holds bytes, and its tensors name their own dtype.
STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "UntypedStorage": "uint8",
}

# Classes whose instances stay opaque: settings and statistics that training scripts save beside the weights.
_HARMLESS = {
    "argparse.Namespace",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "_codecs.encode",
    "builtins.set",
    "builtins.frozenset",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.slice",
    "builtins.range",
    "builtins.object",
    "collections.deque",
    "copyreg._reconstructor",
    "decimal.Decimal",
    "fractions.Fraction",
    "types.SimpleNamespace",
    "uuid.UUID",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_nested_tensor",
}
_DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"}
_TYPES = {
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "builtins.list",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
    "builtins.bytes",
    "builtins.dict",
    "builtins.tuple",
    "builtins.type",
}
_QUANTISERS = "torch.per_"  # per_tensor_affine, per_channel_symmetric, ...
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """A storage as the pickle names it, without its position in the file. `view` is (first, size) in elements."""

    key: str
    dtype: str
    numel: int
    view: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """A tensor as the pickle describes it, checked against the size of its storage."""

    storage: PickledStorage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int


class TorchRules:
    """`inert_pickle.PickleRules` for pickles of torch.save. `storages` collects every storage that the pickle names."""

    def __init__(self) -> None:
        self.storages: dict[str, PickledStorage] = {}

    def named(self, module: str, name: str) -> object:
        found = Global(_PYTHON_2.get(module, module), name)
        path = f"{found.module}.{found.name}"
        known = path in _HARMLESS or path in _DICTS or path in _TYPES or path in _CALLS
        if known or _storage_dtype(found) or path.startswith(_QUANTISERS) or (module == "torch" and name in BITS):
            return found
        if module == "torch" and name.endswith("Tensor"):
            return found
        if _is_foreign(found.module):
            return found
        raise refused(found)

    def called(self, function: object, args: Sequence[object]) -> object:
        if not isinstance(function, Global):
            raise TypeError("a call of something that is no function")
        path = f"{function.module}.{function.name}"
        if path in _DICTS:
            return _pairs(args)
        if path in _CALLS:
            return _CALLS[path](args)
        if path == "copyreg._reconstructor" and args:
            return Opaque(str(args[0]) if isinstance(args[0], Global) else "object")
        if path in _HARMLESS or _is_foreign(function.module):
            return Opaque(str(function))
        raise refused(function)

    def persistent(self, saved_id: object) -> object:
        """("storage", class, key, device, numel[, view]); view is (key, first, size) and only old files have it."""
        if not isinstance(saved_id, tuple) or len(saved_id) < 5 or saved_id[0] not in ("storage", b"storage"):
            raise Malformed("its pickle refers to something outside that is no storage")
        kind, key, _, numel = saved_id[1:5]
        dtype = _storage_dtype(kind) if isinstance(kind, Global) else None
        if dtype is None or not isinstance(key, str | int) or not _size(numel):
            raise TypeError("a storage without type, key or size")
        storage = PickledStorage(str(key), dtype, numel)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Malformed(f"its storage {storage.key!r} appears with two sizes")
        view = saved_id[5] if len(saved_id) > 5 else None
        if view is None:
            return storage
        if not isinstance(view, tuple) or len(view) != 3 or not _size(view[1]) or not _size(view[2]):
            raise TypeError("a view of a storage without offset or size")
        if view[1] + view[2] > numel:
            raise Malformed(f"a view reaches beyond its storage {storage.key!r}")
        return PickledStorage(storage.key, dtype, numel, (view[1], view[2]))


def _is_foreign(module: str) -> bool:
    """Whether a module is neither of Python's own, types apart, nor of torch: the script that saved the file, or a library."""
    top = module.partition(".")[0]
    return top in ("__main__", "typing") or not (top in sys.stdlib_module_names or top == "torch")


def refused(name: Global) -> Malformed:
    """The error for a name that only running code could rebuild."""
    where = f"{name.module}.{name.name}".lower()
    if any(word in where for word in ("quantiz", "torch.nn.", "torchvision.", "timm.", "transformers.")):
        hint = "it is a pickled model, not a state dict; where you trust it, save model.state_dict() instead"
    else:
        hint = "nothing was run; where you trust the file, load it yourself and save only its state_dict"
    return Malformed(f"its pickle names {name}, which only running code could rebuild", hint=hint)


def _storage_dtype(name: Global) -> str | None:
    return STORAGES.get(name.name) if name.module in ("torch", "torch.cuda", "torch.storage") else None


def _size(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMS or not all(_size(v) for v in value):
        raise Malformed("a tensor in it has an impossible shape or stride")
    return tuple(cast("Sequence[int]", value))


def _pairs(args: Sequence[object]) -> dict[object, object]:
    """The dict of OrderedDict(), OrderedDict([[key, value], ...]), defaultdict(factory, {...}) or Counter({...})."""
    last = args[-1] if args else None
    if isinstance(last, dict):
        return last
    found: dict[object, object] = {}
    for pair in last if isinstance(last, list) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError("a dict of something else than pairs")
        found[plain_key(pair[0])] = pair[1]
    return found


def _tensor(storage: object, first: object, shape: object, stride: object, dtype: str | None = None) -> PickledTensor:
    if not isinstance(storage, PickledStorage) or not _size(first):
        raise TypeError("a tensor without a storage")
    assert isinstance(first, int)
    sizes, steps, dtype = _sizes(shape), _sizes(stride), dtype or storage.dtype
    if len(sizes) != len(steps):
        raise Malformed("a tensor in it has an impossible shape or stride")
    held = storage.view[1] if storage.view else storage.numel
    held = held * BITS[storage.dtype] // BITS[dtype]
    numel = prod(sizes)
    last = first + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True)) if numel else 0
    if numel > max(held, MAX_EXPANDED) or (numel and last >= held):
        raise Malformed(f"a tensor in it claims {numel:,} elements of a storage of {held:,}")
    offset = storage.view[0] * BITS[storage.dtype] // BITS[dtype] if storage.view else 0
    return PickledTensor(storage, dtype, sizes, steps, first + offset)


def _plain_tensor(args: Sequence[object]) -> PickledTensor:
    storage, first, shape, stride = _first(args, 4)
    return _tensor(storage, first, shape, stride)


def _tensor_v2(args: Sequence[object]) -> object:
    if len(args) > 6 and args[6]:  # metadata: a lazily conjugated or negated tensor; its bytes are not its values
        return Opaque("tensor with a pending conjugation or negation")
    return _plain_tensor(args)


def _tensor_v3(args: Sequence[object]) -> object:
    storage, first, shape, stride, _, _, dtype = _first(args, 7)
    if not isinstance(dtype, Global) or dtype.name not in BITS:
        return Opaque(f"tensor of {dtype}" if isinstance(dtype, Global) else "tensor")
    return _tensor(storage, first, shape, stride, dtype.name)


def _from_type(args: Sequence[object]) -> object:
    """`_rebuild_from_type_v2(function, type, args, state)`: a tensor with attributes of its own."""
    function, _, inner, _ = _first(args, 4)
    if isinstance(function, Global) and str(function) in _CALLS and isinstance(inner, tuple):
        if str(function) == "torch._tensor._rebuild_from_type_v2":
            raise TypeError("a tensor type within a tensor type")
        return _CALLS[str(function)](inner)
    return Opaque("tensor subclass")


def _first(args: Sequence[object], n: int) -> list[object]:
    if len(args) < n:
        raise TypeError("a tensor with too few facts")
    return list(islice(args, n))


_CALLS: dict[str, Callable[[Sequence[object]], object]] = {
    "torch._utils._rebuild_tensor": _plain_tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_qtensor": _plain_tensor,
    "torch._utils._rebuild_parameter": lambda args: _first(args, 1)[0],
    "torch._utils._rebuild_parameter_with_state": lambda args: _first(args, 1)[0],
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda args: _first(args, 1)[0],
}
