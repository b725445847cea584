"""A model that does not fit its data is refused before a run begins, and one that does is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparseift_cli.data import open_data
from sparseift_cli.recipe.load import load
from sparseift_cli.train.compatibility import check_compatibility
from sparseift_cli.train.prepare import prepare
from sparseift_cli.train.processes import Processes
from tests.helpers.misfits import classifier

Write = Callable[..., Path]
CPU = Processes(torch.device("cpu"))
IMAGES = ("model.input=3x8x8",)
WORDS = " ".join(f"word{i}" for i in range(400))
TEXT = (f"the quick brown fox, {WORDS}\n" * 20).encode()


def text(tmp_path: Path, more: bytes = b"") -> list[str]:
    (tmp_path / "text.txt").write_bytes(TEXT + more)
    return [
        "model.input=null",
        "model.seq=16",
        "data.name=text",
        f"data.root={tmp_path / 'text.txt'}",
        "evaluation.metrics=[loss]",
    ]


MISFITS = [
    (
        "segmenter",
        IMAGES,
        "gives logits of shape [2, 2, 8, 8] for a batch [2, 3, 8, 8]; synthetic-images needs [2, classes]",
    ),
    ("segmenter", (*IMAGES, "init.masks=snip"), "gives logits of shape [2, 2, 8, 8]"),
    ("four_classes", IMAGES, "has 4 outputs; synthetic-images has 10 classes"),
    ("four_classes", (*IMAGES, "training.accumulate=16"), "has 4 outputs"),
    ("last_position", None, "gives logits of shape [2, 1, 256] for a batch [2, 16]; text needs [2, 16, vocabulary]"),
    ("hidden", None, "gives dict with last_hidden_state; text needs logits [B, T, vocabulary]"),
    ("bytes_gpt", ("data.level=words",), "has 256 outputs; the tokens of text go up to 40"),
    ("small_table", None, "has an embedding of 100 tokens; the tokens of text go up to 120"),
]


@pytest.mark.parametrize(("net", "sets", "said"), MISFITS)
def test_a_misfit_is_one_message_before_a_run_begins(
    sparseift, write_recipe: Write, tmp_path: Path, net: str, sets: tuple[str, ...] | None, said: str
) -> None:
    given = list(sets) if sets and sets[0] in IMAGES else [*text(tmp_path), *(sets or ())]
    words = [word for pair in (f"model.name=tests.helpers.misfits:{net}", *given) for word in ("--set", pair)]
    code, out, err = sparseift("train", str(write_recipe("rigl", net="mlp")), *words, "--runs", str(tmp_path / "runs"))
    assert (code, out) == (2, "")
    assert f"tests.helpers.misfits:{net} {said}" in err and "hint: " in err and len(err.splitlines()) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ("segmenter", "gives logits of shape [1, 2, 8, 8]"),
        ("four_classes", "has 4 outputs; cifar10 has 10 classes"),
        ("last_position", "gives logits of shape [1, 1, 256]"),
        ("many_classes", ""),
        ("mapping", ""),
        ("flat", ""),
    ],
)
def test_a_dry_run_tells_what_sizes_tell(sparseift, write_recipe: Write, tmp_path: Path, net: str, said: str) -> None:
    given = ["data=cifar10", *IMAGES] if net in ("segmenter", "four_classes", "many_classes") else text(tmp_path)
    words = [word for pair in (f"model.name=tests.helpers.misfits:{net}", *given) for word in ("--set", pair)]
    code, _, err = sparseift("train", str(write_recipe(None)), *words, "--dry-run")
    assert code == (2 if said else 0) and said in err


@pytest.mark.parametrize(
    ("net", "images"),
    [("many_classes", True), ("of_sixteen", True), ("flat", False), ("mapping", False), ("ascii_gpt", False)],
)
def test_what_can_be_learned_from_is_no_misfit(write_recipe: Write, tmp_path: Path, net: str, images: bool) -> None:
    given = ["model.input=null" if net == "of_sixteen" else IMAGES[0]] if images else text(tmp_path)
    recipe = load(write_recipe(None), [f"model.name=tests.helpers.misfits:{net}", *given])
    prepare(recipe, 0, CPU).close()


def test_a_text_of_more_than_ascii_needs_more_than_ascii(sparseift, write_recipe: Write, tmp_path: Path) -> None:
    words = [
        w
        for pair in ("model.name=tests.helpers.misfits:ascii_gpt", *text(tmp_path, "é\n".encode() * 9))
        for w in ("--set", pair)
    ]
    code, _, err = sparseift("train", str(write_recipe(None)), *words, "--runs", str(tmp_path / "runs"))
    assert code == 2 and "has 128 outputs; the tokens of text go up to 195" in err


def test_looking_changes_nothing() -> None:
    model = classifier(10).train()
    model[1].eval()  # a norm that somebody froze
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    check_compatibility(model, "net", open_data("synthetic-images", size=8), batch_size=4, seq=None)
    assert [m.training for m in model] == [i != 1 for i in range(len(model))]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
