"""How a transformed model starts: its weights' deviations, its masks, its seed; and the ways to rank weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli import Options
from sparseift_cli.errors import UsageError
from sparseift_cli.mask.attached import masks_of
from sparseift_cli.mask.saliency import scores
from sparseift_cli.models.zoo import registry
from sparseift_cli.models.zoo.gpt import GPT, GPTConfig
from sparseift_cli.models.zoo.vit import VisionTransformer, ViTConfig


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


X = torch.randn(4, 3, 12, 12)


def deviation(tensor: torch.Tensor) -> float:
    return float(tensor.detach().std(correction=0))


def test_the_rule_of_the_dense_model_is_found_and_used_with_the_new_fans() -> None:
    torch.manual_seed(0)
    model = registry.build("resnet18")  # Kaiming normal, fan out
    new, _ = sparseift.transform(model, torch.zeros(1, 3, 64, 64), sparsity=0.9)
    masks = masks_of(new)
    for name in ("layer1.0.conv1", "layer2.0.downsample.0", "layer3.1.conv2", "layer4.0.conv1"):
        weight = new.get_parameter(f"{name}.weight")
        live = weight[masks[f"{name}.weight"]]
        want = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
        assert deviation(live) == pytest.approx(want, rel=4 / math.sqrt(2 * live.numel()))
    assert torch.equal(new.get_parameter("layer1.0.bn1.weight"), torch.ones(202))
    head = new.get_parameter("fc.weight")  # torch's default: uniform in 1 / sqrt(fan in)
    assert head.abs().max() <= 1 / math.sqrt(1619)
    assert deviation(head) == pytest.approx(1 / math.sqrt(3 * 1619), rel=0.01)


def test_a_deviation_that_follows_no_fan_stays() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(hidden=256, depth=2, num_heads=4, max_seq=16, vocab=100))
    with torch.no_grad():
        new, _ = sparseift.transform(
            model, torch.zeros(1, 8, dtype=torch.int64), sparsity=0.75, include=("*.h.0.mlp*",)
        )
    weight = new.get_parameter("transformer.h.0.mlp.c_fc.weight")
    live = weight[masks_of(new)["transformer.h.0.mlp.c_fc.weight"]]
    assert weight.shape == (256, 2048)  # only the MLP's hidden width touches no excluded layer
    assert deviation(live) == pytest.approx(0.02, rel=0.01)


def test_density_scaled_weights_are_larger() -> None:
    plain, _ = sparseift.transform(net(), X, sparsity=0.75)
    scaled, _ = sparseift.transform(net(), X, sparsity=0.75, options=Options(init="density_scaled"))
    for key, mask in masks_of(plain).items():
        density = int(mask.count_nonzero()) / mask.numel()
        factor = deviation(scaled.get_parameter(key)[mask]) / deviation(plain.get_parameter(key)[mask])
        assert factor == pytest.approx(density**-0.5, rel=1e-4)


@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
def test_the_seed_decides_everything(member: str) -> None:
    one, two, other = (
        sparseift.transform(net(), X, member=member, sparsity=0.75, options=Options(seed=seed))[0] for seed in (3, 3, 4)
    )
    torch.manual_seed(99)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, c) for a, c in zip(one.parameters(), other.parameters(), strict=True))
    masks = [masks_of(m) for m in (one, two, other)]
    assert all(torch.equal(masks[0][k], masks[1][k]) for k in masks[0])
    assert any(not torch.equal(masks[0][k], masks[2][k]) for k in masks[0])


def test_magnitude_keeps_the_largest() -> None:
    new, _ = sparseift.transform(net(), X, sparsity=0.75, options=Options(scores="magnitude", connect=False))
    random, _ = sparseift.transform(net(), X, sparsity=0.75)
    for key, mask in masks_of(new).items():
        weight = new.get_parameter(key).abs()
        assert mask.count_nonzero() == masks_of(random)[key].count_nonzero()
        # the same weights were drawn for both, so what random masks keep says how large the kept ones must be
        assert weight[mask].min() > weight[mask].mean() * 0.3


def test_saliency_masks_from_a_loader() -> None:
    batches = [(X, torch.randint(0, 10, (4,)))]

    def snip(model: nn.Module, keys: dict[str, int]) -> dict[str, torch.Tensor]:
        return scores(model, list(keys), batches, nn.functional.cross_entropy, method="snip")

    new, plan = sparseift.transform(net(), X, sparsity=0.75, options=Options(scores=snip))
    counts = {row.layer.weight: row.nnz for row in plan.layers if row.status == "transformed"}
    assert {k: int(m.count_nonzero()) for k, m in masks_of(new).items()} == counts
    random, _ = sparseift.transform(net(), X, sparsity=0.75)
    assert any(not torch.equal(m, masks_of(random)[k]) for k, m in masks_of(new).items())


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", "0.5"), ("4x4", "0.75"), ("1:4", "0.75"), ("2x8", "0.5")])
def test_patterns_hold_the_planned_counts(pattern: str, sparsity: str) -> None:
    new, plan = sparseift.transform(net(), X, sparsity=sparsity, pattern=pattern)
    counts = {row.layer.weight: row.nnz for row in plan.layers if row.status == "transformed"}
    for key, mask in masks_of(new).items():
        assert int(mask.count_nonzero()) == counts[key]
        if pattern == "2:4":
            groups = mask[:, : mask.shape[1] // 4 * 4].unflatten(1, (-1, 4)).sum(2)
            assert (groups == 2).all()
    assert sparseift.audit(new, X).forward_ratio


@pytest.mark.parametrize("member", ["wide", "parallel"])
def test_branches_summed_before_the_activation_have_disjoint_masks(member: str) -> None:
    new, _ = sparseift.transform(net(), X, member="parallel", sparsity=0.75, branch_activation="sum")
    masks = masks_of(new)
    together = sum(masks[f"3.branches.{i}.0.weight"].int() for i in range(4))
    assert (together == 1).all()
    assert sum(new.get_submodule(f"3.branches.{i}.0").bias is not None for i in range(4)) == 1


def test_heads_get_equal_shares() -> None:
    torch.manual_seed(0)
    config = ViTConfig(hidden=48, num_heads=6, mlp=192, depth=1, num_classes=10, image=(3, 32, 32))
    model = VisionTransformer(config)
    new, _ = sparseift.transform(model, torch.zeros(1, 3, 32, 32), sparsity=0.75)
    qkv = masks_of(new)["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]
    per_head = qkv.unflatten(0, (18, -1)).sum((1, 2))
    assert per_head.max() - per_head.min() <= 1
    out = masks_of(new)["encoder.layers.encoder_layer_0.self_attention.out_proj.weight"]
    per_head = out.unflatten(1, (6, -1)).sum((0, 2))
    assert per_head.max() - per_head.min() <= 1


def test_blocks_larger_than_a_head_are_balanced_over_groups_of_heads() -> None:
    """Heads of 16 in blocks of 32: two heads of each of q, k and v share their rows of blocks, so nine parts get equal shares."""
    config = ViTConfig(hidden=48, num_heads=6, mlp=192, depth=1, num_classes=10, image=(3, 32, 32))
    new, _ = sparseift.transform(
        VisionTransformer(config), torch.zeros(1, 3, 32, 32), sparsity=0.75, pattern="32x32", heads="scale_dim"
    )
    attention = "encoder.layers.encoder_layer_0.self_attention"
    qkv = masks_of(new)[f"{attention}.in_proj_weight"]
    assert qkv.shape == (288, 96)
    for sums in (qkv[::32, ::32].sum(0), qkv[::32, ::32].sum(1), qkv.unflatten(0, (9, -1)).sum((1, 2)) // 1024):
        assert sums.max() - sums.min() <= 1
    out = masks_of(new)[f"{attention}.out_proj.weight"][::32, ::32]
    assert out.sum() == 2 and out.sum(0).max() == out.sum(1).max() == 1


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({}, "BatchNorm2d ReLU"),
        ({"norm": "none"}, "ReLU"),
        ({"activation": "silu"}, "BatchNorm2d SiLU"),
        ({"activation": "none", "norm": "none"}, ""),
    ],
)
def test_norms_and_activations_inside_a_member_follow_the_model_or_the_options(
    options: dict[str, str], inside: str
) -> None:
    for member, find in (("parallel", "3.branches.1"), ("factorized", "3.inner")):
        new, _ = sparseift.transform(net(), X, member=member, sparsity=0.5, **options)
        modules = [type(m).__name__ for m in new.get_submodule(find).children() if not isinstance(m, nn.Conv2d)]
        assert " ".join(modules) == inside
    norm = sparseift.transform(net(), X, member="factorized", sparsity=0.5, inner="norm")[0].get_submodule("3.inner")
    assert [type(m).__name__ for m in norm.children()] == ["BatchNorm2d"]


def test_a_functional_activation_is_found_too() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(nn.functional.gelu(self.b(torch.relu(self.a(x))), approximate="tanh"))

    new, _ = sparseift.transform(Block(), torch.randn(2, 8), member="parallel", sparsity=0.5)
    found = new.get_submodule("b.branches.0.1")
    assert isinstance(found, nn.GELU) and found.approximate == "tanh"


def test_a_model_on_meta_is_planned_without_memory() -> None:
    with torch.device("meta"):
        model = net()
    new, plan = sparseift.transform(model, X.to("meta"), sparsity=0.9)
    assert all(p.is_meta for p in new.parameters())
    assert not masks_of(new)
    assert sparseift.flops(new).plan == plan
    with pytest.raises(UsageError, match="no function to preserve"):
        sparseift.transform(model, X.to("meta"), sparsity=0.9, options=Options(start="preserve"))


def test_a_transformed_model_does_not_count_as_dense() -> None:
    """A second transform would count sparse layers as dense: iso-FLOP to four times the cost of the first."""
    new, _ = sparseift.transform(net(), X, sparsity=0.75)
    with pytest.raises(UsageError, match="transformed already"):
        sparseift.transform(new, X, sparsity=0.75)
    with pytest.raises(UsageError, match="transformed already"):
        sparseift.flops(new, X, sparsity=0.5)


def test_an_input_that_would_be_ignored_is_refused() -> None:
    new, plan = sparseift.transform(net(), X, sparsity=0.75)
    assert sparseift.flops(new, X).plan == plan
    with pytest.raises(UsageError, match="planned at input 4x3x12x12, not 1x3x24x24"):
        sparseift.flops(new, torch.zeros(1, 3, 24, 24))
    for ask in (sparseift.flops, sparseift.inspect):
        with pytest.raises(UsageError, match="resnet18 brings its own input"):
            ask("resnet18", torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("init", ["dense", "density_scaled"])
@pytest.mark.parametrize("member", ["wide", "doped", "parallel"])
def test_a_deep_net_keeps_its_variance(member: str, init: str) -> None:
    """Twelve ReLU layers without a norm: a gain of 1.4 a layer would be 60 at the end."""
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128, bias=False) for _ in range(12)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    model = nn.Sequential(
        nn.Linear(32, 128, bias=False),
        *(m for layer in layers for m in (layer, nn.ReLU())),
        nn.Linear(128, 10, bias=False),
    )
    x = torch.randn(256, 32)
    new, _ = sparseift.transform(
        model,
        x,
        member=member,
        sparsity=0.75,
        options=Options(init=init),
        **({"branch_activation": "sum"} if member == "parallel" else {}),
    )
    with torch.no_grad():
        gain = (float(new(x).std()) / float(model(x).std())) ** (1 / 12)
    if (member, init) == ("wide", "dense"):
        assert gain == pytest.approx(
            0.25**0.5, rel=0.15
        )  # the dense fan with a quarter of the weights, as in the paper
    else:
        assert gain == pytest.approx(1.0, rel=0.15)


def test_a_glob_that_matches_no_layer_is_an_error() -> None:
    with pytest.raises(UsageError, match="matches no layer"):
        sparseift.transform(net(), X, sparsity=0.75, exclude=("layer9*",))


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12), nn.BatchNorm1d(12), nn.GroupNorm(3, 12)])
@pytest.mark.filterwarnings("ignore:not exact")  # the GroupNorm
def test_a_trained_model_is_not_drawn_anew_without_a_word(norm: nn.Module) -> None:
    """Its norms show that it was trained: whatever draws weights first gives all gains of a norm one value."""
    model = nn.Sequential(
        nn.Linear(4, 12), copy.deepcopy(norm), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    sparseift.transform(model, torch.zeros(2, 4), sparsity=0.75)
    with torch.no_grad():
        model.get_parameter("1.weight")[0] = 1.5
    with pytest.warns(UserWarning, match=r"was trained \(1\.weight has unequal values\)"):
        sparseift.transform(model, torch.zeros(2, 4), sparsity=0.75)
    for start in ("fresh", "preserve"):  # chosen: no warning, which would be an error here
        sparseift.transform(model, torch.zeros(2, 4), sparsity=0.75, options=Options(start=start))
