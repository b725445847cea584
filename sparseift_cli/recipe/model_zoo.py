"""Cerebras Model Zoo configurations of GPT models as recipes.

Two generations are read. The new one has everything under `trainer.init` and `trainer.fit`; the old one has `model`,
`optimizer`, `sparsity`, `runconfig` and `train_input` at the top. Both spell out the *widened* network (hidden 1092,
feed-forward 4368); here the dense model is named and the transform widens it, so the dense one is looked up: the zoo's GPT
with the same depth and heads whose hidden width, times sqrt(1/(1-s)), is the one in the file.
"""

from __future__ import annotations

import re
from math import sqrt
from typing import Any

from ..errors import UsageError
from . import model_zoo_schedule, model_zoo_sparsity
from .foreign import Foreign, Imported

CLOSE = 0.02  # widths are rounded to whole heads: 1092 for 1086.1
SAME = {  # what the zoo's GPT does anyway
    "position_embedding_type": "learned", "share_embedding_weights": True, "layer_norm_epsilon": 1e-5,
    "attention_type": "scaled_dot_product", "use_projection_bias_in_attention": True, "use_ffn_bias_in_attention": True,
    "use_ffn_bias": True, "nonlinearity": "gelu", "use_bias_in_output": False, "loss_scaling": "num_tokens",
    "loss_weight": 1.0, "attention_dropout_rate": 0.1, "dropout_rate": 0.1, "vocab_size": 50257, "embedding_dropout_rate": 0.1,
}  # fmt: skip
REASONS = {
    "initializer": "weights start as the model's own rule says",
    "embedding_initializer": "weights start as the model's own rule says",
    "output_layer_initializer": "weights start as the model's own rule says",
    "backend": "hardware is training.device here",
    "callbacks": "there are no callbacks in a recipe",
    "logging": "the log has every step that is evaluated",
    "loggers": "metrics.jsonl is always written",
    "loss_scaling_factor": "fp16 scales its loss dynamically",
    "loss_scale": "fp16 scales its loss dynamically",
    "precision_opt_level": "this is about Cerebras hardware",
    "data_processor": "data sets are read by their name here",
    "data_dir": "token files are of another format here; say where they are with data.root",
    "num_workers": "text is read from memory-mapped files",
    "shuffle": "training data is always shuffled, from training.seed",
    "val_dataloader": "evaluation reads the data set's own held-out part",
    "eval_input": "evaluation reads the data set's own held-out part",
    "validate": "evaluation reads the data set's own held-out part",
    "validate_all": "evaluation reads the data set's own held-out part",
    "eval_steps": "evaluation reads all of the held-out part",
}
OTHERWISE = "there is no such setting here"


def recognises(file: Foreign) -> bool:
    """Is this a Model Zoo configuration?"""
    return any(file.find(path) is not None for path in ("trainer.init.model", "model.hidden_size", "trainer.0.trainer"))


def convert(file: Foreign, model: str | None = None) -> Imported:
    """The recipe of a Model Zoo file; `model` names the dense model where the zoo has none that fits.

    Raises:
        UsageError: it has no length, or the zoo has no model for it.
    """
    if file.find("trainer.0") is not None:
        raise UsageError(
            f"{file.path} holds several trainers", hint="import them one at a time: put each into its file"
        )
    new = file.find("trainer.init") is not None
    network = "trainer.init.model" if new else "model"
    steps = _length(file)
    mask = model_zoo_sparsity.read(file, "trainer.init.sparsity" if new else "sparsity", steps)
    sections: dict[str, Any] = {"model": _model(file, network, mask, model)}
    sections["data"] = _data(file, "trainer.fit.train_dataloader" if new else "train_input")
    if mask is not None:
        widened = sections["model"].pop("base_width")
        transform = {"member": "wide", **({"base_width": widened} if widened else {}), **mask.transform}
        sections |= {"transform": transform, "sparsity": mask.sparsity, "algorithm": mask.algorithm}
        if mask.masks != "random":
            sections["init"] = {"masks": mask.masks}
    else:
        sections["model"].pop("base_width")
    sections["optimizer"], sections["schedule"] = model_zoo_schedule.read(file, new=new, steps=steps)
    sections["training"] = {"steps": steps, **_training(file, network, new=new)}
    sections |= _intervals(file)
    file.note_rest(REASONS, OTHERWISE)
    size = f"{mask.sparsity:.0%} {mask.algorithm['name']}" if mask else "dense"
    name = f"{sections['model']['name']}_{size}".replace("%", "").replace(" ", "_")
    about = f"{sections['model']['name']}, {size}, from a Cerebras Model Zoo configuration."
    return Imported(name, sections, about, tuple(file.notes))


def _length(file: Foreign) -> int:
    steps = file.take("trainer.init.loop.max_steps", "runconfig.max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise UsageError(f"{file.path} gives no number of steps",
                         hint="loop.max_steps (or runconfig.max_steps) is needed: epochs have no known length")  # fmt: skip
    return steps


def _model(file: Foreign, at: str, mask: model_zoo_sparsity.Mask | None, named: str | None) -> dict[str, Any]:
    """Name, seq, and under `base_width` the widened width (None: the file's model is not widened)."""
    take = lambda key: file.take(f"{at}.{key}")  # noqa: E731
    family, hidden, feed_forward = take("name"), take("hidden_size"), take("filter_size")
    depth, heads, positions = take("num_hidden_layers"), take("num_heads"), take("max_position_embeddings")
    for key, value in SAME.items():
        file.expect(f"{at}.{key}", value, f"the zoo's GPT has {value!r}")
    if not isinstance(hidden, int):
        raise UsageError(f"{file.path}: {at} has no hidden_size", hint="only GPT-like models of the Model Zoo are read")
    if feed_forward not in (None, 4 * hidden):
        file.note(f"{at}.filter_size", f"the zoo's GPT has feed-forward layers of 4 x hidden = {4 * hidden}")
    if named:
        return {"name": named, "seq": positions, "base_width": hidden if mask else None}
    name, dense = _dense_model(str(family or ""), hidden, depth, heads, mask.sparsity if mask else 0.0, positions)
    if name is None:
        raise UsageError(f"{file.path}: the zoo has no GPT of {depth} layers and {heads} heads that widens to hidden {hidden}",
                         hint="name the dense model it was made from: --model gpt3_small")  # fmt: skip
    if mask and dense == hidden:
        file.note(f"{at}.hidden_size", f"this is the dense model's own width, so the file trains a network of fewer FLOPs; "
                  f"the recipe widens {name} until it costs what the dense one costs")  # fmt: skip
        hidden = None
    return {"name": name, "seq": positions, "base_width": hidden if mask else None}


def _dense_model(family: str, hidden: int, depth: Any, heads: Any, sparsity: float,
                 positions: Any) -> tuple[str | None, int]:  # fmt: skip
    """The zoo's GPT that, widened for `sparsity`, is this one, and its hidden width; GPT-3 names before GPT-2 ones."""
    from ..zoo.gpt import CONFIGS

    factor = sqrt(1 / (1 - sparsity))
    fits = [(name, c.hidden, c.max_seq) for name, c in CONFIGS.items() if (c.depth, c.num_heads) == (depth, heads)
            and (c.hidden == hidden or abs(c.hidden * factor / hidden - 1) < CLOSE)]  # fmt: skip
    fits = [f for f in fits if not isinstance(positions, int) or positions <= f[2]]
    fits.sort(key=lambda f: (f[0].startswith("gpt2") != ("2" in family and "3" not in family), f[1] == hidden))
    return (fits[0][0], fits[0][1]) if fits else (None, 0)


def _data(file: Foreign, at: str) -> dict[str, Any]:
    folder = file.find(f"{at}.data_dir")
    text = str(folder.plain()) if folder else ""
    if found := re.search(r"wikitext[-_]?(2|103)(?!\d)", text):
        return {"name": "tokens", "root": f"wikitext-{found[1]}-gpt2"}
    return {"name": "tokens"}


def _training(file: Foreign, network: str, *, new: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, paths in {
        "batch_size": ("trainer.fit.train_dataloader.batch_size", "train_input.batch_size"),
        "clip": ("trainer.init.precision.max_gradient_norm", "optimizer.max_gradient_norm"),
        "seed": ("trainer.init.seed", "runconfig.seed"),
    }.items():
        value = file.take(*paths)
        if value is not None:
            found[key] = value
    mixed = file.take("trainer.init.precision.enabled", f"{network}.mixed_precision")
    at = "trainer.init.precision.fp16_type" if new else f"{network}.fp16_type"
    kind = file.take(at)
    if mixed is not False and kind is not None:
        found["precision"] = {"float16": "fp16", "bfloat16": "bf16", "cbfloat16": "bf16"}.get(kind, "fp32")
        if kind not in ("float16", "bfloat16"):
            file.note(at, f"this format is Cerebras's own; {found['precision']} is written")
    return found


def _intervals(file: Foreign) -> dict[str, Any]:
    every = {
        "evaluation": file.take("trainer.init.loop.eval_frequency", "runconfig.eval_frequency"),
        "checkpoint": file.take("trainer.init.checkpoint.steps", "runconfig.checkpoint_steps"),
    }
    return {section: {"every": steps} for section, steps in every.items() if steps}
