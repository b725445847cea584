"""One forward pass of a model with symbolic sizes: replace its parameters and ints, run it, restore it.

Every parameter and buffer becomes a fake tensor whose dims are symbolic ints, each with a variable of its own; every
int or tuple of ints among the attributes of a module (`num_heads`, `head_dim`, `normalized_shape`) is symbolic
too, because the forward pass computes shapes from it. Sizes that describe space or count things and not widths (kernel,
stride, window, number of layers) stay plain numbers: see NOT_WIDTHS. The forward pass is the model's own, unmodified,
in eval mode. Which variables must be equal follows from what the pass does with them.

A second pass in train mode follows if the first did not call every module that has weights: auxiliary heads run in
train mode only, and their weights read the same widths. Only its facts about widths count, not its MACs.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import _lru_cache_wrapper as _CachedFunction
from functools import cache, wraps
from types import CellType, FunctionType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from .constants import is_statistic, plain_tensors
from .fake_mode import fake_mode
from .flow import is_layer_norm
from .gradients import following_functions, tensors_in
from .hooks import without_watching_hooks
from .record import FROM_INPUT, Recorder, annotate
from .scales import TracedFloat, mark_number
from .shape_rules import ShapeRules
from .symint import Facts, poly_of

# Attributes that stay plain numbers at first, because a run with fewer symbolic sizes is faster and fails less often. Names
# decide nothing: where a dim of a parameter has to be equal to one of these, it is symbolic in a second run (`plain_widths`).
_NAMES = """
    kernel_size stride padding dilation output_padding _reversed_padding_repeated_twice output_size upscale_factor
    downscale_factor scale_factor shift_size window_size image_size patch_size grid_size partition_size n_partitions
    vocab_size num_embeddings padding_idx max_positions max_seq_len num_classes
    num_layers num_hidden_layers layer_idx p top_k num_experts num_local_experts n_routed_experts num_experts_per_tok
    _version
"""  # space; tokens and other values; how often something is done
NOT_WIDTHS = frozenset(_NAMES.split())
# What torch's own layers keep beside their weight, whose shape it repeats: their forward passes do not read it.
_REPEATED = frozenset(("in_features", "out_features", "in_channels", "out_channels", "embedding_dim"))


_ACTIVATIONS = ("relu", "gelu", "silu", "swish", "mish", "elu", "activation")


@dataclass(slots=True)
class Origin:
    """What a variable was made for: dim `index` of a parameter or buffer, or an int attribute (`index`: into a tuple)."""

    kind: str  # parameter | buffer | tensor (a plain attribute) | attribute (an int)
    path: str
    index: int | None
    size: int

    @property
    def label(self) -> str:
        """As a table shows it: "layer1.0.conv1.weight[0]"."""
        return self.path if self.index is None else f"{self.path}[{self.index}]"

    @property
    def owner(self) -> str:
        """Path of the module that has it."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Its name in the module."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Way:
    """Which numbers of a model are symbolic in a run. Models differ in what they accept, so `build` tries several ways.

    Args:
        symbolic: False keeps all sizes plain numbers. The count is the same, the widths stay unknown.
        configs: False keeps the ints in configuration objects plain: some objects check the type of what is assigned.
        tensors: False leaves tensors that are plain attributes as they are: some code reads their values.
        keys: what a size is as a key of a dict, in a set or a cached function: None, nothing; "sizes", equal to sizes that
            follow from the widths in the same way; "values", equal to every size and int of its value, which ties them.
        also: (path of the owner, name) of ints to make symbolic although they are in NOT_WIDTHS.
    """

    symbolic: bool = True
    configs: bool = True
    tensors: bool = True
    keys: Literal["sizes", "values"] | None = None
    also: frozenset[tuple[str, str]] = frozenset()


@dataclass
class SymbolicRun:
    """What one run recorded. `outputs` has the output of each pass: one, or two with the second in train mode."""

    facts: Facts
    recorder: Recorder
    origins: dict[int, list[Origin]] = field(default_factory=dict)  # variable -> what it was made for
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # key of a parameter or buffer -> symbolic shape
    outputs: list[Any] = field(default_factory=list)
    plain: dict[tuple[str, str], int] = field(default_factory=dict)  # (path of the owner, name) -> int left out by name

    def plain_widths(self) -> frozenset[tuple[str, str]]:
        """Ints that were left out by their names, and whose value is what a dim of a parameter had to be equal to."""
        constants = {
            -e.terms[0][1]
            for e in self.facts.equations
            if [len(m) for m, _ in e.terms] == [0, 1]
            and abs(e.terms[1][1]) == 1
            and any(p.kind == "parameter" for p in self.origins.get(e.terms[1][0][0], ()))
        }
        return frozenset(key for key, value in self.plain.items() if value in constants)


def run_symbolically(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    way: Way | None = None,
) -> SymbolicRun:
    """Run `model(*inputs, **kwargs)` on fake tensors, in eval mode; then in train mode if modules were not reached.

    Args:
        inputs, kwargs: tensors of any shape, real or meta: only their shapes and dtypes are used.
        way: which numbers are symbolic.

    Raises:
        Exception: whatever the forward pass raises on these inputs, or on symbolic sizes.
    """
    facts, way = Facts(), way or Way()
    facts.keys = way.keys
    run = SymbolicRun(facts, Recorder())
    training = [m for m in model.modules() if m.training]
    try:
        with (
            _restoring_module_state(model),
            _forgetting_cached_results(model),
            fake_mode(facts),
            _substituted(model, _Substitutes(run, way)),
        ):
            set_training(model, False)
            _forward(model, inputs, kwargs or {}, run, run.recorder)
            if _has_unreached_weights(model, run.recorder):
                with suppress(Exception):  # a train mode may need targets: then what only it reaches keeps its widths
                    set_training(model, True)
                    _forward(model, inputs, kwargs or {}, run, run.recorder.second_pass())
    finally:
        facts.closed = True
        set_training(model, False)
        for module in training:
            module.training = True
    return run


def set_training(model: nn.Module, mode: bool) -> None:
    """`model.train(mode)`; programs of torch.export have the mode that they were exported in, and refuse to change it."""
    with suppress(NotImplementedError):
        model.train(mode)


def _forward(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], run: SymbolicRun, recorder: Recorder
) -> None:
    """One forward pass in the model's current mode; its facts go to `run`, its counted ops to `recorder`."""
    args, named = tree_map_only(
        Tensor,
        lambda t: annotate(torch.empty(t.shape, dtype=t.dtype, device="cpu"), FROM_INPUT),
        (inputs, dict(kwargs)),
    )
    # A function mode (ShapeRules) is asked before a dispatch mode (the recorder): what it answers, the recorder never sees.
    with (
        without_watching_hooks(model, run.facts, recorder),
        _following_modules(model, recorder),
        _runnable_modules(recorder),
        following_functions(recorder.backward),
        warnings.catch_warnings(),
        recorder,
        ShapeRules(run.facts, recorder),
    ):
        warnings.simplefilter("ignore")  # on performance, and nothing is computed
        run.outputs.append(model(*args, **named))
    recorder.backward.finish([*tensors_in(run.outputs[-1]), *_stored_tensors(model)])


def _stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors among the plain attributes of modules: a forward pass may store an auxiliary loss there."""
    for module in model.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                yield value
            elif type(value) in (list, tuple, dict) and name not in ("_parameters", "_buffers"):
                yield from (t for t in (value.values() if isinstance(value, dict) else value) if isinstance(t, Tensor))


def _has_unreached_weights(model: nn.Module, recorder: Recorder) -> bool:
    """Whether a module with weights was not called in this forward pass."""
    return any(path not in recorder.first_seen for path, m in model.named_modules() if m._parameters and path)


@contextmanager
def _substituted(model: nn.Module, substitutes: _Substitutes) -> Iterator[None]:
    """Fake tensors and symbolic ints in all modules, until the end of the block."""
    try:
        for path, module in model.named_modules():
            substitutes.for_tensors(module, f"{path}." if path else "")
            if substitutes.symbolic:
                substitutes.for_numbers(module, f"{path}." if path else "")
        yield
    finally:
        substitutes.restore()


@contextmanager
def _restoring_module_state(model: nn.Module) -> Iterator[None]:
    """Undo at the end what a forward pass stores in modules: its last activations, a step count, a lazy buffer."""
    stores = [module.__dict__ for module in model.modules()]
    inner = [value for store in stores for value in store.values() if type(value) in (dict, list)]
    before = [(held, held.copy()) for held in (*stores, *inner)]
    try:
        yield
    finally:
        for held, kept in before:
            held.clear()
            held.extend(kept) if isinstance(held, list) else held.update(kept)


@contextmanager
def _forgetting_cached_results(model: nn.Module) -> Iterator[None]:
    """Empty the caches of `lru_cache` that a forward pass reads: no real tensor gets into the run, and no fake one out of it."""
    functions = list(_cached_functions(model))
    try:
        for function in functions:
            function.cache_clear()
        yield
    finally:
        for function in functions:
            function.cache_clear()


def _cached_functions(model: nn.Module) -> Iterator[_CachedFunction[Any]]:
    """Functions under `lru_cache` in modules, in their classes, and in the files where these are written.

    Also static ones, and those inside another decorator, as transformers has it.
    """
    classes = {cls for m in model.modules() for cls in type(m).__mro__[:-1]}
    homes = {
        id(home): home for cls in classes if (home := sys.modules.get(cls.__module__)) and home.__name__ != "builtins"
    }
    for holder in (*model.modules(), *classes, *homes.values()):
        for value in vars(holder).values():
            value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            cells = value.__closure__ if isinstance(value, FunctionType) else None
            contents = (cell.cell_contents for cell in cells or () if cell != CellType())
            yield from (each for each in (value, *contents) if isinstance(each, _CachedFunction))


class _Substitutes:
    """Puts fake tensors and symbolic ints in place of parameters, buffers and ints; `restore` undoes it."""

    def __init__(self, run: SymbolicRun, way: Way) -> None:
        self.run = run
        self.way = way
        self.symbolic = way.symbolic
        self.undo: list[tuple[dict[str, Any], str, Any]] = []  # (dict, key, original value)
        self.fakes: dict[int, Tensor] = {}  # id of a tensor -> its fake one: tied parameters stay tied
        self.configs: set[int] = set()  # ids of the configuration objects that are done

    def restore(self) -> None:
        """Put the original values back, the last replaced one first."""
        for store, key, value in reversed(self.undo):
            store[key] = value

    def for_tensors(self, module: nn.Module, prefix: str) -> None:
        """Replace the parameters and buffers of one module, whose keys begin with `prefix`."""
        for kind, store in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in list(store.items()):
                if tensor is None:
                    continue
                copied = key.replace("original_inv_freq", "inv_freq")
                if copied != key and copied in store:  # resized with it
                    self.fakes[id(tensor)] = cast(Tensor, store[copied])
                if id(tensor) not in self.fakes:
                    self.fakes[id(tensor)] = _fake(tensor, kind, prefix + key, module, self.run, self.symbolic)
                fake = self.fakes[id(tensor)]
                if kind == "buffer":
                    self._constant(prefix + key, fake, store, key)
                    continue
                fake._is_param = True  # for isinstance(p, nn.Parameter), as in get_parameter
                self.run.recorder.register_parameter(prefix + key, fake, tensor.requires_grad)
                self.run.shapes[prefix + key] = tuple(fake.shape)
                self._replace(store, key, fake)
        for key, tensor in list(plain_tensors(module)) if self.way.tensors and self.symbolic else ():
            if id(tensor) not in self.fakes:
                self.fakes[id(tensor)] = _fake(tensor, "tensor", prefix + key, module, self.run, self.symbolic)
            self._constant(prefix + key, self.fakes[id(tensor)], module.__dict__, key)
        self._tie_bias(module, prefix)
        if isinstance(module, nn.RNNBase):  # it has a second list of its weights, which forward reads
            names: list[str] = module._flat_weights_names
            self._replace(module.__dict__, "_flat_weights", [module._parameters[n] for n in names])

    def _constant(self, path: str, fake: Tensor, store: dict[str, Any], key: str) -> None:
        """Put the fake tensor of a buffer or plain tensor in its place, and follow what the forward pass does with it."""
        if not is_statistic(path):
            self.run.recorder.register_constant(path, fake)
            if self.symbolic and fake.numel() == 1:
                owner, _, name = path.rpartition(".")
                mark_number(fake, {(owner, name): 1})
        self.run.shapes[path] = tuple(fake.shape)
        self._replace(store, key, fake)

    def _tie_bias(self, module: nn.Module, prefix: str) -> None:
        """Record that a layer has one bias per output: a forward pass that reads `bias[:n]` would not show it."""
        weight, bias = (self.run.shapes.get(prefix + key) for key in ("weight", "bias"))
        plain = isinstance(module, (nn.Linear, _ConvNd)) and not getattr(module, "transposed", False)
        if not (plain and weight and bias):
            return
        outputs, entries = poly_of(weight[0]), poly_of(bias[0])
        if outputs.evaluate(self.run.facts.sizes) == entries.evaluate(self.run.facts.sizes):
            self.run.facts.equal(outputs, entries)

    def for_numbers(self, module: nn.Module, prefix: str) -> None:
        """Replace the numbers of a module, and those of a configuration object that it holds (once for all its holders)."""
        self._numbers(prefix, module.__dict__, of_layer=_is_layer_of_torch(module))
        for key, config in list(module.__dict__.items()):
            if self.way.configs and is_config(config) and id(config) not in self.configs:
                self.configs.add(id(config))
                self._numbers(f"{prefix}{key}.", config.__dict__)

    def _numbers(self, prefix: str, store: dict[str, Any], *, of_layer: bool = False) -> None:
        for key, indices in _int_attributes(store):
            value = store[key]
            where = prefix.removesuffix("."), key
            if of_layer and key in _REPEATED:
                continue
            if key in NOT_WIDTHS and where not in self.way.also:
                if type(value) is int and not of_layer:
                    self.run.plain[where] = value
                continue
            if not indices:
                self._replace(store, key, _variable(self.run, Origin("attribute", prefix + key, None, value)))
            else:
                leaves, form = flattened(value)
                leaves = [
                    _variable(self.run, Origin("attribute", prefix + key, i, v)) if i in indices else v
                    for i, v in enumerate(leaves)
                ]
                self._replace(store, key, tree_unflatten(leaves, form))
        for key, value in list(store.items()):
            if type(value) is float and value > 0 and value != 1 and math.isfinite(value):
                self._replace(store, key, TracedFloat(value, {(prefix.removesuffix("."), key): 1}, self.run.facts))

    def _replace(self, store: dict[str, Any], key: str, value: Any) -> None:
        self.undo.append((store, key, store[key]))
        store[key] = value


def _variable(run: SymbolicRun, origin: Origin) -> Any:
    """A symbolic int with a new variable, in place of the int at `origin`."""
    expr = run.facts.new_variable(origin.size)
    run.origins[next(iter(expr.variables))] = [origin]
    return run.facts.symint(expr)


def _fake(tensor: Tensor, kind: str, path: str, module: nn.Module, run: SymbolicRun, symbolic: bool) -> Tensor:
    """A fake tensor of the same shape; each dim above 1 is a new variable, but for the kernel dims of convolutions."""

    def dim(i: int, size: int) -> Any:
        spatial = isinstance(module, _ConvNd) and i >= 2
        return _variable(run, Origin(kind, path, i, size)) if symbolic and size > 1 and not spatial else size

    shape = [dim(i, size) for i, size in enumerate(tensor.shape)]
    # "cpu" in fake mode: no memory is allocated. Not "meta", or constants made in the forward pass would be on another device.
    return torch.empty(shape, dtype=tensor.dtype, device="cpu")


def _is_layer_of_torch(module: nn.Module) -> bool:
    """Whether a module computes as a layer of torch.nn does: its attributes repeat the shape of its weight, and it reads none.

    A class that extends one with a forward of its own may read them, as a convolution that standardises its weight does.
    """
    own = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    home = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    return home.__module__.startswith("torch.nn.modules.") and home not in own


def is_config(value: Any) -> bool:
    """Whether `value` is a configuration object that modules read sizes from in forward, as Hugging Face's."""
    return _is_config_class(type(value))


@cache
def _is_config_class(cls: type) -> bool:
    return any(base.__name__ in ("PretrainedConfig", "PreTrainedConfig") for base in cls.__mro__)


def configs_of(model: nn.Module) -> list[Any]:
    """Every configuration object that a module of `model` holds, once."""
    held = {id(v): v for module in model.modules() for v in module.__dict__.values() if is_config(v)}
    return list(held.values())


def _int_attributes(attributes: Mapping[str, Any]) -> Iterator[tuple[str, set[int]]]:
    """(name, empty set) of each attribute that is an int above 1; (name, positions) of each that holds such ints.

    That is a tuple or list of ints, or one of names and ints (`{"h": 4, "d": 16}`, as layers of einops keep the lengths of
    axes); positions count its leaves. A 1 is no width: it means "not split" or "no groups", and stays 1 when the model is
    widened.
    """
    for key, value in list(attributes.items()):
        if type(value) is int:
            if value > 1:
                yield key, set()
        elif type(value) in (tuple, list, dict, torch.Size) and value and _of_ints_and_names(value):
            positions = {i for i, v in enumerate(flattened(value)[0]) if type(v) is int and v > 1}
            if positions:
                yield key, positions


def flattened(value: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of a tuple, list or dict of any depth, and its form (for `tree_unflatten`)."""
    return tree_flatten(tuple(value) if isinstance(value, torch.Size) else value)


_MANY = 16


def _of_ints_and_names(value: Any) -> bool:
    """Whether a container holds ints, and beside them names of these at most; a table of many is a vocabulary."""
    if isinstance(value, dict):
        return len(value) <= _MANY and all(type(k) is str and type(v) is int for k, v in value.items())
    if all(type(v) is int for v in value):
        return True
    return len(value) <= _MANY and all(type(v) is tuple and tuple(map(type, v)) == (str, int) for v in value)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function; sigmoid and tanh are gates and do not count."""
    name = type(module).__name__.lower()
    return not (module._parameters or module._modules) and any(word in name for word in _ACTIVATIONS)


def _watch_direct_calls(module: nn.Module, path: str, recorder: Recorder) -> Callable[[], None]:
    """Report a direct call of `module.forward(x)`, which runs no hooks, and its result; returns a function that undoes it."""
    forward, before = module.forward, module.__dict__.get("forward")

    @wraps(forward)
    def seen(*args: Any, **kwargs: Any) -> Any:
        called = recorder.stack[-1] == path
        if not called:
            recorder.enter_module(path)
        try:
            output = forward(*args, **kwargs)
            recorder.note_layer_output(output, by_input=len(args) == 1 and not kwargs)
            return output
        finally:
            if not called:
                recorder.leave_module()

    def restore() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    module.__dict__["forward"] = seen
    return restore


@contextmanager
def _runnable_modules(recorder: Recorder) -> Iterator[None]:
    """Python code of torch.nn that reads the values of tensors, or swaps their memory, in versions for fake tensors."""

    def convert(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`module.to(dtype)` in a forward pass: converted parameters keep their keys."""
        for child in module.children() if recurse else ():
            child._apply(fn)
        for store in (cast("dict[str, Any]", module._parameters), cast("dict[str, Any]", module._buffers)):
            store.update({k: recorder.converted(t, fn(t)) for k, t in store.items() if t is not None})
        return module

    def is_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        """nn.Transformer* compare a mask with the causal one; here a mask has no values, so only the flag counts."""
        return is_causal is True

    replaced = ((nn.Module, "_apply", convert), (transformer, "_detect_is_causal_mask", is_causal))
    originals = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(replaced, originals, strict=True):
            setattr(owner, name, original)


def _tie_channels(module: nn.Module, args: Any) -> None:
    """Compare the number of channels that a norm displays with its input's (which records that they are equal).

    A norm without parameters has no shape that shows it.
    """
    shown = getattr(module, "num_channels" if isinstance(module, nn.GroupNorm) else "num_features", None)
    if isinstance(module, (_BatchNorm, nn.GroupNorm)) and args and isinstance(args[0], Tensor):
        bool(args[0].shape[1] == shown)


@contextmanager
def _following_modules(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Report to the recorder which module runs, by global forward hooks."""
    # not nn.Softmax: the softmax must count for the attention module that calls it (see Recorder.softmaxed)
    names = {id(m): path for path, m in model.named_modules() if not isinstance(m, nn.Softmax)}
    activations = {id(m) for m in model.modules() if is_activation(m)}
    norms = {id(m) for m in model.modules() if is_layer_norm(m)}
    depth: list[bool] = []

    def before(module: nn.Module, args: Any) -> None:
        depth.append(id(module) in names)
        if depth[-1]:
            recorder.enter_module(names[id(module)], args)
            _tie_channels(module, args)
            if id(module) in activations:
                recorder.note_activation(f"module:{names[id(module)]}", args)
            if id(module) in norms:
                recorder.flow.enter_norm(names[id(module)], args)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if depth.pop():
            if id(module) in norms:
                recorder.flow.leave_norm(names[id(module)], output)
            recorder.leave_module()

    handles: list[Callable[[], None]] = [
        *(
            _watch_direct_calls(m, names[id(m)], recorder)
            for m in model.modules()
            if isinstance(m, (nn.Linear, _ConvNd))
        ),
        hooks.register_module_forward_pre_hook(before).remove,
        hooks.register_module_forward_hook(after, always_call=True).remove,
    ]
    try:
        yield
    finally:
        for remove in handles:
            remove()
