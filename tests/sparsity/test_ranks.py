"""Two gloo processes: masks equal on both at every update, and a difference is found and named."""

from __future__ import annotations

from pathlib import Path

import torch

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.sparsity.statistics import check_ranks, fingerprint
from tests.helpers.forked import in_processes
from tests.helpers.ranks import train_and_compare


def test_masks_are_equal_on_every_rank(tmp_path: Path) -> None:
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    calls = [(rank, str(tmp_path / "meet"), str(out)) for rank, out in enumerate(outs)]
    for rank, done in enumerate(in_processes(train_and_compare, calls)):
        assert done.returncode == 0, done
        assert f"rank {rank}: masks differ between ranks: 0.weight" in done.stdout
    one, two = (torch.load(out, weights_only=True) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(int(mask.sum()) == 30 for mask in one)


def test_fingerprints_tell_masks_apart() -> None:
    mask = torch.rand(37, 11, generator=generator_for(0)) < 0.3
    first = int(fingerprint(mask))
    assert first == int(fingerprint(mask.clone()))
    seen = {first}
    for i in range(mask.numel()):
        other = mask.clone()
        other.view(-1)[i] ^= True
        seen.add(int(fingerprint(other)))
    assert len(seen) == mask.numel() + 1
    assert int(fingerprint(mask.flip(0))) != first
    check_ranks({"mask": mask})  # nothing to compare with in a single process
