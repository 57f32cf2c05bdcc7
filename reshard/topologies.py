"""What a name on the command line stands for: shipped topologies and models, files, directories."""

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from reshard import formats
from reshard.errors import ConfigError, ReshardError
from reshard.families import Model
from reshard.families.model import Json, from_hf
from reshard.formats import common

AXES = ("tp", "pp", "dp")


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
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(known)}"


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn the errors of OmegaConf and of the YAML parser below it into one line."""
    try:
        yield
    except ReshardError:
        raise
    except Exception as error:  # the YAML parser's errors have no base that OmegaConf shares
        raise ConfigError(f"`{name}`: not readable as YAML: {first_line(error)}") from None


def read_yaml(path: Path) -> dict[str, Json]:
    """A YAML file as plain data."""
    text = common.read_text(path)
    with readable(str(path)):
        return container(OmegaConf.create(text), str(path))


def container(value: object, name: str) -> dict[str, Json]:
    """An OmegaConf node as plain data; anything but keys and values is refused."""
    if not isinstance(value, DictConfig):
        raise ConfigError(f"`{name}`: expected keys and values")
    return cast(dict[str, Json], OmegaConf.to_container(value, resolve=True))


def first_line(error: Exception) -> str:
    """The first line of an error of another library."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def resolve(spec: Json, side: str) -> dict[str, Json]:
    """What a SPEC stands for: a directory, a YAML file, or a topology's name."""
    if not isinstance(spec, str):
        raise ConfigError(f"{side}.topology: {spec!r} is not a name")
    path = Path(spec)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read_yaml(path)
    own = shipped() / f"{spec}.yaml"
    if re.fullmatch(r"[\w.-]+", spec) and own.is_file():
        return container(OmegaConf.create(own.read_text(encoding="utf-8")), spec)
    if (like := numbered(spec)) is not None:
        return like
    if path.is_dir():
        if side == "dst":
            raise ConfigError(
                f"--dst {spec}: a directory is not a target; name a topology, "
                f"and give dst.path={spec}"
            )
        return {"path": spec}
    if "/" in spec or path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"--{side} {spec}: no such directory or file")
    raise ConfigError(f"--{side}: topology `{spec}` is not known: {near(spec, topology_names())}")


def numbered(name: str) -> dict[str, Json] | None:
    """The topology of a name like `meta3` or `tp3pp2`: of the same kind as one that has a file."""
    parts = re.findall(r"([a-z]+)(\d{1,6})", name)
    if not parts or "".join(word + number for word, number in parts) != name:
        return None
    if any(int(number) < 1 for _, number in parts):
        raise ConfigError(f"topology `{name}`: sizes begin at 1")
    words = [word for word, _ in parts]
    if len(set(words)) != len(words):
        return None
    on_axes = set(words) <= set(AXES)
    pattern = re.compile(r"tp\d+" if on_axes else rf"{words[0]}\d+")
    like = next((known for known in topology_names() if pattern.fullmatch(known)), None)
    if like is None or not (on_axes or len(words) == 1):
        return None
    tree = container(
        OmegaConf.create((shipped() / f"{like}.yaml").read_text(encoding="utf-8")), like
    )
    if on_axes:
        return {**tree, "mesh": {word: int(number) for word, number in parts}}
    mesh = tree["mesh"]
    return {**tree, "mesh": dict.fromkeys(mesh, int(parts[0][1])) if isinstance(mesh, dict) else {}}


def read_model(spec: str) -> Model:
    """A model by its name in configs/models/, or by the path of a config.json."""
    path = Path(spec)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return formats.read_model(path)
    own = shipped() / "models" / f"{spec}.yaml"
    if re.fullmatch(r"[\w.-]+", spec) and own.is_file():
        return from_hf(container(OmegaConf.create(own.read_text(encoding="utf-8")), spec), spec)
    raise ConfigError(
        f"src.model: `{spec}` is neither a file nor a known model: {near(spec, model_names())}"
    )
