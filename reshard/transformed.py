"""What transformers makes of a Hugging Face directory, where it is installed; without weights."""

import contextlib
import importlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from reshard import containers
from reshard.errors import VerifyError, first_line
from reshard.families.model import ModelConfig
from reshard.formats import common
from reshard.formats.options import Scan

PACKAGE = "transformers"
AUTOMATIC = "AutoModelForCausalLM"
OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def check(scan: Scan) -> list[str]:
    """Have transformers read config and tokenizer, and name the tensors of the model.

    One line on what was tried; a VerifyError where its names or shapes are not those of the files.
    """
    try:
        transformers: Any = importlib.import_module(PACKAGE)
    except ImportError:
        return [f"config and tokenizer were not tried: pip install {PACKAGE}"]
    if not (scan.root / common.CONFIG).is_file():
        return [f"{PACKAGE} was not tried: no {common.CONFIG}"]
    with _attempting(f"cannot read {common.CONFIG}"):
        config = transformers.AutoConfig.from_pretrained(str(scan.root), **OFFLINE)
    tried = [type(config).__name__]
    # Of other families transformers may rename tensors as it loads them.
    if isinstance(scan.model, ModelConfig):
        tried.append(_check_names(transformers, config, scan))
    if any((scan.root / name).is_file() for name in common.TOKENIZERS):
        with _attempting("cannot read the tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(scan.root), **OFFLINE)
        tried.append(type(tokenizer).__name__)
    return [f"loaded: {', '.join(tried)} by {PACKAGE} {version(PACKAGE)}"]


@contextlib.contextmanager
def _attempting(what: str) -> Iterator[None]:
    """Turn whatever transformers raises into one line."""
    try:
        yield
    except Exception as error:
        raise VerifyError(f"{PACKAGE} {what}: {first_line(error)}") from None


def _check_names(transformers: Any, config: Any, scan: Scan) -> str:  # noqa: ANN401
    """Compare the names and shapes of the model on the meta device with those of the files."""
    named, made = _class(transformers, getattr(config, "architectures", None))
    with _attempting(f"cannot make a {named} of {common.CONFIG}"), torch.device("meta"):
        model = made(config)
        model.tie_weights()
    stored = {
        key: entry.shape
        for file in scan.layout.files
        for key, entry in containers.index(scan.layout.container, scan.root, file).entries.items()
        if not scan.ignored(key)
    }
    held = model.state_dict(keep_vars=True)
    present = {id(tensor) for key, tensor in held.items() if key in stored}
    for key in sorted({**held, **stored}):
        if key not in stored and id(held[key]) in present:
            continue  # tied: another name of the same tensor is there
        ours, theirs = stored.get(key), tuple(held[key].shape) if key in held else None
        if ours != theirs:
            raise VerifyError(
                f"{PACKAGE}: {named} has `{key}` as {_shape(theirs)}, the files as {_shape(ours)}"
            )
    return f"{named} with {len(stored)} names"


def _class(transformers: Any, names: object) -> tuple[str, Any]:  # noqa: ANN401
    """What makes the model that a config names first, or the usual one where it names none."""
    if not names:
        return AUTOMATIC, getattr(transformers, AUTOMATIC).from_config
    named = names[0] if isinstance(names, list) else names
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise VerifyError(
            f"{PACKAGE} has no model `{containers.shown(str(named))}`, which {common.CONFIG} names"
        )
    return str(named), found


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
