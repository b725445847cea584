"""Spectra of masks, against what graph theory and NumPy's dense SVD say."""

from __future__ import annotations

import json
import subprocess
import sys
from math import cos, pi, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from sparseift_cli.errors import ArtifactError
from sparseift_cli.report.spectral import values as spectral_values
from sparseift_cli.report.spectral.gaps import Spectrum, spectral, unrolled
from sparseift_cli.report.spectral.history import checkpoint_layers, history, kept_checkpoints

CLOSE = 1e-6


def near(value: float) -> object:
    return pytest.approx(value, abs=CLOSE, rel=CLOSE)


def circulant(n: int, offsets: tuple[int, ...]) -> np.ndarray:
    """n x n, row i has an edge to columns i + offset: singular values |sum over offsets of w^(offset k)|."""
    mask = np.zeros((n, n), bool)
    for offset in offsets:
        mask[np.arange(n), (np.arange(n) + offset) % n] = True
    return mask


def projective_plane(q: int) -> np.ndarray:
    """Points by lines of PG(2, q) for a prime q: incident where the dot product is 0 mod q."""
    points = [(1, a, b) for a in range(q) for b in range(q)] + [(0, 1, a) for a in range(q)] + [(0, 0, 1)]
    return (np.array(points) @ np.array(points).T) % q == 0


def biregular(rows: int, columns: int, in_row: int, seed: int) -> np.ndarray:
    """Every row has `in_row` edges, every column rows * in_row / columns: permutation blocks, shifted against each other."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows, columns), bool)
    for block in range(rows // columns):  # square blocks of a random regular graph, as a sum of disjoint permutations
        order, shifts = rng.permutation(columns), rng.permutation(columns)[:in_row]
        for shift in shifts:
            mask[block * columns + np.arange(columns), order[(np.arange(columns) + shift) % columns]] = True
    return switched(mask, rng)


def switched(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same degrees, made random by switching pairs of edges."""
    mask = mask.copy()
    edges = np.argwhere(mask)
    for _ in range(10 * len(edges)):
        a, b = rng.integers(len(edges), size=2)
        (r, c), (s, d) = edges[a], edges[b]
        if not (mask[r, d] or mask[s, c]):
            mask[r, c] = mask[s, d] = False
            mask[r, d] = mask[s, c] = True
            edges[a], edges[b] = (r, d), (s, c)
    return mask


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (2, 3), (30, 40), (300, 400)])  # the last one is not small
def test_complete(m: int, n: int) -> None:
    found = spectral(np.ones((m, n), bool))
    assert (found.s1, found.s2) == (near(sqrt(m * n)), near(0))
    assert found.spectral_gap == near(sqrt(m * n))
    assert found.ramanujan_gap == near(sqrt(m - 1) + sqrt(n - 1))
    assert found.ramanujan_gap_s1 == near(2 * sqrt(sqrt(m * n) - 1))
    assert (found.components, found.nnz, found.density) == (1, m * n, 1.0)


@pytest.mark.parametrize("n", [5, 64, 301])
def test_cycle(n: int) -> None:
    """Two edges a row: a cycle of 2n nodes, with eigenvalues 2 cos(pi k / n)."""
    found = spectral(circulant(n, (0, 1)))
    assert (found.s1, found.s2) == (near(2), near(2 * cos(pi / n)))
    assert found.ramanujan_gap == near(2 - 2 * cos(pi / n))  # 2 sqrt(2 - 1) - s2


@pytest.mark.parametrize(("n", "offsets"), [(40, (0, 1, 3)), (300, (0, 1, 4, 9, 35))])
def test_circulant(n: int, offsets: tuple[int, ...]) -> None:
    roots = np.exp(2j * pi * np.arange(n) / n)
    values = sorted((abs(sum(roots**o for o in offsets))), reverse=True)
    found = spectral(circulant(n, offsets))
    d = len(offsets)
    assert (found.s1, found.s2) == (near(d), near(values[1]))
    assert found.ramanujan_gap == near(2 * sqrt(d - 1) - values[1])


@pytest.mark.parametrize("q", [2, 3, 5, 17])  # Fano plane; the last has 307 points, so it is not small
def test_projective_plane(q: int) -> None:
    """q + 1 points on a line, two lines meet in one point: A A' = q I + J, all singular values but s1 are sqrt(q)."""
    found = spectral(projective_plane(q))
    assert found.rows == found.columns == q * q + q + 1
    assert (found.s1, found.s2) == (near(q + 1), near(sqrt(q)))
    assert found.ramanujan_gap == near(2 * sqrt(q) - sqrt(q))  # Ramanujan, with as much to spare as there can be
    assert found.ramanujan_gap_imdb == near(sqrt(q))  # one degree: the graph is its only subgraph


@pytest.mark.parametrize("n", [3, 300])
def test_two_equal_parts_have_no_gap(n: int) -> None:
    mask = np.zeros((2 * n, 2 * n), bool)
    mask[:n, :n] = mask[n:, n:] = True
    found = spectral(mask)
    assert (found.s1, found.s2, found.components) == (near(n), near(n), 2)
    assert found.spectral_gap == near(0)


def test_the_second_copy_of_a_random_part_is_not_missed() -> None:
    part = np.random.default_rng(0).random((300, 300)) < 0.1
    alone = spectral(part)
    twice = spectral(np.kron(np.eye(2, dtype=bool), part))
    assert (twice.s1, twice.s2) == (near(alone.s1), near(alone.s1))


def test_a_perfect_matching() -> None:
    found = spectral(np.eye(3000, dtype=bool))
    assert (found.s1, found.s2, found.components) == (1, 1, 3000)
    assert (found.ramanujan_gap, found.ramanujan_gap_s1) == (-1, -1)
    assert found.ramanujan_gap_imdb is None


@pytest.mark.parametrize(("rows", "columns", "in_row"), [(300, 300, 6), (600, 300, 5)])
def test_random_biregular_is_nearly_ramanujan(rows: int, columns: int, in_row: int) -> None:
    """s2 tends to sqrt(dl - 1) + sqrt(dr - 1): Brito, Dumitriu, Harris, Spectral gap in random bipartite biregular graphs."""
    mask = biregular(rows, columns, in_row, seed=1)
    in_column = rows * in_row // columns
    assert set(mask.sum(1)) == {in_row} and set(mask.sum(0)) == {in_column}
    found = spectral(mask)
    bound = sqrt(in_row - 1) + sqrt(in_column - 1)
    assert found.s1 == near(sqrt(in_row * in_column))
    assert found.s2 == pytest.approx(bound, rel=0.03)
    assert found.ramanujan_gap == near(bound - found.s2)
    assert found.ramanujan_gap_s1 == near(2 * sqrt(sqrt(in_row * in_column) - 1) - found.s2)


def test_iterative_mean_by_hand() -> None:
    """Four columns of degree 3, complete to three rows, and two of degree 4, too few: one subgraph, K_3,4."""
    mask = np.zeros((7, 6), bool)
    mask[:3, :4] = True
    mask[3:, 4:] = True
    assert spectral(mask).ramanujan_gap_imdb == near(sqrt(3 - 1) + sqrt(4 - 1))
    mask[3:, 3] = True  # now three columns of degree 3, in rows of degree 3: K_3,3, and one of degree 7
    assert spectral(mask).ramanujan_gap_imdb == near(2 * sqrt(2))
    mask = np.hstack([np.ones((5, 3), bool), np.eye(5, dtype=bool)])  # degree 5 three times, degree 1 five times
    assert spectral(mask).ramanujan_gap_imdb == near(sqrt(5 - 1) + sqrt(3 - 1))
    assert spectral(np.ones((3, 2), bool)).ramanujan_gap_imdb is None


def test_mean_degrees_are_of_rows_and_columns_with_edges() -> None:
    mask = np.zeros((6, 9), bool)
    mask[1:3, 2:6] = True  # K_2,4 among empty rows and columns
    found = spectral(mask)
    assert found.ramanujan_gap == near(sqrt(2 - 1) + sqrt(4 - 1))
    assert (found.empty_rows, found.empty_columns, found.components) == (4, 5, 1)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 500), (400, 300)])
def test_nothing_at_all(shape: tuple[int, int]) -> None:
    found = spectral(np.zeros(shape, bool), np.ones(shape, np.float32))
    assert (found.s1, found.s2, found.components, found.nnz, found.density) == (0, 0, 0, 0, 0)
    assert found.ramanujan_gap is found.ramanujan_gap_s1 is found.ramanujan_gap_imdb is None
    assert found.weighted_spectral_gap == 0


def test_one_row() -> None:
    found = spectral(np.arange(100_000)[None] % 2 == 0)
    assert (found.s1, found.s2) == (near(sqrt(50_000)), 0)
    assert found.ramanujan_gap == near(sqrt(49_999))


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 0.9))
def test_like_a_dense_svd(seed: int, rows: int, columns: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask, weight = rng.random((rows, columns)) < density, rng.standard_normal((rows, columns))
    found = spectral(mask, weight)
    for matrix, s1, s2 in (
        (mask * 1.0, found.s1, found.s2),
        (np.abs(mask * weight), found.weighted_s1, found.weighted_s2),
    ):
        expected = [*np.linalg.svd(matrix, compute_uv=False), 0.0]
        assert (s1, s2) == (near(expected[0]), near(expected[1]))


@pytest.mark.parametrize(("shape", "density"), [((300, 400), 0.005), ((300, 400), 0.1), ((512, 300), 0.9)])
def test_the_sparse_way_is_the_dense_one(shape: tuple[int, int], density: float) -> None:
    rng = np.random.default_rng(3)
    mask, weight = rng.random(shape) < density, rng.standard_normal(shape).astype(np.float32)
    found = spectral(mask, weight)
    for matrix, s1, s2 in (
        (mask * 1.0, found.s1, found.s2),
        (np.abs(mask * weight), found.weighted_s1, found.weighted_s2),
    ):
        expected = np.linalg.svd(matrix, compute_uv=False)
        assert (s1, s2) == (pytest.approx(expected[0], rel=1e-7), pytest.approx(expected[1], rel=1e-7))


@pytest.mark.parametrize("dense", [0, 1 << 30])
def test_both_ways_meet(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_values, "DENSE", dense)
    mask = np.random.default_rng(5).random((60, 90)) < 0.2
    expected = np.linalg.svd(mask * 1.0, compute_uv=False)
    found = spectral_values.top_two(csr_array(mask, dtype=np.float64))
    assert (found.s1, found.s2) == (near(expected[0]), near(expected[1]))


def test_order_and_orientation_do_not_matter() -> None:
    rng = np.random.default_rng(7)
    mask, weight = rng.random((300, 260)) < 0.2, rng.standard_normal((300, 260))
    rows, columns = rng.permutation(300), rng.permutation(260)
    found = spectral(mask, weight)
    assert spectral(mask, weight) == found  # to the last bit
    moved = spectral(mask[rows][:, columns], weight[rows][:, columns]).to_json()
    turned = spectral(mask.T, weight.T).to_json()
    sides = {"rows", "columns", "empty_rows", "empty_columns"}
    assert found.ramanujan_gap_imdb is not None
    assert moved == pytest.approx(found.to_json(), rel=CLOSE)
    for name in turned.keys() - sides - {"ramanujan_gap_imdb"}:  # which alone tells columns from rows
        assert turned[name] == pytest.approx(found.to_json()[name], rel=CLOSE), name


def test_weights() -> None:
    mask = np.random.default_rng(9).random((20, 30)) < 0.3
    found = spectral(mask, mask * 1.0)
    assert (found.weighted_s1, found.weighted_s2) == (near(found.s1), near(found.s2))
    signs = np.where(np.random.default_rng(2).random(mask.shape) < 0.5, -1.0, 1.0)
    assert spectral(mask, mask * signs).weighted_spectral_gap == near(found.spectral_gap)  # absolute values
    assert spectral(mask, np.ones(mask.shape)).weighted_spectral_gap == near(found.spectral_gap)  # under the mask
    tiny = spectral(mask, mask * 1e-30)
    assert tiny.weighted_spectral_gap == pytest.approx(found.spectral_gap * 1e-30, rel=1e-9)
    half = np.diag([3.0, 2.0, 0.0])  # grown weights may be zero: an edge of the mask, none of the weights
    assert spectral(half != 1, half).weighted_spectral_gap == near(1)
    bad = np.where(mask, np.nan, 0.0)
    assert spectral(mask, bad).weighted_spectral_gap is None
    assert spectral(mask).weighted_spectral_gap is None


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="R, C"):
        spectral(np.ones((2, 3, 3, 3), bool))
    with pytest.raises(ValueError, match="its mask"):
        spectral(np.ones((2, 3), bool), np.ones((3, 2)))
    assert unrolled(np.zeros((4, 3, 2, 5))).shape == (4, 30)
    assert unrolled(np.zeros(4)).shape == (1, 4)


def test_json_holds_everything() -> None:
    values = spectral(np.ones((2, 3), bool)).to_json()
    assert {*Spectrum.__slots__, "density", "spectral_gap", "weighted_spectral_gap"} == set(values)
    assert json.loads(json.dumps(values)) == values


def test_reading_needs_no_torch(root: Path) -> None:
    code = "import sys, sparseift_cli.report.spectral.history; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def checkpoint(run: Path, name: str, tensors: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "tensors.safetensors")
    size = (folder / "tensors.safetensors").stat().st_size
    (folder / "manifest.json").write_text(json.dumps({"files": {"tensors.safetensors": {"bytes": size}}}))
    return folder


def tensors(mask: np.ndarray, weight: np.ndarray | None = None) -> dict[str, np.ndarray]:
    weight = mask.astype(np.float32) if weight is None else weight
    return {"masks/a.weight": mask, "model/a.weight": weight, "model/a.bias": np.zeros(3, np.float32)}


def test_history_of_a_run(tmp_path: Path) -> None:
    complete, matching = np.ones((2, 3), bool), np.eye(2, 3, dtype=bool)
    checkpoint(tmp_path, "step-00000200", tensors(matching))
    checkpoint(tmp_path, "step-00000100", tensors(matching))
    checkpoint(tmp_path, "step-00000100.1", tensors(complete))  # saved again
    (tmp_path / "checkpoints" / ".step-00000300.abc").mkdir()
    rows = history(tmp_path)
    assert [(r.step, r.layer, r.shape) for r in rows] == [(100, "a.weight", (2, 3)), (200, "a.weight", (2, 3))]
    assert [r.spectrum.spectral_gap for r in rows] == [near(sqrt(6)), near(0)]
    assert [r.spectrum.weighted_spectral_gap for r in rows] == [near(sqrt(6)), near(0)]
    assert history(tmp_path / "nowhere") == []


def test_history_leaves_out_what_is_damaged(tmp_path: Path) -> None:
    mask = np.ones((2, 3), bool)
    checkpoint(tmp_path, "step-00000001", tensors(mask))
    (checkpoint(tmp_path, "step-00000002", tensors(mask)) / "manifest.json").write_text("[]")
    short = checkpoint(tmp_path, "step-00000003", tensors(mask)) / "tensors.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    (checkpoint(tmp_path, "step-00000004", tensors(mask)) / "tensors.safetensors").unlink()
    checkpoint(tmp_path, "step-00000005", tensors(mask, np.ones((3, 2), np.float32)))
    skipped: list[str] = []
    assert [row.step for row in history(tmp_path, skipped=skipped)] == [1]
    assert len(skipped) == 4 and all("step-" in line for line in skipped)
    assert [k.step for k in kept_checkpoints(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16", "float8_e4m3fn"])
def test_element_types(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    weight = torch.tensor([[1.5, 0, -2], [0, 0.25, 0]])
    folder = checkpoint(tmp_path, "step-00000001", tensors(np.ones((2, 3), bool)))
    path = folder / "tensors.safetensors"
    save_file({"masks/w": weight != 0, "model/w": weight.to(getattr(torch, dtype))}, path)
    (folder / "manifest.json").write_text(json.dumps({"files": {path.name: {"bytes": path.stat().st_size}}}))
    (layer,) = checkpoint_layers(folder)
    assert (layer.mask == (weight != 0).numpy()).all()
    if dtype == "float8_e4m3fn":
        assert layer.weight is None and layer.spectrum().weighted_spectral_gap is None
    else:
        assert layer.weight is not None and (layer.weight == weight.numpy()).all()
        assert layer.spectrum().weighted_spectral_gap == near(2.5 - 0.25)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        list(checkpoint_layers(tmp_path))
