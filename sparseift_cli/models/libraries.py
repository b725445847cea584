"""Models of other libraries, by name: `torchvision:resnet50`, `timm:convnext_tiny`, `hf:FOLDER`. Each import is optional.

A maker is called with the device the model is wanted on and gives the module and the input it takes. Nothing is ever
downloaded: a torchvision or timm model comes with fresh weights, a Hugging Face one with those that lie beside its config.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
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
    known = models.list_models()
    if name not in known:
        raise UsageError(
            f"torchvision {library.__version__} has no model {name!r}",
            hint=did_you_mean(name, known) or f"it has {', '.join(known[:6])}, ...",
        )
    builder = models.get_model_builder(name)
    kind = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    if kind == "detection":
        raise UsageError(
            f"{request.source} finds objects: how much it computes depends on the boxes that it finds, not on shapes alone",
            hint=_own_function("(model.backbone, torch.zeros(1, 3, 800, 800))", "for its backbone"),
        )
    if kind == "quantization":
        raise UsageError(
            f"{request.source} computes in int8, which is not counted",
            hint=f"its float twin: torchvision:{name.removeprefix('quantized_')}",
        )
    # By default the builders of segmentation models load a trained backbone, which would be a download.
    options: dict[str, Any] = {k: None for k in inspect.signature(builder).parameters if k == "weights_backbone"}
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    model = _explained(request.source, lambda: _on(device, lambda: models.get_model(name, **options)))
    shape = (3, 299, 299) if name.startswith("inception") else (3, 224, 224)
    if kind == "video":
        shape = (3, 16, *_crop(models.get_model_weights(name)))
    return Made(model, tuple(_image(request, shape, device) for _ in _required(model)))


def _crop(weights: Any) -> tuple[int, int]:
    """(height, width) that the published weights of a torchvision model were evaluated at."""
    size = next(iter(weights)).transforms.keywords["crop_size"]
    return size[0], size[-1]


def _own_function(returned: str, what: str = "with inputs that fit") -> str:
    return f"{what}: a function of yours that returns {returned}, named as package.module:function"


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
    if device != "meta" and not weights and (pickled := sorted(file.parent.glob("pytorch_model*.bin"))):
        raise UsageError(
            f"{request.source} has its weights in {pickled[0].name}, and safetensors are read",
            hint="save it again by save_pretrained; --plan-only and flops need no weights",
        )
    trained = bool(weights) and device != "meta"
    if trained:
        model = _explained(request.source, lambda: cls.from_pretrained(str(file.parent), local_files_only=True))
    else:
        model = _explained(request.source, lambda: _on(device, lambda: cls(config)))
    return Made(model, (), ForwardInputs(request, model, config, device).made(), trained)


# What a forward pass of transformers may want, by the names of its arguments and of the numbers in its configuration.
_IMAGE_TOKENS = ("image_token_id", "image_token_index")
_POSITIONS = ("max_position_embeddings", "max_target_positions", "n_positions")


class ForwardInputs:
    """The keyword arguments of one forward pass, by the names in its signature: zeros of the shapes that the config gives."""

    def __init__(self, request: Request, model: nn.Module, config: Any, device: str) -> None:
        self.request, self.model, self.config, self.device = request, model, config, device
        self.makers: dict[str, Callable[[], tuple[int, ...] | None]] = {
            "input_ids": self.tokens,
            "decoder_input_ids": self.tokens,
            "pixel_values": self.pixels,
            "input_values": self.samples,
            "input_features": self.features,
            "inputs": self.tokens,
        }

    def made(self) -> dict[str, Tensor]:
        """One tensor for each argument that the forward pass needs.

        Raises:
            UsageError: it needs others; the message names them.
        """
        import torch
        from torch import nn

        if type(self.model).forward is nn.Module.forward:
            raise UsageError(
                f"{self.request.source}: {type(self.model).__name__} has no forward pass of its own",
                hint='name one of its parts as the class in the config, "architectures": [...]',
            )
        names = self._wanted()
        shapes = {name: self.makers[name]() for name in names if name in self.makers}
        unknown = [name for name in names if shapes.get(name) is None]
        if unknown:
            kind = type(self.model).__name__
            raise UsageError(
                f"{self.request.source}: the shape of {' and '.join(unknown)}, which {kind} reads, is not known",
                hint=_own_function("(model, {" + ", ".join(f'"{name}": ...' for name in names) + "})"),
            )
        of_tokens = {name: torch.int64 for name in shapes if self.makers[name] == self.tokens}
        if self.request.seq is not None and not of_tokens:
            raise UsageError(
                f"--seq does not apply to {self.request.source}", hint=f"it reads {', '.join(names)}: --input"
            )
        return {
            name: torch.zeros((self.request.batch, *(shape or ())), dtype=of_tokens.get(name), device=self.device)
            for name, shape in shapes.items()
        }

    def _wanted(self) -> list[str]:
        """The arguments without a default, the main one, and those of a second tower: text beside images, a decoder."""
        taken = inspect.signature(self.model.forward).parameters
        wanted = [*_required(self.model), str(self.model.main_input_name)]
        if self._find("is_encoder_decoder") and "decoder_input_ids" in taken:
            wanted.append("decoder_input_ids")
        others = [name for name in ("input_ids", "pixel_values", "input_features") if name in taken]
        if len(others) > 1 and set(wanted) & set(others):
            if "pixel_values" in others and any(hasattr(self.config, name) for name in _IMAGE_TOKENS):
                raise UsageError(
                    f"{self.request.source} reads images at the places of image tokens, and how many there are is up to the text",
                    hint=_own_function('(model, {"input_ids": ..., "pixel_values": ...})'),
                )
            wanted += others
        return list(dict.fromkeys(wanted))

    def _find(self, *names: str) -> Any:
        """The first of that name in the configuration or in one that it holds; None without one, or below 1 (unlimited)."""
        held = [c for c in vars(self.config).values() if hasattr(c, "to_dict")]
        for config in (self.config, *held):
            for name in names:
                value = getattr(config, name, None)
                if value is not None and (not isinstance(value, int) or value > 0):
                    return value
        return None

    def tokens(self) -> tuple[int, ...]:
        limits = [n for name in _POSITIONS if isinstance(n := self._find(name), int)]
        return (self.request.seq or min((DEFAULT_SEQ, *limits)),)

    def pixels(self) -> tuple[int, ...]:
        side, frames = self._find("image_size", "input_size") or 224, self._find("num_frames")
        sides = (
            tuple(side.values())
            if isinstance(side, dict)
            else tuple(side)
            if isinstance(side, (list, tuple))
            else (side, side)
        )
        image = self.request.image or (self._find("num_channels") or 3, *sides)
        return (frames, *image) if frames and len(image) == 3 else image

    def samples(self) -> tuple[int, ...]:
        """Of sound: one second, or the frames of a spectrogram."""
        if mel := self._find("num_mel_bins"):
            return self.request.image or (self._find("max_length") or 1024, mel)
        channels = self._find("audio_channels")
        seconds = (self._find("sampling_rate") or 16000,)
        return self.request.image or ((channels, *seconds) if channels else seconds)

    def features(self) -> tuple[int, ...] | None:
        """Of sound: a spectrogram [frames, bins], or [bins, frames] of two frames for each position (Whisper)."""
        positions, mel, bins = (
            self._find(n) for n in ("max_source_positions", "num_mel_bins", "input_feat_per_channel")
        )
        if bins and positions:
            return self.request.image or (min(positions, 1000), bins)
        return self.request.image or ((mel, 2 * positions) if mel and positions else None)


def _required(model: nn.Module) -> list[str]:
    """The names of the arguments of its forward that have no default."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in plain and p.default is p.empty]


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
        reason = " ".join(str(error).split())[:400]
        raise UsageError(
            f"{source} cannot be built: {type(error).__name__}: {reason}",
            hint="its class refuses these options",
        ) from error


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
