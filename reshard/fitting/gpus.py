"""GPUs as they are named on the command line, and the memory that a program has on each.

The table has what CUDA or HIP gives to a program, less than the data sheet says: PyTorch's
out-of-memory messages in public issues name it ("GPU 0 has a total capacity of 79.10 GiB").
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from reshard.config import parse_size
from reshard.containers import shown
from reshard.errors import ConfigError
from reshard.topologies import near

GIB = 1 << 30
MAX_NODES, MAX_GPUS, MAX_GIB = 512, 4096, 4096
# GiB, the least that was seen where drivers differ; nvidia-smi says 81559 MiB of an H100, 46068 of
# an L40 or A40 (with ECC), 23034 of an L4, 183359 of a B200. The last three are nominal.
CAPACITY: Mapping[str, float] = {
    "B200": 178.35,
    "H200": 139.72,
    "H100": 79.1,
    "H20": 95.0,
    "GH200": 94.5,
    "A100": 79.14,
    "A100-40": 39.38,
    "A40": 44.34,
    "L40": 44.39,
    "L40S": 44.39,
    "L20": 44.39,
    "L4": 22.03,
    "A10": 21.98,
    "A6000": 47.4,
    "RTX6000Ada": 47.4,
    "RTXPRO6000": 94.96,
    "RTX5090": 31.36,
    "RTX4090": 23.52,
    "RTX3090": 23.56,
    "V100": 15.77,
    "V100-32": 31.73,
    "T4": 14.56,
    "MI300X": 191.69,
    "H100NVL": 93.09,
    "MI325X": 238.4,
    "B300": 268.2,
    "A30": 22.35,
}
ALIASES: Mapping[str, str] = {
    "H800": "H100",
    "H10080": "H100",
    "A800": "A100",
    "A10080": "A100",
    "H100NVL94": "H100NVL",
    "A10G": "A10",
    "RTXA6000": "A6000",
    "6000ADA": "RTX6000Ada",
    "PRO6000": "RTXPRO6000",
    "5090": "RTX5090",
    "4090": "RTX4090",
    "3090": "RTX3090",
    "V10016": "V100",
}
# Words around a GPU's name that say nothing of its memory.
IDLE = re.compile(r"NVIDIA|AMD|TESLA|GEFORCE|INSTINCT|SXM\d?|PCIE|HBM\d?E?", re.IGNORECASE)
SIZE = re.compile(r"[0-9.]+\s*[KMG]i?B", re.IGNORECASE)
SPEC = re.compile(r"(?:([0-9]{1,9})\s*[x×*]\s*)?(?:([0-9]{1,9})\s*[x×*]\s*)?(\S.*)", re.IGNORECASE)
FORM = "write 4xH100, 10x48GiB, or 2x8xH100 for two nodes"


@dataclass(frozen=True, slots=True)
class Gpus:
    """`nodes` machines of `per_node` GPUs, each with `memory` bytes that a program can have.

    `known` is whether the memory is that of the table, not as it was asked for.
    """

    name: str
    nodes: int
    per_node: int
    memory: int
    known: bool

    @property
    def count(self) -> int:
        """All of them."""
        return self.nodes * self.per_node

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.count * self.memory

    def spec(self, nodes: int, per_node: int) -> str:
        """How a number of them is written."""
        return f"{nodes}x{per_node}x{self.name}" if nodes > 1 else f"{per_node}x{self.name}"

    def on(self, count: int) -> str:
        """How many of them are used, in words."""
        if self.count == 1:
            return "on 1 GPU"
        return f"on {'all' if count == self.count else f'{count} of'} {self.count} GPUs"

    def __str__(self) -> str:
        return self.spec(self.nodes, self.per_node)


def parse(text: str) -> Gpus:
    """GPUs from `4xH100`, `10x48GiB`, `2x8xH100` (nodes first) or `H100`."""
    match = SPEC.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--gpus: `{shown(text)}` names no GPU; {FORM}")
    numbers = [int(number) for number in match.groups()[:2] if number is not None]
    nodes, per_node = (1, 1, *numbers)[-2:]
    if nodes < 1 or per_node < 1:
        raise ConfigError(f"--gpus: `{shown(text)}`: numbers begin at 1; {FORM}")
    if nodes > MAX_NODES or nodes * per_node > MAX_GPUS:
        raise ConfigError(
            f"--gpus: `{shown(text)}` is {nodes * per_node:,} GPUs in {nodes:,} node"
            f"{'s' if nodes > 1 else ''}, expected up to {MAX_GPUS:,} in {MAX_NODES}"
        )
    name, memory, known = _kind(match[3].strip())
    return Gpus(name, nodes, per_node, memory, known)


def _kind(word: str) -> tuple[str, int, bool]:
    """A GPU's name, its memory in bytes, and whether that is of the table."""
    if SIZE.fullmatch(word):
        memory = parse_size(word, "--gpus")
        if not GIB <= memory <= MAX_GIB * GIB:
            raise ConfigError(
                f"--gpus: `{shown(word)}` of memory per GPU, expected 1GiB to {MAX_GIB}GiB"
            )
        return word.replace(" ", ""), memory, False
    parts = [part for part in re.split(r"[\s_-]+", word) if part and not IDLE.fullmatch(part)]
    plain = "".join(re.sub(r"(?<=\d)GB?$", "", part, flags=re.I) for part in parts).upper()
    table = {_plain(name): name for name in CAPACITY} | dict(ALIASES)
    if plain not in table:
        raise ConfigError(
            f"--gpus: `{shown(word)}` is not in the table of GPUs: "
            f"{near(word.upper(), [*CAPACITY])}; or give the memory, like 4x80GiB"
        )
    name = table[plain]
    return name, int(CAPACITY[name] * GIB), True


def _plain(name: str) -> str:
    return name.replace("-", "").upper()
