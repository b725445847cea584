"""`sparseift flops` and `inspect` as a user types them: results on stdout, errors in one line, the right exit code."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest


def test_every_format_holds_the_same_rows(sparseift) -> None:
    data = json.loads(sparseift("flops", "resnet18", "-s", "0.9", "--json")[1])
    assert data["schema"] == "sparseift.flops/1" and data["unit"] == "flop"
    rows = list(csv.DictReader(io.StringIO(sparseift("flops", "resnet18", "-s", "0.9", "-f", "csv")[1])))
    assert [r["name"] for r in rows] == [r["name"] for r in data["layers"]]
    assert [int(r["transformed_macs"]) for r in rows] == [r["transformed_macs"] for r in data["layers"]]
    assert sum(r["transformed_macs"] for r in data["layers"]) == data["totals"]["transformed"]["forward_macs"]
    table = sparseift("flops", "resnet18", "-s", "0.9")[1]
    markdown = sparseift("flops", "resnet18", "-s", "0.9", "-f", "md")[1]
    for row in data["layers"]:
        assert row["name"] in table and f"| {row['name']} |" in markdown
        assert f"{row['transformed_macs']:,}" in table and f"{row['transformed_macs']:,}" in markdown


def test_golden_schema(sparseift) -> None:
    """Fields may be added, none removed."""
    data = json.loads(sparseift("flops", "resnet18", "-s", "0.9", "--json")[1])
    assert {
        "schema",
        "model",
        "input",
        "unit",
        "flops_per_mac",
        "causal",
        "transform",
        "totals",
        "layers",
        "uncounted",
    } <= set(data)
    assert {"member", "sparsity", "match"} <= set(data["transform"])
    assert {"forward_macs", "forward_flops", "training_flops", "params"} <= set(data["totals"]["dense"])
    assert {"nonzero_params", "activation_factor"} <= set(data["totals"]["transformed"])
    assert set(data["totals"]["ratio"]) == {"forward", "training"}
    keys = {"name", "kind", "role", "status", "reason", "dense_macs", "transformed_macs", "ratio", "density", "nnz"}
    assert all(keys <= set(row) for row in data["layers"])
    dense = json.loads(sparseift("flops", "resnet18", "--json")[1])
    assert dense["transform"] is None and dense["totals"]["transformed"] is None and dense["totals"]["ratio"] is None


def test_depth_folds_without_losing_a_mac(sparseift) -> None:
    for depth in ("1", "2"):
        rows = list(
            csv.DictReader(io.StringIO(sparseift("flops", "resnet18", "-s", "0.5", "--depth", depth, "-f", "csv")[1]))
        )
        assert sum(int(r["dense_macs"]) for r in rows) == 1_814_073_344


def test_gates(sparseift) -> None:
    assert (
        sparseift(
            "flops", "resnet18", "-s", "0.9", "--match", "model", "--max-flops-ratio", "1.0", "--max-layer-ratio", "1"
        )[0]
        == 0
    )
    code, out, err = sparseift("flops", "resnet18", "-s", "0.9", "--max-flops-ratio", "1.0")
    assert code == 1 and out and "1.140884x its dense FLOPs, above 1.0" in err and "stem +254,467,584" in err
    code, out, err = sparseift("flops", "resnet18", "-s", "0.9", "--max-layer-ratio", "0.5", "--format", "github")
    assert (
        code == 1 and out.startswith("::error title=sparseift flops::layer layer1.0.conv1 costs 1.000000x") and not err
    )
    assert sparseift("flops", "resnet18", "--format", "github")[1].startswith(
        "::notice title=sparseift flops::resnet18: 3,628,146,688"
    )


def test_gates_that_nothing_could_hold_are_not_kept(sparseift) -> None:
    """Without a transform every ratio is 1: a forgotten --sparsity left the gate of a CI job green."""
    for source in ("resnet18", "resnet18_cifar100/dense"):
        for gate in ("--max-flops-ratio", "--max-layer-ratio"):
            code, out, err = sparseift("flops", source, gate, "1.5")
            assert code == 2 and not out and f"{gate} holds" in err and "add --sparsity 0.9" in err
    assert sparseift("flops", "resnet18/wide90_rigl", "--max-flops-ratio", "1.5", "--max-layer-ratio", "1")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-flops-ratio", "1.140884"), "costs 1.1408844x its dense FLOPs, above 1.140884 "),
        (
            ("--match", "model", "--max-flops-ratio", "0.9999999"),
            "costs 0.999999996x its dense FLOPs, above 0.9999999 ",
        ),
        (("--max-layer-ratio", "0.99999995"), "costs 1.000000x its dense MACs, above 0.99999995"),
    ],
)
def test_a_gate_shows_on_which_side_of_the_limit_it_is(sparseift, words: tuple[str, ...], said: str) -> None:
    code, _, err = sparseift("flops", "resnet18", "-s", "0.9", *words)
    assert code == 1 and said in err + " "


def test_tiny_differences_keep_their_sign(sparseift) -> None:
    out = sparseift("flops", "resnet18", "-s", "0.9", "--match", "model", "--summary")[1]
    assert ["whole", "model", "-8", "-0.00000044", "%"] in [line.split() for line in out.splitlines()]
    out = sparseift("flops", "resnet18_cifar100/wide75_rigl", "--summary")[1]
    assert "s_max 0.99999: above it" in out and "+0.0000 %" in out


def test_every_sparsity_has_its_notice(sparseift) -> None:
    code, out, _ = sparseift("flops", "resnet18", "-s", "0.5,0.9", "-f", "github")
    dense = "3,628,146,688 FLOPs dense"
    assert code == 0 and out.splitlines() == [
        f"::notice title=sparseift flops::resnet18, sparsity 0.5: {dense}, 1.027562x transformed",
        f"::notice title=sparseift flops::resnet18, sparsity 0.9: {dense}, 1.140884x transformed",
    ]


def test_a_list_of_sparsities_is_held_to_strict_as_well(sparseift) -> None:
    source = ("flops", "tests.helpers.nets:uncounted", "--strict")
    for sparsity in ("0.5", "0.5,0.75"):
        code, out, err = sparseift(*source, "-s", sparsity)
        assert code == 1 and out and "uncounted ops: aten.linalg_inv_ex" in err
    code, out, err = sparseift("flops", "resnet18", "-s", "0.5,0.75", "--verify")
    assert code == 2 and not out and "--verify counts the dense model" in err


def test_strict_refuses_a_body_layer_that_grows_untransformed(sparseift) -> None:
    source = "tests.helpers.nets:shared_weight"
    for sparsity, named in (("0.75", ""), ("0.5,0.75", "sparsity 0.75: ")):
        code, out, err = sparseift("flops", source, "-s", sparsity, "--strict")
        assert code == 1 and out and f"{named}2 layers of the body cost 4.00000x dense" in err
    assert sparseift("flops", source, "-s", "0.75")[0] == 0
    assert sparseift("flops", source, "--strict")[0] == 0


def test_comparison_names_what_cannot_be_matched_and_exits_1(sparseift) -> None:
    code, out, err = sparseift("flops", "gpt3-small", "-s", "0.5,0.9", "--match", "model", "--json")
    rows = json.loads(out)["rows"]
    assert code == 1 and "no density matches" in err
    assert [r["sparsity"] for r in rows] == ["dense", "0.5", "0.9"]
    assert rows[1]["forward_ratio"] <= 1 and "no density matches" in rows[2]["note"]


def test_verify_of_a_model_too_large_for_fvcore_uses_flop_counter_mode(sparseift) -> None:
    code, out, _ = sparseift("flops", "gpt3_2_7b", "--verify", "--json")
    found = json.loads(out)["verify"]
    assert code == 0 and found["agree"] is True
    assert found["rows"][0]["flop_counter"] == found["rows"][0]["ours"] and found["rows"][0]["fvcore"] is None
    assert "fvcore was not run" in found["verdict"] and "are too many" in found["verdict"]


def test_verify_agrees_and_names_what_fvcore_misses(sparseift) -> None:
    data = json.loads(sparseift("flops", "vit_s_16", "--verify", "--json")[1])
    assert data["verify"]["agree"] is True
    assert data["verify"]["unseen_by_fvcore"] == {"aten::scaled_dot_product_attention": 12}
    assert data["verify"]["rows"][0]["flop_counter"] == data["verify"]["rows"][0]["ours"]
    assert data["verify"]["verdict"].startswith("FlopCounterMode, fvcore and sparseift agree to the MAC.")
    assert (
        data["verify"]["rows"][0]["fvcore"] < data["verify"]["rows"][0]["ours"] == data["verify"]["rows"][-1]["fvcore"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("flops", "resnet81"), "did you mean"),
        (("flops", "resnet18", "-s", "1"), "not a number in [0, 1)"),
        (("flops", "resnet18", "-s", "abc"), "not a number in [0, 1)"),
        (
            ("flops", "resnet18", "-s", "", "--max-flops-ratio", "1"),
            "not a number in [0, 1)",
        ),  # an unset $S of a CI script
        (("flops", "resnet18", "-s", "1e-400000000"), "not a number in [0, 1)"),
        (("flops", "resnet18", "-t", "wdie", "-s", ".5"), "did you mean 'wide'?"),
        (("flops", "resnet18", "-t", "wide"), "needs its sparsity"),
        (("flops", "resnet18", "--input", "3by3"), "is not a shape"),
        (("flops", "resnet18", "--seq", "7"), "--seq does not apply to resnet18"),
        (("flops", "gpt2", "--input", "3x8x8"), "--input does not apply to gpt2"),
        (("flops", "gpt2", "--input", "3x8"), "it reads tokens: give their number with --seq"),
        (("flops", "gpt2", "--seq", "9999"), "at most 1024"),
        (("flops", "resnet18", "--sort", "nonsense"), "cannot sort by"),
        (("flops", "resnet18", "--depth", "0"), "folds everything"),
        (("flops", "resnet18", "-s", ".5", "--match", "modle"), "did you mean 'model'?"),
        (("flops", "resnet18", "--causal", "most"), "full, half or exact"),
        (("flops", "resnet18", "--output", "/no/such/folder/x.txt"), "cannot write"),
        (("flops", "no_such_module:make"), "cannot import"),
        (("flops", "json:no_such"), "has no 'no_such'"),
        (("flops", "json:dumps"), "failed: TypeError"),
        (("flops", "collections:OrderedDict"), "not a torch.nn.Module"),
        (("flops", "tests.benchmarks.model:make"), "input of tests.benchmarks.model:make is not known"),
        (("flops", "tests.benchmarks.model:make", "--input", "4x8x8"), "does not run on input 1x4x8x8"),
        (("flops", "missing.yaml"), "no recipe missing.yaml"),
        (("flops", "resnet18", "-s", "0.9", "--max-flops-ratio", "nan"), "--max-flops-ratio must be above 0, not nan"),
        (
            ("flops", "resnet18", "-s", "0.5,0.9", "--max-layer-ratio", "nan"),
            "--max-layer-ratio must be above 0, not nan",
        ),
        (("flops", "mobilenet_v2", "-t", "factorized", "-s", ".75", "--pattern", "4x4"), "blocks have room for 0"),
        (("inspect", "resnet18", "--sparsity", "0.5"), "add --why"),
    ],
)
def test_a_users_mistake_is_one_clear_line(sparseift, words: tuple[str, ...], said: str) -> None:
    code, out, err = sparseift(*words)
    assert code == 2 and not out
    assert err.startswith("sparseift: ") and said in err and "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3


def test_output_is_written_whole(sparseift, tmp_path: Path) -> None:
    target = tmp_path / "audit.json"
    assert sparseift("flops", "resnet18", "-s", "0.5", "--json", "-o", str(target)) == (0, "", "")
    assert json.loads(target.read_text())["model"] == "resnet18"
    assert list(tmp_path.iterdir()) == [target]


def test_a_callable_of_the_users_own(sparseift) -> None:
    data = json.loads(
        sparseift("flops", "tests.benchmarks.model:make", "--input", "3x64x64", "-s", "0.75", "--json")[1]
    )
    conv = 16 * 16 * 9 * 32 * 32
    assert data["totals"]["dense"]["forward_macs"] == 16 * 16 * 49 * 3 * 32 + 16 * conv + 32 * 128 + 128 * 10
    assert all(r["ratio"] == 1 for r in data["layers"] if r["status"] == "transformed")


def test_inspect_explains_every_member(sparseift) -> None:
    data = json.loads(sparseift("inspect", "mobilenet_v2", "--why", "--sparsity", "0.75", "--json")[1])
    rows = {r["name"]: r for r in data["layers"]}
    assert rows["features.1.conv.0.0"]["wide"].startswith("no: depthwise: stays dense and grows")
    assert rows["features.1.conv.0.0"]["doped"] == "no: rank 0: too small for a low-rank part"
    assert rows["features.2.conv.0.0"]["parallel"] == "yes: 4 branches, realised sparsity 0.75"


def test_inspect_explains_the_control(sparseift) -> None:
    for source in ("resnet18", "resnet18/wide90_rigl"):  # a recipe's name is a model, and its match no obstacle
        data = json.loads(sparseift("inspect", source, "--why", "--scope", "none", "--sparsity", "0.75", "--json")[1])
        row = next(r for r in data["layers"] if r["name"] == "layer1.0.conv1")
        assert row["wide"] == "yes: 64>64, density 0.2500" and "doped" not in row
    assert (
        "a control of wide" in sparseift("inspect", "resnet18", "--why", "--scope", "none", "--transform", "doped")[2]
    )


def test_version_and_help(sparseift) -> None:
    assert sparseift("--version")[1].startswith("sparseift ")
    for command in ((), ("flops",), ("inspect",)):
        assert "Usage" in sparseift(*command, "--help")[1]


def test_what_trains_without_masks_says_that_its_non_zeros_are_the_plans(sparseift) -> None:
    note = "Trained without masks"
    assert note in sparseift("flops", "resnet18_cifar100/wide75_unmasked", "--summary")[1]
    assert note not in sparseift("flops", "resnet18_cifar100/wide75_rigl", "--summary")[1]


def test_a_causal_count_that_counts_nothing_says_so(sparseift) -> None:
    """Attention that brings a mask of its own looks like any other."""
    assert "Causal attention counted exact." in " ".join(sparseift("flops", "gpt2", "--causal", "exact")[1].split())
    assert "no attention here says that it is causal" in " ".join(
        sparseift("flops", "vit_s_16", "--causal", "exact")[1].split()
    )
