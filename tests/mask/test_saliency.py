"""Saliency against finite differences and explicit Hessians, and a model that does not notice being scored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.errors import UsageError
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.mask.saliency import force_masks, scores

LOSS = functional.cross_entropy
KEYS = ["0.weight", "2.weight"]


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(count: int = 2, seed: int = 1, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def mean_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([LOSS(model(x), y) for x, y in batches]).mean()


def test_snip_is_the_effect_of_removing_a_weight() -> None:
    """|dL/dc| at c = 1 for w -> c w, by central differences, one weight at a time."""
    model, batches = small(), data()
    found = scores(model, KEYS, batches, LOSS)
    for key in KEYS:
        weight = model.get_parameter(key).data
        slow = torch.zeros_like(weight)
        for i in range(weight.numel()):
            kept, losses = weight.view(-1)[i].item(), []
            for c in (1 + 1e-5, 1 - 1e-5):
                weight.view(-1)[i] = c * kept
                losses.append(mean_loss(model, batches).item())
            weight.view(-1)[i] = kept
            slow.view(-1)[i] = abs(losses[0] - losses[1]) / 2e-5
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key].double(), slow, rtol=1e-5, atol=1e-7)


def flat_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]):
    """The mean loss as a function of the weights of KEYS in one vector, and that vector."""
    shapes = [model.get_parameter(key).shape for key in KEYS]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([s.numel() for s in shapes])
        state = {k: p.view(s) for k, p, s in zip(KEYS, parts, shapes, strict=True)}
        return torch.stack([LOSS(torch.func.functional_call(model, state, (x,)), y) for x, y in batches]).mean()

    return loss, torch.cat([model.get_parameter(key).detach().flatten() for key in KEYS])


def test_grasp_by_the_explicit_hessian() -> None:
    model, batches = small(), data()
    loss, start = flat_loss(model, batches)
    hessian = torch.autograd.functional.hessian(loss, start)
    gradient = torch.autograd.functional.jacobian(loss, start)
    found = scores(model, KEYS, iter(batches), LOSS, method="grasp")
    flat = torch.cat([found[key].flatten() for key in KEYS]).double()
    torch.testing.assert_close(flat, start * (hessian @ gradient), rtol=1e-5, atol=1e-8)


def test_grasp_keeps_what_carries_the_gradient() -> None:
    """The sign: to first order, w -> (1 - e) w changes the gradient's squared norm by -2 e times the score."""
    model, batches = small(), data()
    loss, start = flat_loss(model, batches)
    found = scores(model, KEYS, batches, LOSS, method="grasp")
    flat = torch.cat([found[key].flatten() for key in KEYS])
    for i in (int(flat.argmax()), int(flat.argmin())):
        norms = []
        for e in (1e-4, -1e-4):
            moved = start.clone()
            moved[i] *= 1 - e
            norms.append(float(torch.autograd.functional.jacobian(loss, moved).square().sum()))
        assert (norms[0] - norms[1]) / 2e-4 == pytest.approx(-2 * float(flat[i]), rel=1e-4)


class Everything(nn.Module):
    """Convolution, batch norm, attention, dropout, a frozen weight, and a head tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 3)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2).mT * scale
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.two(self.drop(self.one(x)).relu()).mean(1))


@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize("form", [tuple, dict])
def test_the_model_is_left_as_it_was(method: str, form: type) -> None:
    torch.manual_seed(0)
    model = Everything().train()
    model.norm.eval()
    model.drop.eval()
    inputs = {"x": torch.randn(4, 3, 6, 6), "scale": torch.tensor(2.0)}
    batches = [(inputs if form is dict else tuple(inputs.values()), torch.tensor([0, 1, 2, 0]))]
    LOSS(model(**inputs), batches[0][1]).backward()
    keys = ["conv.weight", "attention.in_proj_weight", "two.weight", "head.weight"]
    before = {
        n: (t, t.clone(), t._version)
        for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
    }
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    needs = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    random = torch.get_rng_state()
    with torch.no_grad():
        first = scores(model, keys, batches, LOSS, method=method)
        torch.rand(3)
        second = scores(model, keys, batches, LOSS, method=method)
    torch.set_rng_state(random)
    again = scores(model, keys, batches, LOSS, method=method)
    assert torch.equal(torch.get_rng_state(), random)
    for key in keys:
        assert first[key].shape == model.get_parameter(key).shape and not first[key].requires_grad
        assert first[key].abs().sum() > 0
        assert torch.equal(first[key], second[key]) and torch.equal(first[key], again[key])
    for tensor, value, version in before.values():
        assert torch.equal(tensor, value) and tensor._version == version
    for name, p in model.named_parameters():
        assert p is before[name][0] and p.requires_grad == needs[name]
        assert p.grad is None if gradients[name] is None else torch.equal(p.grad, gradients[name])
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert model.two.weight is model.one.weight


def test_scores_see_batch_statistics_and_no_dropout() -> None:
    plain = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    noisy = nn.Sequential(plain[0], plain[1], nn.Sequential(nn.Dropout(0.9), plain[2])).double().eval()
    plain[1].running_mean.fill_(100.0)
    net = copy.deepcopy(plain).train()
    mean_loss(net, data()).backward()
    weight = net.get_parameter("0.weight")
    assert weight.grad is not None
    want = (weight.detach() * weight.grad).abs().float()
    for model in (plain, noisy):
        torch.testing.assert_close(scores(model, ["0.weight"], data(), LOSS)["0.weight"], want)


def test_a_failing_forward_leaves_the_modes() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout()).eval()
    with pytest.raises(RuntimeError, match="shapes"):
        scores(model, ["0.weight"], [(torch.ones(2, 4), torch.tensor([0, 1]))], LOSS)
    assert not any(m.training for m in model.modules())


def slow_force(model: nn.Module, nnz: dict[str, int], rounds: int, regrow: bool) -> tuple[dict[str, Tensor], int]:
    """Progressive pruning with plain backward on a masked copy; also how many pruned weights came back."""
    masks = {key: torch.ones_like(model.get_parameter(key), dtype=torch.bool) for key in nnz}
    back = 0
    for t in range(1, rounds + 1):
        net = copy.deepcopy(model)
        for key, mask in masks.items():
            net.get_parameter(key).data.mul_(mask)
        mean_loss(net, data()).backward()
        for key, n in nnz.items():
            weight = model.get_parameter(key).detach()
            gradient = net.get_parameter(key).grad
            assert gradient is not None
            score = (weight * gradient).abs()
            if not regrow:
                score[~masks[key]] = -1
            count = n if t == rounds else round(weight.numel() ** (1 - t / rounds) * n ** (t / rounds))
            new = make_mask(score.shape, count, generator=generator_for(0, key, "force", str(t)), scores=score)
            back += int((new & ~masks[key]).sum())
            masks[key] = new
    return masks, back


@pytest.mark.parametrize("regrow", [True, False])
def test_force_by_hand(regrow: bool) -> None:
    nnz = {"0.weight": 7, "2.weight": 5}
    want, back = slow_force(small(3), nnz, 6, regrow)
    assert bool(back) == regrow  # in this network some weights return, where they may
    found = force_masks(small(3), nnz, iter(data()), LOSS, rounds=6, regrow=regrow)
    assert {k: int(m.sum()) for k, m in found.items()} == nnz
    assert all(torch.equal(found[k], want[k]) for k in nnz)


def test_one_round_is_snip() -> None:
    model, nnz = small(), {"0.weight": 9}
    found = scores(model, ["0.weight"], data(), LOSS)["0.weight"]
    want = make_mask(found.shape, 9, generator=generator_for(0), scores=found)
    assert torch.equal(force_masks(model, nnz, data(), LOSS, rounds=1)["0.weight"], want)


@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize(("pattern", "nnz"), [("2x2", 8), ("1:4", 5 * 2), ("2:4", 20), ("unstructured", 40)])
def test_force_with_structure(regrow: bool, pattern: str, nnz: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False)).double()
    structure = {"2.weight": {"pattern": pattern}}
    batches = [(x, y) for x, y in data()]
    masks = force_masks(model, {"2.weight": nnz}, batches, LOSS, rounds=4, regrow=regrow, structure=structure)
    assert int(masks["2.weight"].sum()) == nnz
    if ":" in pattern:
        assert masks["2.weight"].view(5, 2, 4).sum(2).eq(nnz // 10).all()


class Spare(nn.Sequential):
    """A network that does not use one of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, nn.Identity())
        self[1].spare = nn.Parameter(torch.ones(2))


def test_refusals() -> None:
    model, batches = small(), data()
    with pytest.raises(UsageError, match=r"no parameter '0\.wieght'") as error:
        scores(model, ["0.wieght"], batches, LOSS)
    assert error.value.hint == "did you mean '0.weight'?"
    with pytest.raises(UsageError, match="no batches"):
        scores(model, KEYS, [], LOSS)
    with pytest.raises(UsageError, match="unknown saliency 'force'"):
        scores(model, KEYS, batches, LOSS, method="force")
    with pytest.raises(UsageError, match=r"does not depend on 1\.spare$"):
        scores(Spare(model), ["0.0.weight", "1.spare"], batches, LOSS)
    with pytest.raises(UsageError, match="two are the same parameter"):
        scores(nn.Sequential(model, model), ["0.0.weight", "1.0.weight"], batches, LOSS)
    with pytest.raises(UsageError, match=r"does not depend on any of 0\.weight, 2\.weight"):
        scores(model, KEYS, batches, lambda out, y: LOSS(out.detach(), y))
    with pytest.raises(UsageError, match=r"tensor of shape \(7,\)"):
        scores(model, KEYS, batches, lambda out, y: LOSS(out, y, reduction="none"))
    with pytest.raises(UsageError, match="at least one"):
        force_masks(model, {"0.weight": 5}, batches, LOSS, rounds=0)
    with pytest.raises(UsageError, match=r"0\.weight: 21 non-zeros do not fit"):
        force_masks(model, {"0.weight": 21}, batches, LOSS)


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_what_is_not_finite_is_named(method: str) -> None:
    model = small()
    with pytest.raises(UsageError, match="loss of batch 0 is nan"):
        scores(model, KEYS, [(torch.full((1, 5), torch.nan).double(), torch.tensor([0]))], LOSS, method=method)

    def steep(out: Tensor, target: Tensor) -> Tensor:
        """Zero, with an infinite slope."""
        return (out - out.detach()).abs().sum().sqrt()

    with pytest.raises(UsageError, match=r"scores of 0\.weight are not finite"):
        scores(model, KEYS, data(1), steep, method=method)


def test_a_loss_without_curvature() -> None:
    """GraSP of a linear network under a linear loss is zero everywhere: no gradient flow depends on the weights."""
    model = nn.Sequential(nn.Linear(5, 3)).double()
    found = scores(model, ["0.weight"], data(), lambda out, y: out.sum(), method="grasp")
    assert not found["0.weight"].any()
