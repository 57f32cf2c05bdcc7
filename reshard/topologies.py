"""What a name on the command line stands for: shipped topologies and models, files, directories."""

import difflib
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path

from reshard import formats, yamltext
from reshard.containers import shown
from reshard.errors import ConfigError
from reshard.families import Model
from reshard.families.model import Json, from_hf

AXES = ("tp", "pp", "dp")
MAX_WORD = 80


def shipped() -> Path:
    """The directory of the topologies that are shipped: in a wheel, or in the source tree."""
    packaged = Path(__file__).with_name("configs")
    return packaged if packaged.is_dir() else packaged.parents[1] / "configs"


def topology_names() -> list[str]:
    """The topologies that have a file of their own."""
    return sorted(item.stem for item in shipped().glob("*.yaml"))


def model_names() -> list[str]:
    """The models that come with the program."""
    return sorted(item.stem for item in (shipped() / "models").glob("*.yaml"))


def near(word: str, known: Sequence[str]) -> str:
    """A hint with the closest of the known words."""
    close = difflib.get_close_matches(word[:MAX_WORD], known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(known)}"


def resolve(spec: Json, side: str) -> dict[str, Json]:
    """What a SPEC stands for: a directory, a YAML file, or a topology's name.

    Names that no file can have are looked for too: `os.path` says no where `Path` raises.
    """
    if not isinstance(spec, str):
        raise ConfigError(f"{side}.topology: {reprlib.repr(spec)} is not a name")
    path = Path(spec)
    if path.suffix in (".yaml", ".yml") and os.path.isfile(path):
        return yamltext.read(path)
    own = shipped() / f"{spec}.yaml"
    if re.fullmatch(r"[\w.-]+", spec) and os.path.isfile(own):
        return yamltext.read(own)
    if (like := numbered(spec)) is not None:
        return like
    if os.path.isdir(path):
        if side == "dst":
            raise ConfigError(
                f"--dst {spec}: a directory is not a target; name a topology, "
                f"and give dst.path={spec}"
            )
        return {"path": spec}
    if "/" in spec or path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"--{side} {shown(spec)}: no such directory or file")
    raise ConfigError(
        f"--{side}: topology `{shown(spec)}` is not known: {near(spec, topology_names())}"
    )


def numbered(name: str) -> dict[str, Json] | None:
    """The topology of a name like `meta3` or `tp3pp2`: of the same kind as one that has a file."""
    parts = re.findall(r"([a-z]+)(\d{1,6})", name)
    if not parts or "".join(word + number for word, number in parts) != name:
        return None
    if any(int(number) < 1 for _, number in parts):
        raise ConfigError(f"topology `{shown(name)}`: sizes begin at 1")
    words = [word for word, _ in parts]
    if len(set(words)) != len(words):
        return None
    on_axes = set(words) <= set(AXES)
    pattern = re.compile(r"tp\d+" if on_axes else rf"{words[0]}\d+")
    like = next((known for known in topology_names() if pattern.fullmatch(known)), None)
    if like is None or not (on_axes or len(words) == 1):
        return None
    tree = yamltext.read(shipped() / f"{like}.yaml")
    if on_axes:
        return {**tree, "mesh": {word: int(number) for word, number in parts}}
    mesh = tree["mesh"]
    return {**tree, "mesh": dict.fromkeys(mesh, int(parts[0][1])) if isinstance(mesh, dict) else {}}


def read_model(spec: str) -> Model:
    """A model by its name in configs/models/, or by the path of a config.json."""
    path = Path(spec)
    if os.path.isdir(path):
        path = path / "config.json"
    if os.path.isfile(path):
        return formats.read_model(path)
    own = shipped() / "models" / f"{spec}.yaml"
    if re.fullmatch(r"[\w.-]+", spec) and os.path.isfile(own):
        return from_hf(yamltext.read(own), spec)
    raise ConfigError(
        f"src.model: `{shown(spec)}` is neither a file nor a known model: "
        f"{near(spec, model_names())}"
    )
