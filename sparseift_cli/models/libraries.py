"""Models of other libraries, by name: `torchvision:resnet50`, `timm:convnext_tiny`, `hf:FOLDER`. Each import is optional.

A maker is called with the device the model is wanted on and gives the module and the input it takes. Nothing is ever
downloaded: a torchvision or timm model comes with fresh weights, a Hugging Face one with those that lie beside its config.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .request import Request

DEFAULT_SEQ = 128


@dataclass(frozen=True)
class Made:
    """A module, the arguments that one forward takes, and whether its weights were read from a file."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    trained: bool = False


def maker(source: str) -> Callable[[Request, str], Made] | None:
    """The function that builds a `library:name` source; None for `package.module:callable`."""
    return {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}.get(source.partition(":")[0])


def _torchvision(request: Request, device: str) -> Made:
    library = optional("torchvision", request.source)
    models = importlib.import_module("torchvision.models")
    name = request.source.partition(":")[2]
    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(
            f"torchvision {library.__version__} has no classification model {name!r}",
            hint=did_you_mean(name, known) or f"it has {', '.join(known[:6])}, ...",
        )
    options = {} if request.num_classes is None else {"num_classes": request.num_classes}
    model = _on(device, lambda: models.get_model(name, **options))
    side = 299 if name.startswith("inception") else 224
    return Made(model, (_image(request, (3, side, side), device),))


def _timm(request: Request, device: str) -> Made:
    library = optional("timm", request.source)
    name = request.source.partition(":")[2]
    if not library.is_model(name):
        raise UsageError(
            f"timm {library.__version__} has no model {name!r}",
            hint=did_you_mean(name, library.list_models()) or "timm.list_models() names them",
        )
    options = {} if request.num_classes is None else {"num_classes": request.num_classes}
    model = _on(device, lambda: library.create_model(name, pretrained=False, **options))
    return Made(model, (_image(request, tuple(model.default_cfg["input_size"]), device),))


def _hugging_face(request: Request, device: str) -> Made:
    import torch

    path = Path(request.source.partition(":")[2])
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        raise UsageError(
            f"{request.source}: there is no file {file}",
            hint="hf:FOLDER is a local Hugging Face folder (or its config.json); nothing is downloaded",
        )
    library = optional("transformers", request.source)
    if request.num_classes is not None:
        raise UsageError("--num-classes does not apply to hf: sources", hint="set num_labels in the config")
    config = _explained(request.source, lambda: library.AutoConfig.from_pretrained(str(file)))
    weights = [f for f in ("model.safetensors", "model.safetensors.index.json") if (file.parent / f).is_file()]
    cls = _class_of(library, config, request.source)
    trained = bool(weights) and device != "meta"
    if trained:
        model = _explained(request.source, lambda: cls.from_pretrained(str(file.parent), local_files_only=True))
    else:
        model = _on(device, lambda: cls(config))
    if model.main_input_name == "pixel_values":
        side = getattr(config, "image_size", 224)
        shape = (getattr(config, "num_channels", 3), *(side if isinstance(side, (list, tuple)) else (side, side)))
        return Made(model, (), {"pixel_values": _image(request, shape, device)}, trained)
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_SEQ
    ids = torch.zeros((request.batch, request.seq or min(DEFAULT_SEQ, limit)), dtype=torch.int64, device=device)
    kwargs = {model.main_input_name: ids}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids
    return Made(model, (), kwargs, trained)


def _class_of(library: Any, config: Any, source: str) -> Any:
    """The class that the config names, or the bare model of its type."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(library, name, None)
        if found is not None:
            return found
    mapping = library.AutoModel._model_mapping
    if type(config) not in mapping:
        raise UsageError(
            f"{source}: transformers has no model for a {type(config).__name__}",
            hint='name its class in the config: "architectures": ["LlamaForCausalLM"]',
        )
    return mapping[type(config)]


def _image(request: Request, default: tuple[int, ...], device: str) -> Tensor:
    import torch

    if request.seq is not None:
        raise UsageError(f"--seq does not apply to {request.source}", hint="it reads images: --input 3x224x224")
    return torch.zeros((request.batch, *(request.image or default)), device=device)


def _on(device: str, build: Callable[[], Any]) -> Any:
    """Build on `device`. What reads values while it is built (RegNet) cannot start on meta and is moved there."""
    import torch

    from ..trace.fake_mode import no_init

    try:
        with torch.device(device), no_init(device):
            return build()
    except RuntimeError:  # also what PyTorch calls not implemented on meta
        if device != "meta":
            raise
    return build().to(device)


def _explained(source: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except UsageError:
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{source} cannot be built: {type(error).__name__}: {first_line}") from error


def optional(name: str, source: str) -> Any:
    """An optional library.

    Raises:
        UsageError: it is not installed, or does not import.
    """
    _declare_torchvision_ops()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise UsageError(
            f"{source} needs the package {missing}, which is not installed",
            hint=f"pip install {missing} (keep your torch: give pip a constraints file)",
        ) from None
    except Exception as error:
        raise UsageError(f"{source}: importing {name} failed: {type(error).__name__}: {error}") from error


_declared: list[Any] = []


def _declare_torchvision_ops() -> None:
    """A torchvision whose compiled ops do not fit this torch dies on import for the want of two schemas.

    No classification model calls them, so they are declared where torchvision is installed and its library does not load.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or not spec.submodule_search_locations or "torchvision" in sys.modules:
        return
    folder = Path(next(iter(spec.submodule_search_locations)))
    for file in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(file))
        except OSError:
            break
        return
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
