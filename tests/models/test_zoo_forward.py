"""What the models compute, on real tensors: causality, rotations, shortcuts, positions, and initialisation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseift_cli.models import zoo
from sparseift_cli.models.zoo import bert, botnet, gpt, llama, mobilevit, resnet_cifar


def small_gpt() -> gpt.GPT:
    return gpt.GPT(gpt.GPTConfig(hidden=24, depth=2, num_heads=3, max_seq=16, vocab=11)).eval()


def small_llama(num_kv_heads: int = 2) -> llama.Llama:
    config = llama.LlamaConfig(32, 2, 4, num_kv_heads, mlp=24, vocab=11, tied=False, rope_theta=10000.0)
    return llama.Llama(config).eval()


def small_bert() -> bert.Bert:
    return bert.Bert(bert.BertConfig(hidden=24, depth=2, num_heads=3, mlp=48, vocab=11, max_seq=16)).eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("make", [small_gpt, small_llama])
def test_decoders_do_not_look_ahead(make: Any) -> None:
    model, ids = make(), torch.randint(0, 11, (1, 9))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 11
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_gpt_projects_from_in_to_out() -> None:
    layer = gpt.Conv1D(3, 5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_gpt_attention_is_softmax_of_scaled_products() -> None:
    attention = small_gpt().get_submodule("transformer.h.0.attn")
    assert isinstance(attention, gpt.Attention)
    x = torch.randn(1, 5, 24)
    q, k, v = ((x @ attention.c_attn.weight + attention.c_attn.bias).split(24, dim=-1)[i] for i in range(3))
    heads = []
    for h in range(3):
        cut = slice(8 * h, 8 * h + 8)
        logits = q[0, :, cut] @ k[0, :, cut].T / math.sqrt(8)
        logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(logits.softmax(-1) @ v[0, :, cut])
    expected = torch.cat(heads, dim=-1) @ attention.c_proj.weight + attention.c_proj.bias
    torch.testing.assert_close(attention(x)[0], expected)


def test_rotation_depends_on_distance_alone() -> None:
    cos, sin = llama.RotaryEmbedding(16, 10000.0)(12, torch.empty(0))
    q, k = torch.randn(16), torch.randn(16)
    logits = (llama.rotate(q.expand(1, 1, 12, 16), cos, sin) @ llama.rotate(k.expand(1, 1, 12, 16), cos, sin).mT)[0, 0]
    for distance in range(12):
        diagonal = logits.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_grouped_queries_share_keys_and_values() -> None:
    """GQA equals full attention whose key and value projections repeat each shared head."""
    grouped, full = small_llama(2), small_llama(4)
    state = grouped.state_dict()
    for key in list(state):
        if key.endswith(("k_proj.weight", "v_proj.weight")):
            state[key] = state[key].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    ids = torch.randint(0, 11, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(grouped(ids), full(ids))


def test_bert_ignores_masked_tokens() -> None:
    model = small_bert()
    ids = torch.randint(1, 11, (1, 10))
    with torch.no_grad():
        short = model(ids[:, :6])
        padded = model(ids, attention_mask=torch.tensor([[1] * 6 + [0] * 4]))
        torch.testing.assert_close(short, padded)
        assert not torch.allclose(short, model(ids))
        assert not torch.allclose(short, model(ids[:, :6], token_types=torch.ones(1, 6, dtype=torch.int64)))


def test_option_a_shortcut_pads_channels_on_both_sides() -> None:
    x = torch.randn(1, 4, 2, 2)
    padded = resnet_cifar.pad_channels(x, 8)
    assert torch.equal(padded[:, 2:6], x)
    assert padded[:, :2].abs().sum() + padded[:, 6:].abs().sum() == 0
    assert resnet_cifar.pad_channels(x, 9).shape == (1, 9, 2, 2)


def test_botnet_positions_follow_their_definition() -> None:
    height, width, head_dim = 3, 4, 5
    positions = botnet.RelativePosition(height, width, head_dim)
    for table in positions.parameters():
        nn.init.normal_(table)
    q = torch.randn(1, 2, height * width, head_dim)
    with torch.no_grad():
        logits = positions(q, height, width)
        for i in range(height * width):
            for j in range(height * width):
                down, right = j // width - i // width, j % width - i % width
                offset = positions.height_rel[down + height - 1] + positions.width_rel[right + width - 1]
                torch.testing.assert_close(logits[0, :, i, j], q[0, :, i] @ offset / math.sqrt(head_dim))


def test_mobilevit_folding_is_undone() -> None:
    x = torch.randn(2, 5, 6, 8)
    sequences = mobilevit.unfold(x, 3, 4)
    assert sequences.shape == (2 * 4, 12, 5)
    assert torch.equal(sequences[1, 0], x[0, :, 0, 1])  # second place of the first patch
    assert torch.equal(sequences[0, 1], x[0, :, 0, 2])  # first place of the second patch
    assert torch.equal(mobilevit.fold(sequences, 2, 3, 4), x)


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet20", "wrn22_2", "mobilenet_v2", "mobilevit_s", "vit_s_16"])
def test_trains_on_real_tensors(name: str) -> None:
    side = 32 if zoo.lookup(name).image == (3, 32, 32) else 64
    model = zoo.build(name, num_classes=5, image=(3, side, side))
    loss = F.cross_entropy(model(torch.randn(4, 3, side, side)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initialisation_is_that_of_the_references() -> None:
    conv: Any = zoo.build("resnet18").get_submodule("layer3.0.conv1")
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01)
    decoder = gpt.GPT(gpt.GPTConfig(hidden=256, depth=4, num_heads=4, max_seq=16, vocab=100))
    block = decoder.get_submodule("transformer.h.0")
    assert isinstance(block, gpt.Block)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.01)
    assert block.mlp.c_proj.bias.abs().sum() == 0
    assert decoder.lm_head.weight.device.type == "cpu"
    vit: Any = zoo.build("vit_s_16")
    assert vit.heads.head.weight.abs().sum() == 0


def test_akamaster_checkpoint_fits(shared: Path) -> None:
    path = shared / "data" / "checkpoints" / "resnet20-12fca82f.th"
    if not path.is_file():
        pytest.skip(f"needs the shared checkpoint {path.name}")
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model = zoo.build("resnet20").eval()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()}, strict=True)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
