"""A model by its source, built or as a LayerTable: a zoo name, `library:name` or `pkg.module:callable`.

A zoo model at its default input comes from its shipped table without importing torch; everything else is built on the
meta device and traced.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.registry import import_object
from ..errors import UsageError
from ..table.table import LayerTable
from .libraries import Made, maker
from .request import Request
from .zoo import registry
from .zoo.catalog import ModelInfo

if TYPE_CHECKING:
    from torch import nn

    from ..trace.build import TraceResult

TABLES = Path(__file__).resolve().parent / "zoo" / "tables"


def load_table(request: Request, *, fresh: bool = False) -> LayerTable:
    """The LayerTable of a request; `fresh` traces a zoo model instead of reading its shipped table.

    Raises:
        UsageError: no such source, or it does not run on that input.
    """
    if ":" not in request.source and request.default and not fresh:
        name = registry.lookup(request.source).name
        shipped = TABLES / f"{name}.json"
        if shipped.is_file():
            return LayerTable.from_json(json.loads(shipped.read_text(encoding="utf-8"))["table"])
    found = _traced(build(request))
    return (_traced(build(request, device="cpu")) if found.needs_values else found).table


def _traced(built: Built) -> TraceResult:
    from ..trace.build import trace

    return trace(built.model, built.args, built.kwargs, name=built.name, input_shape=built.input_shape)


@dataclass(frozen=True)
class Built:
    """A model in eval mode, the arguments of one forward, the name to print, and whether its weights were read from a file."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    trained: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the first tensor that the model is given."""
        return shape_of(self.args, self.kwargs)


def shape_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the first tensor among the arguments; () without any."""
    return next((tuple(t.shape) for t in (*args, *kwargs.values()) if hasattr(t, "shape")), ())


def build(request: Request, *, device: str = "meta") -> Built:
    """Build a source on `device`, freshly initialised (or with the weights that a Hugging Face folder holds).

    Raises:
        UsageError: the source cannot be found or built.
    """
    import torch

    make = maker(request.source) if ":" in request.source else None
    if make is not None:
        made = make(request, device)
        return Built(made.model.eval(), made.args, made.kwargs, request.source, made.trained)
    info = import_object(request.source, "model") if ":" in request.source else registry.lookup(request.source)
    if not isinstance(info, ModelInfo):
        from ..trace.symbolise import set_training

        made = _foreign(request, info, device)
        set_training(made.model, False)
        return Built(made.model, made.args, made.kwargs, request.source)
    if info.kind == "image" and request.image is not None and len(request.image) != 3:
        raise UsageError(f"{info.name} takes channels x height x width", hint="--input 3x224x224")
    image: Any = request.image
    from ..trace.fake_mode import no_init

    with torch.device(device), no_init(device):
        model = registry.build(info, num_classes=request.num_classes, seq=request.seq, image=image)
    inputs = registry.example_input(info, batch=request.batch, seq=request.seq, image=image, device=device)
    return Built(model.eval(), (inputs,), {}, request.source if ":" in request.source else info.name)


def _foreign(request: Request, target: Any, device: str) -> Made:
    """The module that `pkg.module:callable` (`target`) returns; the callable may also return (model, example inputs).

    Example inputs are a tensor, a tuple of positional arguments or a mapping of keyword arguments.
    """
    import torch
    from torch import nn

    if request.num_classes is not None:
        raise UsageError(
            "--num-classes is for zoo models", hint="let the callable build the model with the classes you want"
        )
    made = _called(request.source, target, device)
    inputs: Any = None
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"{request.source} gave {type(made).__name__}, not a torch.nn.Module",
            hint="the callable returns a module, or (module, example_input)",
        )
    if request.seq is not None:
        inputs = torch.zeros((request.batch, request.seq), dtype=torch.int64, device=device)
    elif request.image is not None:
        inputs = torch.zeros((request.batch, *request.image), device=device)
    if inputs is None:
        raise UsageError(
            f"the input of {request.source} is not known",
            hint="let the callable return (module, example_input), or give one sample's shape: --input 3x224x224, "
            "or --seq 128 for token ids; in a recipe model.input or model.seq",
        )
    args, kwargs = as_call(inputs)
    return Made(made, args, kwargs)


def as_call(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of positional or a mapping of keyword arguments, as (args, kwargs)."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)), {}


def source_hash(source: str) -> dict[str, str]:
    """SHA-256 of the file of the module that a `pkg.module:callable` names, by the module's name; what was imported, if it was.

    Empty for zoo names and other libraries, whose versions say what they are, and for a module without a file.
    """
    module = source.partition(":")[0]
    if ":" not in source or maker(source) is not None:
        return {}
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return {module: hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file else {}
    except OSError:
        return {}


def _called(source: str, target: Any, device: str) -> Any:
    """`target` itself where it is a module, else what it gives when it is called without arguments."""
    import torch

    if isinstance(target, torch.nn.Module) or not callable(target):
        return target
    from ..trace.fake_mode import no_init

    try:
        with torch.device(device), no_init(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*copying from a non-meta parameter")  # a checkpoint that it reads
            return target()
    except Exception as error:
        raise UsageError(
            f"{source}() failed: {type(error).__name__}: {error}",
            hint="it is called without arguments; wrap it in a function that needs none",
        ) from error
