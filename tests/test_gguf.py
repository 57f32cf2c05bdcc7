"""GGUF files, written and read: the package `gguf` judges each byte, key and value."""

import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFType, GGUFWriter, Keys, LlamaFileType
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reshard import journal
from reshard.blocks import MAX_BLOCK_BYTES
from reshard.encodings import ENCODINGS, STEP, decode, encode
from reshard.families import from_hf
from reshard.formats import gguf_keys
from reshard.traffic import loads_by_rank
from tests.commands import call, done, move, one_line, refused
from tests.oracles import dcp, gguf, hf, meta, nanotron
from tests.oracles.compare import (
    assert_same,
    assert_same_config,
    assert_same_files,
    assert_same_tensor,
)
from tests.oracles.models import (
    LLAMA3_SCALING,
    Model,
    expected_parameter_count,
    model_a,
    model_b,
    model_c,
    with_normal_values,
)
from tests.settings import SETTINGS, WORLDS, Job
from tests.test_bounds import (
    DIRECT,
    NEAREST,
    OWNER,
    lacking_elements,
    large_model,
    measured,
    planned,
    size_of,
    within_memory,
)
from tests.test_faults import SMALL_ROUNDS, interrupt, only
from tests.test_faults import partial as partial_result
from tests.test_faults import run as run_again

SIZES = {
    "hidden_size": 96,
    "head_dim": 16,
    "intermediate_size": 160,
    "vocab_size": 128,
    "num_hidden_layers": 2,
}
SQUARE = {"intermediate_size": 96, "vocab_size": 96}
FEW = {"num_key_value_heads": 2}
SCALED = {"rope_scaling": LLAMA3_SCALING, "attention_bias": True}


def ordinary(**overrides: Any) -> Model:
    """Rows of whole blocks, and values whose blocks have finite scales."""
    return with_normal_values(model_c(**{**SIZES, **overrides}))


# The last ones have rows that no codec takes, and bit patterns of any exponent.
MODELS: dict[str, Callable[[], Model]] = {
    "few": cache(partial(ordinary, **FEW)),
    "square": cache(partial(ordinary, **SQUARE)),
    "scaled": cache(partial(ordinary, tied=True, **FEW, **SCALED)),
    "qwen2": cache(partial(ordinary, model_type="qwen2", **FEW)),
    "wide": cache(partial(ordinary, dtype=torch.float32, tied=True, **FEW)),
    "odd": cache(partial(model_a, max_position_embeddings=77, rms_norm_eps=1e-6)),
    "odd-tied": cache(partial(model_b, tied=True)),
}
ODD = ("odd", "odd-tied")
CODED = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
FILE_TYPES = {"F32": "ALL_F32"}  # the others are MOSTLY_


def kind_of(dtype: str, model: Model) -> Kind:
    """What a dst.dtype makes of matrices."""
    stored = model.config["torch_dtype"]
    plain = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return Kind[plain.get(stored if dtype == "keep" else dtype, dtype.upper())]


def one_file(path: Path) -> Path:
    """The file of a directory that we made."""
    (found,) = path.glob("*.gguf")
    return found


def test_the_models_are_as_odd_as_they_are_said_to_be() -> None:
    blocks = {name: {t.shape[-1] % 32 for t in made().tensors.values() if t.dim() > 1}
              for name, made in MODELS.items()}  # fmt: skip
    assert all((rows == {0}) == (name not in ODD) for name, rows in blocks.items()), blocks
    shapes = {tuple(t.shape) for t in MODELS["square"]().tensors.values()}
    assert shapes == {(96, 96), (96,)}


# ------------------------------------------------------------------------------------------ targets

WRITTEN = [
    *((name, dtype) for name in ("few", "scaled") for dtype in ("keep", "float32", *CODED)),
    *(("square", dtype) for dtype in ("keep", "q8_0", "q4_0")),
    *(("qwen2", dtype) for dtype in ("keep", "q8_0")),
    *(("wide", dtype) for dtype in ("keep", "bfloat16", "float16", "q5_0")),
    *((name, dtype) for name in ODD for dtype in ("keep", "float32")),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of all models, and what one rank makes of them."""
    found = tmp_path_factory.mktemp("gguf")
    for name, made in MODELS.items():
        hf.write(made(), found / name, files=1 + (name == "few"))
    for name, dtype in WRITTEN:
        words = move("hf", found / name, "gguf", found / f"{name}-{dtype}", f"dst.dtype={dtype}")
        done(*words, "engine.fsync=false")
    return found


@pytest.mark.parametrize(("name", "dtype"), WRITTEN)
def test_each_tensor_is_what_the_package_makes_of_the_whole(
    name: str, dtype: str, root: Path
) -> None:
    model = MODELS[name]()
    stored, kind = gguf.read(root / f"{name}-{dtype}"), kind_of(dtype, model)
    assert one_file(root / f"{name}-{dtype}").name == f"model-{kind.name}.gguf"
    expected = gguf.to_gguf(model)
    ours = [name for name in stored.kinds if name != gguf.FACTORS]
    assert ours == list(expected)
    assert (gguf.FACTORS in stored.kinds) == (name == "scaled")
    for key, tensor in expected.items():
        wanted = kind if tensor.dim() > 1 else Kind.F32
        assert stored.kinds[key] == wanted, key
        assert stored.raw[key] == gguf.coded(tensor, wanted).tobytes(), key
    if kind in (Kind.F32, Kind.BF16) and model.config["torch_dtype"] == "bfloat16":
        for key, tensor in model.tensors.items():  # nothing is lost
            assert torch.equal(stored.tensors[key].to(torch.bfloat16), tensor), key


@pytest.mark.parametrize(("name", "dtype"), WRITTEN)
def test_the_header_says_all_that_llama_cpp_reads(name: str, dtype: str, root: Path) -> None:
    config, kind = MODELS[name]().config, kind_of(dtype, MODELS[name]())
    found = gguf.read(root / f"{name}-{dtype}").metadata
    found = {key: value for key, value in found.items() if not key.startswith("GGUF.")}
    count = expected_parameter_count(config)
    assert isinstance(found.pop(Keys.General.NAME), str)
    assert found == {
        **gguf.sizes(config, gguf.arch_of(config)),
        Keys.General.ARCHITECTURE: "qwen2" if name == "qwen2" else "llama",
        Keys.General.TYPE: GGUFType.MODEL,
        Keys.General.SIZE_LABEL: f"{count / 1000:.1f}K",
        Keys.General.FILE_TYPE: LlamaFileType[FILE_TYPES.get(kind.name, f"MOSTLY_{kind.name}")],
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
    }
    fields = GGUFReader(one_file(root / f"{name}-{dtype}")).fields
    kinds = {str: "STRING", int: "UINT32", float: "FLOAT32"}
    for key, value in found.items():
        assert [kind.name for kind in fields[key].types] == [kinds[type(value)]], key


@pytest.mark.parametrize("name", CODED)
def test_long_runs_are_coded_as_a_whole(name: str) -> None:
    """In place, step by step."""
    encoding, kind = ENCODINGS[name], Kind[name.upper()]
    values = np.random.default_rng(0).standard_normal(2 * STEP + 96, dtype=np.float32)
    room = bytearray(values.tobytes())
    expected = quantize(values, kind)
    found = encode(encoding, memoryview(room)).memory
    assert bytes(found) == expected.tobytes()
    assert len(found) == encoding.size(len(values))
    room[-len(found) :] = bytes(found)
    decode(encoding, memoryview(room))
    assert bytes(room) == dequantize(expected, kind).tobytes()


def llama3_factors(config: Mapping[str, Any]) -> Tensor:
    """How much slower transformers turns each pair of rows than without any scaling."""
    steps = torch.arange(0, config["head_dim"], 2, dtype=torch.float32) / config["head_dim"]
    made = LlamaConfig(
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        rope_parameters={**config["rope_scaling"], "rope_theta": config["rope_theta"]},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))
    factors: Tensor = 1.0 / config["rope_theta"] ** steps / scaled
    return factors


def test_llama3_scaling_is_a_tensor_of_factors(root: Path) -> None:
    stored = gguf.read(root / "scaled-q8_0")
    expected = llama3_factors(MODELS["scaled"]().config)
    assert stored.kinds[gguf.FACTORS] == Kind.F32
    assert stored.factors is not None
    torch.testing.assert_close(stored.factors, expected, rtol=1e-5, atol=0)
    assert stored.factors[0] == 1
    assert stored.factors[-1] == 8
    assert not [key for key in stored.metadata if "scaling" in key]


@pytest.mark.parametrize(
    ("head_dim", "factor", "theta"), [(128, 8.0, 5e5), (64, 32.0, 5e5), (32, 4.0, 1e4)]
)
def test_factors_are_those_of_transformers(head_dim: int, factor: float, theta: float) -> None:
    scaling = LLAMA3_SCALING | {"factor": factor}
    config = model_c(head_dim=head_dim, rope_scaling=scaling, rope_theta=theta).config
    found = gguf_keys.rope_factors(from_hf(config, "config"))
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, llama3_factors(config), rtol=1e-5, atol=0)
    assert len(set(found.tolist())) > 3


# Meta's files are cut on both dims, so that writers need what others read.
FILES = [("few", "q8_0"), ("odd", "keep"), ("scaled", "q4_1"), ("square", "q4_0"), ("few", "q5_1")]


@pytest.mark.parametrize("world", WORLDS)
def test_no_setting_changes_a_byte(world: int, root: Path, tmp_path: Path) -> None:
    for name in ("few", "odd", "square"):
        meta.write(MODELS[name](), tmp_path / name, 2)
    settings = [setting for setting in SETTINGS if setting.world == world]
    ways = []
    ends = [(setting, FILES[0]) for setting in settings]
    ends += [(setting, FILES[1 + (place + world) % 4]) for place, setting in enumerate(settings)]
    for place, (setting, (name, dtype)) in enumerate(ends[: len(settings) + 4]):
        source, given = root / name, (*setting.overrides(), f"dst.dtype={dtype}")
        if name != "scaled":
            source, given = tmp_path / name, (*given, f"src.model={root / name / 'config.json'}")
        job = Job(source, tmp_path / f"{place}", "gguf", given, setting.memory)
        ways.append((root / f"{name}-{dtype}", job))
    crossed = set()
    reports = measured(world, [job for _, job in ways])
    for (expected, job), report in zip(ways, reports, strict=True):
        assert one_file(job.target).read_bytes() == one_file(expected).read_bytes(), job
        check_bytes(report, job, world)
        crossed.add((report["bytes"]["exchanged"] > 0, OWNER in job.overrides))
    assert world == 1 or (True, True) in crossed


def check_bytes(report: dict[str, Any], job: Job, world: int) -> None:
    """What was read and written are the files; what crossed is what writers lack."""
    moved, plan = report["bytes"], planned(job, world)
    assert moved["read"] == moved["read_bound"]
    assert moved["written_bound"] == size_of(job.target)
    written = sum(len(raw) for raw in gguf.read(job.target).raw.values())
    assert written <= moved["written"] <= moved["written_bound"]
    width = min(slot.dtype.itemsize for slot in (*plan.source.slots, *plan.target.slots))
    loads = loads_by_rank(plan)
    assert report["by_rank"]["read"] == [load.read for load in loads]
    constants = sum(len(item.data) for item in plan.target.constants)
    assert sum(load.written for load in loads) == written - constants
    lacking = 0 if DIRECT in job.overrides else lacking_elements(plan)
    assert moved["exchanged"] == moved["exchanged_bound"] == width * lacking


def test_a_padded_vocabulary_is_padded_with_zeros(root: Path, tmp_path: Path) -> None:
    model = MODELS["few"]()
    for dtype in ("keep", "q4_0"):
        target = tmp_path / dtype
        done(
            *move("hf", root / "few", "gguf", target, f"dst.dtype={dtype}", "dst.vocab_multiple=50")
        )
        stored, plain = gguf.read(target), gguf.read(root / f"few-{dtype}")
        assert stored.metadata[Keys.LLM.VOCAB_SIZE.format(arch="llama")] == 150
        for key, tensor in plain.tensors.items():
            found = stored.tensors[key]
            if "embed" in key or "lm_head" in key:
                assert found.shape == (150, 96)
                assert not found[128:].any()
                found = found[:128]
            assert_same_tensor(key, found, tensor)
        done("verify", target)
        back = tmp_path / f"{dtype}-back"
        done(*move("gguf", target, "hf", back, "src.vocab=128", "dst.dtype=float32"))
        assert_same(hf.read(back), Model({}, {k: t.float() for k, t in plain.tensors.items()}))
    assert model.config["vocab_size"] == 128


def test_what_is_said_of_a_target_is_true(root: Path) -> None:
    said = {
        name: done("plan", "--dst", "gguf", f"src.path={root / name}", f"dst.dtype={dtype}").out
        for name, dtype in (("few", "q8_0"), ("scaled", "keep"), ("wide", "q5_0"))
    }
    assert all("norms and biases are float32" in text for text in said.values())
    assert "rounded to q8_0" in said["few"]
    assert "tied embeddings: no output.weight" in said["scaled"]
    assert "rounded" not in said["scaled"]
    assert "tokenizer" in said["few"]
    # bfloat16 would be twice as large as what is asked for
    assert "dst.dtype=bfloat16 halves" not in said["wide"]


# ------------------------------------------------------------------------------------------ sources

EVERY_KIND = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.F16, Kind.BF16, Kind.F32)
TARGETS: dict[str, Callable[[Path], Model]] = {
    "hf": hf.read,
    "meta2": meta.read,
    "tp2": nanotron.read,
    "fsdp3": lambda path: Model({}, dcp.read_fsdp(path)),
}


def mixed_kinds(model: Model) -> dict[str, Kind]:
    """All kinds in turn; the tied or untied output another one than the embedding."""
    matrices = [name for name, tensor in gguf.to_gguf(model).items() if tensor.dim() > 1]
    return {name: EVERY_KIND[number % len(EVERY_KIND)] for number, name in enumerate(matrices)}


@pytest.fixture(scope="module")
def sources(root: Path) -> dict[str, Path]:
    """Directories of the model `few`, most of them written by the package itself."""
    model, write = MODELS["few"](), partial(gguf.write, MODELS["few"]())
    write(root / "mixed", mixed_kinds(model), parts=4)
    write(root / "aligned", Kind.Q8_0, alignment=128)
    write(root / "small-first", Kind.Q5_1, parts=9, small_first=True)
    write(root / "plain", Kind.BF16, file="a {strange} {0} name.gguf")
    names = ("mixed", "aligned", "small-first", "plain")
    return {"ours": root / "few-q8_0", **{name: root / name for name in names}}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_are_those_that_the_package_finds(
    world: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    modes = (DIRECT, NEAREST, OWNER)
    jobs = [
        Job(
            path,
            tmp_path / f"{name}-{target}",
            target,
            (modes[(number + place) % 3], "dst.dtype=float32"),
            ("least", "default")[(number + world) % 2],
        )
        for number, (name, path) in enumerate(sources.items())
        for place, target in enumerate(TARGETS)
        if (2 * number + place + world) % 3
    ]
    for job, report in zip(jobs, measured(world, jobs), strict=True):
        stored = gguf.read(job.source)
        expected = Model({}, {name: tensor.float() for name, tensor in stored.tensors.items()})
        assert_same(TARGETS[job.spec](job.target), expected)
        moved = report["bytes"]
        assert moved["read"] == moved["read_bound"] == sum(map(len, stored.raw.values())), job
        assert moved["exchanged"] == moved["exchanged_bound"]


def test_every_tensor_keeps_its_own_dtype(sources: dict[str, Path], tmp_path: Path) -> None:
    done(*move("gguf", sources["mixed"], "hf", tmp_path / "hf"))
    stored = gguf.read(sources["mixed"])
    dtypes = {tensor.dtype for tensor in stored.tensors.values()}
    assert dtypes == {torch.float32, torch.float16, torch.bfloat16}
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert_same(Model({}, found), Model({}, stored.tensors))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_codes_are_coded_anew_from_their_values(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    done(*move("gguf", sources["ours"], "gguf", tmp_path / "out", f"dst.dtype={kind}"))
    before, after = gguf.read(sources["ours"]), gguf.read(tmp_path / "out")
    model = before.model(MODELS["few"]().config)
    for name, tensor in gguf.to_gguf(model).items():
        wanted = Kind[kind.upper()] if tensor.dim() > 1 else Kind.F32
        assert after.raw[name] == gguf.coded(tensor, wanted).tobytes(), name
    if kind == "q8_0":  # its own values are exact
        assert after.raw == before.raw


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", ["few", "square", "scaled", "qwen2", *ODD])
def test_there_and_back_is_the_same_model(
    name: str, manifest: bool, root: Path, tmp_path: Path
) -> None:
    model, source = MODELS[name](), root / f"{name}-keep"
    if not manifest:
        source = tmp_path / "bare"
        shutil.copytree(root / f"{name}-keep", source, ignore=shutil.ignore_patterns("*.json"))
    found = done(*move("gguf", source, "hf", tmp_path / "back", "dst.dtype=bfloat16")).out
    assert "another model" not in found
    assert_same(hf.read(tmp_path / "back"), model)
    assert_same_config(hf.read(tmp_path / "back"), model)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["max_position_embeddings"] == model.config["max_position_embeddings"]
    assert config["architectures"] == model.config["architectures"]


def test_a_mistral_stays_one_where_our_manifest_says_so(tmp_path: Path) -> None:
    """llama.cpp runs it as a llama."""
    named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    model = ordinary(**FEW, **named)
    hf.write(model, tmp_path / "hf")
    done(*move("hf", tmp_path / "hf", "gguf", tmp_path / "gguf"))
    assert gguf.read(tmp_path / "gguf").metadata[Keys.General.ARCHITECTURE] == "llama"
    for place, given in (("back", ()), ("told", (f"src.model={tmp_path / 'hf'}",))):
        (tmp_path / "gguf" / "reshard.json").rename(tmp_path / "kept") if given else None
        words = move(
            "gguf", tmp_path / "gguf", "hf", tmp_path / place, "dst.dtype=bfloat16", *given
        )
        assert "another model" not in done(*words).out
        assert_same(hf.read(tmp_path / place), model)
        assert hf.read(tmp_path / place).config["model_type"] == "mistral"


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_scaling_is_in_the_header(kind: str, root: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 2048}
    model = ordinary(**FEW, rope_scaling=scaling)
    hf.write(model, tmp_path / "hf")
    done(*move("hf", tmp_path / "hf", "gguf", tmp_path / "gguf"))
    stored, keys = gguf.read(tmp_path / "gguf"), Keys.Rope
    assert stored.factors is None
    for key, value in (
        (keys.SCALING_TYPE, kind),
        (keys.SCALING_FACTOR, 4.0),
        (keys.SCALING_ORIG_CTX_LEN, 2048),
    ):
        assert stored.metadata[key.format(arch="llama")] == value
    (tmp_path / "gguf" / "reshard.json").unlink()
    done(*move("gguf", tmp_path / "gguf", "hf", tmp_path / "back", "dst.dtype=bfloat16"))
    assert_same_config(hf.read(tmp_path / "back"), model)


def test_scaling_is_told_by_the_factors(tmp_path: Path) -> None:
    scaling = LLAMA3_SCALING | {"factor": 32.0}
    model = ordinary(**FEW, rope_scaling=scaling)
    gguf.write(model, tmp_path / "gguf", Kind.Q8_0, factors=llama3_factors(model.config), parts=8)
    done(*move("gguf", tmp_path / "gguf", "hf", tmp_path / "back"))
    assert hf.read(tmp_path / "back").config["rope_scaling"] == scaling


def test_metas_files_come_back_byte_for_byte(root: Path, tmp_path: Path) -> None:
    narrow = "dst.dtype=bfloat16"
    done(*move("hf", root / "few", "meta2", tmp_path / "meta"))
    done(*move("meta2", tmp_path / "meta", "gguf", tmp_path / "gguf"))
    done(*move("gguf", tmp_path / "gguf", "meta2", tmp_path / "back", narrow))
    for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json"):
        one, other = tmp_path / "meta" / name, tmp_path / "back" / name
        assert one.read_bytes() == other.read_bytes(), name
    ours = one_file(tmp_path / "gguf").read_bytes()
    assert ours == one_file(root / "few-keep").read_bytes()


def test_older_spellings_of_a_header_are_read(tmp_path: Path) -> None:
    """Sizes that follow from others may be missing, and those by layer may be lists."""
    key = "llama.attention.{}".format
    gone = dict.fromkeys([key("key_length"), key("value_length"), "llama.vocab_size"])
    model = ordinary(**SQUARE)
    gguf.write(model, tmp_path / "gguf", more={**gone, key("head_count_kv"): None})
    done(*move("gguf", tmp_path / "gguf", "hf", tmp_path / "back", "dst.dtype=bfloat16"))
    assert_same(hf.read(tmp_path / "back"), model)


def test_one_model_of_several_is_taken_where_it_is_named(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "both"
    shutil.copytree(sources["mixed"], folder)
    shutil.copy(one_file(sources["ours"]), folder / "model-Q8_0.gguf")
    shutil.copy(one_file(sources["aligned"]), folder / "mmproj-model.gguf")
    refused(tmp_path, r"holds 2 models: .*; choose one with src.file=NAME",
            *move("gguf", folder, "hf", tmp_path / "no"))  # fmt: skip
    parts = sorted(path.name for path in sources["mixed"].glob("*.gguf"))
    for place, file in (("ours", "model-Q8_0.gguf"), ("mixed", parts[0]), ("mixed", parts[2])):
        target = tmp_path / f"{place}-{file}"
        given = (f"src.file={file}", "dst.dtype=float32")
        done(*move("gguf", folder, "hf", target, *given))
        expected = gguf.read(sources[place]).tensors
        assert_same(hf.read(target), Model({}, {k: t.float() for k, t in expected.items()}))
    assert "Q8_0" in done("inspect", folder, "src.file=model-Q8_0.gguf").out


# --------------------------------------------------------------------------------- verify, inspect


def test_checkpoints_of_two_kinds_are_compared(root: Path, tmp_path: Path) -> None:
    done(*move("gguf", root / "few-q8_0", "tp2", tmp_path / "tp2"))
    found = done("verify", root / "few-q8_0", tmp_path / "tp2").out
    assert "gguf Q8_0" in found
    assert "equal" in found
    done(*move("hf", root / "scaled", "hf", tmp_path / "wide", "dst.dtype=float32"))
    done("verify", root / "scaled-float32", tmp_path / "wide")
    assert "another dtype" in done("verify", root / "few-keep", root / "few-float32").out
    other = call("verify", root / "few-q8_0", root / "few-q5_1")
    assert other.code == 1
    assert "model.embed_tokens.weight" in one_line(other.err)


def test_a_flipped_bit_is_found_in_the_tensor_that_has_it(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "few-q8_0", tmp_path / "copy")
    done("verify", tmp_path / "copy")
    file = one_file(tmp_path / "copy")
    (tensor,) = (t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_down.weight")
    at = int(tensor.data_offset) + 3 * 34 + 7
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    found = call("verify", tmp_path / "copy")
    assert found.code == 1
    assert "blk.1.ffn_down.weight" in one_line(found.err)
    found = call("verify", tmp_path / "copy", root / "few-q8_0")
    assert found.code == 1
    assert "model.layers.1.mlp.down_proj.weight" in one_line(found.err)


def test_a_directory_says_what_it_holds(root: Path, sources: dict[str, Path]) -> None:
    found = json.loads(done("inspect", root / "scaled-q4_1", "--json").out)
    assert (found["layout"], found["dtypes"]) == ("gguf Q4_1", ["float32", "q4_1"])
    assert (found["rope"], found["tied"], found["healthy"]) == ("interleaved rows", True, True)
    assert found["parameters"] == expected_parameter_count(MODELS["scaled"]().config)
    assert found["bytes"] == sum(map(len, gguf.read(root / "scaled-q4_1").raw.values())) - 4 * 8
    assert json.loads(done("inspect", root / "qwen2-keep", "--json").out)["rope"] == "half rows"
    found = json.loads(done("inspect", sources["mixed"], "--json").out)
    assert found["files"] == len(list(sources["mixed"].glob("*.gguf")))
    assert found["dtypes"] == ["bfloat16", "float16", "float32", *sorted(CODED)]


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("verb", [(), ("plan",)], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("name", "given", "pattern"),
    [
        (
            "odd",
            "dst.dtype=q8_0",
            r"`model.embed_tokens.weight`: rows of 72 elements are no whole q8_0 blocks of 32",
        ),
        ("few", "dst.dtype=q4", r"dst.dtype: `q4`: did you mean `q4_[01]`"),
        ("few", "dst.mesh.tp=2", r"gguf: a GGUF file has no mesh"),
        ("few", "dst.max_shard_size=1MB", r"max_shard_size does not apply to gguf as a target"),
        ("few", "dst.embedding_dim=1", r"embedding_dim does not apply to gguf as a target"),
        ("few", "src.file=x.gguf", r"src.file does not apply to hf as a source"),
        ("few", "dst.vocab_multiple=0", r"vocab_multiple: 0, expected 1 to"),
        *(
            (
                "few",
                f"dst.dtype={kind}",
                rf"dst.dtype=bfloat16, then: llama-quantize \S*/no/model-BF16.gguf "
                rf"\S*/no/model-{kind.upper()}.gguf {kind.upper()}$",
            )
            for kind in ("q4_k_m", "q6_k", "q2_k", "q5_k_s")
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused(
    verb: tuple[str, ...], name: str, given: str, pattern: str, root: Path, tmp_path: Path
) -> None:
    refused(tmp_path, pattern, *verb, *move("hf", root / name, "gguf", tmp_path / "no", given))


@pytest.mark.parametrize("target", ["hf", "meta2", "tp2", "fsdp3", "titan2"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_other_formats_hold_plain_values_only(
    target: str, kind: str, root: Path, tmp_path: Path
) -> None:
    pattern = rf"dst.dtype={kind}: .*plain values only; use .*--dst gguf"
    words = move("hf", root / "few", target, tmp_path / "no", f"dst.dtype={kind}")
    refused(tmp_path, pattern, *words)


def doubled(model: Model) -> Model:
    """In float64."""
    tensors = {name: tensor.double() for name, tensor in model.tensors.items()}
    return Model(model.config | {"torch_dtype": "float64"}, tensors)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
UNSAYABLE = {
    "mlp_bias": (ordinary, {"mlp_bias": True}, r"mlp_bias=true"),
    "dynamic": (ordinary, {"rope_scaling": DYNAMIC}, r"rope_scaling of type dynamic"),
    "older": (ordinary, {"rope_scaling": {"type": "su", "factor": 2.0}}, r"scaling of type su"),
    "gelu": (ordinary, {"hidden_act": "gelu"}, r"hidden_act is gelu"),
    "qwen2": (
        ordinary,
        {"model_type": "qwen2", "rope_scaling": LLAMA3_SCALING},
        r"llama3 is not known of qwen2",
    ),
    "odd heads": (model_b, {"head_dim": 3, "hidden_size": 18}, r"3 rows have no two halves"),
}


@pytest.mark.parametrize("fault", UNSAYABLE)
def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(fault: str, tmp_path: Path) -> None:
    make, changes, pattern = UNSAYABLE[fault]
    hf.write(make(**changes), tmp_path / "hf")
    refused(tmp_path, rf"gguf: .*{pattern}", *move("hf", tmp_path / "hf", "gguf", tmp_path / "no"))


def test_double_precision_has_to_be_cast(tmp_path: Path) -> None:
    model = MODELS["few"]()
    hf.write(doubled(model), tmp_path / "hf")
    pattern = r"`model.embed_tokens.weight` is float64; use dst.dtype=bfloat16"
    refused(tmp_path, pattern, *move("hf", tmp_path / "hf", "gguf", tmp_path / "no"))
    for dtype in ("bfloat16", "q8_0"):
        words = move("hf", tmp_path / "hf", "gguf", tmp_path / dtype, f"dst.dtype={dtype}")
        done(*words)
        kind = kind_of(dtype, model)
        stored = gguf.read(tmp_path / dtype)
        for key, tensor in gguf.to_gguf(model).items():
            wanted = kind if tensor.dim() > 1 else Kind.F32
            assert stored.raw[key] == gguf.coded(tensor, wanted).tobytes(), key


def test_double_precision_is_read(tmp_path: Path) -> None:
    model = doubled(MODELS["few"]())
    gguf.write(model, tmp_path / "src", Kind.F64)
    for dtype, wanted in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        words = move("gguf", tmp_path / "src", "hf", tmp_path / dtype, f"dst.dtype={dtype}")
        done(*words)
        expected = {name: tensor.to(wanted) for name, tensor in model.tensors.items()}
        assert_same(hf.read(tmp_path / dtype), Model({}, expected))


def test_norms_are_called_float32_only_where_they_are(tmp_path: Path) -> None:
    model = MODELS["few"]()
    gguf.write(model, tmp_path / "src", dict.fromkeys(gguf.to_gguf(model), Kind.F16))
    said = done(*move("gguf", tmp_path / "src", "hf", tmp_path / "out")).out
    dtypes = {tensor.dtype for tensor in hf.read(tmp_path / "out").tensors.values()}
    assert dtypes == {torch.float16}
    assert "norms are float32" not in said


# What may be wrong with a source: what is written, and what is said.
HEADER = "llama.{}".format
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown architecture": (
        {"more": {"general.architecture": "gpt2"}},
        r"`.*model.gguf`: architecture 'gpt2' is not known, expected one of llama, qwen2",
    ),
    "a missing tensor": (
        {"without": ("blk.1.ffn_up.weight",)},
        r"tensor `blk.1.ffn_up.weight` is missing",
    ),
    "no embedding": ({"without": ("token_embd.weight",)}, r"tensor `token_embd.weight` is missing"),
    "a tensor too many": (
        {"extra": {"blk.2.attn_norm.weight": torch.ones(96)}},
        r"tensor `blk.2.attn_norm.weight` is not part of a model",
    ),
    "a tensor too many in a part of its own": (
        {"extra": {"blk.2.attn_norm.weight": torch.ones(96)}, "parts": 21},
        r"tensor `blk.2.attn_norm.weight` is not part of a model",
    ),
    "another width": (
        {"more": {HEADER("embedding_length"): 64}},
        r"`token_embd.weight` is bfloat16 \[128, 96\], expected bfloat16 \[128, 64\]",
    ),
    "another feed-forward": (
        {"more": {HEADER("feed_forward_length"): 96}},
        r"`blk.0.ffn_gate.weight` is bfloat16 \[160, 96\], expected bfloat16 \[96, 96\]",
    ),
    "fewer layers": (
        {"more": {HEADER("block_count"): 1}},
        r"tensor `blk.1.\w+.weight` is not part of",
    ),
    "more layers": (
        {"more": {HEADER("block_count"): 3}},
        r"tensor `blk.2.attn_q.weight` is missing",
    ),
    "other heads": (
        {"more": {HEADER("attention.head_count"): 12}},
        r"`blk.0.attn_q.weight` is bfloat16 \[96, 96\], expected bfloat16 \[192, 96\]",
    ),
    "other key-value heads": (
        {"more": {HEADER("attention.head_count_kv"): 3}},
        r"`blk.0.attn_k.weight` is bfloat16 \[32, 96\], expected bfloat16 \[48, 96\]",
    ),
    "key-value heads that do not divide": (
        {"more": {HEADER("attention.head_count_kv"): 4}},
        r"4 key-value heads do not divide 6",
    ),
    "partly rotary heads": (
        {"more": {HEADER("rope.dimension_count"): 8}},
        r"llama.rope.dimension_count is not the size of a head, 16",
    ),
    "no width": (
        {"more": {HEADER("embedding_length"): None}},
        r"llama.embedding_length is None, expected a positive number",
    ),
    "no layers": ({"more": {HEADER("block_count"): 0}}, r"llama.block_count is 0, expected a pos"),
    "a width in words": (
        {"more": {HEADER("embedding_length"): "96"}},
        r"llama.embedding_length is '96', expected a positive number",
    ),
    "an unknown scaling": (
        {"more": {HEADER("rope.scaling.type"): "longrope"}},
        r"rope.scaling.type is 'longrope', which is not supported",
    ),
    "unknown factors": (
        {"factors": torch.linspace(1, 3, 8)},
        r"rope_freqs.weight is of no llama3 scaling that is known; give src.model",
    ),
    "too few factors": (
        {"factors": torch.ones(4)},
        r"tensor `rope_freqs.weight` is float32 \[4\], expected float32 \[8\]",
    ),
    "biases of one kind only": (
        {"extra": {"blk.0.attn_q.bias": torch.ones(96)}},
        r"tensor `blk.0.attn_q.bias` is not part of",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_source_that_contradicts_itself_is_refused(fault: str, tmp_path: Path) -> None:
    given, pattern = FAULTS[fault]
    gguf.write(MODELS["few"](), tmp_path / "src", **given)
    refused(tmp_path, pattern, *move("gguf", tmp_path / "src", "hf", tmp_path / "no"))
    found = call("inspect", tmp_path / "src")
    assert (found.code, found.err) == (1, "")
    assert "PROBLEM" in found.out


def write_rows(path: Path, kind: Kind, *shape: int) -> None:
    """A file with an embedding of zeros and nothing else."""
    path.mkdir()
    writer = GGUFWriter(path / "model.gguf", "llama")
    for key, value in gguf.sizes(MODELS["few"]().config, "llama").items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    dtype = np.uint8 if kind not in gguf.DTYPES else np.float32
    writer.add_tensor("token_embd.weight", np.zeros(shape, dtype), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_kinds_that_are_not_read_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "src", Kind.Q4_K, 128, 144)
    pattern = r"`token_embd.weight` is stored as Q4_K.* llama-quantize --allow-requantize"
    refused(tmp_path, pattern, *move("gguf", tmp_path / "src", "hf", tmp_path / "no"))
    assert "Q4_K" in call("inspect", tmp_path / "src").out


@pytest.mark.parametrize("shape", [(), (128,), (2, 64, 96)], ids=str)
def test_an_embedding_that_is_no_matrix_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_rows(tmp_path / "src", Kind.F32, *shape)
    refused(tmp_path, "tensor `", *move("gguf", tmp_path / "src", "hf", tmp_path / "no"))


def test_files_that_are_not_there_are_named(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["mixed"], tmp_path / "src")
    second = sorted((tmp_path / "src").glob("*.gguf"))[1]
    words = move("gguf", tmp_path / "src", "hf", tmp_path / "no")
    refused(
        tmp_path,
        r"src.file: `\S*/x.gguf` is not there, found model-00001",
        *words,
        "src.file=x.gguf",
    )
    second.unlink()
    count = int(second.stem[-5:])
    refused(tmp_path, rf"`{second}` is missing: found {count - 1} of {count}", *words)
    refused(tmp_path, r"gguf: a GGUF file has no mesh", *words, "src.mesh.tp=2")


def test_a_config_of_another_model_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    faults = {
        "intermediate_size": (96, r"intermediate is 160, but the config of the model has 96"),
        "num_key_value_heads": (3, r"kv_heads is 2, but the config of the model has 3"),
        "num_hidden_layers": (5, r"5 layers"),
        "model_type": ("qwen2", r"qwen2"),
    }
    for key, (value, pattern) in faults.items():
        config = tmp_path / f"{key}.json"
        config.write_text(json.dumps(MODELS["few"]().config | {key: value}))
        words = move("gguf", sources["plain"], "hf", tmp_path / "no", f"src.model={config}")
        refused(tmp_path, pattern, *words)


@pytest.fixture
def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `gguf` were not installed."""
    monkeypatch.setitem(sys.modules, "gguf", None)


MISSING = r"quantised tensors need the package gguf; pip install gguf"


@pytest.mark.usefixtures("without_the_package")
def test_plain_files_need_no_package(root: Path, tmp_path: Path) -> None:
    done(*move("hf", root / "few", "gguf", tmp_path / "gguf"))
    assert_same_files(tmp_path / "gguf", root / "few-keep")
    done(*move("gguf", tmp_path / "gguf", "hf", tmp_path / "back", "dst.dtype=bfloat16"))
    assert_same(hf.read(tmp_path / "back"), MODELS["few"]())
    assert "gguf Q8_0" in done("inspect", root / "few-q8_0").out


@pytest.mark.usefixtures("without_the_package")
@pytest.mark.parametrize("verb", [(), ("plan",)], ids=["run", "plan"])
def test_codes_need_the_package_before_a_byte_moves(
    verb: tuple[str, ...], root: Path, tmp_path: Path
) -> None:
    words = move("hf", root / "few", "gguf", tmp_path / "no", "dst.dtype=q8_0")
    refused(tmp_path, MISSING, *verb, *words)
    refused(tmp_path, MISSING, *verb, *move("gguf", root / "few-q8_0", "hf", tmp_path / "no"))


# ------------------------------------------------------------------------------- faults and bounds


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 2 Meta files that takes tens of rounds, and what becomes of it."""
    root = tmp_path_factory.mktemp("long")
    model = ordinary(
        hidden_size=384, head_dim=64, intermediate_size=1024, vocab_size=1024, num_hidden_layers=3
    )
    meta.write(model, root / "src", 2)
    done(*move("meta2", root / "src", "gguf", root / "q8_0", "dst.dtype=q8_0"))
    stored = gguf.read(root / "q8_0")
    for name, tensor in gguf.to_gguf(model).items():
        kind = Kind.Q8_0 if tensor.dim() > 1 else Kind.F32
        assert stored.raw[name] == gguf.coded(tensor, kind).tobytes(), name
    return root


@pytest.mark.fault
@pytest.mark.parametrize(
    ("world", "words", "then", "other"),
    [(1, (), 2, (OWNER,)), (2, (NEAREST,), 1, (DIRECT,)), (3, (DIRECT,), 2, ())],
    ids=["1 then 2", "2 then 1", "3 then 2"],
)
def test_an_interrupted_job_goes_on_where_it_stopped(
    world: int,
    words: tuple[str, ...],
    then: int,
    other: tuple[str, ...],
    long: Path,
    tmp_path: Path,
) -> None:
    command = move("meta2", long / "src", "gguf", tmp_path / "dst", "dst.dtype=q8_0", SMALL_ROUNDS)
    interrupt(world, [*command, *words], tmp_path, nth=4)
    folder = partial_result(tmp_path / "dst")
    records = list(journal.read(folder / "journals"))
    journalled = sum(record.length for record in records)
    assert len(records) > 3
    moved = run_again(then, [*command, *other], tmp_path)["bytes"]
    assert moved["resumed"] == journalled
    assert moved["written"] <= moved["written_bound"] - journalled
    assert_same_files(tmp_path / "dst", long / "q8_0")
    assert only(tmp_path, "dst")


@pytest.mark.fault
def test_only_the_damaged_piece_is_coded_again(long: Path, tmp_path: Path) -> None:
    command = move("meta2", long / "src", "gguf", tmp_path / "dst", "dst.dtype=q8_0", SMALL_ROUNDS)
    interrupt(1, command, tmp_path, nth=4)
    folder = partial_result(tmp_path / "dst")
    records = list(journal.read(folder / "journals"))
    with open(one_file(folder / "data"), "r+b") as file:
        file.seek(records[2].offset + 5)
        byte = file.read(1)[0]
        file.seek(records[2].offset + 5)
        file.write(bytes([byte ^ 1]))
    moved = run_again(1, command, tmp_path)["bytes"]
    journalled = sum(record.length for record in records)
    assert moved["resumed"] == journalled - records[2].length
    assert_same_files(tmp_path / "dst", long / "q8_0")


@pytest.mark.parametrize("name", CODED)
@pytest.mark.filterwarnings("error")
def test_blocks_without_a_finite_scale_are_read_without_a_word(name: str) -> None:
    """numpy would warn on standard error."""
    encoding, room = ENCODINGS[name], memoryview(bytearray(128))
    half = np.float16(np.inf).tobytes()
    room[-encoding.nbytes :] = half * 2 + bytes(encoding.nbytes - 4)
    decode(encoding, room)
    assert not np.isfinite(np.frombuffer(room, dtype=np.float32)).all()


@pytest.mark.parametrize("name", CODED)
def test_coding_a_block_takes_little_memory(name: str) -> None:
    """Of 4 MiB, the largest there are; a model with such blocks is too large for a test."""
    values = np.random.default_rng(0).standard_normal(MAX_BLOCK_BYTES // 4, dtype=np.float32)
    room, peaks = memoryview(bytearray(values.tobytes())), []
    encode(ENCODINGS[name], memoryview(bytearray(128)))  # whatever is imported or made once
    for code in (encode, decode):
        tracemalloc.start()
        code(ENCODINGS[name], room)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        size = ENCODINGS[name].size(len(values))
        room[-size:] = bytes(room[:size])
    assert max(peaks) < 4 << 20, peaks


@pytest.mark.slow
def test_memory_is_bounded_while_values_are_coded_and_decoded(tmp_path: Path) -> None:
    model, memory = large_model(1024), 64 << 20
    meta.write(model, tmp_path / "meta", 2)
    coded = tmp_path / "coded.yaml"
    coded.write_text("format: gguf\ndtype: q8_0\n")
    source, target = tmp_path / "meta", tmp_path / "q8_0"
    found = within_memory(2, source, target, str(coded), OWNER, memory)
    assert found["bytes"]["written_bound"] == size_of(target)
    assert found["bytes"]["exchanged"] > 0
    stored = gguf.read(target)
    found = within_memory(1, target, tmp_path / "tp2", "tp2", NEAREST, memory)
    assert found["bytes"]["read"] == sum(map(len, stored.raw.values()))
    assert_same(nanotron.read(tmp_path / "tp2"), Model({}, stored.tensors))


# ------------------------------------------------------------- a header says more than its tensors


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 20000.0), ("max_position_embeddings", 77), ("rms_norm_eps", 1e-3)],
)
def test_another_header_is_another_job(key: str, value: float, tmp_path: Path) -> None:
    source, target = tmp_path / "src", tmp_path / "dst"
    hf.write(MODELS["few"](), source)
    done(*move("hf", source, "gguf", target))
    assert "already done" in done(*move("hf", source, "gguf", target)).out
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    found = call(*move("hf", source, "gguf", target))
    assert (found.code, "already done" in found.out) == (2, False), found.out + found.err


def test_what_header_and_config_both_say_is_the_headers(tmp_path: Path) -> None:
    model = MODELS["few"]()
    hf.write(model, tmp_path / "src")
    done(*move("hf", tmp_path / "src", "gguf", tmp_path / "gguf"))
    (tmp_path / "gguf" / "reshard.json").unlink()
    other = {**model.config, "rms_norm_eps": 1e-3, "max_position_embeddings": 5, "eos_token_id": 9}
    (tmp_path / "config.json").write_text(json.dumps(other))
    asked = f"src.model={tmp_path / 'config.json'}"
    done(*move("gguf", tmp_path / "gguf", "hf", tmp_path / "back"), asked)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    for key in ("rms_norm_eps", "max_position_embeddings"):
        assert config[key] == model.config[key]
    assert config["eos_token_id"] == 9
    scaled = {**other, "rope_scaling": LLAMA3_SCALING}
    (tmp_path / "config.json").write_text(json.dumps(scaled))
    refused(
        tmp_path,
        "its rotary scaling is not",
        *move("gguf", tmp_path / "gguf", "hf", tmp_path / "no"),
        asked,
    )


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    gguf.write(MODELS["few"](), tmp_path / "src", parts=9)
    names = sorted(path.name for path in (tmp_path / "src").glob("*.gguf"))
    (tmp_path / "src" / names[-1]).write_bytes((tmp_path / "src" / names[1]).read_bytes())
    pattern = rf"`\S+{names[-1]}`: tensor `\S+` is in `{names[1]}` too"
    refused(tmp_path, pattern, *move("gguf", tmp_path / "src", "hf", tmp_path / "no"))


def test_verify_takes_a_wider_dtype_with_the_same_values_for_equal(root: Path) -> None:
    said = done("verify", root / "few", root / "few-keep").out
    assert "have the same values in another dtype" in said
    assert "bfloat16 against float32" in said
    assert "equal: " in done("verify", root / "few-keep", root / "few").out
    other = call("verify", root / "few", root / "few-q8_0")
    assert (other.code, "[0, 0]`: " in other.err) == (1, True), other.err
