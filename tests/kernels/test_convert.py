"""use_kernels and to_masked: what is replaced, what is left and why, and that nothing can tell the difference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.conv import BlockConv2d
from sparseift_cli.kernels.convert import to_masked, use_kernels
from sparseift_cli.kernels.copies import warn_of_averages
from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.kernels.registry import LayerRequest, LayerSize, Selected
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


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown kernels 'cutlass'"):
        use_kernels(block_net(compact=False), "cutlass")


class Listed(nn.Module):
    """Holds its layers in a plain list and in a closure too, and reads what it noted at one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = masked(nn.Linear(8, 8))
        self.fc.gain = 2.0
        self.again = [self.fc]
        layer = self.fc
        self.call: Any = lambda x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.again[0](x)) * self.fc.gain


def test_a_layer_is_replaced_wherever_it_is_held() -> None:
    net, x = Listed(), torch.randn(3, 8)
    elsewhere: Any = nn.Sequential(net.fc, nn.ReLU())
    y, z = net(x), elsewhere(x)
    for _ in range(2):
        use_kernels(net, "reference")
        assert [name for name, _ in elsewhere.named_parameters()] == ["0.values", "0.bias"]
        torch.testing.assert_close(net(x), y)
        torch.testing.assert_close(elsewhere(x), z)
        net(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        to_masked(net)
        assert type(net.fc) is nn.Linear and not hasattr(net.fc, "values")
        torch.testing.assert_close(net(x), y)
        torch.testing.assert_close(elsewhere(x), z)


def test_a_model_that_is_one_layer() -> None:
    layer, x = masked(nn.Linear(8, 8)), torch.randn(3, 8)
    y = layer(x)
    assert [c.name for c in use_kernels(layer, "reference")] == ["weight"] and isinstance(layer, BlockLinear)
    torch.testing.assert_close(layer(x), y)
    to_masked(layer)
    torch.testing.assert_close(layer(x), y)


def test_a_compiled_model_computes_with_what_its_layers_are_now() -> None:
    net = nn.Sequential(masked(nn.Linear(8, 8)), nn.ReLU())
    compiled, x = torch.compile(net, backend="eager"), torch.randn(3, 8)
    y = compiled(x)
    use_kernels(compiled, "reference")
    torch.testing.assert_close(compiled(x), y)
    with torch.no_grad():
        net[0].values.zero_()
        net[0].bias.fill_(3)
    assert compiled(x).eq(3).all()


def test_ddp_comes_afterwards(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(masked(nn.Linear(8, 8))))
        with pytest.raises(UsageError, match="averages the gradients of the parameters that it was made with"):
            use_kernels(wrapped, "reference")
    finally:
        torch.distributed.destroy_process_group()


def test_averages_of_a_model_that_is_masked_again_are_let_be() -> None:
    net = block_net(compact=True)
    average = copy.deepcopy(net)
    to_masked(net)
    warn_of_averages(net)
    assert isinstance(average.up, BlockLinear)


def test_a_layer_of_blocks_that_replaced_none_becomes_linear() -> None:
    net = nn.Sequential(BlockLinear(torch.eye(2, dtype=torch.bool), 4))
    x = torch.randn(3, 8)
    y = net(x)
    to_masked(net)
    assert type(net[0]) is nn.Linear and pattern_of(net[0], "weight") == "4x4"
    torch.testing.assert_close(net(x), y)


def test_every_kind_of_layer_is_measured_where_tokens_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers by rows of blocks and tokens, convolutions by their window too; without tokens nothing is measured."""
    asked: list[LayerSize | None] = []

    def noted(kernels: str, layer: LayerRequest, size: LayerSize | None) -> Selected:
        asked.append(size)
        return Selected("masked", "noted")

    monkeypatch.setattr("sparseift_cli.kernels.convert.select", noted)
    use_kernels(block_net(compact=False), tokens=100)
    assert asked == [
        LayerSize(4, 2, 4, 100, bias=False, window=(3, 3, 2, 2, 1, 1)),
        LayerSize(2, 4, 4, 100),
        LayerSize(4, 2, 4, 100),
        LayerSize(4, 4, 8, 100),
    ]
    asked.clear()
    use_kernels(block_net(compact=False))
    assert asked == [None] * 4


def test_a_convolution_of_blocks_that_replaced_none_turns_into_one_of_torch() -> None:
    net = nn.Sequential(BlockConv2d(torch.eye(2, dtype=torch.bool), 4, 3, stride=2, padding=1, bias=False))
    x = torch.randn(2, 8, 5, 5)
    y = net(x)
    to_masked(net)
    assert type(net[0]) is nn.Conv2d and pattern_of(net[0], "weight") == "4x36"
    torch.testing.assert_close(net(x), y)


def test_autocast_dtype_decides_the_backend() -> None:
    net = nn.Sequential(masked(nn.Linear(8, 8)).double())
    (choice,) = use_kernels(net, "blocks", dtype=torch.float64)
    assert choice.backend == "masked" and choice.reason
