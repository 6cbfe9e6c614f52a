"""The best approximation of a difference by a matrix of small rank: what a LoRA of that rank could hold of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.method import Context


def low_rank(difference: Tensor, *, rank: int, context: Context) -> Tensor:
    """The truncated singular value decomposition; a kernel's rows are its output channels, vectors stay as they are.

    By projection on the leading eigenvectors of the smaller Gram matrix, in float64: singular values below 1e-8 of the
    largest are noise, and fp32 holds no more. The library's matrix products may differ in the last bits of float64
    between kinds of processor, which seldom shows in fp32 and hardly ever in fp16.
    """
    if rank < 1:
        raise BadSetting(f"low_rank(rank={rank}): the rank is at least 1.")
    if difference.ndim < 2:
        return difference.clone()
    matrix = difference.reshape(len(difference), -1).double()
    wide = matrix.shape[0] <= matrix.shape[1]
    if rank >= min(matrix.shape):
        return difference.clone()
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    leading: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -int(rank) :]
    projected: Tensor = leading @ (leading.T @ matrix) if wide else (matrix @ leading) @ leading.T
    return projected.reshape(difference.shape).float()
