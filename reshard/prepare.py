"""What is known of a job before a byte moves: the source scanned, the target laid out."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from reshard import assets, formats
from reshard.assets import Readiness
from reshard.casts import narrows
from reshard.config import JobConfig
from reshard.dealing import Ranks
from reshard.elsewhere import look_together
from reshard.encodings import require_codecs
from reshard.errors import (
    IncompleteError,
    LayoutError,
    StorageError,
)
from reshard.families import Model
from reshard.families.model import ModelConfig
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, Parameter, check_covered, check_same_parameters
from reshard.plan import Plan
from reshard.smallfiles import Alone, Meeting, SmallFiles, gather
from reshard.sources import Source, require_known_keys
from reshard.targets import target_of
from reshard.units import size_text
from reshard.view import View, through, within

CODE_VERSION = "3"


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is known of a job before a byte moves; `scan` None: the source is only imagined.

    `stored_model` is `target_model` as the target's own files have it, its vocabulary maybe padded.
    `view` is through what a source is seen of which not all ranks see all files, and `local` names
    its files of weights that not all ranks see, with the ranks that do.
    """

    config: JobConfig
    model: Model
    source: Layout
    target: Layout
    target_format: formats.Format
    target_options: Options
    target_model: Model
    stored_model: Model
    scan: Scan | None
    small: SmallFiles
    notes: tuple[str, ...] = ()
    view: View | None = None
    local: Mapping[str, Ranks] = field(default_factory=dict)

    def made_files(self) -> dict[str, bytes]:
        """The texts that the target's format makes, but those that are carried along."""
        made = self.target_format.side_files(self.stored_model, self.target, self.target_options)
        return {name: data for name, data in made.items() if name not in self.small.facts.names}

    def readiness(self) -> Readiness:
        """The small files that the target will have, and what will be missing."""
        record = self.target_model.to_json().get("config")
        config = record if isinstance(record, dict) else {}
        names = (*self.made_files(), *self.small.facts.names, *self.small.facts.inside)
        return assets.readiness(names, self.target_format.NEEDED, config)

    def plan(self, world: int, machines: Ranks = ()) -> Plan:
        """The plan for `world` ranks, on `machines` of which only one may write a file."""
        engine, sides = self.config.engine, (self.source, self.target)
        modes = engine.exchange, engine.writers
        return Plan(*sides, world, *modes, local=self.local, machines=machines)

    def root(self, scan: Scan) -> Path:
        """The source's directory as the user knows it."""
        return scan.root if self.view is None else self.view.place(scan.root)


def prepare(config: JobConfig, meeting: Meeting | None = None) -> Prepared:
    """Scan or imagine the source, lay out the target, and refuse what cannot be.

    All ranks of `meeting` do so together.
    """
    meeting = meeting or Alone()
    source, view = look_together(config.source, meeting)
    with through(view):
        begun = meeting.together(within(view, lambda: _begin(config, source)))
        scan = begun.source.scan
        small = (
            gather(scan, begun.format, begun.stored_model, meeting)
            if scan is not None
            else SmallFiles()
        )
        found = meeting.together(within(view, lambda: _finish(config, begun, small)))
    if view is None or scan is None:
        return found
    return replace(found, view=view, local=view.local(scan))


@dataclass(frozen=True, slots=True)
class _Begun:
    """A job that can be done, before its small files are known; a header may wait for these."""

    source: Source
    format: formats.Format
    options: Options
    dtype: torch.dtype | None
    model: Model
    stored_model: Model
    parameters: tuple[Parameter, ...]
    target: Layout


def _begin(config: JobConfig, source: Source) -> _Begun:
    """Look at the target, and refuse what does not go together."""
    target_format, options, dtype = target_of(config)
    if options.encoding is not None:
        target_format.require_encoding(options.encoding, config.target.path)
    require_known_keys(config.target, "dst", target_format, set(target_format.TARGET_KEYS))
    formats.require_held(target_format, source.model)
    model, parameters = _cast(source, dtype)
    stored, _ = formats.padded(target_format, parameters, model, options)
    target = formats.laid_out(target_format, parameters, model, options)
    if any(slot.encoding is not None for slot in (*source.layout.slots, *target.slots)):
        require_codecs()
    check_covered(source.layout)
    check_same_parameters(source.layout, target)
    return _Begun(source, target_format, options, dtype, model, stored, parameters, target)


def _finish(config: JobConfig, begun: _Begun, small: SmallFiles) -> Prepared:
    """Complete the target's header, and say what is to be known of the job."""
    source, target_format, target = begun.source, begun.format, begun.target
    model, stored = begun.model, begun.stored_model
    options = replace(begun.options, tokenizer=small.header())
    if options.tokenizer is not None:
        target = formats.laid_out(target_format, begun.parameters, model, options)
    notes = (
        *source.notes,
        *(() if options.encoding else _dtype_notes(source.model.dtype, begun.dtype, target)),
        *(f"target: {line}" for line in target_format.notes(stored, options)),
        *_padding_note(model, stored),
    )
    scan = source.scan
    if scan is not None:
        notes += (*small.facts.notes, *_tokenizer_note(scan, model))
        if scan.left_behind:
            notes += (f"left behind: {', '.join(scan.left_behind)} (weights only are moved)",)
    found = Prepared(
        config=config,
        model=source.model,
        source=source.layout,
        target=target,
        target_format=target_format,
        target_options=options,
        target_model=model,
        stored_model=stored,
        scan=scan,
        small=small,
        notes=notes,
    )
    if config.engine.require_complete and (missing := found.readiness().missing):
        raise IncompleteError(
            f"dst: {', '.join(missing)} would be missing; give src.assets=DIR, a directory that "
            "has them (engine.require_complete=true asks for this)"
        )
    return found


def _cast(source: Source, dtype: torch.dtype | None) -> tuple[Model, tuple[Parameter, ...]]:
    """The model and its parameters in the target's dtype; what is no weight keeps its own."""
    if dtype is None:
        return source.model, source.parameters
    narrow = next((part for part in source.parameters if _is_quantised(part.dtype)), None)
    if narrow is not None:
        raise LayoutError(
            f"dst.dtype: `{narrow.name}` is {str(narrow.dtype).removeprefix('torch.')}, which "
            "means nothing without its scales; dst.dtype=keep moves it as it is"
        )
    parameters = (
        replace(parameter, dtype=dtype) if parameter.dtype.is_floating_point else parameter
        for parameter in source.parameters
    )
    model = replace(source.model, dtype=str(dtype).removeprefix("torch."))
    return model, tuple(parameters)


def _is_quantised(dtype: torch.dtype) -> bool:
    """Whether values of a floating dtype are codes that a scale makes numbers."""
    return dtype.is_floating_point and dtype.itemsize == 1


def _dtype_notes(stored: str, dtype: torch.dtype | None, target: Layout) -> tuple[str, ...]:
    """What happens to the dtype, or might."""
    if dtype is None and stored == "float32":
        size = size_text(target.total_bytes())
        return (f"weights are float32, {size}; dst.dtype=bfloat16 halves them",)
    wanted = stored if dtype is None else str(dtype).removeprefix("torch.")
    if wanted == stored:
        return ()
    counted = (
        "; values that overflow or become zero are counted" if _narrows(stored, wanted) else ""
    )
    return (f"target: cast from {stored} to {wanted}{counted}",)


def _narrows(stored: str, wanted: str) -> bool:
    return narrows(getattr(torch, stored), getattr(torch, wanted))


def _padding_note(model: Model, stored: Model) -> tuple[str, ...]:
    """A line on the rows that a target has beyond the vocabulary."""
    if model.vocab == stored.vocab:
        return ()
    return (f"target: vocabulary padded from {model.vocab} to {stored.vocab} rows of zeros",)


def _tokenizer_note(scan: Scan, model: Model) -> tuple[str, ...]:
    """A warning where the embedding has fewer rows than the tokenizer has tokens.

    Or other rows than that of src.assets has, which may be another model's.
    """
    folder = scan.options.assets
    places = (scan.root, *scan.folders) if folder is None else (folder,)
    tokens = assets.tokens_in(places) if isinstance(model, ModelConfig) else None
    if tokens is None or not isinstance(model, ModelConfig) or tokens == model.vocab:
        return ()
    if folder is None and tokens < model.vocab:
        return ()
    drop = "; src.vocab=tokenizer drops the others" if model.vocab > tokens else ""
    return (
        f"warning: the embedding has {model.vocab} rows, but the tokenizer"
        f"{' in src.assets' if folder is not None else ''} knows {tokens} tokens{drop}",
    )


def small_files(prepared: Prepared) -> dict[str, Iterable[bytes]]:
    """The small files of the target by name, in pieces; for the first rank, which has them all."""
    return {
        **{name: (data,) for name, data in prepared.made_files().items()},
        **{name: assets.pieces_of(path) for name, path in prepared.small.paths.items()},
    }


def job_digest(prepared: Prepared, plan: Plan) -> str:
    """What identifies a job: layouts, block table, sources with sizes and times, small files."""
    record = hashlib.sha256(plan.table_digest().encode())
    if prepared.scan is not None:
        for state in source_states(prepared.scan):
            record.update(repr(state).encode())
        record.update(repr((prepared.made_files(), prepared.small.facts.digest)).encode())
    # A header may hold what no stored tensor shows: theta, positions, ids.
    record.update(repr(prepared.stored_model.to_json()).encode())
    strict = prepared.config.strict_replicas
    record.update(repr((CODE_VERSION, prepared.target.files, strict)).encode())
    return record.hexdigest()


def source_states(scan: Scan) -> Iterator[tuple[str, int, int]]:
    """Every file of weights with its size in bytes and its time in nanoseconds."""
    for file in scan.layout.files:
        try:
            status = os.stat(scan.root / file)
        except OSError as error:
            raise StorageError(f"`{scan.root / file}`: {error.strerror}") from None
        yield file, status.st_size, status.st_mtime_ns
