"""params.json of every generation, both ways; sizes come from tensors, it is a check on them.

What no generation writes down (positions, token ids, the factor of scaled RoPE, whether the output
is tied) comes from a config that is known from elsewhere, else from the release that it looks like.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reshard.containers import shown
from reshard.errors import CheckpointError, LayoutError
from reshard.families import finding
from reshard.families.finding import Said
from reshard.families.model import MAX_NUMBER, MAX_SIZE, Json, ModelConfig, scaling_type
from reshard.families.releases import LLAMA_3_SCALING, is_llama_3_scaling
from reshard.formats import common
from reshard.formats.options import Options

PARAMS = "params.json"
# `multiple_of` and `ffn_dim_multiplier` of the releases: Llama 1, 2 and 3.2 3B; 3.2 1B; 70B; 8B;
# 405B. Where several give a width, the first does.
RELEASED_RULES = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))
USUAL_MULTIPLES = (256, 1024, 4096, 512, 2048)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the shapes of the tensors and the number of files give."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


def imagine(path: Path) -> ModelConfig:
    """The model that a params.json describes on its own, without tensors to tell the sizes."""
    params = read(path)

    def size(key: str, default: int | None = None) -> int:
        return _size(path, key, params.get(key, default))

    hidden, heads = size("dim"), size("n_heads")
    multiplier = _number(path, params, "ffn_dim_multiplier", 1.0)
    width = int(multiplier * int(2 * (4 * hidden) / 3))
    sizes = Sizes(
        hidden=hidden,
        layers=size("n_layers"),
        heads=heads,
        kv_heads=size("n_kv_heads", heads),
        head_dim=hidden // heads,
        intermediate=size("multiple_of") * -(-width // size("multiple_of")),
        vocab=size("vocab_size"),
    )
    return to_model(path, params, sizes, known=None, said=Said(names=_names(path)))[0]


def said(path: Path, options: Options) -> Said:
    """What is said of the release: by the user, and by the names of directories."""
    return Said(options.version, options.instruct, options.rope_factor, _names(path))


def _names(path: Path) -> tuple[str, ...]:
    return finding.names_of(path.parent)


def read(path: Path) -> dict[str, Json]:
    """Read params.json, which some tools wrap in `model`.

    Its number of heads is the one thing that shapes do not tell.
    """
    params = common.read_json(path)
    inner = params.get("model", params)
    if not isinstance(inner, dict):
        raise CheckpointError(f"`{path}`: `model` holds {type(inner).__name__}, expected an object")
    _size(path, "n_heads", inner.get("n_heads"))
    return inner


def check(path: Path, params: Mapping[str, Json], sizes: Sizes) -> None:
    """Refuse a params.json that says something else than the tensors."""
    found = {
        "dim": sizes.hidden,
        "n_layers": sizes.layers,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab,
    }
    for key, size in found.items():
        if params.get(key) not in (None, -1, size):
            raise CheckpointError(
                f"`{path}`: {key} is {reprlib.repr(params[key])}, but the tensors of all files "
                f"make it {size}"
            )


def to_model(
    path: Path,
    params: Mapping[str, Json],
    sizes: Sizes,
    *,
    known: ModelConfig | None,
    said: Said,
) -> tuple[ModelConfig, list[str]]:
    """The model config, and lines on what was assumed."""
    theta = _number(path, params, "rope_theta", 10000.0)
    eps = _number(path, params, "norm_eps", 1e-5)
    scaled = params.get("use_scaled_rope") or False
    if not isinstance(scaled, bool):
        raise CheckpointError(
            f"`{path}`: use_scaled_rope is {reprlib.repr(scaled)}, expected true or false"
        )
    if known is not None:
        if scaled != (scaling_type(known) == "llama3"):
            raise CheckpointError(
                f"`{path}`: use_scaled_rope is {scaled}, but the config of the model has "
                f"rope_scaling {reprlib.repr(known.rope_scaling)}"
            )
        return replace(known, **asdict(sizes), norm_eps=eps, rope_theta=theta), []
    model = ModelConfig("llama", **asdict(sizes), norm_eps=eps, rope_theta=theta)
    found = finding.find(model, said, scaled=scaled)
    usual = [] if "norm_eps" in params else [f"norm_eps {eps:g}, which params.json does not say"]
    return found.complete(model), [*usual, *found.reasons]


def require_said(model: ModelConfig, name: str) -> None:
    """Refuse what Meta's code would compute otherwise, since params.json cannot say it."""
    if model.rope_scaling is not None and not is_llama_3_scaling(model):
        usual = {key: value for key, value in LLAMA_3_SCALING.items() if key != "factor"}
        raise LayoutError(
            f"{name}: rope_scaling {shown(str(dict(model.rope_scaling)))} cannot be said in "
            f"params.json, which knows llama3 scaling with {usual} only; use --dst hf"
        )
    if (activation := model.extras.get("hidden_act", "silu")) != "silu":
        raise LayoutError(
            f"{name}: hidden_act is {shown(str(activation))}, Meta's code has silu only"
        )


def _number(path: Path, params: Mapping[str, Json], key: str, default: float) -> float:
    value = params.get(key)
    if value is None:
        return default
    # An int of any size can be compared; nan is within no limits.
    if isinstance(value, int | float) and value is not True and 0 < value <= MAX_NUMBER:
        return float(value)
    raise CheckpointError(
        f"`{path}`: {key} is {reprlib.repr(value)}, expected a positive number up to {MAX_NUMBER:g}"
    )


def _size(path: Path, key: str, value: Json) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise CheckpointError(
            f"`{path}`: {key} is {reprlib.repr(value)}, expected a positive number up to {MAX_SIZE}"
        )
    return value


def write(model: ModelConfig, mp: int) -> dict[str, Json]:
    """params.json with every key that some generation of Meta's code reads."""
    multiple_of, multiplier = _ffn_rule(model)
    params: dict[str, Json] = {
        "dim": model.hidden,
        "n_layers": model.layers,
        "n_heads": model.heads,
        "n_kv_heads": max(model.kv_heads, mp),
        "vocab_size": model.vocab,
        "multiple_of": multiple_of,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if scaling_type(model) == "llama3":
        params["use_scaled_rope"] = True
    return params


def _ffn_rule(model: ModelConfig) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give this feed-forward width in Meta's code."""
    base, width = int(2 * (4 * model.hidden) / 3), model.intermediate
    for step, multiplier in RELEASED_RULES:
        if step * -(-int((multiplier or 1) * base) // step) == width:
            return step, multiplier
    steps = [step for step in USUAL_MULTIPLES if width % step == 0]
    steps += [step for step in range(min(width, 4096), 0, -1) if width % step == 0]
    for step in steps:
        if step * -(-base // step) == width:
            return step, None
    for digits in range(1, 17):
        for step in steps:
            for aim in (width, width - step / 2):
                multiplier = round(aim / base, digits)
                if step * -(-int(multiplier * base) // step) == width:
                    return step, multiplier
    raise LayoutError(f"meta: no multiple_of gives the feed-forward width {width}")
