"""Layers whose weight is computed in forward from a parameter.

Where zeros of the parameter stay zeros (weight_norm, rows of length one), a mask of the parameter makes the layer sparse. Where
they do not (weight standardisation subtracts a mean), the layer keeps its widths, so that nothing grows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sparseift_cli as sparseift
from sparseift_cli.errors import CheckFailed
from sparseift_cli.sparsity.sparsifier import Sparsifier
from sparseift_cli.transforms.transformation import Options, transformation_of

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def by_hooks(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def own_forward(weight_of: Callable[[Tensor], Tensor]) -> Callable[[nn.Conv2d], nn.Module]:
    class Computed(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, weight_of(self.weight), self.bias)

    def made(like: nn.Conv2d) -> nn.Module:
        return Computed(like.in_channels, like.out_channels, like.kernel_size[0])

    return made


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)


def batch_normed(weight: Tensor) -> Tensor:
    """As timm's StdConv2d computes it."""
    return F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True).reshape_as(weight)


def written_into(weight: Tensor) -> Tensor:
    copy = weight.clone()
    copy[:2] += 1
    return copy


KEEP_ZEROS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of the whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight_norm by hooks": by_hooks,
    "rows of length one": own_forward(lambda w: F.normalize(w.flatten(1), dim=1).view_as(w)),
    "filters of length one": own_forward(lambda w: w / w.square().sum((1, 2, 3), keepdim=True).sqrt()),
    "scaled": own_forward(lambda w: 0.5 * w),
}
LOSE_ZEROS = {
    "standardised": own_forward(standardised),
    "batch-normed": own_forward(batch_normed),
    "written into": own_forward(written_into),
}


def net(wrap: Callable[[nn.Conv2d], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    inner = wrap(nn.Conv2d(8, 12, 3))
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), inner, nn.ReLU(), nn.Conv2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(64, 5)).eval()


def effective(module: nn.Module) -> Tensor:
    """The weight that the convolution is computed with, taken where it is."""
    found: list[Tensor] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.conv2d and args[1].shape[2:] == (3, 3):
                found.append(args[1].detach().clone())
            return func(*args, **(kwargs or {}))

    with Watch():
        module(IMAGE)
    (weight,) = found
    return weight


@pytest.mark.parametrize("wrap", KEEP_ZEROS.values(), ids=KEEP_ZEROS)
def test_a_mask_of_the_parameter_makes_the_layer_sparse(wrap: Callable[[nn.Conv2d], nn.Module]) -> None:
    """8 -> 12 becomes 16 -> 24 with the 864 non-zeros of the dense layer, also after mask updates."""
    module, plan = sparseift.transform(net(wrap), IMAGE, sparsity=0.75)
    row = next(row for row in plan.layers if row.layer.kernel == (3, 3))
    assert (row.status, row.dense_macs, row.macs) == ("transformed", 2 * 16 * 864, 2 * 16 * 864)
    assert effective(module).shape == (24, 16, 3, 3) and int(effective(module).count_nonzero()) == 864
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.01)
    sparsifier = Sparsifier(module, optimizer, algorithm="rigl", total_steps=8, delta_t=2)
    for _ in range(8):
        module(IMAGE).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < int(effective(module).count_nonzero()) <= 864 and effective(module).isfinite().all()
    sparseift.audit(module.eval(), IMAGE)


@pytest.mark.parametrize("wrap", LOSE_ZEROS.values(), ids=LOSE_ZEROS)
def test_where_zeros_do_not_stay_zeros_the_layer_keeps_its_widths(wrap: Callable[[nn.Conv2d], nn.Module]) -> None:
    model = net(wrap)
    model[4] = nn.Sequential(nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1))  # a width that may grow
    module, plan = sparseift.transform(model, IMAGE, sparsity=0.75)
    row = next(row for row in plan.layers if row.layer.kernel == (3, 3))
    assert (row.status, row.macs) == ("untouched", row.dense_macs)
    assert row.reason == "the weight is computed in forward, not a parameter"
    assert effective(module).shape == (12, 8, 3, 3) and not sparseift.flops(module).growing


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_members_that_replace_layers_leave_it_by_name(member: str) -> None:
    _, plan = sparseift.transform(net(parametrizations.weight_norm), IMAGE, member=member, sparsity=0.75)
    row = next(row for row in plan.layers if row.layer.kernel == (3, 3))
    assert row.reason == "its weight is used by ParametrizedConv2d: only Sparse Wide can transform it"


def test_lengths_start_as_the_dense_ones() -> None:
    """Lengths of weight_norm are drawn around their mean, not around zero."""
    dense = net(parametrizations.weight_norm)
    module, _ = sparseift.transform(dense, IMAGE, sparsity=0.75)
    new, old = (m[2].parametrizations.weight.original0.detach() for m in (module, dense))
    assert new.shape == (24, 1, 1, 1) and float(new.mean()) == pytest.approx(float(old.mean()), rel=0.1)
    assert bool((new > 0).all())


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, by_hooks], ids=["parametrised", "hooks"])
def test_preserve_gives_added_channels_a_direction_or_is_refused(wrap: Callable[[nn.Conv2d], nn.Module]) -> None:
    with pytest.raises(CheckFailed, match="the wider Sequential computes NaN"):
        sparseift.transform(net(wrap), IMAGE, sparsity=0.75, options=Options(start="preserve", preserve_slack=0.0))
    module, _ = sparseift.transform(net(wrap), IMAGE, sparsity=0.75, options=Options(start="preserve"))
    done = transformation_of(module)
    assert done is not None and done.deviation is not None and done.deviation < 0.1
