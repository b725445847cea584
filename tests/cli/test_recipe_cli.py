"""`sparseift recipe`: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparseift_cli.base.durations import in_words
from sparseift_cli.cli import app as command
from sparseift_cli.recipe.catalog import headline, shipped
from sparseift_cli.recipe.load import find, load


def run(*args: str) -> int:
    """Exit code of `sparseift ARGS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sparseift", *args])
        try:
            command.main()
        except SystemExit as left:
            return int(left.code or 0)
    return 0


def test_ls_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "ls", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "sparseift.recipes/1"
    rows = {row["name"]: row for row in data["recipes"]}
    assert set(rows) == {entry.name for entry in shipped()}
    assert rows["resnet18/wide90_rigl"]["steps"] == 450_360
    assert next(iter(rows)).startswith("quickstart/")
    for fmt in ("table", "csv", "md"):
        assert run("recipe", "ls", "--format", fmt) == 0
        assert "resnet18_cifar100/wide90_rigl" in capsys.readouterr().out


def test_ls_says_how_long_every_recipe_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Where steps depend on how much text there is, the length stands in the recipe's own unit."""
    assert run("recipe", "ls", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["recipes"]}
    lengths = {name: (rows[name]["steps"], rows[name]["epochs"]) for name in ("gpt_wikitext2/dense", "resnet18/dense")}
    assert lengths == {"gpt_wikitext2/dense": (None, 1), "resnet18/dense": (450_360, 90)}
    assert rows["gpt3_small/dense"]["epochs"] is None
    assert run("recipe", "ls", "--format", "csv") == 0
    cells = {row["name"]: row["steps"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert cells["gpt_wikitext2/wide50_rigl"] == "1 epoch" and cells["resnet18/dense"] == "450360"
    assert all(cells.values())
    assert run("recipe", "ls") == 0
    assert "450,360" in (table := capsys.readouterr().out) and "1 epoch " in table


@pytest.mark.parametrize(("epochs", "words"), [(1.0, "1 epoch"), (2.0, "2 epochs"), (0.5, "0.5 epochs")])
def test_epochs_in_words(epochs: float, words: str) -> None:
    assert in_words(epochs, "epoch") == words


def test_show_prints_a_recipe_with_origins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "show", "resnet18_cifar100/wide90_rigl", "--set", "training.epochs=3") == 0
    text = capsys.readouterr().out
    assert "# --set training.epochs=3: Length of the run in passes" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load(tmp_path / "again.yaml").spec.training.epochs == 3
    assert run("recipe", "show", "resnet18_cifar100/wide90_rigl", "--json") == 0
    values = {row["key"]: row for row in json.loads(capsys.readouterr().out)["values"]}
    assert values["transform.sparsity"]["value"] == 0.9
    assert run("recipe", "show", "resnet18_cifar100/wide90_rigl", "--format", "csv") == 0
    assert "optimizer.lr,0.1," in capsys.readouterr().out


def test_cp_makes_a_recipe_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "cp", "quickstart/digits_mlp_dense", str(tmp_path)) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "digits_mlp_dense.yaml"
    editor = path.read_text().splitlines()[0].partition("$schema=")[2]
    assert Path(editor).is_file()
    assert run("recipe", "cp", "quickstart/digits_mlp_dense", str(path)) == 2
    assert "is there already" in capsys.readouterr().err
    assert run("recipe", "cp", "quickstart/digits_mlp_dense", str(path), "--force") == 0
    assert run("recipe", "cp", "quickstart/digits_mlp_dense", str(tmp_path / "x.txt")) == 2
    assert run("recipe", "cp", "quickstart/digits_mlp_dense", str(tmp_path / "no" / "x.yaml")) == 2
    assert "cannot write" in capsys.readouterr().err


def test_validate_tells_all_problems_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a", "model: resnet19\n"), ("b", "model: resnet18\nsparsity: 2\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    paths = [str(tmp_path / "a.yaml"), "resnet18/wide90_rigl", str(tmp_path / "b.yaml")]
    assert run("recipe", "validate", *paths) == 2
    out, err = capsys.readouterr()
    assert out == "resnet18/wide90_rigl: fine, 1.14088x the dense model's forward FLOPs\n"
    assert "a.yaml:1:8: model: no model is called 'resnet19'" in err
    assert "b.yaml:2:11: transform.sparsity: must be below 1, not 2" in err
    assert run("recipe", "validate", "resnet18/dense", "--no-plan") == 0
    assert (
        run(
            "recipe",
            "validate",
            "gpt3_small/wide75_rigl",
            "--set",
            "sparsity=0.95",
            "--set",
            "transform.match=model",
            "--set",
            "transform.base_width=null",
        )
        == 1
    )


def test_names_of_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find("resnet18/dense") == find("resnet18/dense.yaml")
    assert find("resnet18") is None
    assert load(find("resnet18/dense") or Path()).name == "resnet18_dense"
    (tmp_path / "mine.yaml").write_text("model: resnet18\n")
    assert load(tmp_path / "mine.yaml").name == "mine"
    assert run("recipe", "show", "resnet18/dence.yaml") == 2
    assert "did you mean 'resnet18/dense.yaml'?" in capsys.readouterr().err
    assert run("recipe", "show", "nothing") == 2
    assert run("recipe", "cp", "nothing", str(tmp_path)) == 2


def test_schema_is_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "sparseift recipe"


def test_import_writes_one_recipe_or_a_folder_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, experiment = tmp_path / "base.yaml", tmp_path / "experiment.yaml"
    base.write_text("epochs: 200\nlearning_rate: 0.1\nlog_interval: 5\n")
    experiment.write_text(
        "model: resnet_18\nmaskopt: rigl\nmaskopt_sparsity: [0.5, 0.9]\nsift_scaling: true\nsift_family: sparse_wide\n"
    )
    files = ("recipe", "import", str(base), str(experiment))
    assert run(*files) == 2
    assert "describe 2 runs: resnet18_cifar_wide50_rigl, resnet18_cifar_wide90_rigl" in capsys.readouterr().err
    assert run(*files, "--pick", "maskopt_sparsity=0.9") == 0
    out, err = capsys.readouterr()
    assert out.startswith("# yaml-language-server: $schema=")
    assert f"not carried over: {base}:3: log_interval 5: the log has every step that is evaluated" in err
    (tmp_path / "all").mkdir()
    assert run(*files, "-o", str(tmp_path / "all")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert all(load(path).spec.algorithm.name == "rigl" for path in (tmp_path / "all").iterdir())
    assert run(*files, "-o", str(tmp_path / "all")) == 2
    assert run(*files, "-o", str(tmp_path / "all"), "--force") == 0
    assert run(*files, "--pick", "maskopt_sparsity") == 2


def test_counting_flops_of_a_model_imports_nothing_of_recipes(root: Path) -> None:
    """The sections of a recipe take longer to build than `sparseift flops resnet18` needs."""
    code = (
        "import atexit, sys; sys.argv = ['sparseift', 'flops', 'resnet18', '--summary']\n"
        "atexit.register(lambda: print('sparseift_cli.recipe.sections' in sys.modules, file=sys.stderr))\n"
        "from sparseift_cli.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# yaml-language-server: $schema=x\n# A thing, 3.5 of it. More.\nmodel: x\n", "A thing, 3.5 of it"),
        ("# It shows: something\n", "It shows"),
        ("model: x\n# later\n", ""),
    ],
)
def test_headline_is_the_first_sentence(text: str, said: str) -> None:
    assert headline(text) == said


def test_a_file_that_is_not_there_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "import", str(tmp_path / "no.yaml")) == 2
    err = capsys.readouterr().err
    assert "no.yaml: No such file or directory" in err
    assert "Errno" not in err and err.count("no.yaml") == 1
