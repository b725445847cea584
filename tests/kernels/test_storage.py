"""State dicts in blocks and dense: both ways, into layers, and refusals of what does not fit together."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.layer import BlockLayer
from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.kernels.storage import to_compact_state, to_dense_state
from tests.kernels.cases import mask_of

CORNERS = mask_of("an empty row and an empty column")  # 8 blocks of 5 x 4
State = dict[str, Tensor]


def layer(
    *, transposed: bool = False, kernel: tuple[int, ...] = (), mask: Tensor = CORNERS, bias: bool = True
) -> BlockLayer:
    return BlockLayer(mask, 4, kernel, transposed=transposed, bias=bias)


FORMS = [{}, {"transposed": True}, {"kernel": (3, 3)}, {"kernel": (1, 1)}]


def state_of(**form: object) -> State:
    return nn.Sequential(nn.Linear(3, 16), layer(**form)).state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_both_ways(form: dict[str, object]) -> None:
    model = nn.Sequential(nn.Linear(3, 16), layer(**form))
    state = model.state_dict()
    dense = to_dense_state(state)
    assert list(dense) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(dense["1.weight"], model[1].dense()) and dense["0.weight"] is state["0.weight"]
    for like in (model, state):
        back = to_compact_state(dense, like)
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert all(to_compact_state(state, model)[name] is state[name] for name in state)


def test_a_state_dict_is_dense_without_its_module() -> None:
    buffer = io.BytesIO()
    torch.save(state_of(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    plain = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 20))
    plain.load_state_dict(to_dense_state(state))
    x = torch.randn(2, 3)
    blocks = nn.Sequential(nn.Linear(3, 16), BlockLinear(CORNERS.flip(0), 4))
    blocks.load_state_dict(state)
    torch.testing.assert_close(plain(x), blocks(x))


def test_tied_weights_stay_tied() -> None:
    one = layer(bias=False)
    state = nn.ModuleDict({"a": one, "b": one}).state_dict()
    dense = to_dense_state(state)
    assert dense["a.weight"] is dense["b.weight"]
    back = to_compact_state(dense, state)
    assert back["a.values"].data_ptr() == back["b.values"].data_ptr()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_loads_a_dense_weight(form: dict[str, object], assign: bool) -> None:
    source, target = layer(**form), layer(**form, mask=CORNERS.flip(0, 1))
    dense = to_dense_state(source.state_dict())
    assert target.load_state_dict(dense, assign=assign) == ([], [])
    assert torch.equal(target.dense(), source.dense()) and torch.equal(target.bias, source.bias)
    assert all(torch.equal(a, b) for a, b in zip(target.index, source.index, strict=True))
    assert "weight" in dense


def test_blocks_that_are_zero_stay_where_the_layer_has_them() -> None:
    weight = layer().dense()
    weight[:4] = 0  # its first row of blocks, 3 of them, as after growth at zero
    target = layer()
    target.load_state_dict({"weight": weight}, strict=False)
    assert torch.equal(target.block_mask, CORNERS) and torch.equal(target.dense(), weight)


def test_a_dense_weight_that_does_not_fit_is_refused_by_name() -> None:
    model = nn.Sequential(layer())
    other = layer(mask=torch.ones(5, 4, dtype=torch.bool)).dense()
    with pytest.raises(UsageError, match=r"0.weight has 20 blocks of 4x4 that are not zero, and the model stores 8"):
        model.load_state_dict({"0.weight": other, "0.bias": torch.zeros(20)})
    with pytest.raises(UsageError, match=r"0.weight is \[16, 20\], and the model's is \[20, 16\]"):
        model.load_state_dict({"0.weight": other.t(), "0.bias": torch.zeros(20)})
    with pytest.raises(UsageError, match=r"0.weight has 192 non-zeros outside the 8 blocks of 4x4"):
        to_compact_state({"0.weight": other}, model)
    with pytest.raises(UsageError, match=r"0.weight is \[16, 20\]"):
        to_compact_state({"0.weight": other.t()}, model)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
        model.load_state_dict({"0.weight": model[0].dense()})
    fewer = BlockLinear(mask_of("one block"), 4)
    with pytest.raises(UsageError, match="0 of the state dict is 1 blocks"):
        model.load_state_dict({f"0.{name}": tensor for name, tensor in fewer.state_dict().items()})


def test_layers_on_meta_take_their_blocks_from_the_state() -> None:
    source = layer(mask=CORNERS.flip(0, 1))
    for state in (source.state_dict(), to_dense_state(source.state_dict())):
        target = BlockLinear(CORNERS, 4, device="meta")
        assert all(t.is_meta for t in (*target.parameters(), *target.buffers()))
        target.load_state_dict(state, assign=True)
        assert not any(t.is_meta for t in (*target.parameters(), *target.buffers()))
        assert torch.equal(target.dense(), source.dense())
        assert target(torch.randn(2, 16)).shape == (2, 20)


def test_conv1d_and_linear_exchange_blocks() -> None:
    source, target = layer(transposed=True), layer()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dense(), source.dense().t()) and target.layout.tolist() == [0, 20, 16]


def edited(change: Callable[[State], object]) -> State:
    state = copy.deepcopy(layer().state_dict())
    change(state)
    return {f"fc.{name}": tensor for name, tensor in state.items()}


HOSTILE: dict[str, tuple[Callable[[State], object], str]] = {
    "offsets that fall": (lambda s: s["row_offsets"].__setitem__(1, 5), "do not rise"),
    "offsets too large": (lambda s: s["row_offsets"].__setitem__(-1, 9), "do not rise from 0 to the 8 blocks"),
    "negative offsets": (lambda s: s["row_offsets"].__setitem__(0, -1), "do not rise"),
    "too few offsets": (lambda s: s.update(row_offsets=s["row_offsets"][:-1]), "5 rows of blocks need 6"),
    "a column twice": (lambda s: s["columns"].__setitem__(1, int(s["columns"][0])), "is given twice"),
    "columns in disorder": (lambda s: s.update(columns=s["columns"].flip(0)), "are not in order"),
    "a column outside": (lambda s: s["columns"].__setitem__(-1, 4), "outside the grid, which has 4 columns"),
    "a negative column": (lambda s: s["columns"].__setitem__(0, -1), "outside the grid"),
    "too few columns": (lambda s: s.update(columns=s["columns"][:-1]), "7 entries for 8 blocks"),
    "columns of floats": (lambda s: s.update(columns=s["columns"].float()), "not a list of int32"),
    "offsets in a matrix": (lambda s: s.update(row_offsets=s["row_offsets"].view(2, 3)), "not a list of int32"),
    "a huge weight": (lambda s: s["layout"].__setitem__(2, 2**31 - 4), "too few for a weight"),
    "no size": (lambda s: s["layout"].__setitem__(2, 0), r"the shape \[20, 0\]"),
    "a negative size": (lambda s: s["layout"].__setitem__(1, -20), r"the shape \[-20, 16\]"),
    "a width in no blocks": (lambda s: s["layout"].__setitem__(2, 18), r"do not divide a weight \[20, 18\]"),
    "a strange layout": (lambda s: s["layout"].__setitem__(0, 2), "its layout is not"),
    "an overflow": (lambda s: s.update(layout=torch.tensor([0, 20, 16, 2**31 - 1, 2**31 - 1])), "values are"),
    "blocks that are not square": (lambda s: s.update(values=s["values"][:, :2].clone()), "blocks of 2x4"),
    "flat values": (lambda s: s.update(values=s["values"].flatten(1)), "values are"),
    "no blocks": (lambda s: s.update(values=s["values"][:0], columns=s["columns"][:0]), "0 blocks"),
    "too many blocks": (lambda s: s.update(values=s["values"].repeat(4, 1, 1)), "32 blocks of 4x4 are not a part"),
    "no layout": (lambda s: s.pop("layout"), "has no layout"),
    "no values": (lambda s: s.pop("values"), "has no values"),
    "weight as well": (lambda s: s.update(weight=torch.zeros(20, 16)), "has its weight twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tensors_that_do_not_agree_are_refused(case: str) -> None:
    change, message = HOSTILE[case]
    with pytest.raises(UsageError, match=message) as caught:
        to_dense_state(edited(change))
    assert "fc" in str(caught.value)


@pytest.mark.parametrize("case", [c for c in HOSTILE if c not in ("no layout", "no values", "weight as well")])
def test_a_layer_keeps_its_index_where_a_state_dict_is_refused(case: str) -> None:
    change, message = HOSTILE[case]
    fc = layer()
    model = nn.ModuleDict({"fc": fc})
    before = [t.clone() for t in fc.index]
    with pytest.raises(UsageError, match=message):
        model.load_state_dict(edited(change))
    assert all(torch.equal(a, b) for a, b in zip(fc.index, before, strict=True))


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float64])
def test_an_index_stays_integer(to: torch.dtype) -> None:
    for cast in (lambda m: m.to(to), lambda m: m.type(to)):
        blocks = layer()
        before = [t.clone() for t in blocks.index]
        cast(nn.Sequential(blocks))
        assert blocks.values.dtype == to
        assert all(a.dtype == torch.int32 and torch.equal(a, b) for a, b in zip(blocks.index, before, strict=True))


def test_values_of_a_convolution_are_no_images() -> None:
    conv = layer(kernel=(3, 3))
    before = conv.values.detach().clone()
    nn.Sequential(nn.Conv2d(8, 8, 3), conv).to(memory_format=torch.channels_last)
    assert conv.values.is_contiguous() and torch.equal(conv.values, before)


def test_values_with_a_stride_are_loaded() -> None:
    source = layer(kernel=(3, 3))
    state = source.state_dict() | {"values": source.values.detach().contiguous(memory_format=torch.channels_last)}
    for assign in (False, True):
        target = layer(kernel=(3, 3), mask=CORNERS.flip(0))
        target.load_state_dict(state, assign=assign)
        assert torch.equal(target.dense(), source.dense()) and target.values.is_contiguous()
    assert torch.equal(to_dense_state(state)["weight"], source.dense())
