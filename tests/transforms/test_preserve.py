"""A wide network that starts as the dense one: the same outputs, the planned masks, and gradients where there is slack."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli import Options
from sparseift_cli.errors import UsageError
from sparseift_cli.models.weights import load_into, recognised
from sparseift_cli.models.zoo import registry
from sparseift_cli.models.zoo.bert import Bert, BertConfig
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.trace.build import trace
from sparseift_cli.transforms.compare import deviation
from sparseift_cli.transforms.initialise import initialise, preserve
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for
from sparseift_cli.transforms.transformation import transformation_of
from tests.helpers.preserve_models import (
    EXACT,
    MODELS,
    KeptScale,
    Widened,
    encoder,
    images,
    tiny_gpt,
    tiny_llama,
    tokens,
    trained,
    widened,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparsity", ["0.6", "0.9"])
def test_same_function_and_planned_masks(name: str, sparsity: str) -> None:
    make, x = MODELS[name]
    torch.manual_seed(0)
    case = widened(trained(make(), x), x, sparsity=sparsity)
    assert case.deviation(x) <= EXACT, case.preserved.notes
    for masked in case.surgery.masked:
        mask, weight = case.preserved.masks[masked.key], case.new.get_parameter(masked.key)
        assert mask.dtype == torch.bool and int(mask.sum()) == masked.nnz
        assert not weight[~mask].any()
    assert not any("not exact" in note for note in case.preserved.notes)


@pytest.mark.parametrize("name", MODELS)
def test_slack_replaces_the_smallest_weights_and_changes_no_output_otherwise(name: str) -> None:
    make, x = MODELS[name]
    torch.manual_seed(0)
    dense = trained(make(), x)
    without, case = widened(dense, x), widened(dense, x, slack=0.1)
    silenced = copy.deepcopy(case.new)
    random = 0
    with torch.no_grad():
        for masked in case.surgery.masked:
            mask = case.preserved.masks[masked.key]
            assert int(mask.sum()) == masked.nnz
            added = mask & ~without.preserved.masks[masked.key]
            dropped = without.preserved.masks[masked.key] & ~mask
            assert int(added.sum()) == int(dropped.sum()) <= 0.1 * masked.nnz
            assert case.new.get_parameter(masked.key)[added].all()
            silenced.get_parameter(masked.key)[added] = 0
            random += int(added.sum())
    assert random
    assert deviation(case.new, silenced, (x,), {}) <= EXACT  # no dense output reads them
    assert EXACT < case.deviation(x) < 0.5


@pytest.mark.parametrize(("name", "side"), [("resnet18", 64), ("mobilenet_v2", 32)])
def test_zoo_convolutional_networks(name: str, side: int) -> None:
    torch.manual_seed(0)
    x = images(side, 4)
    case = widened(trained(registry.build(name, num_classes=10), x), x, sparsity="0.75")
    assert case.deviation(x) <= EXACT
    with torch.no_grad():
        first, second, *_ = case.dense(x)
    assert float((first - second).abs().max()) > 0.05  # what is compared depends on the input
    assert all(int(case.preserved.masks[m.key].sum()) == m.nnz for m in case.surgery.masked)


def test_a_foreign_checkpoint_keeps_its_logits(shared: Path) -> None:
    fit = recognised(shared / "data" / "checkpoints" / "resnet20-12fca82f.th")
    dense = registry.build("resnet20").eval()
    load_into(dense, fit.checkpoint, fit.match)
    x = images(batch=16)
    case = widened(dense, x)
    with torch.no_grad():
        before, after = dense(x), case.new.eval()(x)
    assert float((before - after).abs().max()) <= EXACT * float(before.abs().max())
    assert torch.equal(before.argmax(1), after.argmax(1))


@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_batch_norm_is_exact_in_train_mode(slack: float) -> None:
    torch.manual_seed(0)
    x = images(batch=4)
    dense = trained(registry.build("resnet20"), x)
    case = widened(dense, x, slack=slack)
    if slack:  # compared with the dense network without the removed weights
        with torch.no_grad():
            for masked in case.surgery.masked:
                if "layer1" in masked.key:  # where the dense channels are the first 16
                    dense.get_parameter(masked.key).copy_(case.new.get_parameter(masked.key)[:16, :16])
        block, wide = dense.layer1.train(), case.new.layer1.train()
        y = torch.randn(4, 16, 8, 8)
        padded = torch.cat([y, torch.randn(4, len(case.new.bn1.weight) - 16, 8, 8)], 1)
        assert torch.allclose(block(y), wide(padded)[:, :16], atol=1e-4)
        return
    a, b = dense.train()(x).detach(), case.new.train()(x).detach()
    assert float((a - b).abs().max()) <= EXACT * float(a.abs().max())
    assert torch.allclose(dense.bn1.running_mean, case.new.bn1.running_mean[:16], atol=1e-6)
    assert torch.allclose(dense.layer1[0].bn2.running_var, case.new.layer1[0].bn2.running_var[:16], rtol=1e-4)


def gradients(case: Widened, x: Tensor) -> dict[str, Tensor]:
    """The gradient of every sparse weight outside its mask (zero inside): RigL's growth scores."""
    case.new.train().zero_grad()
    case.new(x).float().square().mean().backward()
    found = {}
    for key, mask in case.preserved.masks.items():
        grad = case.new.get_parameter(key).grad
        assert grad is not None
        found[key] = grad.masked_fill(mask, 0)
    return found


def test_without_slack_inner_channels_are_a_dead_saddle() -> None:
    torch.manual_seed(0)
    x = images(batch=4)
    case = widened(trained(registry.build("resnet20"), x), x)
    grads = gradients(case, x)
    inner = [f"layer1.{i}.conv{n}.weight" for i in range(3) for n in (1, 2)]
    for key in inner:  # no weights to added outputs, and none from added inputs, which are zero
        assert not grads[key][16:].any()
    for key in inner[1::2]:
        assert not grads[key][:, 16:].any()
    assert any("no gradient" in note for note in case.preserved.notes)


def test_with_slack_gradients_reach_added_channels() -> None:
    torch.manual_seed(0)
    x = images(batch=4)
    case = widened(trained(registry.build("resnet20"), x), x, slack=0.1)
    grads = gradients(case, x)
    for key in [f"layer1.{i}.conv2.weight" for i in range(3)]:
        assert grads[key][:16, 16:].any()
    assert not any("no gradient" in note for note in case.preserved.notes)


def test_slack_reaches_added_channels_that_a_norm_reads() -> None:
    torch.manual_seed(0)
    ids = tokens()
    for make in (tiny_gpt, lambda: tiny_llama(tied=True)):
        case = widened(trained(make()), ids, slack=0.1)
        grads = gradients(case, ids)
        writers = [k for k in grads if k.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight"))]
        for key in writers[:-1]:  # only the output layer reads what the last one writes
            into_stream = grads[key][:, 48:] if "c_proj" in key else grads[key][48:]
            assert into_stream.any(), key


def test_fused_projections_keep_the_dense_rows_first_within_each_head() -> None:
    torch.manual_seed(0)
    dense = trained(tiny_gpt())
    case = widened(dense, tokens())
    old = dense.transformer.h[0].attn.c_attn.weight.view(48, 3, 4, 12)
    new = case.new.transformer.h[0].attn.c_attn.weight[:48].view(48, 3, 4, -1)
    d = new.shape[-1]
    assert torch.equal(new[:, 1:, :, :12], old[:, 1:])
    assert torch.allclose(new[:, 0, :, :12], old[:, 0] * (d / 12) ** 0.5)
    assert not new[..., 12:].any()


def test_layer_norm_by_hand() -> None:
    """x + W f(LN(x)) with everything written out: centred writers, sqrt(a) gains, eps times a."""
    torch.manual_seed(0)
    dense = trained(encoder())
    x = torch.randn(2, 5, 7)
    case = widened(dense, x)
    block, wide = dense[1].layers[0], case.new[1].layers[0]
    live = torch.tensor([head * wide.self_attn.head_dim + i for head in range(4) for i in range(4)])
    a = 16 / wide.norm1.normalized_shape[0]
    assert wide.norm1.eps == pytest.approx(1e-5 * a)
    assert torch.allclose(wide.norm1.weight[live], block.norm1.weight * a**0.5)
    centring = torch.eye(16) - torch.ones(16, 16) / 16
    assert torch.allclose(wide.linear2.weight[live][:, :32], centring @ block.linear2.weight, atol=1e-6)
    assert torch.allclose(wide.linear2.bias[live], centring @ block.linear2.bias, atol=1e-6)
    stem = case.new[0]  # dense: every added output has the mean of the dense ones
    added = [i for i in range(len(stem.bias)) if i not in set(live.tolist())]
    assert torch.allclose(stem.weight[added], dense[0].weight.mean(0).expand(len(added), 7), atol=1e-6)


def test_post_norm_is_exact_with_equal_gains_and_reported_where_it_is_not() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden=48, depth=2, num_heads=4, mlp=96, vocab=101, max_seq=32)
    fresh = widened(Bert(config).eval(), tokens())
    assert fresh.deviation(tokens()) <= EXACT
    case = widened(trained(Bert(config)), tokens())
    assert EXACT < case.deviation(tokens()) < 0.1
    assert any("not exact" in note and "another LayerNorm" in note for note in case.preserved.notes)


def test_fewer_non_zeros_than_dense_weights_are_reported() -> None:
    torch.manual_seed(0)
    case = widened(trained(tiny_gpt()), tokens(), sparsity="0.5", match="model")
    assert case.deviation(tokens()) > EXACT
    assert any(note.startswith("not exact: the plan has fewer") for note in case.preserved.notes)
    assert all(int(case.preserved.masks[m.key].sum()) == m.nnz for m in case.surgery.masked)


@pytest.mark.parametrize(
    "spec", [{"scope": "inner"}, {"heads": "scale_count"}, {"width_multiple": 8}, {"match": "off"}], ids=str
)
def test_other_specs(spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    case = widened(trained(tiny_gpt()), tokens(), **spec)
    assert case.deviation(tokens()) <= EXACT


def test_rotary_frequencies_of_the_dense_pairs_stay() -> None:
    torch.manual_seed(0)
    case = widened(trained(tiny_llama(tied=False)), tokens())
    like = torch.zeros(1)
    old, new = (m.model.rotary_emb(16, like)[0] for m in (case.dense, case.new))
    assert torch.allclose(old, new[:, : old.shape[1]], atol=1e-6)
    assert [e.name for e in case.preserved.attributes if e.owner == "model.rotary_emb"] == ["theta"]


def test_scales_that_depend_on_a_width_keep_their_dense_values() -> None:
    torch.manual_seed(0)
    case = widened(trained(KeptScale()), tokens())
    assert case.new.embed_scale == 4.0
    assert case.new.scale < 0.5  # the query's weights are larger by the inverse


def test_channel_shuffle_is_refused() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            x = x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)
            return self.c(F.relu(self.b(x)).mean((2, 3)))

    with pytest.raises(UsageError, match="two orders") as caught:
        widened(Shuffle(), images(8))
    assert "fresh" in (caught.value.hint or "")


def test_patterns_and_slacks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="2x2 pattern"):
        widened(tiny_gpt().eval(), tokens(), pattern="2x2")
    with pytest.raises(UsageError, match="slack"):
        widened(tiny_gpt().eval(), tokens(), slack=1.0)


def test_the_seed_decides_where_slack_goes() -> None:
    torch.manual_seed(0)
    dense = trained(tiny_gpt())
    first, again = widened(dense, tokens(), slack=0.1), widened(dense, tokens(), slack=0.1)
    for key, value in first.new.state_dict().items():
        assert torch.equal(value, again.new.state_dict()[key]), key


def test_deviation_is_relative_and_takes_real_inputs() -> None:
    a, b = nn.Linear(4, 2), nn.Linear(4, 2)
    b.load_state_dict(a.state_dict())
    assert deviation(b, a, (torch.zeros(3, 4),), {}) == 0
    with torch.no_grad():
        b.weight.mul_(1.5)
        for layer in (a, b):
            layer.bias.zero_()
    assert deviation(b, a, (torch.zeros(3, 4, device="meta"),), {}) == pytest.approx(0.5)
    with torch.no_grad():
        b.weight[0, 0] = torch.nan
    assert deviation(b, a, (torch.ones(3, 4),), {}) == torch.inf
    gpt = tiny_gpt().train()
    assert (
        deviation(gpt, gpt, (torch.zeros(1, 32, dtype=torch.long),), {}) == 0
    )  # random ids stay below the 101 embedding rows
    assert gpt.training


class Random(nn.Module):
    """Draws random numbers in eval mode too: of the batch (stochastic depth), or of the channels (dropout)."""

    def __init__(self, *, of_channels: bool) -> None:
        super().__init__()
        self.of_channels = of_channels
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = F.dropout(x, 0.5) if self.of_channels else x * (torch.rand(len(x), 1) < 0.5)
        return self.c(self.b(x).relu())


def test_deviation_of_a_forward_that_draws_random_numbers() -> None:
    """The same draws on both sides where they can be the same; where width decides how many are drawn, no number is given."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    options = Options(start="preserve", preserve_slack=0)
    state = torch.get_rng_state()
    new, _ = sparseift.transform(Random(of_channels=False), x, sparsity=0.75, options=options)
    done = transformation_of(new)
    assert done is not None and done.deviation is not None and done.deviation <= 1e-12
    with pytest.warns(UserWarning, match="cannot be measured"):
        new, _ = sparseift.transform(Random(of_channels=True), x, sparsity=0.75, options=options)
    done = transformation_of(new)
    assert done is not None and done.deviation is None
    assert "cannot be measured: the forward pass draws random numbers" in done.notes[0]
    assert len(state) == len(torch.get_rng_state())


def test_deviation_is_measured_in_float64() -> None:
    """Exact is 1e-16, not the rounding of 32 or 16 bits; the module keeps its dtypes and its values."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).to(dtype)
        x = torch.randn(4, 6, dtype=dtype)
        new, _ = sparseift.transform(dense, x, sparsity=0.75, options=Options(start="preserve", preserve_slack=0))
        done = transformation_of(new)
        assert done is not None and done.deviation is not None and done.deviation <= 1e-14
        assert {p.dtype for p in (*new.parameters(), *dense.parameters())} == {dtype}


class Mixed(nn.Module):
    """A softmax over channels, of which a zero that is added takes its share, as no rule of preserve knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mixer, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.mixer(self.b(self.a(x).relu()).softmax(-1)).relu())


@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_whatever_is_not_exact_is_named(slack: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    options = Options(start="preserve", preserve_slack=slack)
    with pytest.warns(UserWarning, match="not exact at mixer"):
        new, _ = sparseift.transform(Mixed(), x, sparsity=0.75, options=options)
    done = transformation_of(new)
    assert done is not None and done.deviation is not None and done.deviation > 0.01
    assert any(note.startswith("not exact at mixer: its output is the first that differs") for note in done.notes)
    assert any(note.startswith("without the slack the largest difference would be 0.") for note in done.notes) == bool(
        slack
    )


class NormedQueries(nn.Module):
    """Attention over pixels whose queries pass a BatchNorm, as in EfficientFormer and LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.scale = nn.Conv2d(3, 16, 1), nn.Linear(16, 5), 4**-0.5
        self.q, self.k, self.v = (nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)) for _ in range(3))
        self.out = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (p(x).flatten(2).unflatten(1, (4, -1)).transpose(2, 3) for p in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) * self.scale).softmax(-1) @ v
        return self.head(self.out(y.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])).mean((2, 3)))


@pytest.mark.parametrize("sparsity", ["0.5", "0.75"])
def test_queries_behind_a_batch_norm(sparsity: str) -> None:
    """Its gain and bias take the factor of the scores; the norm divides the weight's own by it."""
    torch.manual_seed(0)
    x = images(4)
    case = widened(trained(NormedQueries(), x), x, sparsity=sparsity)
    assert case.deviation(x) <= EXACT and not any("not exact" in note for note in case.preserved.notes)


def test_hugging_face_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    dense = trained(transformers.GPT2LMHeadModel(config))
    traced = trace(dense, (), {"input_ids": tokens()}, name="gpt2", input_shape=(2, 16))
    plan = make_plan(traced.table, TransformSpec(sparsity="0.9"))
    surgery = surgery_for(plan, traced.structure, dense)
    new = apply_surgery(dense, surgery)
    initialise(new, dense, surgery)
    preserve(new, dense, plan, surgery, traced.structure, slack=0)
    assert deviation(new, dense, (), {"input_ids": tokens()}) <= EXACT
