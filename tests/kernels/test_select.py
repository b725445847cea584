"""The choice between backends and the masked dense layer, on a CPU with backends that are fast, slow, wrong or fail."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels import KERNELS, LayerChoice, LayerRequest, LayerSize, measure, reference, select
from sparseift_cli.kernels.index import BlockIndex
from sparseift_cli.kernels.reference import ACTIVATIONS, ConvWindow, slope_of
from sparseift_cli.kernels.registry import KINDS, MASKED, Reference, Selected, choose, in_words, square_block
from tests.helpers.forked import in_processes
from tests.helpers.ranks import select_kernels

LAYER = LayerRequest(block=8, dtype="float32", device="cpu")
SIZE = LayerSize(rows=160, columns=40, blocks=64, tokens=300)
ON_GPU = LayerRequest(block=128, dtype="bfloat16", device="cuda", capability=(9, 0))


class Fake:
    """A backend of dense products, each of which waits for `seconds`; it returns `factor` times what is right."""

    summary = "for tests"

    def __init__(self, seconds: float = 0.0, factor: float = 1.0, limit: int = 10**9) -> None:
        self.seconds, self.factor, self.limit, self.calls = seconds, factor, limit, 0

    def why_not(self, layer: LayerRequest) -> str | None:
        return None if layer.kind == "linear" else "linear layers only"

    def how(self, layer: LayerRequest) -> str:
        return "dense products"

    def functions(self) -> Any:
        return self

    def _weight(self, values: Tensor, index: BlockIndex) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        side = values.shape[-1]
        weight = values.new_zeros(*index.grid, side, side)
        weight[index.rows.long(), index.columns.long()] = values
        return weight.transpose(1, 2).reshape(index.grid[0] * side, index.grid[1] * side)

    def multiply(
        self,
        x: Tensor,
        values: Tensor,
        index: BlockIndex,
        transposed: bool = False,
        bias: Tensor | None = None,
        activation: str = "none",
        keep: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if len(x) > self.limit:
            raise RuntimeError("out of memory\nin a frame")
        weight = self._weight(values, index)
        z = self.factor * (x @ (weight if transposed else weight.T))
        z = z if bias is None else z + bias
        return ACTIVATIONS[activation](z), slope_of(z, activation) if keep else x.new_empty(0)

    def weight_gradient(self, grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
        side = grad.shape[1] // index.grid[0]
        whole = (grad.T @ x).unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)
        return whole[index.rows.long(), index.columns.long()]


class Instant(Fake):
    """Computes nothing at sizes that are timed."""

    def multiply(
        self, x: Tensor, values: Tensor, index: BlockIndex, transposed: bool = False, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        if len(x) < 64:
            return super().multiply(x, values, index, transposed, *rest, **named)
        self.calls += 1
        lines = index.grid[1 if transposed else 0]
        return x.new_zeros(len(x), lines * values.shape[-1]), x.new_empty(0)

    def weight_gradient(self, grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
        if len(x) < 64:
            return super().weight_gradient(grad, x, index)
        side = grad.shape[1] // index.grid[0]
        return x.new_zeros(index.num_blocks, side, side)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, no shipped backend, and nothing remembered."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(KERNELS, "_entries", {})
    monkeypatch.setattr(KERNELS, "_installed", {})
    monkeypatch.setattr(measure, "_known", {})
    for memory in (choose, measure._checked):
        memory.cache_clear()
    yield tmp_path / ".cache" / "sparseift"
    for memory in (choose, measure._checked):
        memory.cache_clear()


def forget() -> None:
    """As in a new process."""
    measure._known.clear()
    measure._checked.cache_clear()


def test_auto_takes_the_fastest_and_measures_once_per_shape(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = KERNELS.register("slow", Fake(seconds=0.02))
    fast = KERNELS.register("fast", Instant())
    fast.version = "2.5"
    assert select("auto", LAYER, SIZE) == select("auto", LAYER, SIZE)
    chosen = select("auto", LAYER, SIZE)
    assert (chosen.backend, chosen.reason, chosen.how) == ("fast", "", "dense products")
    times = json.loads((home / "kernels.json").read_text())
    ((key, found),) = times.items()
    assert set(found) == {"slow", "fast", MASKED} and found["slow"] > 40 > found["fast"]
    assert "160x40 blocks of 8, 64 stored, 256 tokens" in key and "slow, fast 2.5;" in key and torch.__version__ in key
    slow.calls = fast.calls = 0
    monkeypatch.setattr(measure, "_measure", lambda *_: pytest.fail("measured again"))
    forget()
    near = LayerSize(rows=160, columns=40, blocks=64, tokens=256)  # 300 and 256 are of one power of two
    assert select("auto", LAYER, near).backend == "fast"
    assert slow.calls and fast.calls, "a new process checks once more whether they are right"


def test_masked_dense_where_it_is_faster() -> None:
    KERNELS.register("slow", Fake(seconds=0.02))
    chosen = select("auto", LAYER, SIZE)
    assert chosen.backend == MASKED and chosen.how == ""
    assert chosen.reason.startswith("masked-dense is faster here: ") and " ms against " in chosen.reason
    assert select("slow", LAYER, SIZE).backend == "slow", "what is asked for by name is not timed"


def test_without_sizes_the_first_backend_that_is_meant_for_speed() -> None:
    lazy = Fake()
    lazy.fast = False
    KERNELS.register("lazy", lazy)
    assert select("auto", LAYER) == select("auto", LAYER, SIZE)
    assert select("auto", LAYER).reason == "no backend is meant for speed"
    assert select("lazy", LAYER).backend == "lazy"
    KERNELS.register("slow", Fake(seconds=0.02))
    assert select("auto", LAYER).backend == "slow"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (Fake(factor=1.05), r"it is wrong on this cpu device: its output differs by [\d.e-]+ from the dense layer's"),
        (Fake(factor=float("nan")), "it is wrong on this cpu device: its output differs by nan"),
        (Fake(limit=1), "it fails on this cpu device: RuntimeError: out of memory$"),
    ],
)
@pytest.mark.parametrize("kernels", ["auto", "bad"])
@pytest.mark.parametrize("size", [SIZE, None])
def test_a_backend_that_is_wrong_here_is_refused(
    backend: Fake, reason: str, kernels: str, size: LayerSize | None
) -> None:
    KERNELS.register("bad", backend)
    chosen = select(kernels, LAYER, size)
    assert chosen.backend == MASKED
    assert re.match(reason, chosen.reason)


def test_a_backend_that_fails_at_this_size_is_left_out(home: Path) -> None:
    KERNELS.register("small", Fake(limit=64))
    chosen = select("auto", LAYER, SIZE)
    assert (chosen.backend, chosen.reason) == (
        MASKED,
        "masked-dense is faster here: its kernels did not run at this size",
    )
    assert not home.exists(), "what may succeed in another process is not cached"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [8, 32])
def test_the_reference_is_right(dtype: str, kind: str, block: int) -> None:
    KERNELS.register("reference", Reference())
    layer = LayerRequest(block, dtype, "cpu", kind=kind)
    assert select("reference", layer) == Selected("reference", how="plain PyTorch")


class WrongBehindActivations(Fake):
    """Right, but for the gradient before an activation."""

    def gradient_before(
        self, grad: Tensor, values: Tensor, index: BlockIndex, slope: Tensor, with_sum: bool = True
    ) -> tuple[Tensor, Tensor]:
        dz = self.multiply(grad, values, index, True)[0] * slope
        return dz, 1.1 * dz.sum(0)


def test_a_wrong_gradient_of_joined_layers_is_refused() -> None:
    KERNELS.register("bad", WrongBehindActivations())
    reason = select("bad", LAYER).reason
    assert reason.startswith("it is wrong on this cpu device: its sum of that gradient differs by 1.0e-01")


def test_a_wrong_convolution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    KERNELS.register("reference", Reference())
    right = reference.conv2d_weight_gradient
    monkeypatch.setattr(reference, "conv2d_weight_gradient", lambda *given: right(*given).flip(1))
    reason = select("reference", LayerRequest(8, "float32", "cpu", kind="conv2d")).reason
    assert reason.startswith("it is wrong on this cpu device: its dW differs by ")


@pytest.mark.parametrize("window", [(3, 3, 1, 1, 1, 1), (3, 3, 2, 2, 1, 1), (5, 3, 1, 2, 0, 1), (1, 1, 1, 1, 0, 0)])
def test_convolutions_are_timed(home: Path, window: tuple[int, ...]) -> None:
    KERNELS.register("reference", Reference())
    layer = LayerRequest(8, "float32", "cpu", kind="conv2d")
    size = LayerSize(rows=3, columns=2, blocks=4, tokens=40, window=window)
    assert set(measure.milliseconds(["reference"], layer, size)) == {"reference", MASKED}
    assert str(window) in (home / "kernels.json").read_text()
    before, after = measure._image(40, ConvWindow(*window))
    assert before[0] == after[0] and 30 <= after[0] * after[1] * after[2] <= 50
    assert ConvWindow(*window).output(*before[1:]) == after[1:]
    assert measure.milliseconds(["reference"], layer, SIZE) == {}, "its window is not known"


def test_reasons_of_all_backends_and_of_names() -> None:
    KERNELS.register("one", Fake())
    conv = LayerRequest(8, "float32", "cpu", kind="conv2d")
    assert select("auto", conv, SIZE).reason == "linear layers only"
    KERNELS.register("two", Fake())
    assert select("auto", conv, SIZE).reason == "one: linear layers only; two: linear layers only"
    assert select("two", conv).reason == "linear layers only"
    assert select("masked", LAYER, SIZE).reason == "masked layers were asked for"
    with pytest.raises(UsageError, match="it is a class; name an object of it"):
        KERNELS.register("three", Fake)
    with pytest.raises(UsageError, match="unknown kernels 'three'") as error:
        select("three", LAYER)
    assert error.value.hint == "known: auto, masked, one, two; or package.module:Name"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"key": 3}', b'{"key": {"masked": "x"}}', b"\xff\xfe"])
def test_a_damaged_cache_is_no_error(home: Path, content: bytes) -> None:
    home.mkdir(parents=True)
    (home / "kernels.json").write_bytes(content)
    KERNELS.register("fast", Instant())
    assert select("auto", LAYER, SIZE).backend == "fast"
    assert len(json.loads((home / "kernels.json").read_text())) == 1


def test_a_cache_that_cannot_be_written_is_no_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.parent.mkdir()
    home.write_text("a file where the folder should be")
    KERNELS.register("fast", Instant())
    assert select("auto", LAYER, SIZE).backend == "fast"
    monkeypatch.setattr(measure, "_measure", lambda *_: pytest.fail("measured again in this process"))
    assert select("auto", LAYER, SIZE).backend == "fast"


def test_processes_of_one_run_choose_what_the_first_measures(tmp_path: Path) -> None:
    done = in_processes(select_kernels, [(rank, str(tmp_path / "meet")) for rank in (0, 1)])
    assert [(one.returncode, one.stdout.split()) for one in done] == [(0, ["fast"] * 3)] * 2, done[0].stderr


def test_it_measures_gradients_where_none_are_wanted() -> None:
    KERNELS.register("fast", Instant())
    with torch.inference_mode():
        assert select("auto", LAYER, SIZE).backend == "fast"


def test_measuring_leaves_the_random_state_alone() -> None:
    KERNELS.register("fast", Instant())
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    select("auto", LAYER, SIZE)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("pattern", "taps", "found"),
    [
        ("128x128", 1, (128, "")),
        ("64x576", 9, (64, "")),
        ("64x64", 9, (None, "blocks of 64x64 are not all 9 taps of whole inputs, as 64x576 are")),
        ("4x1", 1, (None, "blocks of 4x1 are not square")),
        ("96x96", 1, (None, "inputs or outputs are no multiple of 96")),
        ("unstructured", 1, (None, "unstructured masks have no kernel")),
        ("1x1", 1, (None, "1x1 masks have no kernel")),
        ("2:4", 1, (None, "2:4 masks have no kernel")),
        ("own:EvenColumns", 1, (None, "own:EvenColumns masks have no kernel")),
    ],
)
def test_square_blocks_of_patterns(pattern: str, taps: int, found: tuple[int | None, str]) -> None:
    assert square_block(pattern, 256, 128, taps) == found
    assert square_block(pattern, 256, 128, taps, groups=2) == (None, "grouped layers have no kernel")


def test_in_words() -> None:
    no_kernel = "unstructured masks have no kernel"
    choices = [
        LayerChoice("stem", MASKED, None, no_kernel),
        *(LayerChoice(str(i), "blocks", 128, how="Triton, tensor descriptors") for i in range(3)),
        LayerChoice("head", "blocks", 64, how="Triton, tensor descriptors"),
        LayerChoice("q", "mine", 64, how="mine"),
        LayerChoice("norm", MASKED, None),
    ]
    assert in_words(choices) == (
        "3 layers in blocks of 128 (Triton, tensor descriptors); 1 in blocks of 64 (Triton, tensor descriptors); "
        "1 in blocks of 64 (mine); 1 masked-dense: unstructured masks have no kernel; 1 masked-dense"
    )
    assert in_words([]) == ""


def test_what_triton_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseift_cli.kernels.registry import TritonBlocks

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton = TritonBlocks()
    assert triton.how(ON_GPU) == "Triton, tensor descriptors" and not triton.slow_here
    assert triton.how(LayerRequest(64, "float16", "cuda", (8, 6))) == "Triton, pointers"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.how(LAYER) == "Triton's interpreter"
    KERNELS.register("blocks", triton)
    monkeypatch.setattr(TritonBlocks, "why_not", lambda *_: None)
    assert select("auto", LAYER).reason == "Triton's interpreter runs its kernels"
