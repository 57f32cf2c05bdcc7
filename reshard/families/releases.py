"""The releases of Llama: what their published configs say, and Meta's own files do not.

`find` tells a release by what params.json and the shapes say, and by what the user says; it gives
the reason of each guess. `recognise` tells it again from a finished config, whatever its source.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reshard.errors import ConfigError
from reshard.families import prompts
from reshard.families.model import Json, ModelConfig

# llama-models applies this wherever use_scaled_rope is set; the factor differs by release.
ROPE_SCALING: Mapping[str, Json] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# (width, layers) of Llama 3.2 1B and 3B, the only text releases whose rope factor is 32.
LLAMA_3_2 = {(2048, 16), (3072, 28)}
LLAMA_3_VOCABULARY = 128256
CODE_LLAMA_70B = (80, 32016)
# Llama 1 is told by the sizes that it alone has, or by its norm_eps of 1e-6 (others: 1e-5).
LLAMA_1, LLAMA_1_EPS = {(6656, 60), (8192, 80)}, 2e-6
END_OF_TURN = 9
SAMPLING: Mapping[str, Json] = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
# What every published config.json of a Llama has besides.
EXTRAS: Mapping[str, Json] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
}
# Directories that Meta's downloads and Hugging Face's repositories put around the files.
PLAIN_FOLDERS = ("original", "mp8", "mp16")
INSTRUCT = re.compile(r"(^|[-_. ])(instruct|chat)($|[-_. ])", re.IGNORECASE)
VERSION = re.compile(r"(code)?llama[-_]?([123](?:\.[0-9])?)?(?=[-_]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Release:
    """One release: `eos` are the ids that end a base model's text, `turns` those of its instruct
    variant (none: there is no such variant). `specials` are those of a tiktoken tokenizer.
    """

    version: str
    rope_thetas: tuple[float, ...]
    positions: int
    factor: float | None = None
    bos: int = 1
    eos: int = 2
    turns: tuple[int, ...] = ()
    specials: tuple[str, ...] = ()
    template: str | None = None
    instruct_only: bool = False

    def ends(self, instruct: bool) -> int | list[int]:
        """`eos_token_id`: one id, or the list that instruct variants have."""
        return list(self.turns) if instruct and len(self.turns) > 1 else self.eos


_LLAMA_3 = Release(
    "3",
    (500000.0,),
    8192,
    bos=128000,
    eos=128001,
    turns=(128001, 128009),
    specials=prompts.SPECIALS_3,
    template=prompts.LLAMA_3,
)
_LLAMA_3_1 = replace(
    _LLAMA_3,
    version="3.1",
    positions=131072,
    factor=8.0,
    turns=(128001, 128008, 128009),
    specials=prompts.SPECIALS_3_1,
)
_LLAMA_2 = Release("2", (10000.0,), 4096, turns=(2,), template=prompts.LLAMA_2)
RELEASES: Mapping[str, Release] = {
    release.version: release
    for release in (
        Release("1", (10000.0,), 2048),
        _LLAMA_2,
        # The 70B instruct variant was trained with the shorter context, its theta and its prompts.
        replace(_LLAMA_2, version="code", rope_thetas=(1000000.0, 10000.0), positions=16384),
        _LLAMA_3,
        _LLAMA_3_1,
        replace(_LLAMA_3_1, version="3.2", factor=32.0),
        replace(_LLAMA_3_1, version="3.3", instruct_only=True),
    )
}
VERSIONS = tuple(RELEASES)


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
        ids = known_ids(release, model.vocab)
        sampled = release.specials or self.instruct
        short = release.version == "code" and model.rope_theta != release.rope_thetas[0]
        return replace(
            model,
            rope_scaling=None if self.factor is None else {**ROPE_SCALING, "factor": self.factor},
            max_positions=_LLAMA_2.positions if short else release.positions,
            bos=release.bos if ids else 1,
            eos=release.ends(self.instruct) if ids else 2,
            generation=dict(SAMPLING) if sampled and ids else {},
            extras=dict(EXTRAS),
        )


def names_of(folder: Path) -> tuple[str, ...]:
    """The names of a directory that may tell a release: its own, and that around `original`."""
    found = [folder.absolute()]
    while found[-1].name in PLAIN_FOLDERS:
        found.append(found[-1].parent)
    return tuple(path.name for path in found)


def known_ids(release: Release, vocab: int) -> bool:
    """Whether a vocabulary can be that of the release, so that its token ids mean something."""
    return not release.specials or vocab >= LLAMA_3_VOCABULARY


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
    if model.rope_theta in _LLAMA_3.rope_thetas or model.vocab >= LLAMA_3_VOCABULARY:
        return ("3",), theta
    if model.rope_theta == RELEASES["code"].rope_thetas[0]:
        return ("code",), theta
    if model.vocab == CODE_LLAMA_70B[1]:
        return ("code", "2"), f"{theta} and the vocabulary of {model.vocab}"
    sizes = f"{model.layers} layers of width {model.hidden}, norm_eps {model.norm_eps:g}"
    if _is_llama_1(model):
        return ("1", "2", "code"), f"{theta}, {sizes}"
    grouped = "grouped key-value heads" if model.kv_heads != model.heads else sizes
    return ("2", "1", "code"), f"{theta}, {grouped}"


def _is_llama_1(model: ModelConfig) -> bool:
    """Whether a model with Llama 1's rotary base looks like the first release."""
    known = (model.hidden, model.layers) in LLAMA_1 or model.norm_eps <= LLAMA_1_EPS
    return known and model.kv_heads == model.heads


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


def recognise(model: ModelConfig) -> tuple[Release, bool] | None:
    """The release that a config describes, and whether it is the instruct variant.

    A variant of Llama 3 is told by the end of a turn among its eos ids; the older ones, whose
    ids are the same, by the way of sampling that `find` notes for instruct variants alone.
    """
    version = _version_of(model)
    if model.model_type != "llama" or version is None:
        return None
    release = RELEASES[version]
    if not release.specials:
        if (model.layers, model.vocab) == CODE_LLAMA_70B:
            release = replace(release, template=None)  # its prompts are of another kind
        return release, bool(release.turns) and bool(model.generation)
    ends: Sequence[int] = model.eos if isinstance(model.eos, list) else [model.eos or 0]
    return release, model.bos is not None and model.bos + END_OF_TURN in ends


def _version_of(model: ModelConfig) -> str | None:
    """The version, or None; 3.3 is the same as 3.1."""
    if (scaling := model.rope_scaling) is not None:
        usual = {
            key: value for key, value in ROPE_SCALING.items() if key not in ("factor", "rope_type")
        }
        known = "llama3" in (scaling.get("rope_type"), scaling.get("type"))
        if not known or any(scaling.get(key) != value for key, value in usual.items()):
            return None
        return "3.2" if scaling.get("factor") == RELEASES["3.2"].factor else "3.1"
    if model.rope_theta == _LLAMA_3.rope_thetas[0]:
        return "3"
    if model.rope_theta == RELEASES["code"].rope_thetas[0] or model.vocab == CODE_LLAMA_70B[1]:
        return "code"
    if model.rope_theta not in _LLAMA_2.rope_thetas:
        return None
    return "1" if _is_llama_1(model) and not model.generation else "2"
