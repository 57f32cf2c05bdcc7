"""Which release of Llama a Meta directory holds.

Told by what params.json and the shapes say, by the directory's name, and by what the user says; the
reason of each guess is given.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from reshard.errors import ConfigError
from reshard.families import releases
from reshard.families.model import ModelConfig
from reshard.families.releases import RELEASES, VERSIONS, Release

# (width, layers) of Llama 3.2 1B and 3B, the only text releases whose rope factor is 32.
LLAMA_3_2 = {(2048, 16), (3072, 28)}
# Directories that Meta's downloads and Hugging Face's repositories put around the files.
PLAIN_FOLDERS = ("original", "mp8", "mp16")
INSTRUCT = re.compile(r"(^|[-_. ])(instruct|chat)($|[-_. ])", re.IGNORECASE)
VERSION = re.compile(r"(code)?llama[-_]?([123](?:\.[0-9])?)?(?=[-_]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Said:
    """What the user says; `names` are those of the directories."""

    version: str | None = None
    instruct: bool | None = None
    rope_factor: float | None = None
    names: tuple[str, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether the user says anything of the release."""
        return (self.version, self.instruct, self.rope_factor) != (None, None, None)


@dataclass(frozen=True, slots=True)
class Found:
    """A release, which variant of it, its rope factor, and a line on each assumption."""

    release: Release
    instruct: bool
    factor: float | None
    reasons: tuple[str, ...]

    def complete(self, model: ModelConfig) -> ModelConfig:
        """A config of the sizes, with all that follows from the release."""
        release = self.release
        ids = releases.known_ids(release, model.vocab)
        sampled = release.specials or self.instruct
        short = release.version == "code" and model.rope_theta != release.rope_thetas[0]
        return replace(
            model,
            rope_scaling=None
            if self.factor is None
            else {**releases.ROPE_SCALING, "factor": self.factor},
            max_positions=RELEASES["2"].positions if short else release.positions,
            bos=release.bos if ids else 1,
            eos=release.ends(self.instruct) if ids else 2,
            generation=dict(releases.SAMPLING) if sampled and ids else {},
            extras=dict(releases.EXTRAS),
        )


def names_of(folder: Path) -> tuple[str, ...]:
    """The names of a directory that may tell a release: its own, and that around `original`.

    Those of a link, and then those of what it leads to.
    """
    found: list[str] = []
    for path in (folder.absolute(), folder.resolve()):
        found.append(path.name)
        while path.name in PLAIN_FOLDERS:
            path = path.parent
            found.append(path.name)
    return tuple(dict.fromkeys(found))


def find(model: ModelConfig, said: Said, *, scaled: bool) -> Found:
    """The release of a model whose sizes, rotary base and epsilon are known.

    `scaled` is params.json's use_scaled_rope. What contradicts the files is a ConfigError.
    """
    release, why = _version(model, said, scaled)
    instruct, reason = _instruct(release, said)
    if said.rope_factor is not None and not scaled:
        raise ConfigError(
            f"src.rope_factor={said.rope_factor:g}: params.json says nothing of use_scaled_rope, "
            "so that there is nothing to scale; leave the key out"
        )
    factor = (said.rope_factor or release.factor) if scaled else None
    found = Found(release, instruct, factor, ())
    made = found.complete(model)
    reasons = [
        f"Llama {release.version} ({why}): max_position_embeddings {made.max_positions}, "
        f"bos {made.bos}, eos {made.eos}"
    ]
    reasons += [reason] if reason else []
    if factor is not None:
        asked = "as asked for" if said.rope_factor else f"as Llama {release.version} has"
        reasons.append(f"rope factor {factor:g} ({asked}; src.rope_factor=8|32 says otherwise)")
    return replace(found, reasons=tuple(reasons))


def _version(model: ModelConfig, said: Said, scaled: bool) -> tuple[Release, str]:
    """The release and the reason."""
    if said.version is not None:
        return _checked(RELEASES[said.version], model, scaled), "as asked for"
    fitting, why = _fitting(model, said, scaled)
    other = f"src.version={'|'.join(version for version in VERSIONS)} says otherwise"
    for name in said.names:
        match = VERSION.search(name)
        named = "code" if match and match[1] else match[2] if match else None
        if named in fitting:
            return RELEASES[named], f"by the name `{name}`; {other}"
    instruct = said.instruct or (said.instruct is None and _named_instruct(said) is not None)
    usable = [version for version in fitting if RELEASES[version].turns or not instruct]
    return RELEASES[usable[0]], f"by {why}; {other}"


def _fitting(model: ModelConfig, said: Said, scaled: bool) -> tuple[tuple[str, ...], str]:
    """The versions that fit, the likeliest first, and what they were told by."""
    theta = f"rope_theta {model.rope_theta:g}"
    if scaled:
        if (model.hidden, model.layers) in LLAMA_3_2:
            return ("3.2",), f"use_scaled_rope, {model.layers} layers of width {model.hidden}"
        if said.rope_factor == RELEASES["3.2"].factor:
            return ("3.2",), "use_scaled_rope and src.rope_factor=32"
        return ("3.1", "3.2", "3.3"), "use_scaled_rope"
    if model.rope_theta == releases.LLAMA_3_THETA or model.vocab >= releases.LLAMA_3_VOCABULARY:
        return ("3",), theta
    if model.rope_theta == RELEASES["code"].rope_thetas[0]:
        return ("code",), theta
    if model.vocab == releases.CODE_LLAMA_70B[1]:
        return ("code", "2"), f"{theta} and the vocabulary of {model.vocab}"
    sizes = f"{model.layers} layers of width {model.hidden}, norm_eps {model.norm_eps:g}"
    if releases.is_llama_1(model):
        return ("1", "2", "code"), f"{theta}, {sizes}"
    grouped = "grouped key-value heads" if model.kv_heads != model.heads else sizes
    return ("2", "1", "code"), f"{theta}, {grouped}"


def _checked(release: Release, model: ModelConfig, scaled: bool) -> Release:
    """A release that the user names; it must not contradict params.json."""
    version = f"src.version={release.version}"
    if scaled != (release.factor is not None):
        known = [name for name in VERSIONS if (RELEASES[name].factor is not None) == scaled]
        raise ConfigError(
            f"{version}: has {'no ' * (release.factor is None)}scaled rotary positions, but "
            f"params.json says use_scaled_rope {str(scaled).lower()}; use one of "
            f"{', '.join(known)}"
        )
    if model.rope_theta not in release.rope_thetas:
        expected = " or ".join(f"{theta:g}" for theta in release.rope_thetas)
        raise ConfigError(
            f"{version}: has rope_theta {expected}, but params.json says {model.rope_theta:g}; "
            "leave the key out, and give the config with src.model=FILE if it is known"
        )
    return release


def _named_instruct(said: Said) -> str | None:
    """The name of a directory that says instruct or chat."""
    return next((name for name in said.names if INSTRUCT.search(name)), None)


def _instruct(release: Release, said: Said) -> tuple[bool, str]:
    """Whether it is the instruct variant, and the reason."""
    asked = said.instruct
    if asked and not release.turns:
        raise ConfigError(
            f"src.instruct=true: Llama {release.version} has no instruct variant; "
            "say src.version if it is another release"
        )
    if release.instruct_only:
        if asked is False:
            raise ConfigError(
                f"src.instruct=false: Llama {release.version} is an instruct model only; "
                "say src.version=3.1 for a base model"
            )
        return True, f"instruct model (Llama {release.version} is nothing else)"
    if not release.turns:
        return False, ""
    if asked is not None:
        return asked, f"{'instruct' if asked else 'base'} model (as asked for)"
    if (name := _named_instruct(said)) is not None:
        return True, f"instruct model (by the name `{name}`; src.instruct=false says otherwise)"
    return False, "base model (no name says instruct or chat; src.instruct=true says otherwise)"
