"""What the formats in torch.distributed.checkpoint's directories share.

Where the directory is, which of its items are the weights and what the others are, and the
`.metadata` of a new one.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from reshard.containers import Skeleton, dcpmetadata
from reshard.containers.dcpmetadata import Described, Directory, Item
from reshard.errors import CheckpointError, LayoutError
from reshard.formats.options import Chunks, Mesh
from reshard.formats.weights import plain_name, refuse_foreign
from reshard.geometry import Region
from reshard.layout import Layout, Parameter, Slot
from reshard.placement import Boxes, Cut, Placement

CONTAINER = "dcpfile"
FILE = "__{shard}_0.distcp"
METADATA = ".metadata"
ACCELERATE = "pytorch_model_fsdp_0"
WRAPPER = "model"
WRAPPERS = (WRAPPER, "state_dict", "model_state_dict")  # the dicts that trainers put weights in
MARK = "tok_embeddings.weight"  # of a model under the names of Meta and TorchTitan
OTHER_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")  # beside which nothing deeper is looked for
DEPTH = 3  # llama-recipes: fine-tuned-<organisation>/<model> below the folder that it was given
LEFT_BEHIND = {
    "optim": "optimizer states",
    "optimizer": "optimizer states",
    "optimizer_state": "optimizer states",
    "lr_scheduler": "learning-rate scheduler",
    "scheduler": "learning-rate scheduler",
    "dataloader": "data loader state",
    "train_state": "training counters",
    "rng": "random states",
    "rng_state": "random states",
}


def steps(path: Path) -> list[tuple[int, Path]]:
    """The complete steps of a run's checkpoint folder, in order."""
    found = []
    for folder in path.iterdir() if path.is_dir() else ():
        match = re.fullmatch(r"step-(\d{1,18})", folder.name)
        if match and (folder / METADATA).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def folder_of(path: Path) -> Path | None:
    """The DCP directory that `path` is or leads to; None where there is none."""
    found = _candidates(path)
    if len(found) > 1:
        raise CheckpointError(
            f"`{path}`: holds {len(found)} DCP directories, first `{found[0]}` and `{found[1]}`; "
            "name one of them"
        )
    return found[0] if found else None


def _candidates(path: Path) -> list[Path]:
    """The DCP directories that `path` may stand for.

    `path` may be what accelerate or the HF Trainer saved, a TorchTitan run's folder (its newest
    complete step is taken), or a folder with one such directory deeper inside, as llama-recipes
    makes it. One whose `.metadata` was lost is one all the same.
    """
    for folder in (path, path / ACCELERATE):
        if (folder / METADATA).is_file():
            return [folder]
    if found := steps(path):
        return [found[-1][1]]
    if any(path.glob("*.distcp")) or any(path.glob("__*.metadata")):
        return [path]
    if any(next(path.glob(f"*{suffix}"), None) for suffix in OTHER_WEIGHTS):
        return []
    return [
        file.parent
        for depth in range(1, DEPTH + 1)
        for file in sorted(path.glob("*/" * depth + METADATA))
        if not file.parent.name.startswith("optimizer") and ".partial-" not in str(file)
    ]


def surroundings(path: Path, root: Path) -> tuple[Path, ...]:
    """Where the config and the tokenizer of weights in `root` may lie, which `path` led to."""
    outside = (root.parent,) if root != path or root.name == ACCELERATE else ()
    return tuple(dict.fromkeys((root, *outside, path)))


def beside(root: Path) -> tuple[str, ...]:
    """What lies beside a directory of accelerate's, and is not moved."""
    optimizer = root.name == ACCELERATE and any(root.parent.glob("optimizer*"))
    return (LEFT_BEHIND["optimizer"],) if optimizer else ()


def mesh_note(asked: Mesh | None, found: int) -> tuple[str, ...]:
    """A line for a source whose topology names another mesh than its files."""
    if asked is None or asked.dp * asked.tp == found:
        return ()
    return (f"{found} files hold weights: a DCP source is read as it is, whatever its topology",)


def is_titan(path: Path) -> bool | None:
    """Whether `path` leads to TorchTitan's names or to Hugging Face's; None: to no DCP at all."""
    found = _candidates(path)
    if not found:
        return None
    if not (found[0] / METADATA).is_file():
        return False
    stored, _ = weights_in(dcpmetadata.read(found[0]))
    return any(bare(name).endswith(MARK) for name in stored)


def bare(name: str) -> str:
    """The name of a weight without wrappers, that of the dict around all weights included."""
    return plain_name(name).removeprefix(f"{WRAPPER}.")


def weights_in(directory: Directory) -> tuple[dict[str, str], tuple[str, ...]]:
    """The keys of the weights by their name inside the dict around them; and what else there is.

    The directory's own record tells a dict called `model` from `model.` in a module's name; where
    there is none, only names of known families can.
    """
    inner = (f"{WRAPPER}.{WRAPPER}.", f"{WRAPPER}.lm_head.", f"{WRAPPER}.{MARK}")
    unsaid = not directory.paths and any(key.startswith(inner) for key in directory.tensors)
    around = {
        key: _around(directory, key, unsaid=unsaid)
        for key in [*directory.tensors, *directory.others]
    }
    dicts = {
        path
        for path in around.values()
        if path and path[-1] in WRAPPERS and not LEFT_BEHIND.keys() & path
    }
    if len(dicts) > 1:
        raise CheckpointError(
            f"`{METADATA}`: weights are in {len(dicts)} dicts, "
            f"{', '.join(f'`{name}`' for name in sorted(map('.'.join, dicts)))}; save one alone"
        )
    wrapper = next(iter(dicts), ())
    found: dict[str, str] = {}
    left: dict[str, None] = {}
    for key, path in around.items():
        if path == wrapper and key in directory.tensors:
            found[key.removeprefix(".".join((*wrapper, "")) if wrapper else "")] = key
        elif not wrapper and path and path[0] not in LEFT_BEHIND and key in directory.tensors:
            raise CheckpointError(
                f"`{METADATA}`: tensor `{key}` is in a dict `{path[0]}`, expected in one called "
                f"{' or '.join(WRAPPERS)}, or in none; save the weights alone"
            )
        else:
            named = next((LEFT_BEHIND[part] for part in path if part in LEFT_BEHIND), None)
            left[named or f"`{'.'.join(path) or key}`"] = None
    return found, tuple(sorted(left))


def _around(directory: Directory, key: str, *, unsaid: bool) -> tuple[str, ...]:
    """The names of the dicts that a key is in, up to that of the weights where it is in one.

    `unsaid`: there is no record, but all weights begin with `model.`.
    """
    path = tuple(map(str, directory.paths.get(key, ())[:-1]))
    if not path:
        first = key.partition(".")[0]
        return (first,) if first in LEFT_BEHIND or (unsaid and first == WRAPPER) else ()
    depth = next((number for number, part in enumerate(path) if part in WRAPPERS), len(path))
    return path[: depth + 1]


def require_said(root: Path, directory: Directory) -> None:
    """Refuse names that may or may not have a dict's in front, for a family that is not known."""
    if not directory.paths and all(key.startswith(f"{WRAPPER}.") for key in directory.tensors):
        raise CheckpointError(
            f"`{root}`: nothing says whether `{WRAPPER}.` is a part of the names or a dict around "
            "them; save the checkpoint again with torch's own planner"
        )


def foreign_to(keys: Collection[str]) -> Callable[[str], bool]:
    """Whether an item of a file is of another tensor than those with `keys`."""
    return lambda item: item.rpartition("[")[0] not in keys


def led_to(path: Path, root: Path) -> tuple[str, ...]:
    """A line on the directory that a path stands for."""
    return () if root == path else (f"`{root.relative_to(path)}` is taken",)


@dataclass(frozen=True, slots=True)
class Opened:
    """A directory with weights: their `keys` by name inside the dict around them, and what else."""

    root: Path
    directory: Directory
    keys: Mapping[str, str]
    left: tuple[str, ...]


def opened(path: Path, expected: str) -> Opened:
    """The directory that `path` leads to; one without weights, or with LoRA's, is refused.

    `expected` says what should be there, for the message.
    """
    root = folder_of(path)
    if root is None:
        raise CheckpointError(f"`{path}`: holds {expected}")
    directory = dcpmetadata.read(root)
    keys, left = weights_in(directory)
    if not keys:
        raise CheckpointError(
            f"`{root}`: holds no weights, only {', '.join(left) or 'nothing'}; "
            "name the directory of the model"
        )
    refuse_foreign(keys, str(root))
    return Opened(root, directory, keys, left)


def chunks_of(directory: Directory, keys: Mapping[str, str]) -> dict[str, Chunks]:
    """What the directory holds of each tensor in `keys` (key by name), whose boxes must tile it.

    A mesh coordinate is a file that holds any of them.
    """
    files = sorted({file for key in keys.values() for file in directory.tensors[key].files})
    place = {file: number for number, file in enumerate(files)}
    spreads: dict[tuple[str, ...], tuple[tuple[str, int], ...]] = {}
    cuts: dict[tuple[Region, ...], Cut | Boxes] = {}
    found = {}
    for name, key in keys.items():
        tensor = directory.tensors[key]
        dcpmetadata.require_tiled(key, tensor)
        if tensor.files not in spreads:
            spreads[tensor.files] = tuple((file, place[file]) for file in tensor.files)
        if tensor.boxes not in cuts:
            cuts[tensor.boxes] = _cut(tensor.boxes, tensor.shape)
        found[name] = Chunks(
            key, tensor.dtype, tensor.shape, cuts[tensor.boxes], spreads[tensor.files]
        )
    return found


def _cut(boxes: tuple[Region, ...], shape: tuple[int, ...]) -> Cut | Boxes:
    """Boxes in ascending order as a regular cut of dim 0 where they are one."""
    if not shape:
        return Cut(0, 1, 1)
    step = boxes[0].shape[0] if boxes else 1
    regular = Cut(0, shape[0], max(step, 1), parts=len(boxes))
    if all(regular.box(shard, shape) == box for shard, box in enumerate(boxes)):
        return regular
    return Boxes(boxes)


def coordinates(slots: Sequence[Slot]) -> int:
    """How many coordinates the slots of an existing directory lie on."""
    return 1 + max((place for slot in slots for _, place in slot.spread), default=0)


def place(parameter: Parameter, cut: Cut | Boxes) -> Placement:
    """A parameter cut as its stored tensor is; one without dims is held as one with one element."""
    if not parameter.shape:
        return Placement((1,), cut, stored=())
    return Placement(parameter.shape, cut)


def existing(chunks: Chunks, parameter: Parameter, placement: Placement) -> Slot:
    """The slot of a parameter that a directory holds; its stored shape must be the expected one."""
    expected = () if placement.stored == () else placement.whole or placement.shape
    if chunks.shape != expected:
        raise LayoutError(
            f"tensor `{chunks.key}` is {list(chunks.shape)}, but the config makes it "
            f"{list(expected)}"
        )
    return Slot(
        parameter.name,
        placement,
        FILE,
        chunks.key,
        chunks.dtype,
        boxed=True,
        spread=chunks.spread,
    )


def metadata(
    layout: Layout, skeleton: Callable[[str], Skeleton], wrapper: str | None
) -> Mapping[str, Iterator[bytes]]:
    """The `.metadata` of a new directory, in pieces; `wrapper` is a dict that keys begin with."""
    tensors = [
        Described(
            slot.key, slot.dtype, _stored_whole(slot), _path(slot.key, wrapper), _held(slot)[0]
        )
        for slot in layout.slots
    ]
    return {METADATA: dcpmetadata.write(tensors, _items(layout, skeleton))}


def _path(key: str, wrapper: str | None) -> tuple[str, ...]:
    """Where a key stands in the nested dicts that are saved."""
    return (key,) if wrapper is None else (wrapper, key.removeprefix(f"{wrapper}."))


def _stored_whole(slot: Slot) -> tuple[int, ...]:
    """The shape of a slot's tensor over all shards."""
    return () if slot.placement.stored == () else slot.placement.whole or slot.placement.shape


def _held(slot: Slot) -> tuple[tuple[Region, ...], Mapping[int, int]]:
    """The boxes of a slot that are not empty, and the place among them of each shard."""
    if slot.placement.stored == ():
        return (Region((), ()),), {0: 0}
    return _held_by(slot.placement.cut, _stored_whole(slot))


@lru_cache(maxsize=64)
def _held_by(
    cut: Cut | Boxes, shape: tuple[int, ...]
) -> tuple[tuple[Region, ...], Mapping[int, int]]:
    held = [shard for shard in range(cut.parts) if cut.box(shard, shape).numel]
    boxes = tuple(cut.box(shard, shape) for shard in held)
    return boxes, {shard: number for number, shard in enumerate(held)}


def _items(layout: Layout, skeleton: Callable[[str], Skeleton]) -> Iterator[Item]:
    """Every item of every file, with its place among the boxes of its tensor."""
    for file in layout.files:
        items = skeleton(file).items
        for slot, shard in layout.members(file):
            boxes, numbers = _held(slot)
            if shard in numbers:
                number = numbers[shard]
                yield Item(slot.key, boxes[number].start, number, file, *items[slot.key_of(shard)])
