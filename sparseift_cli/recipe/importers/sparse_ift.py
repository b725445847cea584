"""The authors' Sparse-IFT configurations (CIFAR and ImageNet ResNets) as recipes: a base file and an experiment on top.

Facts of that code: an experiment's lists are a grid of runs. Its launch scripts fix the drop fraction at 0.3 and a mask
update every 100 steps whatever the YAML says; mask updates end at 80 % of the run. Sparse Wide takes int(width * sqrt(k)) with
k = round(1/(1-s)) and then searches the density at which the whole model meets `flop_budget`: here `match: model` with that
`base_width`. Without `sift_scaling` nothing is widened: scope none, distributed by `maskopt_mask_distribution`. The other
members replace the 3x3 convolutions of a block and leave the 1x1 ones of shortcuts as they are; the last norm of a block
begins at zero where the block is the plain one, dense or wide. CIFAR:
multistep x0.2 at epochs 60, 120, 160, Nesterov momentum, decay on everything; a parallel branch is a convolution with its
BatchNorm, and the activation follows the sum. ImageNet: cosine, plain momentum, no decay on norms and biases, 8 processes; a
parallel branch ends with a ReLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from ...errors import UsageError, one_of
from ...sparsity.algorithms import ALGORITHMS
from .foreign import Foreign, Imported, Note, checked_number

MARKS = {"maskopt", "maskopt_sparsity", "sift_family", "sift_scaling", "block_name"}
MEMBERS = {
    "sparse_wide": "wide",
    "sparse_parallel": "parallel",
    "sparse_factorized": "factorized",
    "sparse_doped": "doped",
}
CIFAR_KEYS, IMAGENET_KEYS = ("learning_rate",), ("lr", "label_smoothing", "amp", "lr_scheduler", "lr_min")
STEM = 64  # channels of the stem of both ResNets
PROCESSES = 8
BETWEEN = {"linear": "linear", "nonlinear_norelu": "norm", "nonlinear_relu": "activation"}  # uv_layer: U and V
SHORTCUTS = "*.downsample.0"  # 1x1 convolutions, as the zoo's ResNets call them
IGNORED = "the authors' launch script does not pass this on"
REASONS = {
    "log_interval": "the log has every step that is evaluated",
    "print_freq": "the log has every step that is evaluated",
    "flop_budget": "the budget is the dense model's own count, made by the audit",
    "block_name": "the transform decides which block is used",
    "sync_bn": "batch statistics are each process's own",
    "output_dir": "runs go to the runs directory",
}


def recognises(files: list[Foreign]) -> bool:
    """Is one of these a Sparse-IFT configuration? A dense baseline has a model beside the settings of its base file alone."""
    keys = {key for f in files if isinstance(f.document.data, dict) for key in f.document.data}
    return bool(MARKS & keys or ("model" in keys and keys & {*CIFAR_KEYS, *IMAGENET_KEYS}))


def convert(files: list[Foreign], picks: Mapping[str, str]) -> list[Imported]:
    """One recipe for each point of the grid that `picks` (key to value) leaves.

    Raises:
        UsageError: the experiment has no such point, or what it describes is not there.
    """
    for file in files:
        if not isinstance(file.document.data, dict):
            raise UsageError(f"{file.path} is no mapping of settings")
    where = {key: f for f in files for key in f.document.data}  # the last file wins, as in the authors' launcher
    cifar = _is_cifar(where)
    given = {key: f.document.data[key].plain() for key, f in where.items()}
    imported = [_one(point, where, cifar=cifar) for point in _grid(given, picks)]
    if not imported:
        raise UsageError("no run of the experiment has what --pick asks for")
    return imported


def _is_cifar(where: Mapping[str, Foreign]) -> bool:
    """Which of the authors' two programs the files are for: only their base files say it, by the names of settings.

    Raises:
        UsageError: both or neither.
    """
    cifar, imagenet = ([key for key in keys if key in where] for keys in (CIFAR_KEYS, IMAGENET_KEYS))
    if cifar and not imagenet:
        return True
    if imagenet and not cifar:
        return False
    if cifar:
        at = " and ".join(_place(key, where) for key in (cifar[0], imagenet[0]))
        raise UsageError(f"{at}: one is of the CIFAR program, the other of the ImageNet one")
    named = " and ".join(dict.fromkeys(str(file.path) for file in where.values()))
    raise UsageError(
        f"{named}: nothing says whether this is for the CIFAR or the ImageNet program of the authors",
        hint="give the base.yaml of its folder too: it has learning_rate (CIFAR) or lr (ImageNet)",
    )


def _place(key: str, where: Mapping[str, Foreign]) -> str:
    """File, line and key of a setting."""
    file = where[key]
    return f"{file.path}:{file.document.key_locations[key].line}: {key}"


def _grid(given: Mapping[str, Any], picks: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for key in picks:
        one_of("key of the experiment", key, list(given))
    axes = {k: v if isinstance(v, list) and k != "lr_milestones" and k != "seed" else [v] for k, v in given.items()}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        if all(str(point[key]) == value or _equal(point[key], value) for key, value in picks.items()):
            yield point


def _equal(value: Any, text: str) -> bool:
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return False


def _one(point: dict[str, Any], where: Mapping[str, Foreign], *, cifar: bool) -> Imported:
    settings = _Settings(dict(point), point, where)
    take, note = settings.take, settings.note
    model = str(take("model", "")).removeprefix("cifar_").replace("_", "")
    settings.require_one_of("model", model, ("resnet18", "resnet34"))
    algorithm, family = take("maskopt"), str(take("sift_family", "sparse_wide"))
    sparsity = settings.number("maskopt_sparsity", least=0, below=1)
    scaled = settings.yes_or_no("sift_scaling")
    sections: dict[str, Any] = {
        "model": {"name": f"{model}_cifar" if cifar else model},
        "data": {"name": take("data", "cifar100") if cifar else "imagenet"},
    }
    label, init = "dense", dict[str, Any]()
    if algorithm and algorithm != "None" and sparsity:
        settings.require_one_of("sift_family", family, list(MEMBERS))
        settings.require_one_of("maskopt", str(algorithm), ("static", "set", "rigl"))
        member = MEMBERS[family] if scaled else "sparse"
        sections |= {
            "transform": _transform(member, float(sparsity), settings, cifar=cifar),
            "sparsity": float(sparsity),
            "algorithm": _algorithm(str(algorithm), settings),
        }
        masks = take("maskopt_mask_init_method", "random")
        if masks in ("topk", "snip", "grasp", "force"):
            init["masks"] = "magnitude" if masks == "topk" else masks
        elif masks != "random":
            note("maskopt_mask_init_method", "masks start random, by magnitude, or by snip, grasp or force")
        if member == "doped":
            note(
                "sift_family",
                "the authors' code masks U and V as well, to .75, .44 and .19 of the dense FLOPs at "
                ".5, .75 and .9; here only the copy is sparse",
            )
        label = f"{member}{round(100 * float(sparsity))}_{algorithm}"
    if sections.get("transform", {}).get("member", "wide") == "wide":
        init["zero_residual"] = True
    sections |= {"init": init} if init else {}
    sections |= _training(settings, cifar=cifar)
    for key in settings.left:
        note(key, REASONS.get(key, "there is no such setting here"))
    about = f"{sections['model']['name']} on {sections['data']['name']}, {label}, from a configuration of the Sparse-IFT authors."
    return Imported(f"{sections['model']['name']}_{label}", sections, about, tuple(settings.notes))


@dataclass
class _Settings:
    """One point of a grid: what is `left` to read of it, and what was said of settings that are not carried over."""

    left: dict[str, Any]
    point: Mapping[str, Any]
    where: Mapping[str, Foreign]
    notes: list[Note] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a setting, read; the default where it is not there."""
        return self.left.pop(key, default)

    def note(self, key: str, reason: str) -> None:
        """Say that a setting is not carried over unchanged."""
        self.notes.append(Note(_place(key, self.where).removesuffix(f": {key}"), key, self.point[key], reason))

    def number(
        self,
        key: str,
        default: Any = None,
        *,
        above: float | None = None,
        least: float | None = None,
        below: float | None = None,
        whole: bool = False,
    ) -> Any:
        """A setting that is a number. Raises UsageError, with file and line, where it is none or not in these bounds."""
        if (value := self.take(key)) is None:
            return default
        return checked_number(value, _place(key, self.where), above=above, least=least, below=below, whole=whole)

    def yes_or_no(self, key: str) -> bool:
        """A setting that is true or false; false where it is not there. Raises UsageError where it is neither."""
        value = self.take(key, False)
        if not isinstance(value, bool):
            raise UsageError(f"{_place(key, self.where)} is {value!r}, neither true nor false")
        return value

    def require_one_of(self, key: str, value: str, known: Sequence[str]) -> None:
        """Raise UsageError, with file and line, unless `value` is one of `known`."""
        try:
            one_of(f"{key} of a Sparse-IFT configuration", value, known)
        except UsageError as error:
            place = f"{_place(key, self.where)}: " if key in self.where else ""
            raise UsageError(f"{place}{error.message}", hint=error.hint) from None


def _transform(member: str, sparsity: float, settings: _Settings, *, cifar: bool) -> dict[str, Any]:
    """The section; `member` is `sparse` for a network at its dense widths."""
    distribution = str(settings.take("maskopt_mask_distribution", "uniform")).lower()
    shared = {"distribution": distribution} if distribution in ("er", "erk") and member in ("wide", "sparse") else {}
    if distribution != "uniform" and not shared:
        settings.note(
            "maskopt_mask_distribution", "layers keep the FLOPs of their dense ones, which a distribution would change"
        )
    if member == "sparse":
        return {"member": "wide", "scope": "none", "match": "off", **shared}
    found: dict[str, Any] = {"member": member}
    if member == "wide":
        return found | {"match": "model", "base_width": int(STEM * sqrt(round(1 / (1 - sparsity)))), **shared}
    found["exclude"] = [SHORTCUTS]
    if member == "parallel":
        found["activation"] = "none" if cifar else "relu"
    elif member == "factorized":
        between = str(settings.take("uv_layer", "linear"))
        settings.require_one_of("uv_layer", between, tuple(BETWEEN))
        found["inner"] = BETWEEN[between]
    return found


def _algorithm(name: str, settings: _Settings) -> dict[str, Any]:
    take, note = settings.take, settings.note
    for key, fixed in (("maskopt_drop_fraction", 0.3), ("maskopt_frequency", 100)):
        value = take(key)
        if value not in (None, fixed):
            note(key, f"{IGNORED}: {fixed} is what ran, and what is written")
    for key in ("maskopt_end_iteration", "maskopt_drop_fraction_anneal"):
        if take(key) is not None:
            note(key, IGNORED)
    if take("maskopt_begin_iteration"):
        note("maskopt_begin_iteration", "mask updates start with the run")
    ran = {"delta_t": 100, "drop_fraction": 0.3, "stop": 0.8}
    return {"name": name, **{k: v for k, v in ran.items() if k in ALGORITHMS.get(name).option_names()}}


def _training(settings: _Settings, *, cifar: bool) -> dict[str, Any]:
    take, number = settings.take, settings.number
    settings.require_one_of("optimizer", str(take("optimizer", "sgd")), ("sgd",))
    sgd: dict[str, Any] = {
        "name": "sgd",
        "lr": number("learning_rate" if cifar else "lr", 0.1, above=0),
        "momentum": number("momentum", 0.9, least=0, below=1),
        "weight_decay": number("weight_decay", 5e-4 if cifar else 1e-4, least=0),
    }
    sgd["nesterov"] = cifar and sgd["momentum"] > 0
    training = {"epochs": number("epochs", 200 if cifar else 90, above=0), **_seeds(settings)}
    batch = number("batch_size", 128 if cifar else 32, least=1, whole=True)
    if cifar:
        schedule = {"name": "multistep", "milestones": ["60 epochs", "120 epochs", "160 epochs"], "gamma": 0.2}
        return {"optimizer": sgd, "schedule": schedule, "training": training | {"batch_size": batch}}
    workers = number("num_gpus", PROCESSES, least=1, whole=True)
    accumulate = number("gradient_accumulation_steps", 1, least=1, whole=True)
    if "batch_size" in settings.point:
        settings.note("batch_size", f"it is for each of {workers} processes: {batch * workers} is written")
    training |= {
        "batch_size": batch * workers * accumulate,
        "label_smoothing": number("label_smoothing", 0.0, least=0, below=1),
        "precision": "fp16" if settings.yes_or_no("amp") else "fp32",
    }
    training |= {"accumulate": accumulate} if accumulate != 1 else {}
    sgd["no_decay_on"] = ["norm", "bias"]
    if (kind := take("lr_scheduler", "cosineannealing")) != "cosineannealing":
        settings.note("lr_scheduler", f"{kind} is not read; a cosine is written")
    schedule = {"name": "cosine", "final_lr": number("lr_min", 0.0, least=0)}
    if take("clip_grad_norm") not in (None, "None"):
        settings.left["clip_grad_norm"] = settings.point["clip_grad_norm"]
        training["clip"] = number("clip_grad_norm", above=0)
    return {"optimizer": sgd, "schedule": schedule, "training": training}


def _seeds(settings: _Settings) -> dict[str, Any]:
    """`seed` or `seeds` of the section training."""
    given = settings.take("seed", 0)
    seeds = [
        checked_number(seed, _place("seed", settings.where), least=0, whole=True)
        for seed in (given if isinstance(given, list) else [given])
        if "seed" in settings.where
    ] or [0]
    return {"seed": seeds[0]} if len(seeds) == 1 else {"seeds": seeds}
