"""Import: the authors' GPT-3 and ResNet settings become recipes that cost what theirs cost; nothing is lost unsaid."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseift_cli.errors import UsageError
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.recipe.importers import as_recipe, read_foreign
from sparseift_cli.recipe.importers.foreign import Imported
from sparseift_cli.recipe.load import Recipe, load

MODEL = """
  name: gpt3
  hidden_size: {hidden}
  filter_size: {filter}
  num_hidden_layers: 12
  num_heads: 12
  max_position_embeddings: 1024
  vocab_size: 50257
  position_embedding_type: learned
  share_embedding_weights: true
  nonlinearity: gelu
  dropout_rate: 0.1
  attention_dropout_rate: 0.1
  layer_norm_epsilon: 1.0e-5
  initializer: {{name: truncated_normal, mean: 0.0, std: 0.02}}
"""

STATIC_50 = (
    """
train_input: {data_processor: GptHDF5MapDataProcessor, data_dir: ./wikitext-103_hdf5/train/, shuffle: false, batch_size: 512}
eval_input: {data_dir: ./wikitext-103_hdf5/valid/, batch_size: 231}
model:"""
    + MODEL.format(hidden=1092, filter=4368)
    + """  mixed_precision: true
  fp16_type: cbfloat16
optimizer:
  optimizer_type: AdamW
  betas: [0.9, 0.95]
  eps: 1.0e-8
  weight_decay: 0.1
  correct_bias: true
  max_gradient_norm: 1.0
  learning_rate:
    - {scheduler: Linear, initial_learning_rate: 0.0, end_learning_rate: 6.0e-4, total_iters: 2151}
    - {scheduler: CosineDecay, initial_learning_rate: 6.0e-4, end_learning_rate: 6.0e-5, total_iters: 19360}
sparsity:
  sparsity: 0.50
  init_method: random
  param_filter: ["*proj_[qkv]_dense_layer.weight", "*proj_output_dense_layer.weight", "*linear_layer.weight"]
runconfig: {max_steps: 21511, eval_steps: 1, checkpoint_steps: 2152, save_initial_checkpoint: false}
"""
)

NEW = """
trainer:
  init:
    backend: {backend_type: CSX}
    model:
MODEL
    optimizer:
      AdamW: {betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, correct_bias: true}
    schedulers:
    - SequentialLR:
        schedulers:
        - LinearLR: {initial_learning_rate: 0.0, end_learning_rate: 6.0e-4, total_iters: 2151}
        - CosineDecayLR: {initial_learning_rate: 6.0e-4, end_learning_rate: 6.0e-5, total_iters: 19360}
    precision: {enabled: true, fp16_type: cbfloat16, max_gradient_norm: 1.0, loss_scaling_factor: dynamic}
    sparsity: SPARSITY
    loop: {max_steps: 21511, eval_frequency: 2152, eval_steps: 1}
    checkpoint: {steps: 2152, save_initial_checkpoint: false}
    callbacks: [{ComputeNorm: {}}]
  fit:
    train_dataloader: {data_processor: GptHDF5MapDataProcessor, data_dir: ./wikitext-103_hdf5/train/, batch_size: 512}
    val_dataloader: &val {data_processor: GptHDF5MapDataProcessor, data_dir: ./valid/, batch_size: 231}
  validate: {val_dataloader: *val}
"""
RIGL = """
      sparsity: 0.75
      init_method: random
      algorithm: rigl
      drop_fraction: {type: cosine, init: 0.3, half_period: 17209}
      update: {freq: 500, stop: 17209}
      param_filter: ["*proj_[qkv]_dense_layer.weight", "*proj_output_dense_layer.weight", "*linear_layer.weight"]"""


def new(sparsity: str, hidden: int = 1536, feed_forward: int = 6144) -> str:
    model = MODEL.format(hidden=hidden, filter=feed_forward).strip("\n").replace("  ", "      ", 1)
    model = "\n".join("      " + line.strip() for line in model.splitlines())
    return NEW.replace("MODEL", model).replace("SPARSITY", sparsity)


def converted(folder: Path, text: str, **options: Any) -> tuple[Imported, Recipe]:
    (folder / "theirs.yaml").write_text(text, encoding="utf-8")
    (imported,) = read_foreign([folder / "theirs.yaml"], **options)
    (folder / "ours.yaml").write_text(as_recipe(imported), encoding="utf-8")
    return imported, load(folder / "ours.yaml")


def ratio(recipe: Recipe) -> tuple[float, dict[str, tuple[int, ...]]]:
    """Forward FLOPs over the dense ones, and the widths of some layers of block 0."""
    from sparseift_cli.models.source import Request, load_table
    from sparseift_cli.plan.audit import audit
    from sparseift_cli.plan.plan import make_plan
    from sparseift_cli.plan.spec import TrainingSpec, TransformSpec

    table = load_table(Request(recipe.model, seq=recipe.options["seq"]))
    result = audit(make_plan(table, TransformSpec.of(recipe.transform), TrainingSpec(**recipe.training)))
    assert result.plan is not None
    assert result.forward_ratio is not None
    shapes = {
        row.layer.name: (row.parts[0].shape.inputs, row.parts[0].shape.outputs)
        for row in result.plan.layers
        if ".h.0." in row.layer.name and row.parts
    }
    return float(result.forward_ratio), shapes


def test_static_50_of_the_legacy_format(tmp_path: Path) -> None:
    imported, recipe = converted(tmp_path, STATIC_50)
    spec = recipe.spec
    assert (recipe.model, recipe.options) == ("gpt3_small", {"seq": 1024})
    assert (recipe.transform["base_width"], recipe.transform["sparsity"], spec.algorithm.name) == (
        1092,
        "0.5",
        "static",
    )
    assert recipe.transform["include"] == ()
    assert spec.optimizer.model_dump() == {
        "name": "adamw",
        "lr": 6e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "no_decay_on": ("norm", "bias"),
        "fused": True,
    }
    assert (spec.schedule.name, spec.schedule.warmup, spec.schedule.final_lr) == ("cosine", "2151 steps", 6e-5)
    training = spec.training
    assert (training.steps, training.batch_size, training.clip, training.precision) == (21_511, 512, 1.0, "bf16")
    assert spec.checkpoint.every == 2152
    total, shapes = ratio(recipe)
    assert shapes["transformer.h.0.mlp.c_fc"] == (1092, 4368)
    assert total == pytest.approx(1.17, abs=0.005)
    keys = {note.key for note in imported.notes}
    assert keys == {
        "model.fp16_type",
        "train_input.data_processor",
        "train_input.data_dir",
        "train_input.shuffle",
        "eval_input",
        "model.initializer",
        "runconfig.eval_steps",
        "runconfig.save_initial_checkpoint",
    }
    assert f"{tmp_path / 'theirs.yaml'}:2" in {note.where for note in imported.notes}


def test_rigl_75_of_the_trainer_format(tmp_path: Path) -> None:
    imported, recipe = converted(tmp_path, new(RIGL))
    spec = recipe.spec
    assert (recipe.transform["base_width"], recipe.transform["sparsity"]) == (1536, "0.75")
    algorithm = spec.algorithm
    assert (algorithm.name, algorithm.delta_t, algorithm.drop_fraction, algorithm.decay, algorithm.stop) == (
        "rigl",
        500,
        0.3,
        "cosine",
        0.8,
    )
    from sparseift_cli.plan.spec import TrainingSpec

    assert TrainingSpec(**recipe.training).schedule.end == 17_209
    total, shapes = ratio(recipe)
    assert shapes["transformer.h.0.mlp.c_fc"] == (1536, 6144)
    assert total == pytest.approx(1.40, abs=0.005)
    assert spec.evaluation.every == 2152
    keys = {note.key for note in imported.notes}
    assert {"trainer.init.backend", "trainer.init.callbacks", "trainer.validate", "trainer.fit.val_dataloader"} <= keys
    assert not any("sparsity" in key for key in keys)
    assert "Not carried over:" in (tmp_path / "ours.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("block", "sparsity", "algorithm", "include", "said"),
    [
        ("0.75", 0.75, {"name": "static"}, (), []),
        (
            "{type: rigl, sparsity: 0.75, update: {freq: 100}}",
            0.75,
            {"name": "rigl", "delta_t": 100, "stop": 1.0, "drop_fraction": 0.3},
            (),
            [],
        ),
        (
            "{algorithm: set, schedule: 0.75, drop_fraction: 0.2, update: {steps: [100, 200, 300]}}",
            0.75,
            {"name": "set", "delta_t": 100, "decay": "constant", "drop_fraction": 0.2},
            (),
            [],
        ),
        (
            "{algorithm: rigl, sparsity: 0.75, update: {steps: [100, 250]}}",
            0.75,
            {"delta_t": 100},
            (),
            ["equal distances"],
        ),
        (
            "{algorithm: rigl, sparsity: 0.75, update: {freq: 10, start: 50}}",
            0.75,
            {"delta_t": 10},
            (),
            ["start with the run"],
        ),
        (
            "{algorithm: rigl, sparsity: 0.75, drop_fraction: {type: exp, init: 0.4, gamma: -1}, update: {freq: 5, stop: 50}}",
            0.75,
            {"drop_fraction": 0.4, "decay": "cosine"},
            (),
            ["falls from 0.4 to 0 at step 50"],
        ),
        (
            "{algorithm: rigl, sparsity: 0.75, drop_fraction: {type: linear, init: 0.4, slope: -0.008}, update: {freq: 5, stop: 50}}",
            0.75,
            {"drop_fraction": 0.4, "decay": "linear"},
            (),
            [],
        ),
        (
            "{algorithm: gmp, sparsity: {type: exp, init: 0, final: 0.75, gamma: -0.01}, update: {freq: 100, stop: 17209}}",
            0.75,
            {"name": "gmp", "stop": 0.8},
            (),
            ["cubic of gmp"],
        ),
        (
            "{algorithm: gmp, sparsity: {type: cosine, init: 0.0, minimum: 0.75, half_period: 21511}, update: {freq: 100}}",
            0.75,
            {"name": "gmp"},
            (),
            ["cubic of gmp"],
        ),
        ("{algorithm: gmp, sparsity: [0.1, 0.75], update: {freq: 100}}", 0.75, {"name": "gmp"}, (), ["does not cycle"]),
        (
            "{type: gmp, sparsity_schedule: [[0, 0.1], [8605, 0.75]], update: {freq: 100}}",
            0.75,
            {"name": "gmp", "stop": 0.4},
            (),
            ["cubic of gmp"],
        ),
        (
            "{sparsity: 0.75, init_method: topk, param_filter: '*ffn*'}",
            0.75,
            {"name": "static"},
            ("*.mlp.c_fc", "*.mlp.c_proj"),
            [],
        ),
        ("{sparsity: 0.75, init_method: checkerboard}", 0.75, {"name": "static"}, (), ["random is written"]),
        ("{sparsity: 0.75, param_filter: ['*proj_q*']}", 0.75, {}, ("*.attn.c_attn",), ["one layer here"]),
        ("{sparsity: 0.75, param_filter: nothing}", 0.75, {}, (), ["matches no layer"]),
        ("{sparsity: 0.75, param_name_patterns: 'ffn.*weight'}", 0.75, {}, ("*.mlp.c_fc", "*.mlp.c_proj"), []),
        (
            "{type: static, param_name_patterns: {'linear_layer': {sparsity: 0.75}, 'proj_output': {sparsity: 0.75}}}",
            0.75,
            {},
            ("*.attn.c_proj", "*.mlp.c_fc", "*.mlp.c_proj"),
            [],
        ),
        ("{algorithm: my.Own, sparsity: 0.75}", 0.75, {"name": "static"}, (), ["'my.own' is not there"]),
        ("[{sparsity: 0.75, param_filter: '*ffn*'}, {sparsity: 0.75, param_filter: '*self_attn*'}]", 0.75, {}, (), []),
        (
            "{algorithm: static, groups: [{params: {sparsity: 0.75}, param_filter: '*ffn*'}, {sparsity: 0.3, param_filter: '*attn*'}]}",
            0.75,
            {},
            ("*.mlp.c_fc", "*.mlp.c_proj"),
            ["this group is left dense"],
        ),
    ],
)
def test_forms_of_the_sparsity_block(
    tmp_path: Path, block: str, sparsity: float, algorithm: dict[str, Any], include: tuple[str, ...], said: list[str]
) -> None:
    imported, recipe = converted(tmp_path, new(block))
    assert recipe.transform["sparsity"] == str(sparsity)
    assert recipe.transform["include"] == include
    for key, value in algorithm.items():
        assert getattr(recipe.spec.algorithm, key) == value, key
    notes = [str(n) for n in imported.notes if "sparsity" in n.key]
    assert len(notes) == len(said), notes
    assert all(part in note for part, note in zip(said, notes, strict=True))
    assert recipe.spec.init.masks == ("magnitude" if "topk" in block else "random")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (new("{algorithm: rigl}"), "has no sparsity"),
        (new("1.5"), "1.5 is no sparsity in [0, 1)"),
        (new("{sparsity: {type: wave}}"), "is no sparsity"),
        (new("{sparsity: 0.5, param_name_patterns: '('}"), "broken regular expression"),
        (new("0.75").replace("max_steps: 21511, ", ""), "gives no number of steps"),
        (new("0.75", hidden=1111), "no GPT of 12 layers and 12 heads that widens to hidden 1111"),
        ("trainer: [{trainer: {init: {model: {}}}}]\n", "holds several trainers"),
        ("a: 1\n", "neither a Cerebras Model Zoo configuration nor"),
        (
            "model: {hidden_size: 768}\nrunconfig: {max_steps: 5}\n",
            "theirs.yaml:1: the model has no name; of the Model Zoo",
        ),
        (
            "model: {name: gpt2, hidden_size: wide}\nrunconfig: {max_steps: 5}\n",
            ":1: model.hidden_size is 'wide', not a whole",
        ),
        (new("0.75").replace(", batch_size: 512", ""), "gives no batch size"),
        (
            new(RIGL).replace("freq: 500", "freq: '100'"),
            "theirs.yaml:33: trainer.init.sparsity.update.freq is '100', not a whole",
        ),
        (STATIC_50.replace("  learning_rate:\n", "  other:\n"), "optimizer.learning_rate gives no learning rate"),
        (
            STATIC_50[: STATIC_50.index("  learning_rate:")].replace("1092", "768").replace("4368", "3072")
            + "  learning_rate: 0\nrunconfig: {max_steps: 5}\n",
            ": optimizer.learning_rate is 0, not a number above 0",
        ),
        ("model: {hidden_size: 1, hidden_size: 2}\n", "key 'hidden_size' appears twice"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        converted(tmp_path, text)
    assert said in caught.value.message


@pytest.mark.parametrize(
    "family",
    ["bert", "bert/classifier", "vision_transformer", "dit", "dino", "t5", "llama", "mixtral", "santacoder", "jais"],
)
def test_other_families_of_the_model_zoo_are_refused(tmp_path: Path, family: str) -> None:
    """Their sizes are called as a GPT's are, and often are a GPT's."""
    with pytest.raises(
        UsageError, match=rf"theirs.yaml:\d+: the model is '{family}'; of the Model Zoo gpt2 and gpt3 are read"
    ):
        converted(tmp_path, new("null", 768, 3072).replace("name: gpt3", f"name: {family}"))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value of a document."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


@pytest.mark.parametrize("wrong", ["100", [["a"]]])
@pytest.mark.parametrize("format", ["model zoo", "cifar"])
def test_no_value_ends_in_a_traceback(tmp_path: Path, format: str, wrong: Any) -> None:
    """Every value in turn is one of a wrong type: the file is read without it, or refused in words."""
    texts = [new(RIGL)] if format == "model zoo" else [CIFAR_BASE + CIFAR.replace("[0.50, 0.75, 0.90]", "0.5")]
    (tree,) = map(yaml.safe_load, texts)
    for path in places(tree):
        changed = holder = yaml.safe_load(texts[0])
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = wrong
        (tmp_path / "theirs.yaml").write_text(json.dumps(changed))  # JSON is YAML, and quicker to write
        with suppress(UsageError):
            for imported in read_foreign([tmp_path / "theirs.yaml"]):
                as_recipe(imported)


def test_a_dense_configuration_and_one_at_the_dense_width(tmp_path: Path) -> None:
    _, recipe = converted(tmp_path, new("null", 768, 3072))
    assert (recipe.model, recipe.transform, recipe.spec.algorithm.name) == ("gpt3_small", {}, "dense")
    _, recipe = converted(tmp_path, new("0.75", 768, 3072))
    sizes = ("sparsity", "scope", "match", "base_width")
    assert [recipe.transform[key] for key in sizes] == ["0.75", "none", "off", None]  # a control, as the file is
    _, recipe = converted(tmp_path, new("0.75", 768, 3072), model="gpt3_small")
    assert [recipe.transform[key] for key in sizes] == ["0.75", "none", "off", None]


def test_model_can_be_named(tmp_path: Path) -> None:
    _, recipe = converted(tmp_path, new("0.75", hidden=1111, feed_forward=4444), model="gpt2_medium")
    assert (recipe.model, recipe.transform["base_width"]) == ("gpt2_medium", 1111)


@pytest.mark.parametrize(
    ("old", "replacement", "key"),
    [
        ("filter_size: 6144", "filter_size: 6000", "filter_size"),
        ("dropout_rate: 0.1", "dropout_rate: 0.0", "dropout_rate"),
        ("position_embedding_type: learned", "position_embedding_type: rotary", "position_embedding_type"),
        ("AdamW: {", "Lamb: {", "optimizer.Lamb"),
        ("total_iters: 19360", "total_iters: 100", "schedulers"),
        ("CosineDecayLR", "PolynomialLR", "schedulers"),
    ],
)
def test_settings_that_differ_are_named(tmp_path: Path, old: str, replacement: str, key: str) -> None:
    imported, _ = converted(tmp_path, new("0.75").replace(old, replacement, 1))
    assert any(note.key.endswith(key) for note in imported.notes), [n.key for n in imported.notes]


CIFAR_BASE = "batch_size: 128\nepochs: 200\nlog_interval: 150\noptimizer: sgd\nlearning_rate: 0.1\nweight_decay: 5.0e-4\nmomentum: 0.9\n"
CIFAR = (
    "seed: [0]\nmodel: resnet_18\nblock_name: Block\nmaskopt: rigl\nmaskopt_sparsity: [0.50, 0.75, 0.90]\n"
    "sift_scaling: True\nsift_family: sparse_wide\n"
)
IMAGENET_BASE = (
    "batch_size: 32\nlr: 0.256\nmomentum: 0.875\nweight_decay: 3.0517578125e-05\nlabel_smoothing: 0.1\n"
    "lr_scheduler: cosineannealing\nlr_min: 0.0\nepochs: 90\namp: true\n"
)
IMAGENET = (
    "model: resnet_34\nseed: 0\nmaskopt: rigl\nmaskopt_sparsity: [0.5, 0.9]\nmaskopt_mask_distribution: uniform\n"
    "maskopt_mask_init_method: random\nmaskopt_drop_fraction: 0.5\nmaskopt_frequency: 100\nsift_scaling: true\n"
    "sift_family: sparse_wide\nflop_budget: 7355270501\n"
)


def grid(folder: Path, base: str, experiment: str, **picks: str) -> list[tuple[Imported, Recipe]]:
    (folder / "base.yaml").write_text(base)
    (folder / "experiment.yaml").write_text(experiment)
    found = []
    for imported in read_foreign([folder / "base.yaml", folder / "experiment.yaml"], picks=picks):
        (folder / f"{imported.name}.yaml").write_text(as_recipe(imported))
        found.append((imported, load(folder / f"{imported.name}.yaml")))
    return found


def test_authors_cifar_experiment_is_a_grid_of_recipes(tmp_path: Path) -> None:
    found = grid(tmp_path, CIFAR_BASE, CIFAR)
    assert [i.name for i, _ in found] == [f"resnet18_cifar_wide{s}_rigl" for s in (50, 75, 90)]
    assert [r.transform["base_width"] for _, r in found] == [90, 128, 202]
    imported, recipe = found[-1]
    spec = recipe.spec
    assert (recipe.transform["match"], spec.algorithm.stop, spec.algorithm.delta_t) == ("model", 0.8, 100)
    assert (spec.optimizer.nesterov, spec.optimizer.weight_decay, spec.optimizer.no_decay_on) == (True, 5e-4, ())
    assert (spec.schedule.milestones, spec.schedule.gamma) == (("60 epochs", "120 epochs", "160 epochs"), 0.2)
    assert {n.key for n in imported.notes} == {"log_interval", "block_name"}
    assert str(imported.notes[-1]).startswith(f"{tmp_path}/experiment.yaml:3: block_name 'Block': ")


def test_authors_imagenet_experiment(tmp_path: Path) -> None:
    ((imported, recipe),) = grid(tmp_path, IMAGENET_BASE, IMAGENET, maskopt_sparsity=".9")
    spec = recipe.spec
    assert (recipe.model, recipe.transform["base_width"], spec.algorithm.drop_fraction) == ("resnet34", 202, 0.3)
    assert (spec.training.batch_size, spec.training.label_smoothing, spec.training.precision) == (256, 0.1, "fp16")
    assert (spec.optimizer.nesterov, spec.optimizer.no_decay_on) == (False, ("norm", "bias"))
    reasons = {note.key: note.reason for note in imported.notes}
    assert "8 processes: 256 is written" in reasons["batch_size"]
    assert "does not pass this on: 0.3" in reasons["maskopt_drop_fraction"]
    assert "made by the audit" in reasons["flop_budget"]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        (
            {"sparse_wide": "sparse_parallel", "rigl": "static"},
            {"member": "parallel", "branch_activation": "each", "activation": "none", "match": "layer"},
        ),
        (
            {"sparse_wide": "sparse_factorized\nuv_layer: nonlinear_norelu"},
            {"member": "factorized", "inner": "norm"},
        ),
        ({"sparse_wide": "sparse_factorized"}, {"inner": "linear", "exclude": ("*.downsample.0",)}),
        ({"sparse_wide": "sparse_doped"}, {"member": "doped"}),
    ],
)
def test_authors_other_members(tmp_path: Path, changes: dict[str, str], want: dict[str, Any]) -> None:
    text = CIFAR
    for old, replacement in changes.items():
        text = text.replace(old, replacement)
    imported, recipe = grid(tmp_path, CIFAR_BASE, text)[0]
    assert want.items() <= recipe.transform.items()
    assert ("sift_family" in {n.key for n in imported.notes}) == (want.get("member") == "doped")


@pytest.mark.parametrize(
    ("base", "text", "activation"), [(CIFAR_BASE, CIFAR, "none"), (IMAGENET_BASE, IMAGENET, "relu")]
)
def test_authors_parallel_blocks(tmp_path: Path, base: str, text: str, activation: str) -> None:
    """Their blocks replace the two 3x3 convolutions; a branch ends with BatchNorm on CIFAR, and with ReLU on ImageNet."""
    _, recipe = grid(tmp_path, base, text.replace("sparse_wide", "sparse_parallel"))[0]
    from sparseift_cli.models.source import Request, load_table
    from sparseift_cli.plan.plan import make_plan

    assert recipe.transform["activation"] == activation
    plan = make_plan(load_table(Request(recipe.model)), TransformSpec.of(recipe.transform))
    left = {row.layer.name for row in plan.layers if row.layer.kernel and row.status == "untouched"}
    assert left == {"conv1", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}


@pytest.mark.parametrize(
    ("text", "zero"),
    [
        (CIFAR, True),
        (IMAGENET, True),
        ("model: resnet_18\nblock_name: Block\n", True),
        (CIFAR.replace("sparse_wide", "sparse_doped"), False),
        (CIFAR + "maskopt_mask_init_method: snip\n", True),
    ],
)
def test_authors_blocks_begin_at_zero(tmp_path: Path, text: str, zero: bool) -> None:
    """Their scripts leave `zero_init_residual` on, which zeroes the plain block alone."""
    _, recipe = grid(tmp_path, IMAGENET_BASE if text is IMAGENET else CIFAR_BASE, text)[0]
    assert recipe.spec.init.zero_residual == zero
    assert recipe.spec.init.masks == ("snip" if "snip" in text else "random")


def test_authors_unknown_layer_between_factors(tmp_path: Path) -> None:
    text = CIFAR.replace("sparse_wide", "sparse_factorized\nuv_layer: nonlinear_rleu")
    with pytest.raises(UsageError, match="nonlinear_rleu"):
        grid(tmp_path, CIFAR_BASE, text)


def test_authors_dense_baseline_and_oddities(tmp_path: Path) -> None:
    ((_, recipe),) = grid(tmp_path, CIFAR_BASE, "seed: [0, 1]\nmodel: resnet_18\nblock_name: Block\n")
    assert (recipe.transform, recipe.spec.algorithm.name, recipe.spec.training.seeds) == ({}, "dense", (0, 1))
    odd = CIFAR.replace("True", "False") + (
        "maskopt_mask_init_method: lamp\nmaskopt_begin_iteration: 5\nmaskopt_end_iteration: 9\n"
        "maskopt_mask_distribution: erk\nmine: 3\n"
    )
    imported, _ = grid(tmp_path, CIFAR_BASE, odd)[0]
    keys = {n.key for n in imported.notes}
    assert {"maskopt_mask_init_method", "maskopt_begin_iteration", "maskopt_end_iteration", "mine"} <= keys
    for text, said in (
        ("renset_18", r"experiment.yaml:2: model: unknown model of a Sparse-IFT configuration 'renset18'"),
        ("resnet_18\noptimizer: adam", r"experiment.yaml:3: optimizer: unknown optimizer"),
        ("resnet_18\nlearning_rate: 0", r"experiment.yaml:3: learning_rate is 0, not a number above 0"),
        (
            "resnet_18\nmaskopt: rigl\nmaskopt_sparsity: 1.0",
            r"experiment.yaml:4: maskopt_sparsity is 1.0, not a number .* below 1",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            grid(tmp_path, CIFAR_BASE, f"block_name: Block\nmodel: {text}\n")
    with pytest.raises(UsageError, match="no run of the experiment"):
        grid(tmp_path, CIFAR_BASE, CIFAR, maskopt_sparsity="0.6")
    with pytest.raises(UsageError, match="unknown key of the experiment 'sparsity'"):
        grid(tmp_path, CIFAR_BASE, CIFAR, sparsity="0.5")


@pytest.mark.parametrize(("distribution", "written"), [("uniform", "uniform"), ("erk", "erk"), ("er", "er")])
def test_authors_sparse_networks_of_the_dense_widths(tmp_path: Path, distribution: str, written: str) -> None:
    """Without sift_scaling nothing is widened: the baseline that the article compares with."""
    text = CIFAR.replace("sift_scaling: True", "sift_scaling: False") + f"maskopt_mask_distribution: {distribution}\n"
    imported, recipe = grid(tmp_path, CIFAR_BASE, text)[1]
    want = {"member": "wide", "scope": "none", "match": "off", "distribution": written, "sparsity": "0.75"}
    assert want.items() <= recipe.transform.items()
    assert imported.name == "resnet18_cifar_sparse75_rigl"
    assert not any("maskopt" in note.key for note in imported.notes)


def test_which_program_of_the_authors_is_said_by_the_base_file(tmp_path: Path) -> None:
    for base, model in ((CIFAR_BASE, "resnet18_cifar"), (IMAGENET_BASE, "resnet18")):
        text = CIFAR.replace("sparse_wide", "sparse_parallel")  # the ImageNet program's file has block_name too
        assert grid(tmp_path, base, text)[0][1].model == model
    for base, said in (
        ("epochs: 3\n", "nothing says whether"),
        (CIFAR_BASE + "lr_min: 0.0\n", "one is of the CIFAR"),
    ):
        with pytest.raises(UsageError, match=said):
            grid(tmp_path, base, CIFAR)
    without = IMAGENET_BASE.replace("batch_size: 32\n", "")
    assert grid(tmp_path, without, IMAGENET)[0][1].spec.training.batch_size == 256


def test_options_of_the_other_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is a Model Zoo file"):
        converted(tmp_path, new("0.75"), picks={"a": "b"})
    (tmp_path / "c.yaml").write_text(CIFAR)
    with pytest.raises(UsageError, match="names its own"):
        read_foreign([tmp_path / "c.yaml"], model="resnet18")
