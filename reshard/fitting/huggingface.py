"""transformers with a device_map: whole layers on each GPU, one after the other."""

import json
from collections.abc import Mapping

from reshard.errors import ConfigError, LayoutError
from reshard.families.model import ModelConfig
from reshard.fitting import devicemap
from reshard.fitting.case import Wish
from reshard.fitting.devicemap import MIB, Place, Placed
from reshard.fitting.gpus import Gpus
from reshard.fitting.memory import ALLOWANCE, kv_bytes
from reshard.fitting.moving import already, checked, moved, where
from reshard.fitting.rows import FallenOut, Figure, Row, Section, about, gib
from reshard.fitting.subject import Subject, laid_out
from reshard.formats.options import Options

NAME = "hf"
PLACES_SHOWN = 12


def section(subject: Subject, gpus: Gpus, wish: Wish) -> Section:
    """The device_map on the GPUs of one node, and whether it fits."""
    title = "HUGGING FACE transformers, device_map by accelerate"
    node = ("one node only: a device_map does not cross nodes",) if gpus.nodes > 1 else ()
    try:
        row = _row(subject, gpus, wish)
    except (LayoutError, ConfigError) as error:
        return Section("huggingface", title, node, (), (FallenOut(NAME, str(error)),))
    if isinstance(row, FallenOut):
        return Section("huggingface", title, node, (), (row,))
    return Section("huggingface", title, node, (row,))


def _row(subject: Subject, gpus: Gpus, wish: Wish) -> Row | FallenOut:
    """The map, checked: what is on each GPU is within its memory less the allowance."""
    root, most = devicemap.skeleton(subject.parameters, subject.model), gpus.memory - ALLOWANCE
    placed = devicemap.device_map(root, gpus.per_node, most)
    held = devicemap.held_by(root, placed.places)
    if over := [at for at, size in held.items() if not isinstance(at, int) or size > most]:
        what = f"{gib(sum(held[place] for place in over))} of {gib(subject.nbytes)} find no place"
        where_not = gpus.spec(1, gpus.per_node)
        return FallenOut(NAME, f"{what} on {where_not}; on the disk it would crawl")
    tokens = None
    if subject.known is not None:
        tokens = _tokens(subject.known, placed.places, held, most)
        if (why := _unserved(subject.known, wish, tokens)) is not None:
            return FallenOut(NAME, why)
    return _fitting(subject, gpus, placed, held, tokens)


def _unserved(model: ModelConfig, wish: Wish, tokens: int) -> str | None:
    """Why a map with room for `tokens` of KV cache does not serve, None where it does."""
    if (why := wish.beyond(model)) is not None:
        return f"{why}; transformers warns of more, and what it then writes is of no use"
    if wish.served(tokens) is None:
        short = f"KV cache for {about(tokens)} tokens only, asked for {wish.tokens:,}"
        return f"all weights have a place, but {short}"
    return None


def _fitting(
    subject: Subject, gpus: Gpus, placed: Placed, held: Mapping[Place, int], tokens: int | None
) -> Row:
    """A map that fits, and the line that loads the model so."""
    room = "" if tokens is None else f"; KV cache for {about(tokens)} tokens"
    allowed = gib(gpus.memory - ALLOWANCE)
    made, used = laid_out(subject, NAME, Options()), len(held)
    load = _loading(where(subject, made, NAME), subject.dtype, placed)
    figures: dict[str, Figure] = {
        "device_map": dict(placed.places),
        "max_memory_bytes": list(placed.caps[: max(placed.used) + 1]),
        "held_bytes": {str(place): nbytes for place, nbytes in held.items()},
        "kv_tokens": tokens,
    }
    return Row(
        name=f"hf, device_map {gpus.on(used)}",
        target=NAME,
        gpus=used,
        fits=True,
        said=(
            f"checked: {gib(max(held.values()))} on the fullest, {allowed} allowed{room}",
            *_places(placed.places, held),
            *already(subject, made),
        ),
        commands=(*moved(subject, gpus, made, NAME), load),
        check=checked(subject, made, NAME),
        figures=figures,
    )


def _places(places: Mapping[str, Place], held: Mapping[Place, int]) -> list[str]:
    """A line per GPU, up to some."""
    names = devicemap.condensed(places)
    lines = [f"cuda:{place}: {', '.join(names[place])}: {gib(held[place])}" for place in names]
    more = len(lines) - PLACES_SHOWN
    rest = [f"... and {more} more GPUs (--json has all)"] if more > 0 else []
    return [*lines[:PLACES_SHOWN], *rest]


def _tokens(
    model: ModelConfig, places: Mapping[str, Place], held: Mapping[Place, int], most: int
) -> int:
    """Tokens of KV cache for which the tightest GPU has room: keys and values lie with layers."""
    layers: dict[Place, int] = {}
    for number in range(model.layers):
        place = devicemap.place_of(f"model.layers.{number}.", places)
        layers[place] = layers.get(place, 0) + 1
    return min((most - held[place]) // (count * kv_bytes(model)) for place, count in layers.items())


def _loading(folder: str, dtype: str, placed: Placed) -> tuple[str, ...]:
    """The line of Python that loads it so, in parts between which it may be broken."""
    sizes = [f"{cap // MIB}MiB" for cap in placed.caps[: max(placed.used) + 1]]
    first, last, end = sizes[0], sizes[-1], len(sizes) - 1
    memory = f'dict.fromkeys(range({len(sizes)}), "{first}")'
    if first != last:
        memory = f'{{**dict.fromkeys(range({end}), "{first}"), {end}: "{last}"}}'
    return (
        f"AutoModelForCausalLM.from_pretrained({json.dumps(folder)},",
        f'device_map="{placed.how}",',
        f'dtype="{dtype}",',
        f"max_memory={memory})",
    )
