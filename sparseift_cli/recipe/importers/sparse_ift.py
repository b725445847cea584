"""The authors' Sparse-IFT configurations (CIFAR and ImageNet ResNets) as recipes: a base file and an experiment on top.

Facts of that code: an experiment's lists are a grid of runs. Its launch scripts fix the drop fraction at 0.3 and a mask
update every 100 steps whatever the YAML says; mask updates end at 80 % of the run. Sparse Wide takes int(width * sqrt(k)) with
k = round(1/(1-s)) and then searches the density at which the whole model meets `flop_budget`: here `match: model` with that
`base_width`. The other members replace the 3x3 convolutions of a block and leave the 1x1 ones of shortcuts as they are; the
last norm of a block begins at zero where the block is the plain one, dense or wide. CIFAR:
multistep x0.2 at epochs 60, 120, 160, Nesterov momentum, decay on everything; a parallel branch is a convolution with its
BatchNorm, and the activation follows the sum. ImageNet: cosine, plain momentum, no decay on norms and biases, 8 processes; a
parallel branch ends with a ReLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from ...errors import UsageError, one_of
from ...sparsity.algorithms import ALGORITHMS
from .foreign import Foreign, Imported, Note

MARKS = {"maskopt", "maskopt_sparsity", "sift_family", "sift_scaling", "block_name"}
MEMBERS = {
    "sparse_wide": "wide",
    "sparse_parallel": "parallel",
    "sparse_factorized": "factorized",
    "sparse_doped": "doped",
}
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
    """Is one of these a Sparse-IFT configuration?"""
    return any(isinstance(f.document.data, dict) and MARKS & set(f.document.data) for f in files)


def convert(files: list[Foreign], picks: Mapping[str, str]) -> list[Imported]:
    """One recipe for each point of the grid that `picks` (key to value) leaves.

    Raises:
        UsageError: the experiment has no such point, or what it describes is not there.
    """
    cifar = any(f.find(key) is not None for f in files for key in ("learning_rate", "block_name")) and not any(
        f.find(key) is not None for f in files for key in ("lr", "label_smoothing", "amp")
    )
    where = {key: f for f in files for key in f.document.data}  # the last file wins, as in the authors' launcher
    given = {key: f.document.data[key].plain() for key, f in where.items()}
    imported = [_one(point, where, cifar=cifar) for point in _grid(given, picks)]
    if not imported:
        raise UsageError("no run of the experiment has what --pick asks for")
    return imported


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
    left = dict(point)
    notes: list[Note] = []

    def note(key: str, reason: str) -> None:
        file = where[key]
        notes.append(Note(f"{file.path}:{file.document.key_locations[key].line}", key, point[key], reason))

    def take(key: str, default: Any = None) -> Any:
        return left.pop(key, default)

    model = str(take("model", "")).removeprefix("cifar_").replace("_", "")
    one_of("model of a Sparse-IFT configuration", model, ("resnet18", "resnet34"))
    algorithm, sparsity, family = take("maskopt"), take("maskopt_sparsity"), take("sift_family", "sparse_wide")
    scaled = take("sift_scaling", False)
    sections: dict[str, Any] = {
        "model": {"name": f"{model}_cifar" if cifar else model},
        "data": {"name": take("data", "cifar100") if cifar else "imagenet"},
    }
    label, init = "dense", dict[str, Any]()
    if algorithm and sparsity:
        one_of("sift_family", str(family), list(MEMBERS))
        member = MEMBERS[str(family)]
        sections |= {
            "transform": _transform(member, float(sparsity), left, cifar=cifar),
            "sparsity": float(sparsity),
            "algorithm": _algorithm(str(algorithm), take, note),
        }
        masks = take("maskopt_mask_init_method", "random")
        if masks in ("topk", "snip", "grasp", "force"):
            init["masks"] = "magnitude" if masks == "topk" else masks
        elif masks != "random":
            note("maskopt_mask_init_method", "masks start random, by magnitude, or by snip, grasp or force")
        if not scaled:
            note(
                "maskopt",
                "sift_scaling is off, so the file trains a network of fewer FLOPs; the recipe keeps the dense FLOPs",
            )
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
    sections |= _training(take, note, cifar=cifar)
    for key in left:
        note(key, REASONS.get(key, "there is no such setting here"))
    about = f"{sections['model']['name']} on {sections['data']['name']}, {label}, from a configuration of the Sparse-IFT authors."
    return Imported(f"{sections['model']['name']}_{label}", sections, about, tuple(notes))


def _transform(member: str, sparsity: float, left: dict[str, Any], *, cifar: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"member": member}
    if member == "wide":
        found |= {"match": "model", "base_width": int(STEM * sqrt(round(1 / (1 - sparsity))))}
        return found
    found["exclude"] = [SHORTCUTS]
    if member == "parallel":
        found["activation"] = "none" if cifar else "relu"
    elif member == "factorized":
        between = str(left.pop("uv_layer", "linear"))
        one_of("uv_layer", between, tuple(BETWEEN))
        found["inner"] = BETWEEN[between]
    return found


def _algorithm(name: str, take: Any, note: Any) -> dict[str, Any]:
    one_of("maskopt", name, ("static", "set", "rigl"))
    for key, fixed in (("maskopt_drop_fraction", 0.3), ("maskopt_frequency", 100)):
        value = take(key)
        if value not in (None, fixed):
            note(key, f"{IGNORED}: {fixed} is what ran, and what is written")
    for key in ("maskopt_end_iteration", "maskopt_drop_fraction_anneal"):
        if take(key) is not None:
            note(key, IGNORED)
    if take("maskopt_begin_iteration"):
        note("maskopt_begin_iteration", "mask updates start with the run")
    if take("maskopt_mask_distribution", "uniform") != "uniform":
        note("maskopt_mask_distribution", "set transform.distribution yourself; it needs transform.match: model")
    ran = {"delta_t": 100, "drop_fraction": 0.3, "stop": 0.8}
    return {"name": name, **{k: v for k, v in ran.items() if k in ALGORITHMS.get(name).option_names()}}


def _training(take: Any, note: Any, *, cifar: bool) -> dict[str, Any]:
    if (optimizer := take("optimizer", "sgd")) != "sgd":
        raise UsageError(f"optimizer {optimizer!r} of a Sparse-IFT configuration is not read", hint="sgd is")
    sgd = {
        "name": "sgd",
        "lr": take("learning_rate") or take("lr") or 0.1,
        "momentum": take("momentum", 0.9),
        "nesterov": cifar,
        "weight_decay": take("weight_decay", 5e-4 if cifar else 1e-4),
    }
    seeds, batch, workers = take("seed", 0), take("batch_size", 128 if cifar else 32), take("num_gpus", PROCESSES)
    training: dict[str, Any] = {"epochs": take("epochs", 200 if cifar else 90), "batch_size": batch}
    training |= (
        {"seed": seeds} if not isinstance(seeds, list) else {"seed": seeds[0]} if len(seeds) == 1 else {"seeds": seeds}
    )
    if cifar:
        schedule = {"name": "multistep", "milestones": ["60 epochs", "120 epochs", "160 epochs"], "gamma": 0.2}
    else:
        note("batch_size", f"it is for each of {workers} processes: {batch * workers} is written")
        training |= {
            "batch_size": batch * workers,
            "label_smoothing": take("label_smoothing", 0.0),
            "precision": "fp16" if take("amp", False) else "fp32",
        }
        sgd["no_decay_on"] = ["norm", "bias"]
        if (accumulate := take("gradient_accumulation_steps", 1)) != 1:
            training |= {"accumulate": accumulate, "batch_size": batch * workers * accumulate}
        if (kind := take("lr_scheduler", "cosineannealing")) != "cosineannealing":
            note("lr_scheduler", f"{kind} is not read; a cosine is written")
        schedule = {"name": "cosine", "final_lr": take("lr_min", 0.0)}
        if (clip := take("clip_grad_norm")) not in (None, "None"):
            training["clip"] = clip
    return {"optimizer": sgd, "schedule": schedule, "training": training}
