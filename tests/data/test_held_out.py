"""What is measured on is never what is trained on: a part of the training split is held out, or held-out files are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_cli.data import DataSet, open_data
from sparseift_cli.data.dataset import stratified_draw
from sparseift_cli.data.image_files import FolderSet
from sparseift_cli.data.images import ImageSet
from sparseift_cli.data.token_files import write_tokens
from sparseift_cli.data.tokens import TokenSet
from sparseift_cli.errors import UsageError
from sparseift_cli.recipe.load import load, run_steps
from sparseift_cli.runs.metrics import read_metrics
from sparseift_cli.train.prepare import open_recipe_data, prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.run import run_seeds

RECIPE = """
model: digits_mlp
data: {{name: digits, validation: 0.2}}
training: {{{training}, device: cpu}}
evaluation: {{metrics: [top1], test: true}}
"""


@pytest.fixture
def digits() -> ImageSet:
    made = open_data("digits")
    assert isinstance(made, ImageSet)
    return made


def sorted_rows(*parts: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, ...]]:
    return sorted(
        (int(y), *x.flatten().tolist()) for images, labels in parts for x, y in zip(images, labels, strict=True)
    )


def test_the_two_parts_are_the_training_images(digits: ImageSet) -> None:
    split = digits.with_validation(0.2)
    assert split.split_names == ("train", "valid", "test")
    assert split.held_out == "valid"
    assert split.splits == {"train": 1154, "valid": 288, "test": 355}
    assert sorted_rows(split.images("train"), split.images("valid")) == sorted_rows(digits.images("train"))
    assert torch.equal(split.images("test")[0], digits.images("test")[0])
    assert split.sha256 != digits.sha256
    again = digits.with_validation(0.2)
    assert torch.equal(again.images("valid")[0], split.images("valid")[0])
    held, every = (part.images(name)[1].bincount() for part, name in ((split, "valid"), (digits, "train")))
    assert ((held - 0.2 * every).abs() < 1).all()  # every class gives its share


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_what_cannot_be_held_out(digits: ImageSet, share: float) -> None:
    with pytest.raises(UsageError, match=r"(0|1442) of 1442 training images of digits cannot be held out"):
        digits.with_validation(share)
    with pytest.raises(UsageError, match="has a validation split of its own"):
        digits.with_validation(0.1).with_validation(0.1)


def test_a_draw_leaves_every_class_something() -> None:
    """7 of 20: 5.25 of 15, .7 of 2 twice, .35 of 1; the single image stays."""
    labels = torch.tensor([0] * 15 + [1] * 2 + [3] * 2 + [4])
    drawn = stratified_draw(labels, 7, "a set")
    assert labels[drawn].bincount(minlength=5).tolist() == [5, 1, 0, 1, 0]
    assert not torch.equal(drawn, stratified_draw(labels, 7, "another set"))


def folder(root: Path, per_split: dict[str, int]) -> Path:
    image = pytest.importorskip("PIL.Image")
    for split, each in per_split.items():
        for label, name in enumerate(("ant", "bee", "cow")):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                image.new("RGB", (8, 8), (60 * label, 9 * i, len(split))).save(root / split / name / f"{i}.bmp")
    return root


def tokens(root: Path, *splits: str) -> Path:
    write_tokens(root, {name: torch.randint(0, 99, (200,)) for name in splits}, vocab=99)
    return root


def lines(root: Path, *splits: str) -> Path:
    for name in splits:
        (root / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(60)))
    return root


RUN = """
model: {{name: {model}}}
data: {{name: {data}, root: {root}{more}}}
training: {{steps: 1, batch_size: 2, device: cpu}}
"""
MODELS = {
    "image-folder": "tests.helpers.nets:mlp, input: 3x8x8",
    "text": "tests.helpers.nets:letters, seq: 4",
    "tokens": "tests.helpers.nets:letters, seq: 4",
}


def opened(tmp_path: Path, data: str, root: Path, more: str = "") -> DataSet:
    path = tmp_path / "recipe.yaml"
    path.write_text(RUN.format(model=MODELS[data], data=data, root=root, more=more))
    return open_recipe_data(load(path).spec)


@pytest.mark.parametrize(("share", "percent"), [(None, 10), (0.2, 20)])
@pytest.mark.parametrize("data", ["image-folder", "text", "tokens"])
def test_training_data_alone_is_divided(tmp_path: Path, data: str, share: float | None, percent: int) -> None:
    """The parts share no sample and together they are the training split."""
    root = {
        "image-folder": lambda: folder(tmp_path, {"train": 10}),
        "text": lambda: lines(tmp_path, "train"),
        "tokens": lambda: tokens(tmp_path, "train"),
    }[data]()
    dataset = opened(tmp_path, data, root, f", validation: {share}" if share else "")
    assert dataset.held_out == "valid" and dataset.drawn_from_training
    if isinstance(dataset, FolderSet):
        train, valid = dataset.files("train"), dataset.files("valid")
        assert not set(train) & set(valid)
        assert {path for path, _ in train + valid} == {str(path) for path in root.glob("train/*/*.bmp")}
        assert [label for _, label in valid] == sorted([0, 1, 2] * (percent // 10))
    else:
        assert isinstance(dataset, TokenSet)
        whole = (
            open_data(data, root).stream("train").tokens
            if data == "tokens"
            else torch.tensor(list((root / "train.txt").read_bytes()))
        )
        parts = dataset.stream("train").tokens, dataset.stream("valid").tokens
        assert torch.cat(parts).tolist() == whole.tolist()
        assert len(parts[1]) == pytest.approx(len(whole) * percent / 100, abs=9)  # a line has 9 bytes
    assert dataset.repeats("valid") == 0


@pytest.mark.parametrize("data", ["image-folder", "text", "tokens"])
def test_files_that_say_what_is_held_out_are_not_divided(tmp_path: Path, data: str) -> None:
    root = {
        "image-folder": lambda: folder(tmp_path, {"train": 10, "val": 1}),
        "text": lambda: lines(tmp_path, "train", "valid"),
        "tokens": lambda: tokens(tmp_path, "train", "valid"),
    }[data]()
    assert opened(tmp_path, data, root).drawn_from_training == ""
    with pytest.raises(UsageError, match=r"has a file that says what|has a validation split of its own"):
        opened(tmp_path, data, root, ", validation: 0.2")


def test_a_set_that_nobody_can_divide_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text("a b c\n" * 99)
    with pytest.raises(UsageError, match=r"wikitext-2 \(.*\) has only the split train: nothing is held out"):
        print(open_data("wikitext-2", tmp_path).held_out)


def test_held_out_samples_that_are_training_samples_are_counted(tmp_path: Path, digits: ImageSet) -> None:
    copied = folder(tmp_path / "images", {"train": 4})
    shutil.copytree(copied / "train", copied / "val")
    (copied / "val" / "ant" / "0.bmp").write_bytes((copied / "val" / "ant" / "0.bmp").read_bytes()[:-1] + b"x")
    assert open_data("image-folder", copied).repeats("valid") == 11
    texts = lines(tmp_path, "train")
    (tmp_path / "valid.txt").write_text((tmp_path / "train.txt").read_text()[90:290])
    assert open_data("text", texts).repeats("valid") == 200
    assert digits.repeats("test") == 0


@pytest.mark.parametrize("divided", [True, False])
def test_a_run_says_what_it_measures_on(sparseift: Any, tmp_path: Path, divided: bool) -> None:
    root = folder(tmp_path / "images", {"train": 10})
    if not divided:
        shutil.copytree(root / "train", root / "val")
    path = tmp_path / "recipe.yaml"
    path.write_text(RUN.format(model=MODELS["image-folder"], data="image-folder", root=root, more=", workers: 0"))
    code, out, err = sparseift("train", str(path), "--runs", str(tmp_path / "runs"), "--json")
    assert code == 0
    session = json.loads((Path(json.loads(out)["runs"][0]["path"]) / "provenance.json").read_text())["sessions"][0]
    if divided:
        assert "held out to measure on: 3 of its 30 training images, the same share of every class" in err
        assert session["held_out"]["drawn_from_training"].startswith("3 of its 30 training images")
    else:
        assert "warning: 30 of 30 images of the split valid of image-folder are in the training split too" in err
        assert session["held_out"]["repeated"] == {"valid": 30}


def test_a_recipe_watches_it_and_tests_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(training="epochs: 2, batch_size: 100"))
    recipe = load(path)
    assert run_steps(recipe.spec) == 22  # 1,442 - 288 images are 11 batches
    run = prepare(recipe, 0, Processes(torch.device("cpu")))
    assert (run.steps, run.held_out.split, run.test and run.test.split) == (22, "valid", "test")
    (summary,) = run_seeds(recipe, [0], tmp_path / "runs", None, lambda *_: None, lambda *_: None)
    *_, last = read_metrics(Path(summary["path"]) / "metrics.jsonl")
    assert last["top1"] * 2.88 == pytest.approx(round(last["top1"] * 2.88))  # of 288 images
    assert last["test_top1"] * 3.55 == pytest.approx(round(last["test_top1"] * 3.55))


def test_the_command_shows_it_and_a_report_judges_by_it(sparseift: Any, tmp_path: Path) -> None:
    """Runs with and without the measurement are one group: it changes no result."""
    path, runs = tmp_path / "recipe.yaml", str(tmp_path / "runs")
    path.write_text(RECIPE.format(training="epochs: 1, batch_size: 100"))
    code, out, err = sparseift("train", str(path), "--seeds", "0..1", "--runs", runs)
    assert code == 0 and "test top1" in out and "test_top1: " in out and " test_top1 " in err
    code, out, _ = sparseift("train", str(path), "--seeds", "2", "--runs", runs, "--set", "evaluation.test=false")
    assert code == 0 and "test" not in out.replace(str(tmp_path), "")
    code, out, _ = sparseift("report", runs, "--json")
    (group,) = json.loads(out)["groups"]
    assert (group["metric"], group["n"]) == ("top1", 3)
    code, out, _ = sparseift("report", runs, "--metric", "test_top1", "--json")
    (group,) = json.loads(out)["groups"]
    assert (group["metric"], group["n"], group["mean"]) == ("test_top1", 2, group["test_top1"])
    code, _, err = sparseift("report", runs, "--metric", "test_tpo1")
    assert code == 2 and "did you mean 'test_top1'?" in err
