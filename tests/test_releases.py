"""Every release of Llama from Meta's directory: configs, bits and logits, against other judges."""

import ast
import hashlib
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from reshard import families
from reshard.errors import CheckpointError, ConfigError, LayoutError, ReshardError
from reshard.families.finding import Said, find, names_of
from reshard.families.model import ModelConfig, from_hf, from_json
from reshard.families.releases import RELEASES, recognise
from reshard.formats import gguf_keys, meta_params
from reshard.formats import meta as meta_format
from reshard.formats.options import Mesh, Options
from tests.oracles import forward, hf, meta
from tests.oracles.compare import assert_same, assert_same_tensor
from tests.oracles.models import LLAMA3_SCALING, model_a, with_normal_values
from tests.oracles.releases import TINY, model_of
from tests.settings import Job, must_convert

GOLDENS = Path(__file__).parent / "goldens"
TOKENS = torch.arange(2 * 24).reshape(2, 24) * 661 % 32000

# What the published configs say where the golden's maker says something else, and why it does.
SCALED = LLAMA3_SCALING  # transformers 4.45's converter leaves the scaling out
PUBLISHED: dict[str, dict[str, Any]] = {
    # 128008 is a reserved token before 3.1
    "3-instruct": {"eos_token_id": [128001, 128009]},
    "3.1": {"rope_scaling": SCALED},
    "3.1-instruct": {"rope_scaling": SCALED},
    # a release that the converter does not know
    "3.2": {"rope_scaling": SCALED | {"factor": 32.0}, "tie_word_embeddings": True},
    "3.2-instruct": {"rope_scaling": SCALED | {"factor": 32.0}, "tie_word_embeddings": True},
    "3.3": {"rope_scaling": SCALED},
}
# Published for base models too; the converter writes it for instruct variants alone.
TIED = "tie_word_embeddings"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each release in Meta's layout, in Hugging Face's, and in Meta's again."""
    root = tmp_path_factory.mktemp("releases")
    jobs = []
    for name, tiny in TINY.items():
        tiny.write(root / "meta" / name)
        (root / "meta" / name / "checklist.chk").write_text("0  consolidated.00.pth\n")
        jobs.append(Job(root / "meta" / name, root / "hf" / name, "hf", tiny.said))
        jobs.append(Job(root / "hf" / name, root / "back" / name, f"meta{tiny.mp}"))
    must_convert(2, jobs)
    return root


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def golden(name: str) -> dict[str, Any]:
    return read(GOLDENS / f"llama-{name}.json")


# ------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("name", TINY)
def test_config_json_is_that_of_transformers_own_converter(name: str, places: Path) -> None:
    found, expected = read(places / "hf" / name / "config.json"), golden(name)["config"]
    # The converter says float16 or bfloat16 whatever the tensors are.
    dtype = str(TINY[name].dtype).removeprefix("torch.")
    expected |= {"torch_dtype": dtype, **PUBLISHED.get(name, {})}
    del expected["transformers_version"]
    assert found == expected


@pytest.mark.parametrize("name", TINY)
def test_generation_config_has_the_ids_and_the_published_sampling(name: str, places: Path) -> None:
    found = read(places / "hf" / name / "generation_config.json")
    expected = golden(name)["generation_config"]
    del expected["transformers_version"]
    if name.startswith("3"):
        expected.pop("_from_model_config", None)
        expected |= SAMPLING
    expected |= {k: v for k, v in PUBLISHED.get(name, {}).items() if k in expected}
    assert found == expected
    assert (
        transformers.GenerationConfig.from_pretrained(places / "hf" / name).eos_token_id
        == (expected["eos_token_id"])
    )


@pytest.mark.parametrize("name", TINY)
def test_tensors_are_those_of_transformers_own_converter(name: str, places: Path) -> None:
    found = load_file(places / "hf" / name / "model.safetensors")
    expected = dict(golden(name)["sha256"])
    if TINY[name].tied:
        assert expected.pop("lm_head.weight") == expected["model.embed_tokens.weight"]
    assert {tensor.dtype for tensor in found.values()} == {TINY[name].dtype}
    if TINY[name].dtype != torch.bfloat16:
        assert not expected  # the converter casts to bfloat16
        expected = {key: digest(value) for key, value in model_of(TINY[name]).tensors.items()}
    assert {key: digest(value) for key, value in found.items()} == expected


# Configs as they stand in the repositories on the hub, typed by hand, with Meta's params.json; and
# the tiny model that is of the same release.
HUB = {
    "Llama-2-7b": "2",
    "CodeLlama-7b": "code",
    "Llama-3-8B": "3",
    "Llama-3-8B-Instruct": "3-instruct",
    "Llama-3.1-8B": "3.1",
    "Llama-3.1-8B-Instruct": "3.1-instruct",
    "Llama-3.2-1B": "3.2",
    "Llama-3.2-1B-Instruct": "3.2-instruct",
    "Llama-3.2-3B": "3.2",
    "Llama-3.3-70B-Instruct": "3.3",
}
HUB_SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
)
# Where ours is not what is published: the name, the key, both values.
DIFFERS = {
    # published in float16; Meta's files, whose dtype is kept, are of bfloat16
    ("Llama-2-7b", "torch_dtype"): ("float16", "bfloat16"),
    # one id where generation_config.json has both, which is what generating stops at; ours are both
    ("Llama-3-8B-Instruct", "eos_token_id"): (128009, [128001, 128009]),
    # a limit of the hub's examples, and no fact of the model
    ("Llama-3-8B", "max_length"): (4096, None),
    ("Llama-3-8B-Instruct", "max_length"): (4096, None),
}


def test_every_published_golden_is_compared() -> None:
    names = {path.stem.removeprefix("published-") for path in GOLDENS.glob("published-*.json")}
    assert names == set(HUB)


@pytest.mark.parametrize("name", HUB)
def test_facts_of_a_release_are_those_on_the_hub(name: str, places: Path) -> None:
    """All that the published files have but the sizes, with the default of the base of old."""
    published = read(GOLDENS / f"published-{name}.json")
    folder = places / "hf" / HUB[name]
    differing = {}
    for file in ("config", "generation_config"):
        found = read(folder / f"{file}.json")
        for key, value in published.get(file, {}).items():
            if key not in (*HUB_SIZES, "_from_model_config") and found.get(key) != value:
                differing[name, key] = (value, found.get(key))
    assert differing == {at: values for at, values in DIFFERS.items() if at[0] == name}
    assert read(folder / "config.json")["rope_theta"] == (
        published["config"].get("rope_theta", 10000.0)
    )


@pytest.mark.parametrize("name", HUB)
def test_params_json_alone_makes_the_config_on_the_hub(name: str, tmp_path: Path) -> None:
    published = read(GOLDENS / f"published-{name}.json")
    params, expected = published["params"], published["config"]
    if params["vocab_size"] == -1:  # Llama 2 leaves it to the tokenizer
        params["vocab_size"] = expected["vocab_size"]
    file = tmp_path / name / "params.json"
    file.parent.mkdir()
    file.write_text(json.dumps(params))
    model = meta_params.imagine(file)
    found = families.to_hf(model)
    # Only the tensors tell these.
    known = {key: value for key, value in expected.items() if key not in ("torch_dtype", TIED)}
    known |= {key: ours for (at, key), (_, ours) in DIFFERS.items() if at == name and key in known}
    assert {key: found.get(key) for key in known} == known
    again = recognise(model)
    assert again is not None
    told = {"3.3": "3.1"}.get(TINY[HUB[name]].version, TINY[HUB[name]].version)
    assert (again[0].version, again[1]) == (told, TINY[HUB[name]].instruct)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["1", "2", "code", "3", "3.1", "3.2", "3.3"])
def test_logits_are_those_of_meta_s_own_forward_pass(name: str, places: Path) -> None:
    tiny = TINY[name]
    expected = forward.logits(places / "meta" / name, TOKENS, rope_factor=tiny.rope_factor)
    with torch.no_grad():
        model = transformers.LlamaForCausalLM.from_pretrained(
            places / "hf" / name, dtype=torch.float32
        )
        found = model(TOKENS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if RELEASES[tiny.version].factor is not None:  # the other factor is another model
        other = forward.logits(places / "meta" / name, TOKENS, rope_factor=40 - tiny.rope_factor)
        assert not torch.allclose(found, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_back_in_meta_s_layout_all_is_there(name: str, places: Path) -> None:
    there, back = places / "meta" / name, places / "back" / name
    for file in there.glob("*.pth"):
        expected, found = meta.load(file), meta.load(back / file.name)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert_same_tensor(f"{name}: {file.name}: {key}", found[key], tensor)
    params, said = read(back / "params.json"), read(there / "params.json")
    free = ("vocab_size", "multiple_of", "ffn_dim_multiplier")
    assert {key: params.get(key) for key in said if key not in free} == {
        key: value for key, value in said.items() if key not in free
    }
    assert meta.ffn_size(params) == meta.ffn_size(said)
    assert not (back / "checklist.chk").exists()
    assert (places / "hf" / name / "assets" / "checklist.chk").exists() is False


def test_what_was_assumed_is_said_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "Llama3.1-8B-Instruct"
    TINY["3.1"].write(folder)
    said = meta_format.scan(folder, Options()).assumed
    assert said == (
        "Llama 3.1 (by the name `Llama3.1-8B-Instruct`; "
        "src.version=1|2|code|3|3.1|3.2|3.3 says otherwise): max_position_embeddings 131072, "
        "bos 128000, eos [128001, 128008, 128009]",
        "instruct model (by the name `Llama3.1-8B-Instruct`; src.instruct=false says otherwise)",
        "rope factor 8 (as Llama 3.1 has; src.rope_factor=8|32 says otherwise)",
    )
    asked = Options(version="3.2", instruct=False, rope_factor=8.0)
    assert meta_format.scan(folder, asked).assumed == (
        "Llama 3.2 (as asked for): max_position_embeddings 131072, bos 128000, eos 128001",
        "base model (as asked for)",
        "rope factor 8 (as asked for; src.rope_factor=8|32 says otherwise)",
    )


def test_what_is_said_goes_before_a_config_that_lies_beside(tmp_path: Path, places: Path) -> None:
    shutil.copytree(places / "back" / "3.1", tmp_path / "one")
    scan = partial(meta_format.scan, tmp_path / "one")
    assert scan(Options()).model.eos == 128001
    assert scan(Options()).assumed == ("what the files do not say is from reshard.json",)
    found = scan(Options(instruct=True))
    assert found.model.eos == [128001, 128008, 128009]
    assert found.assumed[0] == "what src says of the release goes before a config that is known"


def test_through_torchtitan_and_nanotron_nothing_is_forgotten(tmp_path: Path, places: Path) -> None:
    jobs = []
    for name in ("3.2-instruct", "2-chat"):
        for way in ("titan2", "tp2"):
            one, other = tmp_path / name / way, tmp_path / name / f"{way}-hf"
            jobs.append(Job(places / "meta" / name, one, way, TINY[name].said))
            jobs.append(Job(one, other, "hf"))
    must_convert(2, jobs)
    for done in jobs[1::2]:
        expected = places / "hf" / done.target.parent.name
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            assert (done.target / file).read_bytes() == (expected / file).read_bytes(), done.target
        model = from_json(read(done.target / "reshard.json")["model"])
        found = recognise(model)
        assert found is not None
        assert (found[0].version, found[1]) == (done.target.parent.name.partition("-")[0], True)


# ------------------------------------------------------------------------------------ which release

RELEASED = {
    # name: hidden, layers, heads, kv heads, feed-forward, vocabulary, theta, eps, scaled, version
    "llama-7b": (4096, 32, 32, 32, 11008, 32000, 1e4, 1e-6, False, "1"),
    "llama-65b": (8192, 80, 64, 64, 22016, 32000, 1e4, 1e-5, False, "1"),
    "13B": (5120, 40, 40, 40, 13824, 32000, 1e4, 1e-6, False, "1"),
    "llama-2-7b-chat": (4096, 32, 32, 32, 11008, 32000, 1e4, 1e-6, False, "2"),
    "llama-2-70b": (8192, 80, 64, 8, 28672, 32000, 1e4, 1e-5, False, "2"),
    "CodeLlama-7b": (4096, 32, 32, 32, 11008, 32016, 1e6, 1e-5, False, "code"),
    "CodeLlama-34b-Instruct": (8192, 48, 64, 8, 22016, 32000, 1e6, 1e-5, False, "code"),
    "CodeLlama-70b-Instruct": (8192, 80, 64, 8, 28672, 32016, 1e4, 1e-5, False, "code"),
    "Meta-Llama-3-8B": (4096, 32, 32, 8, 14336, 128256, 5e5, 1e-5, False, "3"),
    "Meta-Llama-3-70B-Instruct": (8192, 80, 64, 8, 28672, 128256, 5e5, 1e-5, False, "3"),
    "Llama3.1-8B": (4096, 32, 32, 8, 14336, 128256, 5e5, 1e-5, True, "3.1"),
    "Llama-3.1-405B": (16384, 126, 128, 8, 53248, 128256, 5e5, 1e-5, True, "3.1"),
    "Llama3.2-1B": (2048, 16, 32, 8, 8192, 128256, 5e5, 1e-5, True, "3.2"),
    "weights": (3072, 28, 24, 8, 8192, 128256, 5e5, 1e-5, True, "3.2"),
    "Llama-3.3-70B-Instruct": (8192, 80, 64, 8, 28672, 128256, 5e5, 1e-5, True, "3.3"),
}
POSITIONS = {"1": 2048, "2": 4096, "code": 16384, "3": 8192}


def sized(name: str) -> tuple[ModelConfig, bool, str]:
    hidden, layers, heads, kv, ffn, vocab, theta, eps, scaled, version = RELEASED[name]
    sizes = (hidden, layers, heads, kv, hidden // heads, ffn, vocab)
    return ModelConfig("llama", *sizes, norm_eps=eps, rope_theta=theta), scaled, version


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_size_is_told_and_recognised_again(name: str) -> None:
    sizes, scaled, version = sized(name)
    found = find(sizes, Said(names=(name,)), scaled=scaled)
    assert found.release.version == version
    instruct = name.endswith(("chat", "Instruct"))
    assert found.instruct == instruct
    model = found.complete(sizes)
    short = name == "CodeLlama-70b-Instruct"
    assert model.max_positions == (4096 if short else POSITIONS.get(version, 131072))
    assert (model.rope_scaling or {}).get("factor") == {"3.1": 8, "3.3": 8, "3.2": 32}.get(version)
    again = recognise(from_json(json.loads(json.dumps(model.to_json()))))
    assert again is not None
    told = {"3.3": "3.1"}.get(version, version)
    assert (again[0].version, again[1]) == (told, instruct)
    # That one alone is prompted in another way.
    assert (again[0].template is None) == (version == "1" or name == "CodeLlama-70b-Instruct")


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("llama2-7b", "2"),
        ("llama3-8b", "3"),
        ("llama3.1-405b", "3.1"),
        ("llama3.2-1b", "3.2"),
        ("llama3.2-3b", "3.2"),
    ],
)
def test_published_configs_are_what_params_json_becomes(file: str, version: str) -> None:
    """The configs in configs/models are those of the published repositories."""
    from omegaconf import OmegaConf

    path = Path(__file__).parents[1] / "configs" / "models" / f"{file}.yaml"
    published = from_hf(OmegaConf.to_container(OmegaConf.load(path)), file)  # type: ignore[arg-type]
    bare = replace(published, rope_scaling=None, max_positions=1, bos=None, eos=None)
    found = find(bare, Said(), scaled=published.rope_scaling is not None)
    assert found.release.version == version
    made = replace(found.complete(bare), extras=published.extras, generation={})
    assert made == published
    assert recognise(published) == (RELEASES[version], False)


@pytest.mark.parametrize(
    ("eos", "instruct"), [(128001, False), (128009, True), ([128001, 128009], True), (None, False)]
)
def test_an_instruct_variant_is_told_by_the_end_of_a_turn(eos: Any, instruct: bool) -> None:
    model = replace(sized("Meta-Llama-3-8B")[0], bos=128000, eos=eos)
    assert recognise(model) == (RELEASES["3"], instruct)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2"},
        {"rope_theta": 100000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 2.0}},
    ],
)
def test_what_is_no_release_is_not_recognised(changes: dict[str, Any]) -> None:
    assert recognise(replace(sized("llama-2-70b")[0], **changes)) is None


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("Llama3.1-8B", {"version": "2"}, r"src.version=2: has no scaled .* use one of 3.1, 3.2"),
        ("Meta-Llama-3-8B", {"version": "3.1"}, r"src.version=3.1: has scaled .* 1, 2, code, 3$"),
        ("llama-7b", {"version": "code", "rope_factor": 8.0}, r"src.rope_factor=8: .* leave"),
        ("CodeLlama-7b", {"version": "2"}, r"src.version=2: has rope_theta 10000, .* 1e\+06; "),
        ("Llama3.1-8B", {"version": "3.3", "instruct": False}, r"src.instruct=false: Llama 3.3 "),
        ("llama-7b", {"version": "1", "instruct": True}, r"src.instruct=true: Llama 1 has no"),
    ],
)
def test_what_contradicts_the_files_is_refused(
    name: str, said: dict[str, Any], message: str
) -> None:
    sizes, scaled, _ = sized(name)
    with pytest.raises(ConfigError, match=message) as caught:
        find(sizes, Said(**said), scaled=scaled)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_llama_3_scaling_is_told_in_either_spelling(key: str) -> None:
    scaling = {name: value for name, value in LLAMA3_SCALING.items() if name != "rope_type"}
    model = replace(sized("Llama3.1-8B")[0], rope_scaling={key: "llama3", **scaling})
    again = recognise(model)
    assert again is not None
    assert again[0].version == "3.1"
    meta_params.require_said(model, "meta1")
    assert meta_params.write(model, 1)["use_scaled_rope"] is True
    factors = gguf_keys.rope_factors(model)
    assert factors is not None
    assert factors.max() == 8


def test_the_newer_spelling_goes_before_the_older() -> None:
    scaling = LLAMA3_SCALING | {"rope_type": "linear", "type": "llama3"}
    model = replace(sized("Llama3.1-8B")[0], rope_scaling=scaling)
    assert recognise(model) is None
    assert "use_scaled_rope" not in meta_params.write(model, 1)
    assert gguf_keys.rope_factors(model) is None
    with pytest.raises(LayoutError, match=r"meta1: rope_scaling .* cannot be said in params.json"):
        meta_params.require_said(model, "meta1")


def test_names_are_those_of_the_directory_and_around_original() -> None:
    names = names_of(Path("/x/Llama-3.1-405B-Instruct/original/mp16"))
    assert names == ("mp16", "original", "Llama-3.1-405B-Instruct")
    assert names_of(Path("/x/chat/weights")) == ("weights",)


@pytest.mark.parametrize("name", ["chatty", "instructions", "llama-7b", "Llama", "x-llama-4"])
def test_other_names_say_nothing(name: str) -> None:
    sizes, _, _ = sized("Meta-Llama-3-8B")
    assert not find(sizes, Said(names=(name,)), scaled=False).instruct
    old = replace(sizes, vocab=32000, rope_theta=1e4, kv_heads=32)
    assert find(old, Said(names=(name,)), scaled=False).release.version == "2"


@pytest.mark.parametrize(
    ("name", "multiple_of", "multiplier"),
    [
        ("llama-2-70b", 4096, 1.3),
        ("Meta-Llama-3-8B", 1024, 1.3),
        ("Meta-Llama-3-70B-Instruct", 4096, 1.3),
        ("Llama3.2-1B", 256, 1.5),
        ("weights", 256, None),
        ("Llama-3.1-405B", 4096, 1.2),
        ("llama-7b", 256, None),
    ],
)
def test_params_json_has_the_released_rule_for_the_width(
    name: str, multiple_of: int, multiplier: float | None
) -> None:
    params = meta_params.write(sized(name)[0], 1)
    assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == (multiple_of, multiplier)


# -------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("mp", [2, 4])
def test_copied_heads_are_one_model_with_its_scaling(mp: int, tmp_path: Path) -> None:
    """As 405B in 8 and in 16 files: both have 8 key-value heads, here 2."""
    sizes = {"num_key_value_heads": 2, "intermediate_size": 216, "vocab_size": 240}
    model = with_normal_values(model_a(rope_scaling=LLAMA3_SCALING, **sizes))
    meta.write(model, tmp_path / "meta", mp)
    must_convert(2, [Job(tmp_path / "meta", tmp_path / "hf", "hf")])
    found = hf.read(tmp_path / "hf")
    assert_same(found, model)
    config = read(tmp_path / "hf" / "config.json")
    assert (config["num_key_value_heads"], config["rope_scaling"]) == (2, LLAMA3_SCALING)


@pytest.mark.parametrize(
    "place", ["consolidated.{0:02d}/consolidated.{0:02d}.pth", "consolidated.{0:02d}/model.pth"]
)
def test_folders_of_ranks_are_read(place: str, tmp_path: Path) -> None:
    model = model_a()
    meta.write(model, tmp_path / "meta", 3)
    for rank in range(3):
        moved = tmp_path / "meta" / place.format(rank)
        moved.parent.mkdir()
        (tmp_path / "meta" / f"consolidated.{rank:02d}.pth").rename(moved)
    must_convert(2, [Job(tmp_path / "meta", tmp_path / "hf", "hf")])
    assert_same(hf.read(tmp_path / "hf"), model)


def test_a_single_file_may_have_no_number(tmp_path: Path) -> None:
    model = model_a()
    meta.write(model, tmp_path / "meta", 1)
    (tmp_path / "meta/consolidated.00.pth").rename(tmp_path / "meta/consolidated.pth")
    must_convert(1, [Job(tmp_path / "meta", tmp_path / "hf", "hf")])
    assert_same(hf.read(tmp_path / "hf"), model)


@pytest.mark.parametrize("beside", [False, True])
def test_the_tokenizer_may_lie_one_level_up(beside: bool, tmp_path: Path) -> None:
    meta.write(model_a(), tmp_path / "llama" / "7B", 2)
    (tmp_path / "llama" / "tokenizer.model").write_bytes(b"x")
    if beside:
        (tmp_path / "llama" / "7B" / "tokenizer.model").write_bytes(b"y")
    scan = meta_format.scan(tmp_path / "llama" / "7B", Options())
    assert scan.folders == (() if beside else (tmp_path / "llama",))


@pytest.mark.parametrize("name", ["tokenizer.model", "params.json"])
def test_a_file_s_name_is_spelled_once(name: str) -> None:
    nodes = [
        node
        for path in Path(meta_format.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    assert sum(isinstance(node, ast.Constant) and node.value == name for node in nodes) == 1


def edited(path: Path, **changes: object) -> None:
    params = path / "params.json"
    params.write_text(json.dumps(read(params) | changes))


HUGE = 10**400
RULE = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "multiple_of": 32}


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e400", str(HUGE), "true", "0"])
@pytest.mark.parametrize("key", ["ffn_dim_multiplier", "rope_theta", "norm_eps", *RULE])
def test_numbers_without_bounds_are_refused(key: str, value: str, tmp_path: Path) -> None:
    record = json.dumps(RULE | {key: "@"}).replace('"@"', value)
    (tmp_path / "params.json").write_text(record)
    with pytest.raises(CheckpointError, match=rf"params.json`: {key} is ") as caught:
        meta_params.imagine(tmp_path / "params.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_the_widest_number_makes_no_model(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(RULE | {"ffn_dim_multiplier": 1e30}))
    with pytest.raises(ConfigError, match=r"`intermediate` is .*, expected a positive int up to"):
        meta_params.imagine(tmp_path / "params.json")


def with_tensor(path: Path, key: str, tensor: torch.Tensor) -> None:
    file = path / "consolidated.00.pth"
    torch.save({**torch.load(file), key: tensor}, file)


W1 = "layers.1.feed_forward.w1.weight"
REFUSED = {
    "fp8": (lambda p: (p / "fp8_scales_0.pt").touch(), r"fp8_scales_0.pt`: an FP8 .*bfloat16"),
    "int4": (lambda p: (p / "int4_scales_0.pt").touch(), r"int4_scales_0.pt`: a quantised "),
    "qlora": (lambda p: edited(p, quantization_args={}), r"params.json`: quantization_args: a qu"),
    "lora": (lambda p: edited(p, lora_args={"rank": 16}), r"params.json`: lora_args: a quant"),
    "llama 4": (lambda p: edited(p, moe_args={}), r"moe_args: Llama 4 .* is read as `hf`"),
    "vision": (lambda p: edited(p, vision_chunk_size=448), r"vision_chunk_size: a vision model"),
    "float8": (
        lambda p: with_tensor(p, W1, torch.zeros(74, 72).to(torch.float8_e4m3fn)),
        r"consolidated.00.pth`: tensor `layers.1.feed_forward.w1.weight` \(float8_e4m3fn\): an FP8",
    ),
    "int8": (
        lambda p: with_tensor(p, W1, torch.zeros(74, 72, dtype=torch.int8)),
        r"w1.weight` \(int8\): a quantised release",
    ),
    "scales": (
        lambda p: with_tensor(p, f"{W1[:-7]}.scales", torch.ones(3)),
        r"tensor `layers.1.feed_forward.w1.scales` .*: a quantised release",
    ),
    "adaptor": (
        lambda p: with_tensor(p, f"{W1[:-7]}.adaptor.A.weight", torch.ones(3)),
        r"adaptor.A.weight` .*: a quantised release",
    ),
    "text model": (
        lambda p: with_tensor(p, f"text_model.{W1}", torch.ones(3)),
        r"tensor `text_model.layers.1.feed_forward.w1.weight` .*: a vision model",
    ),
    "wqkv": (
        lambda p: with_tensor(p, "layers.0.attention.wqkv.weight", torch.ones(3)),
        r"wqkv.weight` .*: Llama 4 in Meta's layout",
    ),
    "experts": (
        lambda p: with_tensor(p, "layers.0.feed_forward.experts.moe_w_in_eD_F", torch.ones(3)),
        r"experts.moe_w_in_eD_F` .*: Llama 4",
    ),
    "a file and a folder": (
        lambda p: shutil.copytree(p, p / "consolidated.01"),
        r"a rank has both a file and a folder, found 4 for 3 ranks; keep one of the two",
    ),
    "a folder of two": (
        lambda p: [
            (p / "consolidated.02.pth").unlink(),
            shutil.copytree(p, p / "consolidated.02"),
        ],
        r"consolidated.02`: a rank's folder with 2 .pth files, expected one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    spoil, message = REFUSED[name]
    meta.write(model_a(), tmp_path, 3)
    if name == "a file and a folder":
        keep = tmp_path / "consolidated.01.pth"
        (tmp_path / "consolidated.01").mkdir()
        shutil.copy(keep, tmp_path / "consolidated.01")
    else:
        spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        meta_format.scan(tmp_path, Options())
    assert "\n" not in str(caught.value)


def test_a_gap_in_the_files_is_named(tmp_path: Path) -> None:
    meta.write(model_a(), tmp_path, 3)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(ReshardError, match=r"consolidated.01.pth` is missing: found 2 of 3"):
        meta_format.scan(tmp_path, Options(mesh=Mesh(tp=3)))
