"""Recipes: every problem with its place, all at once; defaults, --set and origins; what is written is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sparseift_cli.base import durations
from sparseift_cli.data import DATASETS
from sparseift_cli.errors import UsageError
from sparseift_cli.recipe.load import Recipe, load, require_data, run_steps
from sparseift_cli.recipe.open_arguments import open_arguments
from sparseift_cli.recipe.strict_yaml import scalar
from sparseift_cli.recipe.write import annotated_yaml, resolved_yaml

FIVE = "model: resnet18_cifar\ndata: cifar100\ntransform: wide\nsparsity: 0.9\nalgorithm: rigl\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def made(folder: Path, text: str, *sets: str) -> Recipe:
    return load(write(folder, text), sets)


def test_all_problems_at_once_with_their_places_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: resnet19\ntransfrom: wide\nsparsity: 0.5\nsparsity: 0.9\nalgorithm: {name: rigl, delta: 3}\n"
        "optimizer: {name: sgdd}\nschedule: {warmup: 5 parsecs}\ntraining: {epochs: -1, batch_size: x, seed: 1.5}\n",
    )
    with pytest.raises(UsageError) as caught:
        load(path, ["optimizer.lr=fast", "modle=x"])
    head, *lines = caught.value.message.split("\n  ")
    assert head == "the recipe has problems:"
    assert lines[:9] == [
        f"{path}:1:8: model: no model is called 'resnet19' (did you mean 'resnet18'?)",
        f"{path}:2:1: unknown key 'transfrom', did you mean 'transform'?",
        f"{path}:4:1: key 'sparsity' appears twice, first on line 3",
        f"{path}:5:25: unknown key 'delta', did you mean 'delta_t'?",
        f"{path}:6:12: optimizer: 'sgdd' is not one of sgd, adamw, did you mean 'sgd'?",
        f"{path}:7:20: schedule.warmup: expected a duration (5, '500 steps', '2 epochs', '10%'), not '5 parsecs'",
        f"{path}:8:20: training.epochs: must be above 0, not -1",
        f'{path}:8:36: training.batch_size: expected a whole number, not "x"',
        f"{path}:8:45: training.seed: expected a whole number, not 1.5",
    ]
    assert lines[9:] == ["--set modle=x: unknown key 'modle', did you mean 'model'?"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("sparsity: 0.5\n", "names no model"),
        ("model: resnet18\nsparsity: 1.5\n", ":2:11: transform.sparsity: must be below 1, not 1.5"),
        ("model: resnet18\nsparsity: high\n", ':2:11: transform.sparsity: expected a number, not "high"'),
        (
            "model: resnet18\ntransform: wider\nsparsity: 0.5\n",
            ":2:12: transform.member: unknown member 'wider' (did you mean 'wide'?)",
        ),
        ("model: resnet18\ntransform: wide\n", ":2:12: transform.sparsity: needs a value"),
        ("model: resnet18\ntransform: {member: wide, sparsity: .5}\nsparsity: 0.5\n", ":3:1: sparsity is given twice"),
        ("model: &a resnet18\ntransform: {member: wide}\nsparsity: *a\n", 'expected a number, not "resnet18"'),
        ("model: &a {name: resnet18}\nalgorithm: *a\n", "aliases are not allowed"),
        ("model: [\n", "not YAML"),
        ("model: " + "[" * 5000, "nested too deeply"),
        ("model: {name: {name: {name: 1}}}\n", "model.name: expected text, not {"),
        (
            "model: resnet18\nalgorithm: {name: rigl, delta_t: 0}\nsparsity: .5\n",
            "algorithm.delta_t: must be at least 1, not 0",
        ),
        ("model: 7\n", "model: expected a name or a mapping, not 7"),
        ("model: {input: 3x8x8}\n", "model.name: needs a value. A zoo model"),
        ("model: {name: resnet18, input: 3by3}\n", "model.input: '3by3' is not of the form it should have"),
        ("model: {name: resnet18, input: 3x32}\n", "takes channels x height x width"),
        ("model: {name: gpt2, input: 3x8}\n", "it reads tokens"),
        ("model: {name: resnet18, seq: 8}\n", "--seq does not apply to resnet18"),
        ("model: {name: gpt2, seq: 4096}\n", "learned positions for at most 1024"),
        ("model: resnet18\ntraining: 3\n", "training: expected a mapping, not 3"),
        ("model: resnet18\nlr: 3\n", "unknown key 'lr', lr belongs under optimizer"),
        ("model: resnet18\nalgorithm: {steps: 3}\n", "the length of the run is training.steps, or training.epochs"),
        ("model: resnet18\nalgorithm: rigl\n", "algorithm: rigl needs a transform and its sparsity"),
        ("model: resnet18\ntraining: {epochs: 1, steps: 1}\n", "the length of the run is epochs or steps: give one"),
        ("model: resnet18\ntraining: {batch_size: 10, accumulate: 3}\n", "does not divide into 3 micro-batches"),
        ("model: resnet18\ntraining: {seeds: [1, 1]}\n", "seeds has a seed twice"),
        ("model: resnet18\ntraining: {seeds: [1, -1]}\n", ":2:23: training.seeds.1: must be at least 0, not -1"),
        (
            "model: resnet18\noptimizer: {name: adamw, momentum: .9}\n",
            "optimizer.momentum: no option of adamw, known: name, lr,",
        ),
        ("model: resnet18\noptimizer: {name: adamw, betas: [.9]}\n", "optimizer.betas.1: expected more values"),
        ("model: resnet18\noptimizer: {name: sgd, momentum: 0, nesterov: true}\n", "nesterov needs a momentum above 0"),
        (
            "model: resnet18\noptimizer: {no_decay_on: [norms]}\n",
            "'norms' is not one of norm, bias, did you mean 'norm'?",
        ),
        ("model: resnet18\ntraining: {compile: 1}\n", "training.compile: expected true or false, not 1"),
        ("model: resnet18\ntraining: {clip: 1e999}\n", "training.clip: expected a finite number, not Infinity"),
        ("model: resnet18\ninit: preserve\n", "preserve needs the dense checkpoint: init.checkpoint"),
        (
            "model: resnet18\nsparsity: .3\ntransform: {pattern: '2:4'}\n",
            "pattern 2:4 has density 1/2, not 7/10 (use sparsity 0.5)",
        ),
        ("model: resnet18\nsparsity: .3\ntransform: {distribution: erk}\n", "it cannot match each layer"),
        ("model: resnet18\ndata: cifr10\n", "data.name: unknown data set 'cifr10' (did you mean 'cifar10'?)"),
        ("model: gpt2\ndata: {name: stdlib, validation: .2}\n", "stdlib has a held-out part of its own"),
        ("model: gpt2\ndata: {name: text, validation: .125}\n", "text is cut at a whole per cent, not at 0.125"),
        (
            "model: gpt2\ndata: stdlib\nevaluation: {test: true}\n",
            ":3:20: evaluation.test: stdlib has no test split beside",
        ),
        (
            "model: resnet18\ndata: cifar10\nevaluation: {test: true}\n",
            "data.validation holds a part of the training images out",
        ),
        ("model: resnet18\ndata: {name: cifar10, seq: 3}\n", "the tokens in a sample are model.seq"),
        (
            "model: resnet18\ncheckpoint: {best: perplexity_per_word}\n",
            "perplexity_per_word is not among evaluation.metrics",
        ),
        (
            "model: resnet18\nevaluation: {metrics: top3}\n",
            "evaluation.metrics.0: unknown metric 'top3' (did you mean 'top5'?)",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert said in caught.value.message


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "bytes.yaml")
    big = write(tmp_path, "#" * (1 << 20) + "\nmodel: resnet18\n")
    with pytest.raises(UsageError, match="too large for a recipe"):
        load(big)
    with pytest.raises(UsageError, match="too many for a recipe"):
        made(tmp_path, "model: [" + "1," * 30_000 + "]")


def test_five_lines_are_a_recipe(tmp_path: Path) -> None:
    recipe = made(tmp_path, FIVE)
    assert (recipe.model, recipe.options) == ("resnet18_cifar", {})
    assert recipe.transform["member"] == "wide"
    assert recipe.transform["sparsity"] == "0.9"
    assert recipe.training == {"algorithm": "rigl", "delta_t": 100, "stop": "0.75", "recompute": False, "steps": 78_000}
    spec = recipe.spec
    assert spec.optimizer.model_dump() == {
        "name": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "no_decay_on": (),
        "fused": True,
    }
    assert (spec.schedule.name, spec.schedule.milestones, spec.schedule.gamma) == (
        "multistep",
        ("30%", "60%", "80%"),
        0.2,
    )
    assert (spec.training.epochs, spec.training.batch_size, spec.training.unit) == (200, 128, "epochs")
    assert (spec.evaluation.metrics, spec.checkpoint.best, spec.checkpoint.keep) == (
        ("loss", "top1", "top5"),
        "top1",
        2,
    )
    with pytest.raises(ValidationError):
        spec.training.epochs = 3


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            "model: resnet18\ndata: imagenet\n",
            {
                "optimizer.lr": 0.256,
                "training.epochs": 90,
                "training.label_smoothing": 0.1,
                "schedule.name": "cosine",
                "data.workers": 8,
                "model.num_classes": None,
            },
        ),
        (
            "model: mobilenet_v2\ndata: CIFAR-100\n",
            {"data.name": "cifar100", "model.num_classes": 100, "model.input": "3x32x32"},
        ),
        ("model: {name: mobilenet_v2, input: 3x64x64}\ndata: cifar100\n", {"model.input": "3x64x64"}),
        (
            "model: resnet18\ndata: mnist\n",
            {"model.input": "1x28x28", "model.num_classes": 10, "optimizer.name": "sgd"},
        ),
        (
            "model: gpt2\ndata: wikitext-2\n",
            {
                "optimizer.name": "adamw",
                "optimizer.betas": (0.9, 0.95),
                "training.clip": 1.0,
                "training.steps": 1000,
                "data.level": "words",
                "checkpoint.best": "loss",
            },
        ),
        ("model: gpt2\n", {"optimizer.name": "adamw", "algorithm.name": "dense"}),
        ("model: a.b:c\ndata: digits\noptimizer: adamw\n", {"optimizer.lr": 1e-3, "model.input": None}),
        (
            "model: gpt2\ndata: stdlib\ntraining: {epochs: .5}\nschedule: linear\n",
            {"training.steps": None, "schedule.warmup": 0},
        ),
        (
            "model: resnet18\ntransform: {member: sparse-wide, include: layer1*}\nsparsity: .5\n".replace("-", "_"),
            {"transform.include": ("layer1*",)},
        ),
    ],
)
def test_defaults_follow_the_data_and_the_model(tmp_path: Path, text: str, want: dict[str, Any]) -> None:
    spec = made(tmp_path, text).spec
    for key, value in want.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(spec, section), name) == value, key


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("training.seeds=0..4", "training.seeds", (0, 1, 2, 3, 4)),
        ("training.seeds=3,5", "training.seeds", (3, 5)),
        ("training.seeds=[7]", "training.seeds", (7,)),
        ("training.seeds=7", "training.seeds", (7,)),
        ("training.seeds=", "training.seeds", ()),
        ("training.compile=true", "training.compile", True),
        ("training.clip=null", "training.clip", None),
        ("training.kernels=masked", "training.kernels", "masked"),
        ("training.kernels=Blocks", "training.kernels", "blocks"),
        ("training.steps=50", "training.epochs", None),
        ("sparsity=0.5", "transform.sparsity", 0.5),
        ("transform.sparsity=.5", "transform.sparsity", 0.5),
        ("transform=doped", "transform.member", "doped"),
        ("algorithm=set", "algorithm.delta_t", 7),
        ("data.root=12", "data.root", "12"),
        ("data.root=/data=x", "data.root", "/data=x"),
        ("data.root=null", "data.root", None),
        ("model=resnet34_cifar", "model.name", "resnet34_cifar"),
        ("schedule.warmup=500 steps", "schedule.warmup", "500 steps"),
        ("optimizer=adamw", "optimizer.betas", (0.9, 0.999)),
        ("evaluation.metrics=loss,top1", "evaluation.metrics", ("loss", "top1")),
    ],
)
def test_set_is_typed_by_the_schema(tmp_path: Path, option: str, key: str, value: Any) -> None:
    recipe = made(tmp_path, FIVE.replace("algorithm: rigl", "algorithm: {name: rigl, delta_t: 7}"), option)
    section, _, name = key.partition(".")
    assert getattr(getattr(recipe.spec, section), name) == value
    if value is not None and "epochs" not in key and name not in ("delta_t", "betas"):
        assert recipe.origins[key] == f"--set {option}"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("optimizer.lr=fast", '--set optimizer.lr=fast: optimizer.lr: expected a number, not "fast"'),
        ("optimizer.lr", "--set optimizer.lr: expected KEY=VALUE, as in --set optimizer.lr=1e-3"),
        ("optimizer.rl=1", "--set optimizer.rl=1: unknown key 'rl', "),
        ("optimiser.lr=1", "unknown key 'optimiser', did you mean 'optimizer'?"),
        ("lr=1", "unknown key 'lr', lr belongs under optimizer"),
        ("training=3", "--set training=3: which value of training? known: epochs, steps"),
        ("training.batch_size=1.5", "training.batch_size: expected a whole number, not 1.5"),
        ("training.seeds=a", 'training.seeds.0: expected a whole number, not "a"'),
        ("optimizer.betas=.9,.95", "optimizer.betas: no option of sgd, known: name, lr, momentum"),
        ("training.kernels=x", "unknown kernels 'x' (known: auto, masked, blocks, reference; or package.module:Name)"),
        ("training.precision=[", "'[' is not one of fp32, bf16, fp16"),
    ],
)
def test_set_says_what_is_wrong(tmp_path: Path, option: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(tmp_path, FIVE, option)
    assert said in caught.value.message


def test_set_takes_the_transform_out(tmp_path: Path) -> None:
    recipe = made(tmp_path, FIVE, "transform=null", "algorithm=dense")
    assert recipe.spec.transform is None
    assert recipe.transform == {}


def test_origins_name_line_option_and_default(tmp_path: Path) -> None:
    origins = made(tmp_path, FIVE, "optimizer.lr=1").origins
    assert origins["transform.sparsity"] == "recipe.yaml:4"
    assert origins["optimizer.lr"] == "--set optimizer.lr=1"
    assert origins["optimizer.momentum"] == "default for cifar"
    assert origins["optimizer.fused"] == "default"


@pytest.mark.parametrize(
    "text", [FIVE, "model: gpt2\ndata: stdlib\n", "model: a.b:c\n", "model: resnet18\ndata: mnist\n"]
)
def test_a_whole_recipe_is_read_as_the_same(tmp_path: Path, text: str) -> None:
    first = made(tmp_path, text, "optimizer.lr=6e-05")
    assert "lr: 6.0e-5\n" in resolved_yaml(first.spec)
    again = made(tmp_path, resolved_yaml(first.spec))
    assert again.spec == first.spec
    assert resolved_yaml(again.spec) == resolved_yaml(first.spec)
    assert made(tmp_path, annotated_yaml(first)).spec == first.spec


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        (1.0, "1"),
        (1e-8, "1.0e-8"),
        (3.0517578125e-5, "3.0517578125e-5"),
        ("no", '"no"'),
        ("2:4", '"2:4"'),
        ("12", '"12"'),
        ("1e3", '"1e3"'),
        ("", '""'),
        ("*a", '"*a"'),
        ("10%", "10%"),
        ("3x32x32", "3x32x32"),
        ("# x", '"# x"'),
        ("a: b", '"a: b"'),
        ("500 steps", "500 steps"),
        (1e300, "1.0e300"),
        ("é", '"é"'),
        ("a#b", '"a#b"'),
    ],
)
def test_scalars_are_read_as_they_were(tmp_path: Path, value: Any, text: str) -> None:
    from sparseift_cli.recipe.strict_yaml import read

    assert scalar(value) == text
    document, _ = read(write(tmp_path, f"x: {text}\n"))
    assert document.plain() == {"x": value}


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    assert made(tmp_path, "model: resnet18\nsparsity: 7.5e-1\n").transform["sparsity"] == "0.75"


def test_durations_count_in_the_unit_of_the_run() -> None:
    def steps(value: float | str, unit: str = "epochs") -> int:
        return durations.in_steps(value, run_steps=1000, epoch_steps=40, unit=unit)

    assert [steps(v) for v in (2, 0.5, "7 steps", "1 step", "1.5 epochs", "29%")] == [80, 20, 7, 1, 60, 290]
    assert [steps(v, "steps") for v in (2, "2 epochs", "100%")] == [2, 80, 1000]
    assert durations.steps_per_epoch(50_000, 128) == 390
    with pytest.raises(UsageError, match="do not fill one batch"):
        durations.steps_per_epoch(10, 64)
    assert durations.part_of_run(17_209, 21_511) == 0.8
    assert durations.part_of_run(0, 7) == 0.0
    assert durations.part_of_run(7, 7) == 1.0


def test_length_of_a_run(tmp_path: Path) -> None:
    assert run_steps(made(tmp_path, FIVE, "data.limit=1000", "training.epochs=2").spec) == 14
    assert run_steps(made(tmp_path, FIVE, "training.epochs=0.01").spec) == 3
    assert run_steps(made(tmp_path, "model: gpt2\ndata: stdlib\ntraining: {epochs: 1}\n").spec) is None
    assert run_steps(made(tmp_path, "model: gpt2\ndata: stdlib\ntraining: {epochs: 1}\n").spec, samples=3200) == 100


def test_training_needs_data(tmp_path: Path) -> None:
    require_data(made(tmp_path, FIVE))
    with pytest.raises(UsageError, match="names no data"):
        require_data(made(tmp_path, "model: resnet18\n"))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (FIVE, ("cifar100", None, {"download": True})),
        ("model: resnet18\ndata: {name: imagenet, root: /d}\n", ("imagenet", Path("/d"), {"size": 224})),
        (
            "model: resnet18_cifar\ndata: {name: synthetic-images, limit: 64}\n",
            ("synthetic-images", None, {"size": 32, "channels": 3, "classes": 100, "train": 64}),
        ),
        (
            "model: gpt2\ndata: {name: text, root: a.txt, validation: .05}\n",
            ("text", Path("a.txt"), {"level": "bytes", "max_vocab": None, "valid_percent": 5}),
        ),
        ("model: gpt2\ndata: tokens\n", ("tokens", None, {})),
        (
            "model: gpt2\ndata: {name: wikitext-103, level: bpe, tokenizer: t.json}\n",
            ("wikitext-103", None, {"level": "bpe", "max_vocab": None, "tokenizer": "t.json"}),
        ),
    ],
)
def test_arguments_of_open_data(tmp_path: Path, text: str, want: Any) -> None:
    name, root, options = open_arguments(made(tmp_path, text).spec)
    assert (name, root, options) == want
    DATASETS.get(name).require_options(options)


@pytest.mark.parametrize(
    ("data", "perplexities"),
    [
        ("stdlib", ["token"]),
        ("text", ["token"]),
        ("{name: wikitext-2, level: bytes}", ["token"]),
        ("wikitext-2", ["word"]),
        ("{name: text, level: words}", ["word"]),
        ("tokens", ["token", "word"]),
    ],
)
def test_text_is_measured_by_what_its_tokens_are(tmp_path: Path, data: str, perplexities: list[str]) -> None:
    metrics = made(tmp_path, f"model: bytes_gpt\ndata: {data}\n").spec.evaluation.metrics
    assert list(metrics) == ["loss", *(f"perplexity_per_{unit}" for unit in perplexities), "bits_per_byte"]
