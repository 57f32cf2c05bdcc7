"""GGUF directories, through the gguf package: names by its table, rows by the published formula."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from tests.oracles import rope
from tests.oracles.models import Model, checked

Array = NDArray[Any]
PLAIN = {
    torch.float32: Kind.F32,
    torch.float16: Kind.F16,
    torch.bfloat16: Kind.BF16,
    torch.float64: Kind.F64,
}
DTYPES = {kind: dtype for dtype, kind in PLAIN.items()}
FACTORS = "rope_freqs.weight"
ROTARY = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class Stored:
    """All files of a directory as one: plain values, and those of codecs de-quantised to float32.

    `tensors` have Hugging Face's names and row order; `kinds`, `raw` and `factors` are as stored,
    by GGUF's names.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    kinds: dict[str, Kind]
    raw: dict[str, bytes]
    factors: Tensor | None

    def model(self, config: dict[str, Any]) -> Model:
        """With a config, whose names and shapes they must have."""
        return checked(config, self.tensors)


def arch_of(config: Mapping[str, Any]) -> str:
    """The architecture that llama.cpp runs a model as."""
    return "qwen2" if config["model_type"] == "qwen2" else "llama"


def names(arch: str, layers: int) -> "gguf.TensorNameMap":
    """The package's table of names."""
    (known,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(known, layers)


def name_of(hf: str, arch: str, layers: int) -> str:
    """The GGUF name of a Hugging Face tensor."""
    found = names(arch, layers).get_name(hf, try_suffixes=(".weight", ".bias"))
    assert found is not None, hf
    return str(found)


def heads_of(hf: str, config: Mapping[str, Any]) -> int:
    """The heads whose rows are interleaved in a tensor; 0 where none are."""
    if arch_of(config) != "llama" or not any(module in hf for module in ROTARY):
        return 0
    queries = "q_proj" in hf
    return int(config["num_attention_heads" if queries else "num_key_value_heads"])


def to_gguf(model: Model) -> dict[str, Tensor]:
    """The tensors under GGUF's names and in its row order; values are untouched."""
    config, found = model.config, {}
    for hf, tensor in model.tensors.items():
        heads = heads_of(hf, config)
        name = name_of(hf, arch_of(config), config["num_hidden_layers"])
        found[name] = rope.interleave(tensor, heads) if heads else tensor
    return found


def coded(tensor: Tensor, kind: Kind) -> Array:
    """A whole tensor as the package codes it, as bytes by row; plain kinds must be the tensor's."""
    if kind in DTYPES:
        cast = tensor.to(DTYPES[kind]).contiguous()
        found: Array = cast.view(torch.uint8).numpy()
        return found
    with np.errstate(all="ignore"):  # blocks may have no finite scale
        quantised: Array = gguf.quants.quantize(tensor.float().numpy(), kind)
    return quantised


def values(raw: bytes, kind: Kind, shape: tuple[int, ...]) -> Tensor:
    """The values of stored bytes."""
    if kind in DTYPES:
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[kind]).reshape(shape)
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(shape[0], -1)
    with np.errstate(all="ignore"):
        found = np.ascontiguousarray(gguf.quants.dequantize(rows, kind))
    return torch.from_numpy(found).reshape(shape)


def read(path: Path) -> Stored:
    """Read every file; offsets must be as llama.cpp wants them, and names those of the model."""
    path = Path(path)
    files = sorted(path.glob("*.gguf"))
    assert files, f"no file in {path}"
    metadata: dict[str, Any] = {}
    stored: dict[str, tuple[Kind, tuple[int, ...], bytes]] = {}
    for number, file in enumerate(files):
        reader = gguf.GGUFReader(file)
        check_offsets(file, reader)
        own = {key: field.contents() for key, field in reader.fields.items()}
        metadata = own if number == 0 else metadata
        for tensor in reader.tensors:
            assert tensor.name not in stored, tensor.name
            shape = tuple(int(size) for size in reversed(tensor.shape))
            stored[tensor.name] = (tensor.tensor_type, shape, tensor.data.tobytes())
    return _renamed(metadata, stored)


def _renamed(
    metadata: dict[str, Any], stored: dict[str, tuple[Kind, tuple[int, ...], bytes]]
) -> Stored:
    """With Hugging Face's names and row order, by the sizes that the header has."""
    arch, plain = (
        metadata["general.architecture"],
        {n: values(r, k, s) for n, (k, s, r) in stored.items()},
    )
    factors = plain.pop(FACTORS, None)
    layers = metadata[f"{arch}.block_count"]
    config = {
        "model_type": arch,
        "num_attention_heads": metadata[f"{arch}.attention.head_count"],
        "num_key_value_heads": metadata[f"{arch}.attention.head_count_kv"],
    }
    back = {name_of(hf, arch, layers): hf for hf in _possible(layers)}
    tensors = {}
    for name, tensor in plain.items():
        heads = heads_of(back[name], config)
        tensors[back[name]] = rope.deinterleave(tensor, heads) if heads else tensor
    kinds = {name: kind for name, (kind, _, _) in stored.items()}
    raw = {name: data for name, (_, _, data) in stored.items()}
    return Stored(metadata, tensors, kinds, raw, factors)


def _possible(layers: int) -> list[str]:
    """Every name that a model of so many layers may have."""
    projections = [f"self_attn.{one}_proj" for one in "qkvo"]
    projections += [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    parts = [f"{one}.{kind}" for one in projections for kind in ("weight", "bias")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    found = [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    return ["model.embed_tokens.weight", *found, "model.norm.weight", "lm_head.weight"]


def check_offsets(file: Path, reader: "gguf.GGUFReader") -> None:
    """Tensors follow each other in the order of the header, padded, up to the end of the file."""
    position, alignment = int(reader.data_offset), int(reader.alignment)
    for tensor in reader.tensors:
        assert position % alignment == 0
        assert int(tensor.data_offset) == position, f"{file.name}: {tensor.name}"
        position = -(-(position + int(tensor.n_bytes)) // alignment) * alignment
    assert file.stat().st_size == position or not reader.tensors, file.name


def sizes(config: Mapping[str, Any], arch: str) -> dict[str, int | float]:
    """The keys of a header that have a model's sizes and numbers, by the package's names."""
    keys, heads = gguf.Keys, config["num_attention_heads"]
    found = {
        keys.LLM.VOCAB_SIZE: config["vocab_size"],
        keys.LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        keys.LLM.EMBEDDING_LENGTH: config["hidden_size"],
        keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        keys.LLM.FEED_FORWARD_LENGTH: config["intermediate_size"],
        keys.Attention.HEAD_COUNT: heads,
        keys.Attention.HEAD_COUNT_KV: config["num_key_value_heads"],
        keys.Attention.KEY_LENGTH: config["head_dim"],
        keys.Attention.VALUE_LENGTH: config["head_dim"],
        keys.Rope.DIMENSION_COUNT: config["head_dim"],
        keys.Attention.LAYERNORM_RMS_EPS: float(np.float32(config["rms_norm_eps"])),
        keys.Rope.FREQ_BASE: float(np.float32(config["rope_theta"])),
    }
    return {key.format(arch=arch): value for key, value in found.items()}


def write(
    model: Model,
    path: Path,
    kinds: Kind | Mapping[str, Kind] = Kind.BF16,
    *,
    parts: int = 0,
    small_first: bool = False,
    alignment: int | None = None,
    factors: Tensor | None = None,
    file: str = "model.gguf",
    more: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model with the package's own writer.

    `kinds` are those of tensors by their GGUF names, or one for all matrices. `parts` is the number
    of tensors in each file (0: all in one). `more` replaces keys of the header (None: left out) and
    `without` leaves tensors out; `extra` are further tensors, as float32.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    arch = arch_of(model.config)
    writer = gguf.GGUFWriter(
        path / file, arch, split_max_tensors=parts, small_first_shard=small_first
    )
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (sizes(model.config, arch) | dict(more or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    if factors is not None:
        writer.add_tensor(FACTORS, factors.numpy())
    for name, tensor in to_gguf(model).items():
        usual = Kind.BF16 if tensor.dim() > 1 else Kind.F32
        if isinstance(kinds, Kind):
            kind = kinds if tensor.dim() > 1 else usual
        else:
            kind = kinds.get(name, usual)
        if name not in without:
            writer.add_tensor(name, coded(tensor, kind), raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
