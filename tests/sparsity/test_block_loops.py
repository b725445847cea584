"""What programs do beside training, to layers of stored blocks: the masks stay those of training with zeros."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.convert import use_kernels
from tests.helpers.block_net import block_net, dense_weights, loss_of, make
from tests.helpers.block_pair import ADAMW, Pair


def move(net: nn.Module) -> None:
    """Put every buffer elsewhere in memory, as `net.cpu()` and `net.cuda()` do."""
    for module in net.modules():
        module._buffers = {k: None if b is None else b.clone() for k, b in module._buffers.items()}


@pytest.mark.parametrize("algorithm", ["rigl", "snfs"])
def test_a_model_that_was_elsewhere_between_two_steps(algorithm: str) -> None:
    pair = Pair(algorithm)
    for t in range(8):
        for net in pair.nets:
            move(net)
        pair.step(t)


@pytest.mark.filterwarnings(
    r"ignore:optimizer.step\(\) without sparsifier.step\(\)"
)  # of the first, which is not closed yet
def test_closing_a_sparsifier_leaves_the_next_one_its_gradients() -> None:
    pair = Pair("rigl")
    first = pair.sparsifiers
    pair.sparsifiers = [make(n, o) for n, o in zip(pair.nets, pair.optimizers, strict=True)]
    for t in range(8):
        if t == 3:
            for sparsifier in first:
                sparsifier.close()
        pair.step(t)


@pytest.mark.filterwarnings(
    "ignore:the weights were loaded from a run with other masks", "ignore:the optimiser's state was"
)
@pytest.mark.parametrize("with_state", [False, True], ids=["weights", "weights and moments"])
@pytest.mark.parametrize("algorithm", ["set", "rigl", "snfs"])
def test_weights_of_other_masks_that_are_loaded_in_the_middle(algorithm: str, with_state: bool) -> None:
    """The optimiser's moments stay with the weights that they are of, and are zero where no weight was."""
    pair, saved = Pair(algorithm), []
    for t in range(11):
        if t == 2:
            saved = [copy.deepcopy((n.state_dict(), o.state_dict())) for n, o, _ in pair.runs()]
        if t == 8:
            before = dense_weights(pair.nets[1])
            for (net, optimizer, _), (weights, state) in zip(pair.runs(), saved, strict=True):
                net.load_state_dict(weights)
                if with_state:
                    del state["param_groups"][0]["sparseift"]  # as of a loop that saves what it knows
                    optimizer.load_state_dict(state)
            moved = [not (w != 0).equal(before[name] != 0) for name, w in dense_weights(pair.nets[1]).items()]
            assert any(moved)
        pair.step(t)


def test_loaded_zeros_leave_the_blocks_where_they_are() -> None:
    pair = Pair("rigl")
    for t in range(11):
        if t == 5:
            (zeros, blocks), twice = pair.nets, pair.nets[0].twice.weight
            weight = twice.detach().clone()
            weight[:, :8] = 0
            zeros.load_state_dict(zeros.state_dict() | {"twice.weight": weight})
            state = {k: v for k, v in blocks.state_dict().items() if not k.startswith("twice.")}
            blocks.load_state_dict(state | {"twice.weight": weight, "twice.bias": blocks.twice.bias})
        pair.step(t)


@pytest.mark.parametrize("algorithm", ["rigl", "snfs"])
def test_gradients_that_are_set_to_zero_in_place_do_not_count(algorithm: str) -> None:
    pair = Pair(algorithm)
    for t in range(10):
        for net, optimizer, _ in pair.runs():
            optimizer.zero_grad(set_to_none=False)
            if t in (2, 3, 6):  # a batch that the loop throws away
                loss_of(net, 99).backward()
                optimizer.zero_grad(set_to_none=False)
        pair.step(t, micro=2)
        for net, _, _ in pair.runs():
            for p in net.parameters():
                p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("algorithm", ["rigl", "snfs"])
def test_gradients_that_were_computed_for_something_else_do_not_count(algorithm: str, when: str) -> None:
    """torch.autograd.grad adds to no parameter's gradient: here, for its norm in a log."""
    pair = Pair(algorithm)
    for t in range(10):
        for net, optimizer, sparsifier in pair.runs():
            for moment in ("before", "between", "after"):
                if moment == when:
                    torch.autograd.grad(loss_of(net, 77), list(net.parameters()))
                if moment != "after":
                    (loss_of(net, t, moment == "between") / 2).backward()
            sparsifier.step()
            optimizer.step()
            optimizer.zero_grad()
        pair.require_equal(t)


@pytest.mark.filterwarnings("ignore:the loop made more backward passes in this step than before")
def test_layers_that_take_part_now_more_and_now_less_often_lose_two_updates_at_most() -> None:
    nets = [block_net(compact=False), block_net(compact=True)]
    optimizers = [ADAMW(net.parameters(), lr=0.01) for net in nets]
    sparsifiers = [make(n, o, "rigl", delta_t=1, stop=1.0) for n, o in zip(nets, optimizers, strict=True)]
    lost = 0
    for t in range(16):
        parts = (1, 3, 2, 0, 4)[t % 5]
        for net, optimizer, sparsifier in zip(nets, optimizers, sparsifiers, strict=True):
            for part in range(parts):
                loss_of(net, t, part).backward()
            sparsifier.step()
            optimizer.step()
            optimizer.zero_grad()
        zeros, blocks = (sparsifier.masks() for sparsifier in sparsifiers)
        if not all(torch.equal(mask, blocks[name]) for name, mask in zeros.items()):
            lost += 1
            sparsifiers[1].load_state_dict(sparsifiers[0].state_dict())
            nets[1].load_state_dict(nets[0].state_dict())
            optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert lost <= 2


def _two_processes(rank: int, folder: str) -> None:
    """Train with gradients that are averaged by hand; process 1 uses the net in every third step alone."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: list[Any] = []
    for compact in (False, True):
        net = block_net(compact=compact)
        optimizer = ADAMW(net.parameters(), lr=0.01)
        sparsifier = make(net, optimizer, "rigl", delta_t=2)
        for t in range(7):
            if rank == 0 or t % 3 == 0:
                loss_of(net, t, rank).backward()
            for p in net.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
                p.grad /= 2
            sparsifier.step()
            optimizer.step()
            optimizer.zero_grad()
        sparsifier.check_ranks()
        found.append((sparsifier.masks(), dense_weights(net)))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
def test_a_layer_that_only_one_process_uses_in_a_step(tmp_path: Path) -> None:
    spawn(_two_processes, (str(tmp_path),), nprocs=2)
    (masks, weights), (others, blocks) = torch.load(tmp_path / "found.pt")
    start = block_net(compact=True)
    assert any(not torch.equal(m, start.get_submodule(n.removesuffix(".weight")).weight_mask) for n, m in masks.items())
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    torch.testing.assert_close(weights, blocks, rtol=1e-4, atol=1e-5)


def test_a_step_without_the_sparsifier_is_said() -> None:
    net = block_net(compact=True)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    make(net, optimizer, "rigl")
    loss_of(net, 0).backward()
    with pytest.warns(UserWarning, match=r"optimizer.step\(\) without sparsifier.step\(\) before it: no mask moves"):
        optimizer.step()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("algorithm", ["rigl", "static"])
def test_steps_that_move_no_mask_need_no_sparsifier(algorithm: str) -> None:
    net = block_net(compact=True)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer, algorithm)
    for t in range(2):
        loss_of(net, t).backward()
        if algorithm != "static":
            sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # without gradients


def test_an_optimizer_made_too_early() -> None:
    net = block_net(compact=False)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    use_kernels(net, "reference")
    with pytest.raises(UsageError, match=r"conv\.weight is trained but not in the optimiser") as error:
        make(net, optimizer)
    assert "call use_kernels before the optimiser is made" in str(error.value.hint)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
def test_sharded_weights(tmp_path: Path) -> None:
    """Blocks that do not move train under fully_shard, as their weights need no masks; the rest is refused by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        pair = Pair("static")
        net = block_net(compact=True)
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        optimizer = ADAMW(net.parameters(), lr=0.01)
        with pytest.raises(UsageError, match=r"conv\.weight is a DTensor"):
            make(net, optimizer, "rigl")
        sharded = make(net, optimizer, "static")
        for t in range(3):
            pair.step(t)
            loss_of(net, t).backward()
            sharded.step()
            optimizer.step()
            optimizer.zero_grad()
        for name, p in pair.nets[1].named_parameters():
            torch.testing.assert_close(net.get_parameter(name).full_tensor(), p, rtol=1e-4, atol=1e-5)
        masked = block_net(compact=False)
        fully_shard(masked, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UsageError, match=r"conv\.weight is a DTensor"):
            make(masked, ADAMW(masked.parameters(), lr=0.01), "static")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("algorithm", ["rigl", "snfs"])
def test_gradients_that_a_loop_makes_itself_are_said(algorithm: str) -> None:
    """As those of several tasks that are combined by hand: at places without blocks nothing is known of them."""
    net = block_net(compact=True)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer, algorithm, delta_t=1)
    before = sparsifier.masks()
    for t in range(2):
        parameters = list(net.parameters())
        tasks = [torch.autograd.grad(loss_of(net, t, task), parameters) for task in range(3)]
        for p, *gradients in zip(parameters, *tasks, strict=True):
            p.grad = gradients[0] - gradients[1] + 0.1 * gradients[2]
        if sparsifier.collects_gradients:
            with pytest.warns(UserWarning, match="are not those of the backward passes times a factor"):
                sparsifier.step()
        else:
            sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(mask, before[name]) for name, mask in sparsifier.masks().items())
