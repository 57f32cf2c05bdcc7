"""YAML that nobody vouches for: keys, lists and plain values, and of OmegaConf two kinds of `${}`.

A text is looked at token by token before anything is built of it. What OmegaConf makes of it is
looked at before anything is resolved: `${oc.env:NAME}`, `${oc.env:NAME,default}` and references to
other keys are resolved, and no other resolver is called, whatever the process has registered.
"""

import contextlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import yaml  # type: ignore[import-untyped]  # it ships no types
from omegaconf import DictConfig, OmegaConf

from reshard.containers import shown
from reshard.errors import ConfigError, ReshardError, first_line
from reshard.families.model import Json
from reshard.formats import common

MAX_BYTES = 1 << 20
MAX_TOKENS = 1 << 14
MAX_DEPTH = 16
MAX_TEXT = 4096  # of one value: a path is the longest
MAX_REFERENCES = 8  # each may double what another leads to
MAX_FROM_ENVIRONMENT = 64
FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:[A-Za-z_]\w*(,[^${}\\]*)?\}", re.ASCII)
REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w.-]*\}", re.ASCII)
NAMED = re.compile(r"\$\{([^:{}$]{1,40}):")
UNPRINTED = ("Cc", "Cf", "Cs")  # control, marks of direction and the like, half a pair
REFUSED = {
    yaml.TagToken: "a tag",
    yaml.AnchorToken: "an anchor",
    yaml.AliasToken: "an alias",
    yaml.DirectiveToken: "a directive",
}
OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn the errors of OmegaConf and of the YAML parser below it into one line."""
    try:
        yield
    except (ReshardError, MemoryError):
        raise
    except Exception as error:  # the YAML parser's errors have no base that OmegaConf shares
        raise ConfigError(f"`{name}`: not readable as YAML: {first_line(error)}") from None


def read(path: Path) -> dict[str, Json]:
    """A YAML file as plain data."""
    return parse(common.read_text(path, MAX_BYTES), str(path))


def parse(text: str, name: str) -> dict[str, Json]:
    """A YAML text as plain data; `name` is for messages."""
    with readable(name):
        _require_plain(text, name)
        return container(OmegaConf.create(text), name)


def dotlist(items: Sequence[str], name: str) -> DictConfig:
    """KEY=VALUE items as a tree, their values read as YAML."""
    with readable(name):
        for item in items:
            _require_plain(item.partition("=")[2], name)
        return OmegaConf.from_dotlist(list(items))


def container(value: object, name: str) -> dict[str, Json]:
    """An OmegaConf node as plain data; anything but keys and values is refused."""
    if not isinstance(value, DictConfig):
        raise ConfigError(f"`{name}`: expected keys and values")
    with readable(name):
        texts = list(_texts(OmegaConf.to_container(value, resolve=False)))
        _require_known(texts, name)
        found = OmegaConf.to_container(value, resolve=True)
    # OmegaConf would resolve again what a variable or an escaped `$` gave.
    left = next((text for text in _texts(found) if "${" in text), None)
    if left is not None:
        raise ConfigError(f"`{name}`: `{shown(left)}` is left of what was resolved; write no `${{`")
    return cast(dict[str, Json], found)


def _require_plain(text: str, name: str) -> None:
    """Refuse tags, anchors, directives and what is too large or too deep, before it is built."""
    depth = 0
    for number, token in enumerate(yaml.scan(text)):
        for kind, what in REFUSED.items():
            if isinstance(token, kind):
                line = token.start_mark.line + 1
                raise ConfigError(
                    f"`{name}`: line {line} has {what}, which is not allowed; write the value out"
                )
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > MAX_DEPTH:
            raise ConfigError(f"`{name}`: is nested deeper than {MAX_DEPTH} levels")
        if number >= MAX_TOKENS:
            raise ConfigError(f"`{name}`: is longer than any configuration")
        if isinstance(token, yaml.ScalarToken) and len(token.value) > MAX_TEXT:
            raise ConfigError(
                f"`{name}`: line {token.start_mark.line + 1} has a value of {len(token.value)} "
                f"characters, expected {MAX_TEXT} at most"
            )


def _texts(value: object) -> Iterator[str]:
    """Every text in a tree, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _require_known(texts: Sequence[str], name: str) -> None:
    """Refuse text that cannot be printed, and any `${}` but variables and a few references."""
    references = variables = 0
    for text in texts:
        if any(unicodedata.category(character) in UNPRINTED for character in text):
            raise ConfigError(f"`{name}`: `{shown(text)}` has characters that cannot be printed")
        rest, from_environment = FROM_ENVIRONMENT.subn("", text)
        rest, to_keys = REFERENCE.subn("", rest)
        variables, references = variables + from_environment, references + to_keys
        if "${" in rest or (len(text) > MAX_TEXT and rest != text):
            named = NAMED.search(rest)
            what = f"the resolver `{named[1]}` of" if named else "what is asked for in"
            raise ConfigError(
                f"`{name}`: {what} `{shown(text)}` is not allowed; "
                "use ${oc.env:NAME}, ${oc.env:NAME,default} or ${another.key}"
            )
    if references > MAX_REFERENCES or variables > MAX_FROM_ENVIRONMENT:
        raise ConfigError(
            f"`{name}`: has {references} references to keys and {variables} to the environment, "
            f"expected {MAX_REFERENCES} and {MAX_FROM_ENVIRONMENT} at most"
        )


def written(tree: Mapping[str, Json]) -> str:
    """Plain data as a YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(tree)))
