"""The published permutation between the two orders of a rotary head's rows.

Hugging Face rotates rows (j, j + d/2) of a head of d rows together, Meta rows (2j, 2j + 1).
"""

from torch import Tensor


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows (or elements of a bias) from Hugging Face order to Meta order."""
    return _swap(tensor, (heads, 2, tensor.shape[0] // heads // 2))


def deinterleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows (or elements of a bias) from Meta order to Hugging Face order."""
    return _swap(tensor, (heads, tensor.shape[0] // heads // 2, 2))


def _swap(tensor: Tensor, view: tuple[int, int, int]) -> Tensor:
    return tensor.reshape(*view, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
