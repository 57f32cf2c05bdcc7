"""What a format must know beyond the model: the mesh, and the choices its files leave open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reshard.containers import Blob
from reshard.families import Model
from reshard.layout import Layout, Parameter
from reshard.placement import Boxes, Cut


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the mesh axes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1


@dataclass(frozen=True, slots=True)
class Chunks:
    """A stored tensor that is there: `spread` has the file and the coordinate of each box."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    cut: Cut | Boxes
    spread: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Options:
    """A topology as its format sees it; None means: decide by the model or by the files.

    `mesh` None (a source only): read from the files. `files` names the file of each parameter, and
    `stages` the pipeline stage of each parameter, where a checkpoint that exists decides them.
    `vocab` is the true vocabulary of a source whose tables have padding: rows, or "tokenizer" for
    as many as that has tokens. `model` is a config for what the files do not say, `assets` a
    directory with a config and the small files that the source lacks.
    `version`, `instruct` and `rope_factor` say which release of Llama a source is.
    `rope` is the order of rotary rows ("interleaved" or "half"), `keys` the generation of names
    ("current" or "older"), `wrapper` the name of the dict around the weights ("model" or "none"),
    and `chunks` what an existing directory holds of each tensor. `encoding` is the codec of
    matrices, `tokenizer` the number and the bytes of its keys in a header, and `file` the one file
    of several models that is meant.
    """

    mesh: Mesh | None = None
    embedding_dim: int | None = None
    max_shard_bytes: int = 5_000_000_000
    rope_interleaved: bool | None = None
    vocab_multiple: int | None = None
    vocab: int | str | None = None
    tied: bool | None = None
    rope_factor: float | None = None
    version: str | None = None
    instruct: bool | None = None
    model: Model | None = None
    assets: Path | None = None
    rope: str | None = None
    keys: str | None = None
    wrapper: str | None = None
    files: Mapping[str, str] | None = None
    stages: Mapping[str, int] | None = None
    chunks: Mapping[str, Chunks] | None = None
    encoding: str | None = None
    tokenizer: tuple[int, Blob] | None = None
    file: str | None = None

    @property
    def axes(self) -> Mesh:
        """The mesh, or that of a single device."""
        return self.mesh or Mesh()


@dataclass(frozen=True, slots=True)
class Scan:
    """A checkpoint that exists: its model, its layout, and what was learnt on the way.

    `assumed` are lines on what the files do not say and how it was decided; `left_behind` names
    what is not carried; `folders` are where small files lie besides `root`, and `inside` what the
    weights' own files have of their content. `ignored(key)` tells
    stored tensors that are known to be of no use, and `wrong_metadata(file, metadata)` what is
    wrong with a header's metadata.
    """

    format: str
    model: Model
    parameters: tuple[Parameter, ...]
    layout: Layout
    root: Path
    options: Options
    assumed: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    inside: tuple[str, ...] = ()
    ignored: Callable[[str], bool] = field(default=lambda key: False)
    wrong_metadata: Callable[[str, Mapping[str, object]], str | None] = field(
        default=lambda file, metadata: None
    )
