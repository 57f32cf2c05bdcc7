"""What is fuzzed: each reader with its seeds, its kinds of damage, and what must hold after it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from reshard import config, containers, formats
from reshard.containers import dcpfile, dcpmetadata, gguffile, safetensors, torchfile
from reshard.encodings import stored_bytes
from reshard.errors import ReshardError
from reshard.formats import common
from reshard.formats.options import Options, Scan
from tests.fuzz import harness, mutations, texts
from tests.fuzz.harness import Files, Reader
from tests.fuzz.mutations import Damage
from tests.fuzz.seeds import JOB, WRITERS, checkpoint

PLANNED: Mapping[str, Damage] = {
    ".safetensors": mutations.edit_safetensors,
    ".json": mutations.edit_json,
    ".pth": mutations.edit_torch,
    ".bin": mutations.edit_torch,
    ".metadata": mutations.edit_pickle,
    ".gguf": mutations.edit_gguf,
    ".yaml": texts.edit_yaml,
    "words": texts.edit_words,
}
# Of the damage, how much has a plan.
SHARE = 0.6


def damaged(rng: Random, name: str, files: Files) -> tuple[str, bytes]:
    """One file of a checkpoint damaged, and the name of the damage."""
    data = files[name]
    planned = next((made for suffix, made in PLANNED.items() if name.endswith(suffix)), None)
    if planned is not None and rng.random() < SHARE:
        return planned.__name__, planned(rng, data)
    if rng.random() < 0.1:
        return "splice", mutations.splice(rng, data, files[rng.choice(sorted(files))])
    generic = rng.choice(mutations.GENERIC)
    return generic.__name__, generic(rng, data)


def of(form: str, *, only: str = "") -> Callable[[Path], Files]:
    """The files of a checkpoint of a format, or the first of one kind."""

    def files(folder: Path) -> Files:
        made = checkpoint(form, folder)
        if not only:
            return made
        name = next(name for name in made if name.endswith(only))
        return {"file" + only: made[name]}

    return files


def require_inside(found: containers.FileIndex, path: Path) -> None:
    """Every entry lies in its file."""
    held = path.stat().st_size
    for entry in found.entries.values():
        if entry.encoding is not None:
            size = stored_bytes(entry.shape, entry.dtype, entry.encoding)
        elif math.prod(entry.shape) == 0:
            size = 0
        else:
            steps = zip(entry.shape, entry.strides, strict=True)
            last = sum((length - 1) * stride for length, stride in steps)
            size = (last + 1) * entry.dtype.itemsize
        assert 0 <= entry.offset <= entry.offset + size <= held, f"{entry} is outside of {held}"


def read_safetensors(root: Path) -> None:
    require_inside(safetensors.index(root, "file.safetensors"), root / "file.safetensors")


def read_torch(root: Path) -> None:
    require_inside(torchfile.index(root, "file.pth"), root / "file.pth")


def read_gguf(root: Path) -> None:
    require_inside(gguffile.index(root, "file.gguf"), root / "file.gguf")


def read_dcp(root: Path) -> None:
    found = dcpmetadata.read(root)
    for fqn, tensor in found.tensors.items():
        dcpmetadata.require_tiled(fqn, tensor)
    for file in found.files:
        require_inside(dcpfile.index(root, file), root / file)


def read_json(root: Path) -> None:
    common.dump_json(common.read_json(root / "file.json"))


def read_index(root: Path) -> None:
    common.read_json(root / "x.index.json")


def read_job(root: Path) -> None:
    config.load(None, None, [], str(root / "job.yaml"))


def read_words(root: Path) -> None:
    words = (root / "words").read_bytes().decode(errors="replace").split("\n")
    config.load("hf", "tp4", [f"src.path={root}", f"dst.path={root}/x", *words], None)


def scan(root: Path) -> None:
    found = formats.detect(root).scan(root, Options())
    common.check_headers(found, found.layout.files)
    for file in found.layout.files:
        require_inside(
            containers.index(found.layout.container, found.root, file), found.root / file
        )
    common.dump_json(found.model.to_json())
    for target in formats.formats().values():
        if not target.SOURCE_ONLY:
            lay_out(target, found)


def lay_out(target: formats.Format, found: Scan) -> None:
    """What would be written of a source that could be read, as far as its config decides it."""
    options, message = Options(), ""
    try:
        formats.require_held(target, found.model)
        made = formats.laid_out(target, found.parameters, found.model, options)
        target.notes(found.model, options)
        target.side_files(found.model, made, options)
        for file in made.files:
            made.header(file)
    except ReshardError as error:
        message = str(error)
    assert not (fault := harness.wrong_message(message)), fault


READERS: Mapping[str, Reader] = {
    "safetensors": Reader(of("hf", only=".safetensors"), ("",), read_safetensors),
    "torchfile": Reader(of("meta", only=".pth"), ("",), read_torch),
    "gguf": Reader(of("gguf", only=".gguf"), ("",), read_gguf),
    "dcp metadata": Reader(of("fsdp"), (".metadata",), read_dcp),
    "dcp items": Reader(of("fsdp"), (".distcp",), read_dcp),
    "json": Reader(lambda folder: {"file.json": texts.INDEX}, ("",), read_json),
    "yaml": Reader(lambda folder: {"job.yaml": JOB}, ("",), read_job),
    "command line": Reader(lambda folder: {"words": texts.WORDS}, ("",), read_words),
    **{f"{form} directory": Reader(of(form), ("",), scan) for form in WRITERS},
}


def case(reader: str, files: Files, seed: int, number: int) -> tuple[str, str, bytes]:
    """The case of a number: the file that is damaged, how, and its bytes."""
    rng = Random(f"{reader} {seed} {number}")
    names = [name for name in sorted(files) if name.endswith(tuple(READERS[reader].hit))]
    # Small texts decide more than weights, and are read by more code.
    small = [name for name in names if not name.endswith((".safetensors", ".distcp", ".pth"))]
    name = rng.choice(small if small and rng.random() < 0.7 else names)
    how, data = damaged(rng, name, files)
    return name, how, data
