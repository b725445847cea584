"""Which device a run takes, and how many runs share it."""

from __future__ import annotations

import pytest
import torch

from sparseift_cli.train.processes import Slot, processes


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


def taken(wanted: str, of: int) -> list[tuple[str, int]]:
    """Device and number of runs on it, for each of `of` slots."""
    found = []
    for slot in range(of):
        with processes(wanted, Slot(slot, of)) as ours:
            found.append((str(ours.device), ours.at_once))
    return found


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_slots_take_the_gpus_in_turn(three_gpus: None, wanted: str) -> None:
    assert taken(wanted, 1) == [("cuda:0", 1)]
    assert taken(wanted, 5) == [("cuda:0", 2), ("cuda:1", 2), ("cuda:2", 1), ("cuda:0", 2), ("cuda:1", 2)]


def test_runs_that_name_their_gpu_share_it(three_gpus: None) -> None:
    assert taken("cuda:2", 3) == [("cuda:2", 3)] * 3
    assert taken("cpu", 2) == [("cpu", 2)] * 2


def test_a_local_rank_is_taken_where_there_is_one(three_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert taken("auto", 1) == [("cuda:2", 1)]


def test_gpus_that_cannot_be_used_share_nothing_out(three_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert taken("auto", 3) == [("cpu", 3)] * 3


def test_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert taken("auto", 2) == [("cpu", 2)] * 2
