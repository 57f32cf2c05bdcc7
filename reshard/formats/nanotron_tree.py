"""The tree of files of a Nanotron step: its names, and the mesh and the stages that they tell."""

import os
import re
from pathlib import Path

from reshard import containers
from reshard.containers import shown
from reshard.errors import CheckpointError
from reshard.formats import common
from reshard.formats.options import Mesh, Options
from reshard.layout import Layout

KEY = "data"
MAX_LATEST_BYTES = 1 << 12


FILE = "model/model/{module}/model_{leaf}{suffix}.safetensors"


SUFFIX = "_pp-rank-{stage}-of-{pp}_tp-rank-{{shard}}-of-{tp}"


FILE_NAME = re.compile(
    r"model_(?:weight|bias)(?:_pp-rank-(\d{1,6})-of-(\d{1,6})_tp-rank-(\d{1,6})-of-(\d{1,6}))?"
    r"\.safetensors"
)


MODULES = {
    "embedding": "token_position_embeddings/pp_block/token_embedding",
    "attention.q": "decoder/{layer}/pp_block/attn/qkv_proj",
    "attention.k": "decoder/{layer}/pp_block/attn/qkv_proj",
    "attention.v": "decoder/{layer}/pp_block/attn/qkv_proj",
    "attention.o": "decoder/{layer}/pp_block/attn/o_proj",
    "mlp.gate": "decoder/{layer}/pp_block/mlp/gate_up_proj",
    "mlp.up": "decoder/{layer}/pp_block/mlp/gate_up_proj",
    "mlp.down": "decoder/{layer}/pp_block/mlp/down_proj",
    "attention.norm": "decoder/{layer}/pp_block/input_layernorm",
    "mlp.norm": "decoder/{layer}/pp_block/post_attention_layernorm",
    "norm": "final_layer_norm/pp_block",
    "output": "lm_head/pp_block",
}


def place_of(role: str, layer: int | None) -> dict[str, str]:
    """What a file's name says of a parameter: its module, and weight or bias."""
    weight, bias, _ = role.partition(".bias")
    return {"module": MODULES[weight].format(layer=layer), "leaf": "bias" if bias else "weight"}


def step(path: Path) -> Path:
    """The step directory that a run's folder names as its latest, or `path` itself."""
    if not (path / "latest.txt").is_file():
        return path
    step = common.read_text(path / "latest.txt", MAX_LATEST_BYTES).strip()
    if not re.fullmatch(r"\d{1,12}", step, re.ASCII) or not (path / step).is_dir():
        raise CheckpointError(
            f"`{path / 'latest.txt'}`: names step `{shown(step)}`, which is not there"
        )
    return path / step


def is_saved(path: Path) -> bool:
    """Whether a step is not beyond the one that its run's latest.txt names, if there is a run."""
    latest = path.parent / "latest.txt"
    if not path.name.isdecimal() or not latest.is_file():
        return True
    step = common.read_text(latest, MAX_LATEST_BYTES).strip()
    return step.isdecimal() and int(path.name) <= int(step)


def stored_files(root: Path) -> list[str]:
    """Every safetensors file below model/, relative to the step directory; links are followed."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, inside, names in os.walk(root / "model", followlinks=True):
        status = os.stat(folder)
        # A link to a directory above would lead there again and again.
        if (status.st_dev, status.st_ino) in seen:
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.endswith(".safetensors")
        ]
    return sorted(found)


def topology(root: Path, options: Options) -> tuple[Mesh, dict[str, int]]:
    """The mesh and the stages that the file names tell; files of more than one mesh are refused."""
    sizes: dict[tuple[int, int], str] = {}
    stages: dict[str, int] = {}
    files = stored_files(root)
    for file in files:
        match = FILE_NAME.fullmatch(os.path.basename(file))
        if match is None:
            raise CheckpointError(
                f"`{root / file}`: not the name of a file that Nanotron writes for a dense model"
            )
        if match[1] is None:
            continue
        sizes.setdefault((int(match[2]), int(match[4])), file)
        stages.setdefault(block_of(file), int(match[1]))
    if len(sizes) != 1:
        shown = " and ".join(f"`{file}`" for file in sizes.values()) or "no sharded file"
        raise CheckpointError(
            f"`{root}`: {shown}: expected files of one topology; remove the stale ones"
        )
    if "embedding" not in stages:
        raise CheckpointError(f"`{root}`: no file of {MODULES['embedding']} is there")
    (pp, tp), file = next(iter(sizes.items()))
    # A layout takes memory for each rank that a name speaks of.
    if max(pp, tp) > len(files):
        raise CheckpointError(
            f"`{root / file}`: is one of tp={tp} pp={pp}, but there are {len(files)} files; "
            "complete the download"
        )
    asked = options.mesh
    if asked and (asked.tp, asked.pp) != (tp, pp):
        raise CheckpointError(
            f"`{root}`: holds tp={tp} pp={pp} (`{file}`), "
            f"but the source is tp={asked.tp} pp={asked.pp}"
        )
    return Mesh(tp=tp, pp=pp, dp=asked.dp if asked else 1), stages


def block_of(file: str) -> str:
    """The pipeline block of a file's path."""
    parts = file.split("/")
    modules = {
        "token_position_embeddings": "embedding",
        "final_layer_norm": "norm",
        "lm_head": "output",
    }
    name = parts[2] if len(parts) > 3 else ""
    return parts[3] if name == "decoder" else modules.get(name, name)


def only_entry(path: Path) -> containers.Entry:
    """The one tensor of a file."""
    entries = containers.index("safetensors", path.parent, path.name).entries
    if list(entries) != [KEY]:
        raise CheckpointError(f"`{path}`: holds {sorted(entries)[:3]}, expected one tensor `{KEY}`")
    return entries[KEY]


def check_files(root: Path, found: Layout, mesh: Mesh) -> None:
    """Refuse a directory that lacks a file of its topology, or has one that does not belong."""
    stored, expected = set(stored_files(root)), set(found.files)
    if missing := sorted(expected - stored):
        raise CheckpointError(
            f"`{root / missing[0]}` is missing: {len(missing)} of {len(expected)} files of "
            f"tp={mesh.tp} pp={mesh.pp}"
        )
    if stale := sorted(stored - expected):
        raise CheckpointError(
            f"`{root / stale[0]}` does not belong to this model at tp={mesh.tp} pp={mesh.pp} "
            f"({len(stale)} such files); is it a leftover of another run?"
        )
