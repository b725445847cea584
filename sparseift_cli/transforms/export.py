"""A model for other programs: its weights dense, with their zeros, in the form that they load.

Every form is written beside its target, tried where it can be, and renamed at the end: a reader sees all of it or nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.atomic import explain_os_errors, replace_folder, temporary_folder
from ..base.text import some_of
from ..errors import ArtifactError, CheckFailed, UsageError, one_of
from ..kernels.convert import block_masks, to_masked
from ..mask.attached import SUFFIX, masks_of, unwrapped
from ..trace.outputs import returned
from ..trace.symbolise import is_config
from .compare import SAME, eval_mode, largest_difference, lost_by_configuration, real_inputs
from .transformation import transformation_of

FORMATS = {
    "hf": "a folder that from_pretrained of transformers loads",
    "state_dict": "a file that torch.load reads, for load_state_dict",
    "safetensors": "the same tensors as a safetensors file",
    "onnx": "an ONNX file for any batch size, at the other sizes of the model's input",
}
Example = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of one forward pass."""
BESIDE_WEIGHTS = (
    *("tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.spm", "spiece.model", "sentencepiece*.model", "*.tiktoken", "chat_template*", "tekken.json"),
    *("generation_config.json", "*processor_config.json", "README.md", "LICENSE*"),
)
"""Files of a Hugging Face folder that do not depend on the sizes of its model: tokenizer, generation, licence."""
_LARGEST_ONNX = 2**31 - 2**20  # of a file of protobuf; larger models would be several files
_ROUNDING = 1e-4  # of the largest output: float32 in another order of additions


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how far off its outputs are."""

    path: Path
    to: str
    parameters: int
    nonzeros: int
    files: dict[str, int]
    """Bytes by name."""
    difference: float | None = None
    """Largest difference of an output, over the largest output; None where the form cannot be run here."""
    notes: tuple[str, ...] = ()
    step: int | None = None
    """Of the checkpoint, where it is a run's."""


def export_model(
    model: nn.Module,
    path: str | Path,
    to: str,
    *,
    example: Example | None = None,
    source: Path | None = None,
    force: bool = False,
) -> Exported:
    """Write `model` in one of `FORMATS`. The model itself does not change.

    Args:
        model: any module; layers that store blocks are written dense.
        example: needed for onnx and hf, which are run: only shapes and dtypes matter.
        source: the Hugging Face folder that the dense model came from: files beside its weights are copied.
        force: replace what an export wrote before.

    Raises:
        UsageError: this form cannot say what the model is; the message names what it cannot say. A package is missing.
        CheckFailed: what was written computes something else.
        ArtifactError: `path` exists, or cannot be written.
    """
    one_of("format", to, tuple(FORMATS))
    target = require_free(path, to, force=force)
    model = dense_form(model)
    with explain_os_errors("write", target), eval_mode(model):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as temporary:
            if to == "hf":
                difference, notes = _hugging_face(model, temporary, example, source)
                files = _sizes(temporary)
                for written in temporary.iterdir():
                    written.chmod(0o644)  # safetensors makes it readable for the owner only
                temporary.chmod(0o755)
                replace_folder(target, temporary)
            else:
                file = temporary / target.name
                difference, notes = _file(model, file, to, example)
                file.chmod(0o644)
                files = _sizes(temporary)
                file.replace(target)
                temporary.rmdir()
    parameters = list(model.parameters())
    nonzeros = sum(int(p.count_nonzero()) for p in parameters)
    return Exported(target, to, sum(p.numel() for p in parameters), nonzeros, files, difference, tuple(notes))


def require_free(path: str | Path, to: str, *, force: bool) -> Path:
    """Check that an export may be written to `path`; commands call it before the work.

    Raises:
        ArtifactError: something else is there.
    """
    target = Path(path)
    if not target.exists() or (to == "hf" and target.is_dir() and not any(target.iterdir())):
        return target
    same = (target / "config.json").is_file() if to == "hf" else target.is_file()
    if not same:
        raise ArtifactError(f"{target} exists and was not written by this export", hint="choose another -o")
    if not force:
        raise ArtifactError(f"{target} is there already", hint="--force replaces it")
    return target


def dense_form(model: nn.Module) -> nn.Module:
    """The module inside wrappers, with ordinary layers alone: itself, or a copy where layers store blocks.

    Raises:
        UsageError: it has no weights.
    """
    model = unwrapped(model)
    if any(p.is_meta for p in model.parameters()):
        raise UsageError("a model on the meta device has no weights to export", hint="leave out --plan-only")
    if block_masks(model):
        model = deepcopy(model)
        to_masked(model)
    return model


def save_state_dict(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict of tensors [*] as torch.save does; on the CPU, so that it loads on any machine."""
    torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, file)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def _file(model: nn.Module, file: Path, to: str, example: Example | None) -> tuple[float | None, list[str]]:
    """Write one file; the difference and notes."""
    if to == "onnx":
        return _onnx(model, file, example)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    if to == "state_dict":
        save_state_dict(state, file)
        return None, []
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in state.items():  # tied weights under each of their names: load_state_dict wants them all
        kept = tensor.detach().cpu().contiguous()
        tensors[name] = kept.clone() if kept.untyped_storage().data_ptr() in places else kept
        places.add(kept.untyped_storage().data_ptr())
    save_file(tensors, file, metadata={"format": "pt"})
    return None, []


# --- Hugging Face ---


def _hugging_face(
    model: nn.Module, folder: Path, example: Example | None, source: Path | None
) -> tuple[float | None, list[str]]:
    """Write the folder, load it again as others will, and compare.

    Raises:
        UsageError: configuration and class cannot say what the model is.
        CheckFailed: the loaded model computes something else.
    """
    any_model: Any = model
    config = model.__dict__.get("config")
    kind = type(model).__name__
    if not (is_config(config) and hasattr(model, "save_pretrained")):
        raise UsageError(
            f"{kind} is no model of transformers, so from_pretrained cannot build it",
            hint="--to state_dict or safetensors; models of hf:FOLDER can be exported so",
        )
    done = transformation_of(model)
    if done is not None and done.surgery.members:
        paths = [member.path for member in done.surgery.members]
        raise UsageError(
            f"{kind} has no place for what replaces {some_of(paths, 3)}: from_pretrained builds plain layers there",
            hint="--to state_dict or safetensors; Sparse Wide models, whose layers are plain, can be exported so",
        )
    if example is None:
        raise UsageError("--to hf runs the model to compare it, and its input is not known", hint="give example_input")
    if lost := lost_by_configuration(model, *example):
        raise UsageError(
            lost[0].partition("; sparseift.save")[0], hint="--to state_dict or safetensors keeps all of it"
        )
    with _without_masks(model):
        any_model.save_pretrained(folder)
    copied = [] if source is None else _copy_beside(source, folder)
    loader: Any = type(model)
    again = loader.from_pretrained(str(folder), local_files_only=True, dtype=next(model.parameters()).dtype)
    found = largest_difference(again.to(next(model.parameters()).device).eval(), model, *example)
    if found > SAME:
        raise CheckFailed(
            f"what from_pretrained loads differs by {found:.2g} of the largest output; nothing was written",
            hint="--to state_dict or safetensors, for code that builds the module itself",
        )
    if copied:
        return found, [f"copied from {source}: {', '.join(copied)}"]
    return found, [f"no tokenizer: {source} has none" if source else "no tokenizer: no source folder is known"]


def _copy_beside(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, generation and processor files; their names. Weights, configuration and code stay."""
    if not source.is_dir():
        return []
    names = sorted({file.name for glob in BESIDE_WEIGHTS for file in source.glob(glob) if file.is_file()})
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


@contextmanager
def _without_masks(model: nn.Module) -> Iterator[None]:
    """Inside, the model has no masks beside its weights: buffers that another program would ask about."""
    held: list[tuple[nn.Module, str, Tensor]] = []
    for key in masks_of(model):
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        mask = module._buffers.pop(name + SUFFIX)
        assert mask is not None
        held.append((module, name + SUFFIX, mask))
    try:
        yield
    finally:
        for module, name, mask in held:
            module._buffers[name] = mask


# --- ONNX ---


class _Positional(nn.Module):
    """`model` as a function from a list of tensors to a tuple of its results: by-products (caches) are left out."""

    def __init__(self, model: nn.Module, names: list[str], positional: int) -> None:
        super().__init__()
        self.model = model
        self._names, self._positional = names, positional

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._results(tensors).values())

    def result_names(self, *tensors: Tensor) -> list[str]:
        """`logits`, ...; `output` of a model that returns one tensor."""
        return [
            f"output_{name}".rstrip("_") if name[:1].isdecimal() or not name else name
            for name in self._results(tensors)
        ]

    def _results(self, tensors: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        named = dict(zip(self._names, tensors[self._positional :], strict=True))
        return returned(self.model(*tensors[: self._positional], **named)).results


def _onnx(model: nn.Module, file: Path, example: Example | None) -> tuple[float | None, list[str]]:
    """Write the file and, where onnxruntime is installed, run it.

    Raises:
        UsageError: a package is missing, the input is not known, or PyTorch cannot export the model.
        CheckFailed: the file computes something else.
    """
    _package("onnxscript")
    if example is None:
        raise UsageError("--to onnx runs the model once, and its input is not known", hint="give example_input")
    if sum(t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor)) > _LARGEST_ONNX:
        raise UsageError("an ONNX file holds 2 GiB, and the dense weights are more", hint="--to safetensors")
    args, kwargs = real_inputs(model, *_twice(example))
    tensors = [*args, *kwargs.values()]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise UsageError("--to onnx is for models whose inputs are tensors", hint="--to state_dict or safetensors")
    names = [*(f"input_{i}" if len(args) > 1 else "input" for i in range(len(args))), *kwargs]
    plain = _Positional(model, list(kwargs), len(args)).eval()
    with torch.no_grad(), _setting(model, "use_cache", False), _without_masks(model), _silent():
        want = plain(*tensors)
        fixed = _written(plain, tensors, names, plain.result_names(*tensors), file)
    notes = [f"the batch size is fixed: {fixed}"] if fixed else []
    if importlib.util.find_spec("onnxruntime") is None:
        return None, [*notes, "not run: pip install onnxruntime, and the export runs the file and compares"]
    found = _run_onnx(file, dict(zip(names, tensors, strict=True)), want)
    if not found <= _ROUNDING:
        raise CheckFailed(
            f"onnxruntime gives other outputs: they differ by {found:.2g} of the largest; nothing was written",
            hint="--to state_dict or safetensors",
        )
    return found, notes


def _twice(example: Example) -> Example:
    """The example with two samples: a size of 1 would be taken for a constant."""
    from torch.utils._pytree import tree_map_only

    def doubled(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 0 or tensor.shape[0] != 1 else torch.cat([tensor, tensor])

    return tree_map_only(Tensor, doubled, example)


def _written(plain: nn.Module, tensors: list[Tensor], names: list[str], outputs: list[str], file: Path) -> str | None:
    """Export with a free batch size; where that fails with a fixed one, and say why.

    Raises:
        UsageError: PyTorch cannot export the model.
    """
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} if tensor.dim() else {} for tensor in tensors)
    reasons: list[str] = []
    for dynamic in ((shapes,), None):
        try:
            torch.onnx.export(
                plain,
                tuple(tensors),
                str(file),
                input_names=names,
                output_names=outputs,
                dynamic_shapes=dynamic,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            return reasons[0] if reasons else None
    raise UsageError(f"PyTorch cannot export this model to ONNX: {reasons[-1]}", hint="--to state_dict or safetensors")


def _run_onnx(file: Path, inputs: Mapping[str, Tensor], want: tuple[Tensor, ...]) -> float:
    """The largest difference of an output of onnxruntime to `want`, over the largest of `want`."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: t.cpu().numpy() for name, t in inputs.items() if name in taken})
    worst = largest = 0.0
    for have, tensor in zip(found, want, strict=True):
        wanted = tensor.cpu().double()
        worst = max(worst, float((torch.from_numpy(have).double() - wanted).abs().nan_to_num(nan=torch.inf).max()))
        largest = max(largest, float(wanted.abs().max()))
    return worst / largest if largest else worst


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, what PyTorch's exporter warns of (packages that no model here needs, its own deprecations) is not printed."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@contextmanager
def _setting(model: nn.Module, name: str, value: object) -> Iterator[None]:
    """Inside, the setting `name` of the model's configuration, where it has one, is `value`."""
    config: Any = model.__dict__.get("config")
    if not (is_config(config) and hasattr(config, name)):
        yield
        return
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


def _package(name: str) -> Any:
    """An optional package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            f"--to onnx needs the package {name}", hint="pip install onnxscript onnxruntime (keep your torch)"
        ) from None
