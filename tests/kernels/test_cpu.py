"""The C++ kernels for CPUs and their operators, against the dense layer in float64."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.cpu import library, reference
from sparseift_cli.kernels.cpu.library import CELLS
from sparseift_cli.kernels.cpu.ops import cell_linear
from sparseift_cli.kernels.index import BlockIndex
from tests.kernels.cases import MASKS, mask_of, relative

ours = torch.ops.sparseift


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    """Compiled once for all tests of all runs: processes wait for each other."""
    if reason := library.why_not():
        pytest.skip(f"the kernels cannot run here: {reason}")


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Operands:
    """Random operands of one layer, float32."""

    index: BlockIndex
    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor

    @classmethod
    def draw(cls, mask: Tensor, cell: tuple[int, int], tokens: int, seed: int = 0) -> Operands:
        """For the cells of `mask` [R, C]."""
        (rows, columns), (r, c) = mask.shape, cell
        generator = torch.Generator().manual_seed(seed)
        index = BlockIndex.from_mask(mask, block=1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        x, grad = normal(tokens, columns * c), normal(tokens, rows * r)
        return cls(index, x, normal(index.num_blocks, r, c), normal(rows * r), grad)

    def differences(self) -> list[float]:
        """Of y, dx, dvalues and dbias to those of the dense layer in float64, in the Frobenius norm."""
        y = ours.cell_linear(self.x, self.values, self.bias, list(self.index))
        found = ours.cell_linear_backward(self.grad, self.x, self.values, list(self.index), [True] * 3)
        x, values, bias, grad = (tensor.double() for tensor in (self.x, self.values, self.bias, self.grad))
        wanted = reference.gradients(grad, x, values, self.index)
        return [
            relative(y, reference.linear(x, values, self.index, bias)),
            *(relative(*pair) for pair in zip(found, wanted, strict=True)),
        ]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_masks_with_empty_rows_and_columns(cell: tuple[int, int], name: str, tokens: int) -> None:
    assert max(Operands.draw(mask_of(name), cell, tokens).differences()) < 1e-6


@given(
    cell=st.sampled_from(CELLS),
    grid=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    density=st.floats(0, 1),
    tokens=st.integers(1, 200),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_mask(cell: tuple[int, int], grid: tuple[int, int], density: float, tokens: int, seed: int) -> None:
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density
    mask.view(-1)[seed % mask.numel()] = True
    assert max(Operands.draw(mask, cell, tokens, seed).differences()) < 2e-6


@pytest.mark.parametrize("cell", [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("grid", [(3, 9000), (9000, 3)])
def test_more_inputs_or_outputs_than_a_cache_has_room_for(cell: tuple[int, int], grid: tuple[int, int]) -> None:
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(0)) < 0.02
    assert max(Operands.draw(mask, cell, 65).differences()) < 2e-6


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_computes_the_same_bits(cell: tuple[int, int]) -> None:
    case = Operands.draw(mask_of("an empty row and an empty column").repeat(5, 3), cell, 200)
    results = []
    for count in (1, 2, 3, 2, 40):
        torch.set_num_threads(count)
        y = ours.cell_linear(case.x, case.values, case.bias, list(case.index))
        results.append([y, *ours.cell_linear_backward(case.grad, case.x, case.values, list(case.index), [True] * 3)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tokens", [64, 150])
def test_gradients_one_at_a_time(cell: tuple[int, int], tokens: int) -> None:
    case = Operands.draw(mask_of("an empty row and an empty column"), cell, tokens)
    operands = (case.grad, case.x, case.values, list(case.index))
    together = ours.cell_linear_backward(*operands, [True] * 3)
    for k in range(3):
        alone = ours.cell_linear_backward(*operands, [k == which for which in range(3)])
        assert relative(alone[k], together[k]) < 1e-6
        assert all(len(tensor) == 0 for which, tensor in enumerate(alone) if which != k)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the options are those of x86")
@pytest.mark.parametrize(("without", "width"), [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_narrower_vectors(without: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    script = tmp_path / "own-c++"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" {without} -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("HOME", str(tmp_path))
    library._found.cache_clear()
    try:
        assert library.library().sparseift_vector_width() == width
        for cell in CELLS:
            assert max(Operands.draw(mask_of("one row").repeat(6, 1), cell, 70).differences()) < 1e-6
            assert max(Operands.draw(mask_of("one column").repeat(9, 6), cell, 200).differences()) < 1e-6
    finally:
        library._found.cache_clear()


# --- operators ---


def test_operators_follow_the_rules_of_torch_library() -> None:
    case = Operands.draw(mask_of("an empty row and an empty column"), (4, 1), 3)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.values, case.bias)]
    torch.library.opcheck(ours.cell_linear, (*inputs, list(case.index)))
    torch.library.opcheck(ours.cell_linear, (*inputs[:2], None, list(case.index)))
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(ours.cell_linear_backward, (case.grad, case.x, case.values, list(case.index), needs))


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # float32; but each output is linear in each input
def test_numerical_gradient() -> None:
    case = Operands.draw(mask_of("one column"), (1, 1), 3)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.values.flatten(), case.bias)]
    assert torch.autograd.gradcheck(
        lambda x, values, bias: cell_linear(x, values, case.index, bias), inputs, eps=0.25, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0, 4), (3, 2, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    case = Operands.draw(mask_of("an empty row and an empty column"), (4, 1), 1)
    values = case.values.requires_grad_()
    x = torch.randn(shape)
    y = cell_linear(x, values, case.index)
    torch.testing.assert_close(y, x @ reference.dense_weight(values.detach(), case.index).T)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 20) and values.grad.shape == values.shape


def test_strided_operands() -> None:
    case = Operands.draw(mask_of("all blocks"), (4, 4), 70)
    x, values = case.x.T.contiguous().T.requires_grad_(), case.values.mT.contiguous().mT.requires_grad_()
    y = cell_linear(x, values, case.index)
    (y * case.grad).sum().backward()
    torch.testing.assert_close(y, reference.linear(case.x, case.values, case.index))
    dx, dvalues, _ = reference.gradients(case.grad, case.x, case.values, case.index)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(values.grad, dvalues)


def test_bfloat16_is_stored_and_summed_in_float32() -> None:
    case = Operands.draw(mask_of("all blocks").repeat(4, 40), (1, 1), 70)
    x, values, bias, grad = (tensor.bfloat16() for tensor in (case.x, case.values, case.bias, case.grad))
    found = [ours.cell_linear(x, values, bias, list(case.index))]
    found += ours.cell_linear_backward(grad, x, values, list(case.index), [True] * 3)
    wanted = [reference.linear(x, values, case.index, bias), *reference.gradients(grad, x, values, case.index)]
    for ours_, theirs in zip(found, wanted, strict=True):
        assert ours_.dtype == torch.bfloat16
        assert relative(ours_, theirs) < 1e-3  # a few sums that are rounded the other way
    with torch.autocast("cpu"):
        y = cell_linear(case.x, case.values, case.index, case.bias)
    assert torch.equal(y, found[0])


def test_compiled_once_though_cells_move() -> None:
    mask = mask_of("an empty row and an empty column")
    case = Operands.draw(mask, (1, 1), 70)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(cell_linear, backend=backend, fullgraph=True)
    for moved in (mask, mask.flip(0), mask.flip(1)):
        case.index.move_(moved)
        torch.testing.assert_close(
            compiled(case.x, case.values, case.index, case.bias),
            reference.linear(case.x, case.values, case.index, case.bias),
        )
    assert len(graphs) == 1


def test_flops_are_those_of_the_non_zeros() -> None:
    case = Operands.draw(mask_of("an empty row and an empty column"), (4, 1), 70)
    x, values = case.x.requires_grad_(), case.values.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        cell_linear(x, values, case.index, case.bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 70 * values.numel()
    with FlopCounterMode(display=False) as counter:
        cell_linear(x.detach(), values, case.index, case.bias).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 70 * values.numel()


def test_what_does_not_fit_is_refused() -> None:
    case = Operands.draw(mask_of("all blocks"), (4, 4), 2)
    index = case.index
    for x, values, bias, said in [
        (case.x[:, 1:], case.values, None, r"is \[tokens, 12\], not \[2, 11\]"),
        (case.x, case.values[1:], None, r"values are \[6, r, c\]"),
        (case.x, case.values[:, :2], None, "cells of 1x1, 4x1, 4x4, 8x8, 16x16, not 2x4"),
        (case.x, case.values, case.bias[1:], r"outputs of these cells are 8, not \[7\]"),
        (case.x.double(), case.values.double(), None, "float32 or bfloat16, not torch.float64"),
        (case.x, case.values.bfloat16(), None, "of one dtype, not torch.bfloat16, torch.float32"),
    ]:
        with pytest.raises(UsageError, match=said):
            cell_linear(x, values, index, bias)


def test_index_of_another_type_is_refused() -> None:
    case = Operands.draw(mask_of("all blocks"), (1, 1), 2)
    index = BlockIndex(*(tensor.long() for tensor in case.index))
    with pytest.raises(UsageError, match=r"contiguous tensors of torch\.int32 on the CPU, not torch\.int64"):
        cell_linear(case.x, case.values, index)
