"""`sparseift transform` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseift_cli
from sparseift_cli.errors import UsageError


def test_from_the_zoo_to_a_folder_and_back(sparseift, tmp_path: Path) -> None:
    out = tmp_path / "wide"
    code, stdout, stderr = sparseift("transform", "resnet20", "-s", "0.75", "-o", str(out), "--export", "dense")
    assert code == 0
    assert "layer1.0.conv1" in stdout and "Written to" in stderr and "Counted again" in stderr
    again = sparseift("flops", str(out), "--json")[1]
    asked = sparseift("flops", "resnet20", "-s", "0.75", "--json")[1]
    assert json.loads(again)["totals"] == json.loads(asked)["totals"]
    code, stdout, _ = sparseift("inspect", str(out), "--values")
    assert code == 0 and "layer1.0.conv1.weight" in stdout
    model = sparseift_cli.load(out)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    code, _, stderr = sparseift("transform", "resnet20", "-s", "0.75", "-o", str(out))
    assert code == 4 and "--force" in stderr
    assert sparseift("transform", "resnet20", "-s", "0.5", "-o", str(out), "--force")[0] == 0
    assert sparseift("flops", str(out), "-s", "0.9")[0] == 2


def test_a_folder_is_held_to_a_budget_as_its_source_is(sparseift, tmp_path: Path) -> None:
    """Gates and ways to count were accepted with a folder, and ignored."""
    out = str(tmp_path / "plan")
    made = ("resnet20", "-s", "0.75")
    assert sparseift("transform", *made, "--plan-only", "-o", out)[0] == 0
    for gate in ("--max-flops-ratio", "--max-layer-ratio"):
        assert sparseift("flops", out, gate, "0.5")[0] == sparseift("flops", *made, gate, "0.5")[0] == 1
        assert sparseift("flops", out, gate, "1.5")[0] == 0
    code, stdout, stderr = sparseift("flops", out, "--max-flops-ratio", "1.0", "--format", "github")
    assert code == 1 and stdout.startswith("::error title=sparseift flops::the model costs") and not stderr
    counted = ("--algorithm", "rigl", "--delta-t", "10", "--json")
    assert sparseift("flops", out, *counted)[1] == sparseift("flops", *made, *counted)[1]
    for other in (("-t", "doped"), ("--batch", "2"), ("--verify",)):
        assert sparseift("flops", out, *other)[0] == 2


def test_a_matched_folder_is_not_shown_with_other_non_zeros(sparseift, tmp_path: Path) -> None:
    """Counted otherwise, the match would have been another; the folder's non-zeros are those that it was made with."""
    out = str(tmp_path / "plan")
    small = ("gpt2", "--seq", "8", "-s", "0.5", "--plan-only")
    assert sparseift("transform", *small, "--match", "model", "-o", out)[0] == 0
    code, stdout, stderr = sparseift("flops", out, "--causal", "exact")
    assert code == 2 and not stdout and "planned with match model" in stderr
    assert sparseift("flops", out, "--algorithm", "rigl")[0] == 0  # forward FLOPs were matched: no other masks
    with pytest.raises(UsageError, match="other non-zeros"):
        sparseift_cli.flops(out, causal="half")
    layers = str(tmp_path / "layers")
    assert sparseift("transform", *small, "-o", layers)[0] == 0
    assert sparseift("flops", layers, "--causal", "exact")[0] == 0


def test_json_is_the_audit_and_what_was_measured(sparseift, tmp_path: Path) -> None:
    code, stdout, _ = sparseift(
        "transform", "resnet20", "-s", "0.5", "-t", "doped", "-o", str(tmp_path / "o"), "--json"
    )
    data = json.loads(stdout)
    assert code == 0
    assert data["schema"] == "sparseift.flops/1"
    assert data["measured"]["forward_macs"] == data["totals"]["transformed"]["forward_macs"]
    assert data["measured"]["nonzero_params"] == data["totals"]["transformed"]["nonzero_params"]


def test_plan_only_writes_no_weights(sparseift, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    assert sparseift("transform", "gpt3_13b", "-s", "0.5", "--plan-only", "--summary", "-o", str(out))[0] == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "audit.json",
        "plan.json",
        "provenance.json",
        "surgery.json",
        "table.json",
    ]


def test_a_foreign_checkpoint(sparseift, tmp_path: Path, shared: Path) -> None:
    source = shared / "data" / "checkpoints" / "resnet20-12fca82f.th"
    out = tmp_path / "out"
    code, stdout, stderr = sparseift("transform", str(source), "-s", "0.75", "-o", str(out))
    assert (code, stdout) == (2, "") and "--init preserve" in stderr and "--init fresh" in stderr and not out.exists()
    code, _, stderr = sparseift("transform", str(source), "-s", "0.75", "-o", str(out), "--init", "fresh")
    assert code == 0, stderr
    assert json.loads((out / "provenance.json").read_text())["source"]["source"] == "resnet20"
    assert sparseift_cli.load(out)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_trained_weights_are_not_left_behind_without_a_word(
    sparseift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a checkpoint is read, or a function of the user's returns a model that it trained."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        dense[1].weight.copy_(torch.rand(8))
    torch.save(dense.state_dict(), "weights.pt")
    (tmp_path / "trained_or_not.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef fresh():\n"
        "    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)\n"
        "    return nn.Sequential(*layers), torch.zeros(1, 4)\n\n\ndef trained():\n"
        "    model, x = fresh()\n    model.load_state_dict(torch.load('weights.pt'))\n    return model, x\n"
    )
    shape = ("-s", "0.75", "--summary")
    sources = {
        "weights.pt": ("weights.pt", "--model", "trained_or_not:fresh"),
        "trained_or_not:trained": ("trained_or_not:trained",),
    }
    for name, source in sources.items():
        out = f"out_of_{len(source)}"
        code, stdout, stderr = sparseift("transform", *source, *shape, "-o", out)
        assert (code, stdout) == (2, "") and stderr.startswith(f"sparseift: {name} has trained weights")
        assert not (tmp_path / out).exists()
        assert sparseift("transform", *source, *shape, "--plan-only")[0] == 0
        for start in ("fresh", "preserve"):
            code, _, stderr = sparseift("transform", *source, *shape, "-o", out, "--force", "--init", start)
            assert code == 0 and ("dense model's output: 0" in stderr or "e-" in stderr) == (start == "preserve")
    assert sparseift("transform", "trained_or_not:fresh", *shape, "-o", "new")[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (("resnet20", "-s", "0.5"), 2, "-o FOLDER"),
        (("resnet20", "-o", "x"), 2, "--sparsity"),
        (("resnet20", "-s", "0.5", "-o", "x", "--init", "preserved"), 2, "did you mean 'preserve'"),
        (("resnet20", "-s", "0.5", "--plan-only", "--init", "preserve"), 2, "no weights to preserve"),
        (("resnet21", "-s", "0.5", "--plan-only"), 2, "did you mean"),
        (("resnet20", "-s", "0.5", "--plan-only", "--model", "resnet20"), 2, "for checkpoint files"),
        (("torchvision:resnet19", "-s", "0.5", "--plan-only"), 2, "torchvision"),
        (("hf:nowhere", "-s", "0.5", "--plan-only"), 2, "nothing is downloaded"),
        (("nowhere.pth", "-s", "0.5", "-o", "x"), 2, "nowhere.pth"),
        (("resnet20", "-s", "0.5", "-o", "x", "-f", "github"), 2, "no gates"),
        (("resnet20", "-s", "1.5", "-o", "x"), 2, "not a number in [0, 1)"),
    ],
)
def test_mistakes_are_explained(
    sparseift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, printed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    got, stdout, stderr = sparseift("transform", *words)
    assert (got, stdout) == (code, "")
    assert printed in stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
