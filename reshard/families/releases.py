"""The releases of Llama: what their published configs say, and Meta's own files do not.

`recognise` tells the release of a finished config, whatever its source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from reshard.families import prompts
from reshard.families.model import Json, ModelConfig, scaling_type

# llama-models applies this wherever use_scaled_rope is set; the factor differs by release.
LLAMA_3_SCALING: Mapping[str, float] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE_SCALING: Mapping[str, Json] = {"rope_type": "llama3", **LLAMA_3_SCALING}
LLAMA_3_THETA = 500000.0
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
    (LLAMA_3_THETA,),
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


def known_ids(release: Release, vocab: int) -> bool:
    """Whether a vocabulary can be that of the release, so that its token ids mean something."""
    return not release.specials or vocab >= LLAMA_3_VOCABULARY


def is_llama_3_scaling(model: ModelConfig) -> bool:
    """Whether positions are scaled as in some release, by whatever factor."""
    given = model.rope_scaling or {}
    usual = (given.get(key) == LLAMA_3_SCALING[key] for key in LLAMA_3_SCALING if key != "factor")
    return scaling_type(model) == "llama3" and all(usual)


def is_llama_1(model: ModelConfig) -> bool:
    """Whether a model with Llama 1's rotary base looks like the first release."""
    known = (model.hidden, model.layers) in LLAMA_1 or model.norm_eps <= LLAMA_1_EPS
    return known and model.kv_heads == model.heads


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
    if model.rope_scaling is not None:
        factor = model.rope_scaling.get("factor")
        scaled = "3.2" if factor == RELEASES["3.2"].factor else "3.1"
        return scaled if is_llama_3_scaling(model) else None
    if model.rope_theta == LLAMA_3_THETA:
        return "3"
    if model.rope_theta == RELEASES["code"].rope_thetas[0] or model.vocab == CODE_LLAMA_70B[1]:
        return "code"
    if model.rope_theta not in _LLAMA_2.rope_thetas:
        return None
    return "1" if is_llama_1(model) and not model.generation else "2"
