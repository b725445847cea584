"""A layer's weight as a product of two, or as a product and a rest: truncated singular values, or an identity for one factor.

Weights are [out, in / groups, *kernel]; a group's matrix is [out / groups, in / groups * taps], whose rows U's kernels
are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """Values by the plan's names of the parts, how much each is worth keeping, and the way they were found.

    U: [groups, rank, in / groups * taps], V: [groups, out / groups, rank]; `sparse`: the shape of the weight.
    """

    way: str
    u: Tensor
    v: Tensor
    u_score: Tensor
    v_score: Tensor


def matrices(weight: Tensor, groups: int) -> Tensor:
    """[groups, out / groups, in / groups * taps], in double precision on the CPU."""
    return weight.detach().double().cpu().reshape(groups, weight.shape[0] // groups, -1)


def singular(matrix: Tensor, rank: int) -> Factors:
    """The best product of this rank, its singular values shared equally; columns beyond them are zero."""
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    n = min(rank, s.shape[-1])
    root = s[:, :n].sqrt()
    u, v = _empty(matrix, rank)
    u[:, :n] = root[:, :, None] * right[:, :n]
    v[:, :, :n] = left[:, :, :n] * root[:, None]
    return Factors("U V is a truncated singular value decomposition", u, v, u.abs(), v.abs())


def factorizations(matrix: Tensor, rank: int) -> list[Factors]:
    """Every way to write the matrix as V U: with an identity in U or V where the rank reaches that side, or by SVD."""
    _, outputs, inputs = matrix.shape
    ways = [singular(matrix, rank)]
    if rank >= inputs:  # U passes every input on, V is the matrix
        u, v = _empty(matrix, rank)
        u[:, :inputs] = torch.eye(inputs, dtype=u.dtype)
        v[:, :, :inputs] = matrix
        ways.append(Factors("the factors have an identity in U", u, v, u * matrix.norm(dim=1)[:, None], v.abs()))
    if rank >= outputs:  # U is the matrix, V passes every product on
        u, v = _empty(matrix, rank)
        u[:, :outputs] = matrix
        v[:, :, :outputs] = torch.eye(outputs, dtype=u.dtype)
        ways.append(Factors("the factors have an identity in V", u, v, u.abs(), v * matrix.norm(dim=2)[:, :, None]))
    return ways


def _empty(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    groups, outputs, inputs = matrix.shape
    return matrix.new_zeros(groups, rank, inputs), matrix.new_zeros(groups, outputs, rank)
