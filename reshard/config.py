"""From command line and YAML to a checked, typed job: topologies by name, file or directory.

OmegaConf does the merging and the typing; nothing of it is passed on. All user input is checked
here, except what only the files of a checkpoint can tell.
"""

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reshard import yamltext
from reshard.containers import shown
from reshard.encodings import ENCODINGS, TOOL_ONLY
from reshard.errors import ConfigError, first_line
from reshard.families.model import Json
from reshard.families.releases import VERSIONS
from reshard.formats.options import Mesh, Options
from reshard.schema import EngineConfig, Schema, SourceConfig, TargetConfig
from reshard.topologies import AXES, near, read_model, resolve
from reshard.yamltext import container, readable

MAX_TIMEOUT = 1e7
MAX_MULTIPLE = 1 << 20
MAX_FACTOR = 1024.0
MAX_NAME_BYTES = 255
TEXT_KEYS = frozenset(
    f"{side}.{key}"
    for side in ("src", "dst")
    for key in ("topology", "path", "model", "like", "assets", "file")
)
# Keys that every format knows; the others are named by the formats.
COMMON_KEYS = {
    "src": ("topology", "format", "mesh", "path", "model", "replicas", "assets", "vocab"),
    "dst": ("topology", "format", "mesh", "path", "dtype", "like", "vocab_multiple"),
}
DTYPES = {
    "keep": None,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "f16": torch.float16,
    "float32": torch.float32,
    "f32": torch.float32,
}
CODECS = (*ENCODINGS, *TOOL_ONLY)
CHOICES = {
    "embedding_dim": ("auto", "0", "1"),
    "rope": ("auto", "interleaved", "half"),
    "keys": ("auto", "current", "older"),
    "wrapper": ("auto", "model", "none"),
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Side:
    """One checked side of a job. `format` None: to be detected in `path`, as one of `among`.

    `given` are the keys that not every format knows and that are not as by default.
    """

    format: str | None
    path: Path | None
    options: Options
    dtype: torch.dtype | None
    given: frozenset[str] = frozenset()
    among: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Engine:
    """How a job runs: sizes in bytes, times in seconds."""

    memory: int
    exchange: str
    writers: str
    backend: str
    timeout: float
    fsync: bool
    shared_files: str
    verify: bool
    require_complete: bool


@dataclass(frozen=True, slots=True)
class JobConfig:
    """A checked configuration."""

    source: Side
    target: Side
    engine: Engine
    strict_replicas: bool
    like: Path | None


def parse_size(text: str, key: str) -> int:
    """Bytes from `256MiB`, `5GB` or a plain number; `key` is for the message."""
    match = re.fullmatch(
        r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]i?B|)", str(text).strip(), re.IGNORECASE
    )
    if match is None:
        raise ConfigError(f"{key}: `{shown(text)}` is not a size; write it like 256MiB or 5GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def load(src: str | None, dst: str | None, overrides: Sequence[str], file: str | None) -> JobConfig:
    """Merge topologies, job file and overrides, in this order, and check all of it."""
    return of_tree(tree_of(src, dst, overrides, file))


def tree_of(
    src: str | None, dst: str | None, overrides: Sequence[str], file: str | None
) -> dict[str, Json]:
    """What a user has given in all, as a job file would have it."""
    tree = yamltext.read(Path(file)) if file else {}
    return merged([tree, _dotlist(overrides), _topologies(src, dst)])


def of_tree(given: Mapping[str, Json]) -> JobConfig:
    """The job that a tree describes, laid over the topologies that it names; all of it checked."""
    sides = {}
    for name in ("src", "dst"):
        side = given.get(name)
        spec = side.get("topology") if isinstance(side, Mapping) else None
        sides[name] = resolve(spec, name) if spec else {}
    schema = _typed([sides, given])
    return _checked(schema)


def _topologies(src: str | None, dst: str | None) -> dict[str, Json]:
    named = {"src": src, "dst": dst}
    return {name: {"topology": spec} for name, spec in named.items() if spec is not None}


def _dotlist(overrides: Sequence[str]) -> dict[str, Json]:
    """KEY=VALUE items as a tree."""
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not re.fullmatch(r"(src|dst|engine)(\.\w+)+", key):
            raise ConfigError(
                f"`{shown(item)}` is not KEY=VALUE with a key below src, dst or engine"
            )
    # A path may look like anything: text is taken as it stands, only the rest is read as YAML.
    texts = [item for item in overrides if item.partition("=")[0] in TEXT_KEYS]
    typed = yamltext.dotlist([item for item in overrides if item not in texts], "command line")
    with readable("command line"):
        for item in texts:
            key, _, value = item.partition("=")
            OmegaConf.update(typed, key, value)
    return container(typed, "command line")


def merged(trees: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Several trees in one; what a later one has counts."""
    with readable("configuration"):
        both = OmegaConf.merge(*(OmegaConf.create(dict(tree)) for tree in trees))
        return container(both, "configuration")


def _typed(trees: Sequence[Mapping[str, Json]]) -> Schema:
    """Merge into the dataclasses, which refuse unknown keys and wrong types."""
    for tree in trees:
        _check_keys(tree)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Schema), *(dict(tree) for tree in trees))
        return cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{shown(key or 'configuration')}: {first_line(error)}") from None


def _check_keys(tree: Mapping[str, Json]) -> None:
    """Refuse keys that no dataclass has, with a near match."""
    levels = {"src": SourceConfig, "dst": TargetConfig, "engine": EngineConfig}
    for name, branch in tree.items():
        if name not in levels:
            raise ConfigError(f"unknown key `{shown(name)}`: {near(str(name), list(levels))}")
        if not isinstance(branch, Mapping):
            raise ConfigError(f"`{name}` is {reprlib.repr(branch)}, expected keys and values")
        known = [item.name for item in fields(levels[name])]
        for key, value in branch.items():
            if key not in known:
                raise ConfigError(f"unknown key `{name}.{shown(key)}`: {near(str(key), known)}")
            if f"{name}.{key}" in TEXT_KEYS and not isinstance(value, str | None):
                raise ConfigError(
                    f"{name}.{key} is {reprlib.repr(value)}, expected text; put it in quotes"
                )
            if key == "mesh" and value is not None:
                _check_axes(f"{name}.mesh", value)


def _check_axes(key: str, mesh: Json) -> None:
    """Refuse a mesh that is not sizes by axis."""
    if not isinstance(mesh, Mapping):
        raise ConfigError(f"{key} is {reprlib.repr(mesh)}, expected sizes by axis, like {{tp: 4}}")
    if wrong := [axis for axis in mesh if axis not in AXES]:
        raise ConfigError(f"unknown key `{key}.{shown(wrong[0])}`: {near(str(wrong[0]), AXES)}")


def _checked(schema: Schema) -> JobConfig:
    """The job, with every value looked at."""
    engine = schema.engine
    _one_of("engine.exchange", engine.exchange, ("collective", "direct"))
    _one_of("engine.writers", engine.writers, ("nearest", "owner"))
    _one_of("engine.shared_files", engine.shared_files, ("auto", "always", "never"))
    _one_of("engine.backend", engine.backend, ("auto", "nccl", "gloo"))
    _one_of("src.replicas", schema.src.replicas, ("first", "strict"))
    if engine.exchange == "direct" and engine.writers == "owner":
        raise ConfigError(
            "engine.writers=owner does not apply to engine.exchange=direct, where nothing crosses; "
            "use collective"
        )
    if not 0 < engine.timeout <= MAX_TIMEOUT:
        raise ConfigError(
            f"engine.timeout: {engine.timeout:g} is not a time in seconds, "
            f"above 0 and up to {MAX_TIMEOUT:,.0f}"
        )
    source, target = _side(schema.src, "src"), _side(schema.dst, "dst")
    return JobConfig(
        source,
        target,
        Engine(
            parse_size(engine.memory, "engine.memory"),
            engine.exchange,
            engine.writers,
            engine.backend,
            engine.timeout,
            engine.fsync,
            engine.shared_files,
            engine.verify,
            engine.require_complete,
        ),
        schema.src.replicas == "strict",
        _path(schema.dst.like, "dst.like"),
    )


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key}: `{shown(value)}`: {near(value, known)}")


def _side(config: SourceConfig | TargetConfig, name: str) -> Side:
    """One side, its strings parsed."""
    for key, known in CHOICES.items():
        _one_of(f"{name}.{key}", getattr(config, key), known)
    # GGUF files and tools spell them in capitals.
    config = replace(config, dtype=config.dtype.lower())
    if config.dtype not in TOOL_ONLY:
        _one_of(f"{name}.dtype", config.dtype, (*DTYPES, *ENCODINGS))
    if config.vocab_multiple is not None and not 1 <= config.vocab_multiple <= MAX_MULTIPLE:
        raise ConfigError(
            f"{name}.vocab_multiple: {config.vocab_multiple}, expected 1 to {MAX_MULTIPLE}"
        )
    mesh = config.mesh
    if mesh is not None and min(mesh.tp, mesh.pp, mesh.dp) < 1:
        raise ConfigError(f"{name}.mesh: tp={mesh.tp} pp={mesh.pp} dp={mesh.dp}: sizes begin at 1")
    options = Options(
        mesh=Mesh(mesh.tp, mesh.pp, mesh.dp) if mesh is not None else None,
        embedding_dim=None if config.embedding_dim == "auto" else int(config.embedding_dim),
        max_shard_bytes=parse_size(config.max_shard_size, f"{name}.max_shard_size"),
        rope_interleaved=config.rope_interleaved,
        vocab_multiple=config.vocab_multiple,
        model=read_model(config.model) if config.model else None,
        rope=None if config.rope == "auto" else config.rope,
        keys=None if config.keys == "auto" else config.keys,
        wrapper=None if config.wrapper == "auto" else config.wrapper,
        encoding=config.dtype if config.dtype in CODECS else None,
    )
    if isinstance(config, SourceConfig):
        options = _of_source(options, config)
    path = _path(config.path, f"{name}.path")
    plain = type(config)()
    given = [item.name for item in fields(config) if item.name not in COMMON_KEYS[name]]
    changed = frozenset(key for key in given if getattr(config, key) != getattr(plain, key))
    # A topology may leave the choice between formats to the files: "fsdp|titan".
    among = tuple(config.format.split("|")) if config.format else ()
    only = among[0] if len(among) == 1 else None
    return Side(only, path, options, DTYPES.get(config.dtype), changed, among)


def _path(text: str | None, key: str) -> Path | None:
    """A path that can be asked for: no part of it is longer than a name can be."""
    if not text:
        return None
    if max(map(len, text.encode().split(b"/"))) > MAX_NAME_BYTES:
        raise ConfigError(
            f"{key}: `{shown(text)}...` has a part of more than {MAX_NAME_BYTES} bytes"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: `{shown(text)}`: {first_line(error)}") from None


def _of_source(options: Options, config: SourceConfig) -> Options:
    """Options with what only a source may say."""
    _one_of("src.version", config.version, ("auto", *VERSIONS))
    if config.rope_factor is not None and not 1 < config.rope_factor <= MAX_FACTOR:
        raise ConfigError(
            f"src.rope_factor: {config.rope_factor:g}, expected a factor such as 8 or 32"
        )
    return replace(
        options,
        tied=config.tied,
        rope_factor=config.rope_factor,
        version=None if config.version == "auto" else config.version,
        instruct=config.instruct,
        assets=_folder(_path(config.assets, "src.assets")),
        file=config.file,
        vocab=_vocabulary(config.vocab),
    )


def _vocabulary(asked: str | None) -> int | str | None:
    """src.vocab: a number of rows, or where to count them."""
    if asked is None or asked == "tokenizer":
        return asked
    if re.fullmatch(r"[1-9]\d{0,9}", asked) is None:
        raise ConfigError(
            f"src.vocab: `{shown(asked)}` is neither a number of rows nor `tokenizer`"
        )
    return int(asked)


def _folder(assets: Path | None) -> Path | None:
    """The directory of src.assets, which must be one."""
    if assets is not None and not assets.is_dir():
        raise ConfigError(
            f"src.assets: `{assets}` is not a directory; name one with a model's config.json and "
            "tokenizer"
        )
    return assets
