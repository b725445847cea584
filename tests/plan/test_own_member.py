"""A member from outside the package is planned, carried out, counted and trained as the four of the paper are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from sparseift_cli.plan import members
from sparseift_cli.plan.members import MEMBERS, Member
from sparseift_cli.plan.spec import TransformSpec
from tests.helpers.own_member import MACS, WIDTH, SequenceModule, TwoInSequence, mlp

NAMED = "tests.helpers.own_member:TwoInSequence"
MODEL = "tests.helpers.own_member:mlp"


@pytest.fixture(params=["two-in-sequence", NAMED])
def member(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, root: Path) -> str:
    """Its name, once registered in Python, and once as `package.module:Name`, which is looked for in the working folder."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(MEMBERS, "_entries", dict(MEMBERS._entries))
    if ":" not in request.param:
        MEMBERS.register("two_in_sequence", TwoInSequence())
    return request.param


def test_it_is_transformed_and_measured_as_planned(member: str) -> None:
    model, x = mlp()
    new, plan = sparseift.transform(model, x, member=member, sparsity=0.75)
    rows = {row.layer.name: row for row in plan.layers}
    assert [(row.macs, row.nnz, row.weights) for row in (rows["3"], rows["5"])] == [
        (WIDTH**2, WIDTH**2, 2 * WIDTH**2)
    ] * 2
    assert [(p.role, p.nnz) for p in rows["3"].parts] == [("first", WIDTH**2 // 2), ("second", WIDTH**2 // 2)]
    assert isinstance(new[3], SequenceModule)  # pyright: ignore[reportIndexIssue]
    audit = sparseift.audit(
        new, x
    )  # traces the module and counts its masks: raises where they are not what was planned
    assert audit.dense.forward_macs == MACS and audit.forward_ratio == 1
    assert sparseift.flops(model, x, member=member, sparsity=0.75).forward_ratio == 1
    new(torch.randn(3, 3, 8, 8)).sum().backward()


def test_what_it_leaves_alone_says_why(member: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    _, plan = sparseift.transform(model, torch.randn(1, 4), member=member, sparsity=0.75)
    assert [row.reason for row in plan.layers] == ["input layer", "only square linear layers", "", "output layer"]


def test_the_command_line_takes_it(member: str, sparseift) -> None:
    code, out, err = sparseift("flops", MODEL, "--transform", member, "-s", "0.75", "--json")
    assert code == 0, err
    found = json.loads(out)
    name = NAMED if ":" in member else "two_in_sequence"
    assert found["transform"]["member"] == name and found["totals"]["transformed"]["forward_macs"] == MACS
    assert [part["name"] for part in found["layers"][1]["parts"]] == ["first", "second"]
    code, out, _ = sparseift("flops", MODEL, "--transform", member, "-s", "0.75")
    assert code == 0 and "two in sequence, sparsity 0.75" in out
    code, out, _ = sparseift("inspect", MODEL, "--why", "--transform", member)
    assert code == 0 and "2 in sequence" in " ".join(out.split())


def test_a_folder_of_it_is_loaded_again(member: str, tmp_path: Path) -> None:
    model, x = mlp()
    new, _ = sparseift.transform(model, x, member=member, sparsity=0.75)
    sparseift.save(new, tmp_path / "out")
    back = sparseift.load(tmp_path / "out", into=mlp()[0])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(back(x), new(x)) and sparseift.flops(tmp_path / "out").forward_ratio == 1


@pytest.mark.parametrize("algorithm", ["static", "rigl"])
def test_a_recipe_trains_it_at_the_planned_flops(member: str, algorithm: str, sparseift, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"""
model: {{name: "{MODEL}", input: 3x8x8}}
data: synthetic-images
transform: {{member: "{member}"}}
sparsity: 0.75
algorithm: {algorithm}
training: {{steps: 4, batch_size: 8, device: cpu}}
evaluation: {{every: 4, limit: 16}}
"""
    )
    assert sparseift("recipe", "validate", str(recipe), "--plan")[0] == 0
    code, _, err = sparseift("train", str(recipe), "--runs", str(tmp_path / "runs"))
    assert code == 0, err
    (path,) = (tmp_path / "runs").rglob("audit.json")
    last = json.loads((path.parent / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["flops"] == 4 * 8 * json.loads(path.read_text("utf-8"))["totals"]["transformed"]["training_flops"]


def test_it_refuses_to_start_as_the_dense_layer(member: str) -> None:
    model, x = mlp()
    with pytest.raises(UsageError, match="cannot start as the dense layer") as refusal:
        sparseift.transform(model, x, member=member, sparsity=0.75, options=sparseift.Options(start="preserve"))
    assert refusal.value.hint == "use --init fresh"


def test_what_is_no_member_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown member 'wid'") as unknown:
        TransformSpec(member="wid")
    assert unknown.value.hint == "did you mean 'wide'?"
    with pytest.raises(UsageError, match="pathlib:Path is not a member: it is no Member"):
        TransformSpec(member="pathlib:Path")
    with pytest.raises(UsageError, match="there is already a member 'wide'"):
        MEMBERS.register("wide", TwoInSequence())


class Strange(TwoInSequence):
    """Its torch half is no module."""

    torch_half = "pathlib:Path"


def test_a_torch_half_that_is_none_is_refused() -> None:
    model, x = mlp()
    with pytest.raises(UsageError, match="pathlib:Path, which is no MemberModule"):
        sparseift.transform(model, x, member=f"{__name__}:Strange", sparsity=0.75)


@pytest.mark.parametrize("name", ["wide", "Sparse-Wide", "sparse_wide", "WIDE"])
def test_either_spelling_is_read_and_documents_have_the_one_they_always_had(name: str) -> None:
    spec = TransformSpec(member=name)
    assert spec.member == "wide" and spec.to_json()["member"] == "sparse_wide"
    assert TransformSpec.from_json(spec.to_json()) == spec


def test_every_member_says_what_it_is() -> None:
    assert list(MEMBERS) == ["wide", "parallel", "factorized", "doped"]
    members: list[Member] = [MEMBERS.get(name) for name in MEMBERS]
    assert [m.title for m in members] == ["Sparse Wide", "Sparse Parallel", "Sparse Factorized", "Sparse Doped"]
    assert all(m.help and m.name == name for m, name in zip(members, MEMBERS, strict=True))


def test_a_file_in_the_folder_of_members_is_all_that_a_shipped_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fifth.py").write_text("from tests.helpers.own_member import TwoInSequence\nMEMBER = TwoInSequence()\n")
    monkeypatch.setattr(members, "__path__", [*members.__path__, str(tmp_path)])
    found = members._found()
    monkeypatch.delitem(sys.modules, f"{members.__name__}.fifth")
    assert list(found) == ["wide", "parallel", "factorized", "doped", "two_in_sequence"]
