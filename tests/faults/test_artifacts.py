"""Folders that `sparseift transform` wrote: read back bit for bit, refused when they are damaged, never half written."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli.errors import ArtifactError, CheckFailed, UsageError
from sparseift_cli.mask.attached import masks_of, pattern_of
from sparseift_cli.models.zoo import registry
from sparseift_cli.plan.members import wide

X = torch.randn(2, 3, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(192, 5)
    )


@pytest.fixture
def written(tmp_path: Path) -> tuple[nn.Module, Path]:
    new, _ = sparseift.transform(net(), X, sparsity=0.75)
    return new, sparseift.save(new, tmp_path / "out")


@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
def test_a_round_trip_is_exact(member: str, tmp_path: Path) -> None:
    new, _ = sparseift.transform(net(), X, member=member, sparsity=0.75)
    path = sparseift.save(new, tmp_path / "out", state_dict=True)
    with torch.device("meta"):
        dense = net()
    back = sparseift.load(path, into=dense)
    assert torch.equal(back(X), new.eval()(X))
    assert all(torch.equal(m, masks_of(new)[k]) for k, m in masks_of(back).items())
    assert list(masks_of(back)) == list(masks_of(new))
    assert sparseift.audit(back, X).forward_ratio == sparseift.flops(str(path)).forward_ratio
    assert sparseift.flops(str(path)).plan.to_json() == json.loads((path / "plan.json").read_text())
    plain = torch.load(path / "state_dict.pt", weights_only=True)
    assert plain.keys() == new.state_dict().keys()
    assert sparseift.save(back, tmp_path / "again").is_dir()


def test_ties_survive(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = registry.build("llama_tiny")
    ids = torch.randint(0, 100, (1, 8))
    new, _ = sparseift.transform(model, ids, sparsity=0.5)
    back = sparseift.load(sparseift.save(new, tmp_path / "out"), into=model)
    assert back.get_parameter("lm_head.weight") is back.get_parameter("model.embed_tokens.weight")
    assert torch.equal(back(ids), new.eval()(ids))


def test_the_dense_model_must_be_given_where_no_source_names_it(written) -> None:
    with pytest.raises(UsageError, match="does not say how"):
        sparseift.load(written[1])
    with pytest.raises(UsageError, match="does not fit this Linear"):
        sparseift.load(written[1], into=nn.Linear(3, 3))


def damage(path: Path, kind: str) -> None:
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "garbage":
        path.write_bytes(b"\x00" + os.urandom(64))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "masks.safetensors", "plan.json", "table.json", "surgery.json", "provenance.json"]
)
@pytest.mark.parametrize("kind", ["missing", "truncated", "garbage"])
def test_damage_is_one_sentence(written, name: str, kind: str) -> None:
    _, path = written
    damage(path / name, kind)
    if name == "model.safetensors" and kind == "missing":
        assert all(p.is_meta or p.numel() for p in sparseift.load(path, into=net()).parameters())
        return
    with pytest.raises(ArtifactError) as error:
        sparseift.load(path, into=net())
    assert "\n" not in error.value.message and error.value.hint


def test_a_changed_mask_or_plan_is_noticed(written) -> None:
    from safetensors.torch import load_file, save_file

    _, path = written
    masks = load_file(path / "masks.safetensors")
    (key,) = masks
    masks[key].view(-1)[masks[key].view(-1).nonzero()[0]] = False
    save_file(masks, path / "masks.safetensors")
    with pytest.raises(ArtifactError, match="is not the planned one"):
        sparseift.load(path, into=net())
    plan = json.loads((path / "plan.json").read_text())
    plan["layers"][2]["macs"] += 1
    (path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ArtifactError, match="counts otherwise"):
        sparseift.flops(str(path))


def test_a_folder_of_before_patterns_were_kept_by_layer_loads(tmp_path: Path) -> None:
    """Older versions kept the pattern in the spec alone."""
    new, _ = sparseift.transform(net(), X, sparsity=0.75, pattern="4x4")
    path = sparseift.save(new, tmp_path / "out")
    for name, rows in (("plan", "layers"), ("surgery", "masked")):
        document = json.loads((path / f"{name}.json").read_text())
        dropped = [row.pop("pattern", None) for row in document[rows]]
        assert "4x4" in dropped
        (path / f"{name}.json").write_text(json.dumps(document))
    assert [row.pattern for row in sparseift.flops(str(path)).plan.layers if row.status == "transformed"] == ["4x4"]
    back = sparseift.load(path, into=net())
    assert pattern_of(back.get_submodule("3"), "weight") == "4x4"
    assert torch.equal(back(X), new.eval()(X))


def test_a_folder_keeps_widths_that_were_rounded_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of an older version, which did not make them multiples of the block; here as a copy of the module too."""
    with monkeypatch.context() as older:
        older.setattr(wide, "blocks_of_widths", lambda spec: ((), Fraction(0)))
        new, made = sparseift.transform(net(), X, sparsity=0.5, pattern="4x4")
        path = sparseift.save(new, tmp_path / "out")
        torch.save(new, tmp_path / "new.pt")
    assert new[0].out_channels == 11  # 8 * 1.41; now it is 12
    assert sparseift.flops(str(path)).plan.to_json() == made.to_json()
    assert torch.equal(sparseift.load(path, into=net())(X), new.eval()(X))
    copy = torch.load(tmp_path / "new.pt", weights_only=False)
    assert sparseift.audit(copy, X).plan.to_json() == made.to_json()
    assert sparseift.transform(net(), X, sparsity=0.5, pattern="4x4")[0][0].out_channels == 12


def test_nothing_is_overwritten_and_nothing_is_left_half(
    written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, path = written
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(ArtifactError, match="holds a transformed model already"):
        sparseift.save(new, path)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    for force in (False, True):
        with pytest.raises(ArtifactError, match="was not written by sparseift"):
            sparseift.save(new, foreign, force=force)
    assert (foreign / "cat.jpg").read_bytes() == b"cat"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ArtifactError, match="No space left"):
            sparseift.save(new, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photos"]
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


def test_a_model_changed_behind_its_plan_is_noticed() -> None:
    from sparseift_cli.errors import CheckFailed

    new, _ = sparseift.transform(net(), X, sparsity=0.75)
    mask = sparseift.masks(new)["3.weight"]
    mask.view(-1)[(~mask).view(-1).nonzero()[0]] = True
    with pytest.raises(CheckFailed, match=r"3\.weight: 865, planned 864"):
        sparseift.audit(new, X)


def test_a_folder_runs_no_code_that_nobody_imported(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unheard_of.py").write_text(
        "import pathlib\nimport torch\nfrom torch import nn\n\n\ndef net():\n    pathlib.Path('ran').touch()\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)\n"
    )
    command = request.getfixturevalue("sparseift")
    assert command("transform", "unheard_of:net", "-s", "0.75", "-o", "out")[0] == 0
    (tmp_path / "ran").unlink()
    monkeypatch.delitem(sys.modules, "unheard_of")
    with pytest.raises(UsageError, match="names unheard_of:net, whose code would run") as refused:
        sparseift.load("out")
    assert "trust=True" in (refused.value.hint or "") and not (tmp_path / "ran").exists()
    assert sparseift.load("out", trust=True)(torch.zeros(1, 4)).shape == (1, 2)  # imported from now on
    assert sparseift.load("out")(torch.zeros(1, 4)).shape == (1, 2)
    provenance = tmp_path / "out" / "provenance.json"
    provenance.write_text(provenance.read_text().replace("unheard_of:net", "os:abort"))
    with pytest.raises(UsageError, match="names os:abort"):
        sparseift.load("out")


@pytest.mark.parametrize("algorithm", ["gmp", "granet"])
def test_masks_that_are_pruned_still_are_not_saved_as_the_plan(tmp_path: Path, algorithm: str) -> None:
    torch.manual_seed(0)
    model, _ = sparseift.transform(net(), X, sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = sparseift.Sparsifier(model, optimizer, algorithm=algorithm, total_steps=40, delta_t=4)
    for step in range(40):
        model(X).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        if step == 5:
            for refuse in (lambda: sparseift.save(model, tmp_path / "out"), lambda: sparseift.audit(model, X)):
                with pytest.raises(CheckFailed, match=r"planned numbers of non-zeros: .*, planned ") as refused:
                    refuse()
                assert "GMP and GraNet" in (refused.value.hint or "")
            assert not (tmp_path / "out").exists()
    assert sparseift.load(sparseift.save(model, tmp_path / "out"), into=net()) is not None
    sparseift.audit(model, X)
