"""use_kernels and to_masked: what is replaced, what is left and why, and that nothing can tell the difference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.conv import BlockConv2d
from sparseift_cli.kernels.convert import to_masked, use_kernels
from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.mask.attached import attach, masks_of, parts_of, pattern_of
from sparseift_cli.mask.mask import make_mask
from tests.helpers.block_net import PATTERNS, block_net


def masked(module: Any, pattern: str = "4x4", name: str = "weight", parts: Any = None) -> Any:
    """`module` with half the blocks of a weight masked."""
    weight = module.get_parameter(name)
    mask = make_mask(
        weight.shape, weight.numel() // 32 * 16, generator=torch.Generator().manual_seed(0), pattern=pattern
    )
    attach(module, {name: mask}, {name: pattern}, {name: parts or ()})
    return module


def test_outputs_and_gradients_stay() -> None:
    net = block_net(compact=False).double()
    dense = copy.deepcopy(net)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    biases = {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
    choices = use_kernels(net, "reference")
    assert [(c.name, c.backend, c.block, c.reason) for c in choices] == [(n, "reference", 4, "") for n in PATTERNS]
    assert isinstance(net.conv, BlockConv2d) and isinstance(net.up, BlockLinear)
    assert biases <= {id(p) for p in net.parameters()}  # a bias is the same parameter as before
    torch.testing.assert_close(net(x), dense(twin))
    net(x).square().sum().backward()
    dense(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    for name in PATTERNS:
        layer, other = net.get_submodule(name.removesuffix(".weight")), dense.get_parameter(name)
        torch.testing.assert_close(layer.values.grad, layer.blocks_of(other.grad))


def test_there_and_back() -> None:
    net = block_net(compact=False).eval()
    net.twice.weight.requires_grad_(False)
    before, forms = copy.deepcopy(net), [(type(m), m.training) for m in net.modules()]
    use_kernels(net, "reference")
    assert masks_of(net).keys() == PATTERNS.keys()
    to_masked(net)
    assert [(type(m), m.training) for m in net.modules()] == forms
    assert net.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in net.state_dict().items())
    for (name, mask), other in zip(masks_of(net).items(), masks_of(before).values(), strict=True):
        assert torch.equal(mask, other)
        assert pattern_of(net.get_submodule(name.rpartition(".")[0]), "weight") == PATTERNS[name]
    assert not net.twice.weight.requires_grad and net.up.weight.requires_grad


def test_calling_it_again_changes_the_backend_or_undoes_it() -> None:
    net = block_net(compact=True)
    assert all(choice.backend == "reference" and choice.block == 4 for choice in use_kernels(net))
    choices = use_kernels(net, masked_because="gmp begins denser")
    assert all((c.backend, c.reason) == ("masked", "gmp begins denser") for c in choices)
    assert str(choices) == "4 layers masked-dense: gmp begins denser"
    assert not any(isinstance(m, BlockLinear) for m in net.modules())
    assert all(c.backend == "masked" for c in use_kernels(net, "masked"))


class Reads(nn.Module):
    """Reads the weight of its layer, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.fc.weight.dtype), self.fc.weight, self.fc.bias)


def test_code_that_reads_the_weight_trains_the_blocks() -> None:
    net = Reads()
    masked(net.fc)
    dense = copy.deepcopy(net)
    use_kernels(net, "reference")
    x = torch.randn(3, 8)
    torch.testing.assert_close(net(x), dense(x))
    net(x).sum().backward()
    dense(x).sum().backward()
    torch.testing.assert_close(net.fc.values.grad, net.fc.blocks_of(dense.fc.weight.grad))


def hooked() -> nn.Module:
    layer = masked(nn.Linear(8, 8))
    layer.register_forward_hook(lambda *_: None)
    return layer


def emptied() -> nn.Module:
    layer = nn.Linear(8, 8)
    attach(layer, {"weight": torch.zeros(8, 8, dtype=torch.bool)}, {"weight": "4x4"})
    return layer


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: masked(nn.Linear(8, 8), "unstructured"), "unstructured masks have no kernel"),
        (lambda: masked(nn.Linear(8, 8), "4x2"), "the blocks of 4x2 are not square"),
        (lambda: masked(nn.Linear(8, 8), "2:4"), "2:4 masks have no kernel"),
        (lambda: masked(nn.Conv2d(8, 8, 3), "4x4"), "the blocks of 4x4 are not square"),
        (lambda: masked(nn.Linear(9, 8)), "9 inputs and 8 outputs are not multiples of 4"),
        (lambda: masked(nn.Linear(8, 8), parts=((0, 2), (2, 8))), "parts of the weight"),
        (lambda: masked(Scaled(8, 8)), "Scaled is no layer that kernels replace"),
        (lambda: masked(nn.MultiheadAttention(8, 2), name="in_proj_weight"), "MultiheadAttention is no layer"),
        (lambda: masked(nn.Conv1d(8, 8, 1)), "Conv1d is no layer"),
        (lambda: masked(nn.Conv2d(8, 8, 1, groups=2), "4x4"), "its channels are in 2 groups"),
        (hooked, "this Linear has hooks"),
        (emptied, "it has no non-zeros"),
    ],
)
def test_what_stays_masked_says_why(layer: Any, reason: str) -> None:
    net = nn.Sequential(layer())
    (choice,) = use_kernels(net, "reference")
    assert choice.backend == "masked" and choice.reason.startswith(reason)
    assert not any(isinstance(m, BlockLinear | BlockConv2d) for m in net.modules())


def test_shared_weights_stay_and_shared_layers_are_replaced_everywhere() -> None:
    first, second = masked(nn.Linear(8, 8)), nn.Linear(8, 8)
    second.weight = first.weight
    (choice,) = use_kernels(nn.Sequential(first, second), "reference")
    assert choice.reason == "its weight is shared with another layer"
    layer = masked(nn.Linear(8, 8))
    net: Any = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.ReLU(), layer)})
    use_kernels(net, "reference")
    assert net["a"] is net["b"][1] and isinstance(net["a"], BlockLinear)


def test_a_part_of_whole_blocks_keeps_its_rows() -> None:
    net = nn.Sequential(masked(nn.Linear(8, 8), parts=((0, 4),)))
    (choice,) = use_kernels(net, "reference")
    assert choice.backend == "reference" and parts_of(net[0], "weight") == ((0, 4), (4, 8))
    to_masked(net)
    assert parts_of(net[0], "weight") == ((0, 4), (4, 8))


def test_a_mask_that_is_no_longer_of_blocks() -> None:
    layer = masked(nn.Linear(8, 8))
    layer.weight_mask[0, 0] ^= True
    (choice,) = use_kernels(nn.Sequential(layer), "reference")
    assert choice.reason == "its mask does not consist of whole blocks of 4x4"


def test_the_model_itself_and_unknown_backends_are_refused() -> None:
    with pytest.raises(UsageError, match="the model itself is the Linear"):
        use_kernels(masked(nn.Linear(8, 8)), "reference")
    with pytest.raises(UsageError, match="unknown kernels 'cutlass'"):
        use_kernels(block_net(compact=False), "cutlass")


def test_a_layer_of_blocks_that_replaced_none_becomes_linear() -> None:
    net = nn.Sequential(BlockLinear(torch.eye(2, dtype=torch.bool), 4))
    x = torch.randn(3, 8)
    y = net(x)
    to_masked(net)
    assert type(net[0]) is nn.Linear and pattern_of(net[0], "weight") == "4x4"
    torch.testing.assert_close(net(x), y)


def test_autocast_dtype_decides_the_backend() -> None:
    net = nn.Sequential(masked(nn.Linear(8, 8)).double())
    (choice,) = use_kernels(net, "blocks", dtype=torch.float64)
    assert choice.backend == "masked" and choice.reason
