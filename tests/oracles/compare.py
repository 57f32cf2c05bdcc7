"""Bit equality of tensors, models, configs and directories."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tests.oracles.models import Model

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers, so that NaN payloads and -0.0 count."""
    return tensor.contiguous().view(BITS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same(a: Model, b: Model) -> None:
    """Two models hold the same tensors bit for bit; the first difference is named."""
    missing, surplus = a.tensors.keys() - b.tensors.keys(), b.tensors.keys() - a.tensors.keys()
    assert not missing, f"only the first model has {sorted(missing)}"
    assert not surplus, f"only the second model has {sorted(surplus)}"
    for name, tensor in a.tensors.items():
        assert_same_tensor(name, tensor, b.tensors[name])


def assert_same_tensor(name: str, a: Tensor, b: Tensor) -> None:
    """Two tensors are equal bit for bit; the first differing index is named."""
    assert a.dtype == b.dtype, f"{name}: {a.dtype} against {b.dtype}"
    assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)} against {tuple(b.shape)}"
    if same_bits(a, b):
        return
    differs = (bits(a) != bits(b)).nonzero()
    first = tuple(differs[0].tolist())
    values = f"{a[first].item()!r} against {b[first].item()!r}"
    codes = f"bits {bits(a)[first].item():#x} against {bits(b)[first].item():#x}"
    raise AssertionError(
        f"{name}{list(first)}: {values} ({codes}); {len(differs)} of {a.numel()} elements differ"
    )


def assert_same_config(a: Model, b: Model, ignore: Iterable[str] = ()) -> None:
    """The facts that decide a model's tensors and logits are equal in both configs."""
    keys = [key for key in ARCHITECTURE if key not in set(ignore)]
    differ = {k: (a.config.get(k), b.config.get(k)) for k in keys if differ_at(a, b, k)}
    assert not differ, f"configs differ: {differ}"


def differ_at(a: Model, b: Model, key: str) -> bool:
    """Whether two configs differ at one key."""
    return bool(a.config.get(key) != b.config.get(key))


def assert_same_files(a: Path, b: Path) -> None:
    """Two directory trees hold the same bytes in the same files; the first difference is named."""
    names = files_in(a)
    assert names == files_in(b), f"different files: {sorted(names ^ files_in(b))}"
    for name in sorted(names):
        one, other = (a / name).read_bytes(), (b / name).read_bytes()
        if one != other:
            raise AssertionError(f"{name}: {_first_difference(one, other)}")


def files_in(root: Path) -> set[str]:
    """The paths of all files below a directory, relative to it."""
    return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}


def _first_difference(a: bytes, b: bytes) -> str:
    if len(a) != len(b):
        return f"{len(a)} bytes against {len(b)}"
    at = next(i for i in range(len(a)) if a[i] != b[i])
    return f"byte {at} is {a[at]:#04x} against {b[at]:#04x}"
