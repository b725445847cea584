"""A layer's weight as a product V U of two factors: by a truncated SVD, or with an identity as one of them.

A weight [out, in / groups, *kernel] is one matrix a group, [out / groups, in / groups * taps]: U takes the patch that a
kernel sees to `rank` numbers, V takes these to the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A product V U for every group, and scores of what a mask should keep in each factor.

    `u`, `u_score`: [groups, rank, in / groups * taps]. `v`, `v_score`: [groups, out / groups, rank].
    """

    method: str
    """How they were found: a clause for a note."""
    u: Tensor
    v: Tensor
    u_score: Tensor
    v_score: Tensor


def group_matrices(weight: Tensor, groups: int) -> Tensor:
    """[out, in / groups, *kernel] -> [groups, out / groups, in / groups * taps], in double precision on the CPU."""
    return weight.detach().double().cpu().reshape(groups, weight.shape[0] // groups, -1)


def truncated_svd(matrix: Tensor, rank: int) -> Factors:
    """The closest product of this rank in the Frobenius norm (Eckart and Young 1936); U and V share the singular values.

    Where the rank is larger than the matrix's, the other rows of U and columns of V are zero.

    >>> f = truncated_svd(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64), rank=1)
    >>> (f.v @ f.u).abs()
    tensor([[[0., 0.],
             [0., 4.]]], dtype=torch.float64)

    Args:
        matrix: [groups, out, in], in double precision.
    """
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    n = min(rank, s.shape[-1])
    root = s[:, :n].sqrt()
    u, v = _zeros(matrix, rank)
    u[:, :n] = root[:, :, None] * right[:, :n]
    v[:, :, :n] = left[:, :, :n] * root[:, None]
    return Factors("U V is a truncated singular value decomposition", u, v, u.abs(), v.abs())


def factorizations(matrix: Tensor, rank: int) -> list[Factors]:
    """The truncated SVD and, where the rank reaches that side, the exact products with an identity as U or as V.

    Which of them loses least depends on how many weights of each factor a mask keeps. A weight beside an identity scores
    its size; a one of the identity scores the norm of the column (or row) of the matrix that it passes on.

    Args:
        matrix: [groups, out, in], in double precision.
    """
    _, outputs, inputs = matrix.shape
    found = [truncated_svd(matrix, rank)]
    if rank >= inputs:  # U passes on every input, V is the matrix
        u, v = _zeros(matrix, rank)
        u[:, :inputs] = torch.eye(inputs, dtype=u.dtype)
        v[:, :, :inputs] = matrix
        found.append(Factors("the factors have an identity in U", u, v, u * matrix.norm(dim=1)[:, None], v.abs()))
    if rank >= outputs:  # U is the matrix, V passes on every product
        u, v = _zeros(matrix, rank)
        u[:, :outputs] = matrix
        v[:, :, :outputs] = torch.eye(outputs, dtype=u.dtype)
        found.append(Factors("the factors have an identity in V", u, v, u.abs(), v * matrix.norm(dim=2)[:, :, None]))
    return found


def _zeros(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [groups, rank, in] and V [groups, out, rank] of zeros."""
    groups, outputs, inputs = matrix.shape
    return matrix.new_zeros(groups, rank, inputs), matrix.new_zeros(groups, outputs, rank)
