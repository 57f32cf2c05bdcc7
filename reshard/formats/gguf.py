"""GGUF directories: one file, or its parts, with weights, sizes and tokenizer, for llama.cpp.

Rotary rows of the llama architecture are interleaved, as in Meta's files; those of qwen2 are not.
Norms and biases are float32. A tied output is left out, and so is the tied one that is read. The
frequency factors of llama3 scaling are a tensor of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reshard import containers
from reshard.containers.gguffile import Fields
from reshard.encodings import ENCODINGS, TOOL_ONLY, Encoding
from reshard.errors import CheckpointError, ConfigError, LayoutError
from reshard.families import parameters as parameters_of
from reshard.families.model import ModelConfig
from reshard.formats import common, gguf_files, gguf_keys
from reshard.formats.options import Mesh, Options, Scan
from reshard.layout import Constant, Content, Layout, Parameter, Slot
from reshard.placement import Placement, uncut
from reshard.storage import read_bytes

NAME = "gguf"
FAMILIES = tuple(gguf_keys.ARCHITECTURES)
FALLBACK = True
TOKENIZER = "tokenizer.ggml"
NEEDED = {"tokenizer": (TOKENIZER,)}
EMBEDS_TOKENIZER = True
SOURCE_KEYS = ("file",)
CONTAINER = "gguffile"
FILE = "model-{kind}.gguf"
KEYS = {
    "embedding": "token_embd.weight",
    "attention.q": "blk.{layer}.attn_q.weight",
    "attention.k": "blk.{layer}.attn_k.weight",
    "attention.v": "blk.{layer}.attn_v.weight",
    "attention.o": "blk.{layer}.attn_output.weight",
    "mlp.gate": "blk.{layer}.ffn_gate.weight",
    "mlp.up": "blk.{layer}.ffn_up.weight",
    "mlp.down": "blk.{layer}.ffn_down.weight",
    "attention.norm": "blk.{layer}.attn_norm.weight",
    "mlp.norm": "blk.{layer}.ffn_norm.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _key(role: str, layer: int | None) -> str:
    """The name of a parameter's tensor."""
    module, bias, _ = role.partition(".bias")
    key = KEYS[module].format(layer=layer)
    return key.removesuffix("weight") + "bias" if bias else key


def layout(parameters: Sequence[Parameter], model: ModelConfig, options: Options) -> Layout:
    """Whole tensors in one file, which has no mesh."""
    if options.axes != Mesh():
        raise LayoutError(f"gguf: a GGUF file has no mesh, found {options.axes}")
    gguf_keys.require_said(model, NAME)
    if model.model_type in gguf_keys.INTERLEAVED:
        common.require_even_heads(model, NAME)
    kind = _kind(parameters, options)
    file = FILE.format(kind=kind)
    slots = tuple(_slot(parameter, model, file, options.encoding) for parameter in parameters)
    header = {
        **gguf_keys.header(model, kind, parameters),
        **({"": Fields(*options.tokenizer)} if options.tokenizer is not None else {}),
    }
    return Layout(
        f"gguf {kind}",
        CONTAINER,
        1,
        slots,
        _rope_factors(model, file),
        metadata=lambda template, shard: header,
    )


def _slot(parameter: Parameter, model: ModelConfig, file: str, encoding: str | None) -> Slot:
    """Where one parameter lies; what is no matrix is float32 and has no codec."""
    matrix = len(parameter.shape) > 1
    codec = ENCODINGS[encoding] if matrix and encoding is not None else None
    if codec is not None:
        _require_blocks(parameter, codec)
    elif matrix and parameter.dtype not in PLAIN:
        raise LayoutError(
            f"gguf: `{parameter.name}` is {common.stored_text(parameter.dtype, None)}; "
            "use dst.dtype=bfloat16, float16 or float32"
        )
    rotary = parameter.rotary and model.model_type in gguf_keys.INTERLEAVED
    placement = Placement(
        parameter.shape, uncut(parameter.shape[0]), interleaved=parameter.head if rotary else 0
    )
    plain = matrix and codec is None
    return Slot(
        parameter.name,
        placement,
        file,
        _key(parameter.role, parameter.layer),
        parameter.dtype if plain else torch.float32,
        encoding=codec,
    )


def _require_blocks(parameter: Parameter, codec: Encoding) -> None:
    """Refuse a matrix whose rows are no whole blocks."""
    if parameter.shape[-1] % codec.block:
        raise LayoutError(
            f"gguf: `{parameter.name}`: rows of {parameter.shape[-1]} elements are no whole "
            f"{codec.name} blocks of {codec.block}; use dst.dtype=bfloat16, float16 or float32"
        )


def _kind(parameters: Sequence[Parameter], options: Options) -> str:
    """What most matrices are, as GGUF names it."""
    if options.encoding is not None:
        return options.encoding.upper()
    names = [PLAIN.get(item.dtype, "F32") for item in parameters if len(item.shape) > 1]
    return max(sorted(set(names)), key=names.count)


def _rope_factors(model: ModelConfig, file: str) -> tuple[Constant, ...]:
    """The tensor by which llama.cpp applies llama3 scaling."""
    factors = gguf_keys.rope_factors(model)
    if factors is None:
        return ()
    content = Content(ROPE_FACTORS, torch.float32, tuple(factors.shape))
    return (Constant(file, content, factors.numpy().tobytes()),)


def require_encoding(encoding: str, folder: Path | None) -> None:
    """Refuse an encoding that only llama.cpp's own tool makes, with the commands that do."""
    if encoding in TOOL_ONLY:
        where = folder if folder is not None else Path("DIR")
        made, wanted = (where / FILE.format(kind=kind) for kind in ("BF16", encoding.upper()))
        raise ConfigError(
            f"dst.dtype={encoding}: llama.cpp's own tool makes it; run this with "
            f"dst.dtype=bfloat16, then: llama-quantize {made} {wanted} {encoding.upper()}"
        )


def purpose(options: Options) -> str:
    """What a target is for."""
    return "for llama.cpp and what is built on it"


def notes(model: ModelConfig, options: Options) -> tuple[str, ...]:
    """What the plan says of a target."""
    found = ["norms and biases are float32, as llama.cpp wants them"]
    if model.tied:
        found.append("tied embeddings: no output.weight, llama.cpp takes token_embd.weight")
    if gguf_keys.slides(model):
        found.append("the sliding window is left out: llama.cpp has none for this architecture")
    if options.encoding is not None:
        found.append(f"matrices are rounded to {options.encoding}, which loses precision")
    return tuple(found)


def detect(path: Path) -> bool:
    """Whether `path` is a directory of this format."""
    return bool(gguf_files.candidates(path))


@dataclass(frozen=True, slots=True)
class _Held:
    """A stored tensor: its file, and where it lies there."""

    file: str
    entry: containers.Entry


def scan(path: Path, options: Options) -> Scan:
    """Read the layout of a directory from the header of its file or files."""
    if options.mesh not in (None, Mesh()):
        raise LayoutError(f"gguf: a GGUF file has no mesh, found {options.mesh}")
    files = gguf_files.chosen(path, options.file)
    held, metadata = _held(path, files), containers.index(CONTAINER, path, files[0]).metadata
    model, assumed = _model(path, path / files[0], options, metadata, held)
    expected = parameters_of(model)
    where = _found(path, expected, held)
    matrices = [where[item.name].entry for item in expected if len(item.shape) > 1]
    model = replace(model, dtype=common.dominant_dtype(entry.dtype for entry in matrices))
    dtypes = {name: found.entry.dtype for name, found in where.items()}
    plain = replace(options, mesh=Mesh(), encoding=None, tokenizer=None)
    made = replace(layout(expected, model, plain), name=f"gguf {_name_of(matrices)}", constants=())
    return Scan(
        NAME,
        model,
        common.with_stored_dtypes(expected, dtypes),
        replace(made, slots=tuple(_as_held(slot, where[slot.parameter]) for slot in made.slots)),
        path,
        plain,
        (*assumed, *_said_of([found.entry for found in where.values()])),
        ignored=lambda key: key == ROPE_FACTORS,
        inside=(TOKENIZER,) if f"{TOKENIZER}.tokens" in metadata else (),
    )


def _held(path: Path, files: Sequence[str]) -> dict[str, _Held]:
    """Every stored tensor of the files."""
    held: dict[str, _Held] = {}
    for file in files:
        for key, entry in containers.index(CONTAINER, path, file).entries.items():
            if key in held:
                raise CheckpointError(
                    f"`{path / file}`: tensor `{key}` is in `{held[key].file}` too, expected once"
                )
            held[key] = _Held(file, entry)
    return held


def _model(
    path: Path,
    header: Path,
    options: Options,
    metadata: Mapping[str, object],
    held: Mapping[str, _Held],
) -> tuple[ModelConfig, list[str]]:
    """The model by its header, or by a config from elsewhere that agrees with it."""
    embedding = held.get(KEYS["embedding"])
    if embedding is None or len(embedding.entry.shape) != 2:
        raise CheckpointError(f"`{header}`: tensor `{KEYS['embedding']}` is missing or no matrix")
    described = gguf_keys.Header(header, metadata).model(
        embedding.entry.shape[0],
        tied=KEYS["output"] not in held,
        biased=_key("attention.o.bias", 0) in held,
    )
    factors = _factors(path, described, held.get(ROPE_FACTORS))
    sizes = (described.hidden, described.layers, described.heads)
    known, assumed = common.config_for(path, options, sizes, gguf_keys.families(described))
    if known is not None:
        return gguf_keys.agreed(known, described, factors, path), assumed
    if factors is not None:
        described = gguf_keys.with_rope_factors(described, factors, path)
    return described, assumed


def _as_held(slot: Slot, held: _Held) -> Slot:
    """A slot in the file, the dtype and the encoding that a checkpoint has it in."""
    file = held.file.replace("{", "{{").replace("}", "}}")
    return replace(slot, file=file, dtype=held.entry.dtype, encoding=held.entry.encoding)


def _found(
    path: Path, expected: Sequence[Parameter], held: Mapping[str, _Held]
) -> dict[str, _Held]:
    """The stored tensor of each parameter; what is missing or too many is refused."""
    keys = {parameter.name: _key(parameter.role, parameter.layer) for parameter in expected}
    if missing := [key for key in keys.values() if key not in held]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"`{path}`: tensor `{missing[0]}` is missing{more}")
    if extra := sorted(set(held) - set(keys.values()) - {ROPE_FACTORS}):
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(
            f"`{path / held[extra[0]].file}`: tensor `{extra[0]}` is not part of a model as its "
            f"header describes it{more}"
        )
    return {name: held[key] for name, key in keys.items()}


def _name_of(matrices: Sequence[containers.Entry]) -> str:
    """How most matrices are stored, as GGUF names it."""
    names = [
        entry.encoding.name.upper() if entry.encoding is not None else PLAIN.get(entry.dtype, "F64")
        for entry in matrices
    ]
    return max(sorted(set(names)), key=names.count)


def _said_of(entries: Sequence[containers.Entry]) -> tuple[str, ...]:
    """What a user should know of the values."""
    coded = sorted({entry.encoding.name for entry in entries if entry.encoding is not None})
    if coded:
        return (f"{', '.join(coded)} tensors are de-quantised to float32, exactly",)
    kinds = {len(entry.shape) > 1: entry.dtype for entry in entries}
    if kinds.get(False) == torch.float32 != kinds.get(True):
        return ("norms are float32, as GGUF has them; dst.dtype makes all alike",)
    return ()


def _factors(path: Path, model: ModelConfig, held: _Held | None) -> torch.Tensor | None:
    """The factors of rotary frequencies, if there are any."""
    if held is None:
        return None
    file, entry = path / held.file, held.entry
    if (entry.dtype, entry.shape) != (torch.float32, (model.head_dim // 2,)):
        raise CheckpointError(
            f"`{file}`: tensor `{ROPE_FACTORS}` is {common.stored_text(entry.dtype, None)} "
            f"{list(entry.shape)}, expected float32 [{model.head_dim // 2}]"
        )
    data = read_bytes(file, entry.offset, 4 * entry.shape[0])
    return torch.frombuffer(bytearray(data), dtype=torch.float32)
