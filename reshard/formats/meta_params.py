"""params.json of every generation, both ways; sizes come from tensors, it is a check on them.

What no generation writes down (positions, token ids, the factor of scaled RoPE, whether the output
is tied) comes from a config that is known from elsewhere, else from the release that the numbers
look like.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reshard.errors import CheckpointError, LayoutError
from reshard.families.model import Json, ModelConfig
from reshard.formats import common

PARAMS = "params.json"
# llama-models applies this scaling wherever use_scaled_rope is set; the factor differs by release.
ROPE_SCALING: Mapping[str, Json] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# (dim, n_layers) of Llama 3.2 1B and 3B, whose rope factor is 32.
LLAMA_3_2 = {(2048, 16), (3072, 28)}
LLAMA_3_VOCABULARY = 128256
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
        value = params.get(key, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"`{path}`: {key} is {value!r}, expected a positive number")
        return value

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
    return to_model(path, params, sizes, known=None, rope_factor=None)[0]


def read(path: Path) -> dict[str, Json]:
    """Read params.json, which some tools wrap in `model`.

    Its number of heads is the one thing that shapes do not tell.
    """
    params = common.read_json(path)
    inner = params.get("model", params)
    if not isinstance(inner, dict):
        raise CheckpointError(f"`{path}`: `model` holds {type(inner).__name__}, expected an object")
    heads = inner.get("n_heads")
    if type(heads) is not int or heads < 1:
        raise CheckpointError(f"`{path}`: n_heads is {heads!r}, expected a positive number")
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
                f"`{path}`: {key} is {params[key]}, but the tensors of all files make it {size}"
            )


def to_model(
    path: Path,
    params: Mapping[str, Json],
    sizes: Sizes,
    *,
    known: ModelConfig | None,
    rope_factor: float | None,
) -> tuple[ModelConfig, list[str]]:
    """The model config, and lines on what was assumed."""
    theta = _number(path, params, "rope_theta", 10000.0)
    eps = _number(path, params, "norm_eps", 1e-5)
    scaled = bool(params.get("use_scaled_rope"))
    if known is not None:
        if scaled != is_llama3(known):
            raise CheckpointError(
                f"`{path}`: use_scaled_rope is {scaled}, but the config of the model has "
                f"rope_scaling {known.rope_scaling}"
            )
        return replace(known, **asdict(sizes), norm_eps=eps, rope_theta=theta), []
    factor = rope_factor or (32.0 if (sizes.hidden, sizes.layers) in LLAMA_3_2 else 8.0)
    llama_3 = sizes.vocab >= LLAMA_3_VOCABULARY
    model = ModelConfig(
        model_type="llama",
        **asdict(sizes),
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling={**ROPE_SCALING, "factor": factor} if scaled else None,
        max_positions=_positions(theta, eps, scaled=scaled),
        bos=128000 if llama_3 else 1,
        eos=128001 if llama_3 else 2,
    )
    assumed = [
        f"max_position_embeddings {model.max_positions}, bos {model.bos} and eos {model.eos}, "
        f"as releases with rope_theta {theta:g} have"
    ]
    if scaled:
        why = "as asked for" if rope_factor else f"{sizes.layers} layers of width {sizes.hidden}"
        assumed.append(f"rope factor {factor:g} ({why}; src.rope_factor=8|32 says otherwise)")
    return model, assumed


def is_llama3(model: ModelConfig) -> bool:
    """Whether the model scales its positions in the one way that Meta's code knows."""
    scaling = model.rope_scaling or {}
    return "llama3" in (scaling.get("rope_type"), scaling.get("type"))


def require_said(model: ModelConfig, name: str) -> None:
    """Refuse what Meta's code would compute otherwise, since params.json cannot say it."""
    usual = {key: ROPE_SCALING[key] for key in ROPE_SCALING if key not in ("factor", "rope_type")}
    scaling = model.rope_scaling
    odd = scaling is not None and any(scaling.get(key) != value for key, value in usual.items())
    if scaling is not None and (odd or not is_llama3(model)):
        raise LayoutError(
            f"{name}: rope_scaling {dict(scaling)} cannot be said in params.json, which knows "
            f"llama3 scaling with {usual} only; use --dst hf"
        )
    if (activation := model.extras.get("hidden_act", "silu")) != "silu":
        raise LayoutError(f"{name}: hidden_act is {activation}, Meta's code has silu only")


def _positions(theta: float, eps: float, *, scaled: bool) -> int:
    """The release's context: 3.1 and later, 3, Code Llama, 2, or 1 (told from 2 by its epsilon)."""
    if scaled:
        return 131072
    by_theta = {500000.0: 8192, 1000000.0: 16384}
    return by_theta.get(theta, 4096 if eps > 2e-6 else 2048)


def _number(path: Path, params: Mapping[str, Json], key: str, default: float) -> float:
    value = params.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"`{path}`: {key} is {value!r}, expected a positive number")
    return float(value)


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
    if is_llama3(model):
        params["use_scaled_rope"] = True
    return params


def _ffn_rule(model: ModelConfig) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give this feed-forward width in Meta's code."""
    base, width = int(2 * (4 * model.hidden) / 3), model.intermediate
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
