"""Data sets by name: where they are looked for, how they are fetched, and what is said where they are not."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from sparseift_cli import data
from sparseift_cli.data.places import Remote, data_home, fetch, search
from sparseift_cli.errors import UsageError

CONTENT = b"the file" * 1000


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    """A server that is a folder."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "set.bin").write_bytes(CONTENT)
    return Remote((tmp_path / "server" / "set.bin").as_uri(), hashlib.md5(CONTENT).hexdigest(), len(CONTENT))


def recognise(place: Path) -> bytes | None:
    return place.read_bytes() if place.is_file() else None


def test_fetching_is_checked_and_whole(remote: Remote, tmp_path: Path) -> None:
    path = fetch(remote, tmp_path / "new" / "cache")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["set.bin"]
    path.write_bytes(b"mine")
    assert fetch(remote, path.parent).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"md5": "0" * 32}, "sent a file with md5"),
        ({"nbytes": 100}, "sent more than the 100 bytes"),
        ({"url": "file:///nowhere/set.bin"}, "cannot download file:///nowhere/set.bin: "),
    ],
)
def test_nothing_stays_of_a_failed_fetch(remote: Remote, change, message: str, tmp_path: Path) -> None:
    wrong = Remote(**{"url": remote.url, "md5": remote.md5, "nbytes": remote.nbytes, **change})
    with pytest.raises(UsageError, match=message) as caught:
        fetch(wrong, tmp_path / "cache")
    assert "\n" not in caught.value.message
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args, **_options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UsageError, match=r"cifar-100-python\.tar\.gz: Name or service not known") as caught:
        data.open_data("cifar100", tmp_path, download=True)
    assert str(tmp_path / "cifar-100-python.tar.gz") in str(caught.value.hint)


def test_folders_that_cannot_be_written(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write into"):
        fetch(remote, tmp_path / "file" / "cache")


def test_search_goes_through_its_places(remote: Remote, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        search("thing", root, ["a/x", "b/x", "set.bin"], recognise, remotes=[remote])
    assert (
        caught.value.message == f"the data set thing is not there; tried {root}, {root}/a/x, {root}/b/x, {root}/set.bin"
    )
    assert "download=True" in str(caught.value.hint)
    (root / "b" / "x").write_bytes(b"here")
    assert search("thing", root, ["a/x", "b/x"], recognise) == b"here"
    assert search("thing", root / "b" / "x", [], recognise) == b"here"
    assert search("thing", tmp_path / "other", ["set.bin"], recognise, remotes=[remote], download=True) == CONTENT


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEIFT_DATA", str(tmp_path))
    assert data_home() == tmp_path
    (tmp_path / "train.txt").write_text("a b\n")
    assert data.open_data("wikitext-2").splits == {"train": 3}
    monkeypatch.delenv("SPARSEIFT_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_home() == tmp_path / ".cache" / "sparseift"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"digits is not there; tried .*\.cache/sparseift/digits\.csv\.gz") as caught:
        data.open_data("digits")
    assert "scikit-learn" in str(caught.value.hint)


# --- names ---


def test_names_are_forgiving_and_mistakes_are_told() -> None:
    assert data.DATASETS.get("CIFAR-100").name == "cifar100"
    assert data.DATASETS.get("WikiText_2").name == "wikitext-2"
    with pytest.raises(UsageError, match="unknown data set 'cifra10'") as caught:
        data.open_data("cifra10")
    assert "did you mean 'cifar10'?" in str(caught.value.hint)
    with pytest.raises(UsageError, match="cifar10 has no option 'downlod'") as caught:
        data.open_data("cifar10", downlod=True)
    assert caught.value.hint == "did you mean 'download'?"
    with pytest.raises(UsageError) as caught:
        data.open_data("stdlib", seq=3)
    assert caught.value.hint == "it takes none"


@pytest.mark.parametrize("name", data.DATASETS.names)
def test_facts_fit_the_openers(name: str) -> None:
    source = data.DATASETS.get(name)
    assert source.name == name and source.summary
    assert next(iter(inspect.signature(source.open).parameters)) == "root"
    assert "Raises" in str(inspect.getdoc(source.open))
    assert set(source.recipe_options or ()) <= set(source.options)


@pytest.mark.parametrize("name", ["digits", "synthetic-images", "stdlib", "synthetic-text"])
def test_facts_are_those_of_the_opened_set(name: str) -> None:
    """Of the sets that need no files."""
    source, opened = data.DATASETS.get(name), data.open_data(name)
    assert (source.kind, source.splits) == (opened.kind, opened.split_names)
    assert source.image in (None, opened.shape) and source.classes in (None, opened.classes)
    assert source.samples in (None, opened.splits["train"])
    assert not source.has_separate_test
    assert "test" not in opened.split_names or opened.held_out == "test"


def test_names_need_no_torch() -> None:
    code = "import sys; from sparseift_cli import data; data.DATASETS.get('mnist'); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    with pytest.raises(AttributeError):
        data.nothing  # noqa: B018
