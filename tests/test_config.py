"""From names, files and KEY=VALUE to a checked job; everything else is refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from reshard import families, formats
from reshard.config import load, parse_size
from reshard.errors import ConfigError, ReshardError
from reshard.formats.options import Mesh
from reshard.geometry import whole
from reshard.prepare import prepare
from reshard.sources import open_source
from reshard.topologies import model_names, read_model, topology_names


def source(name: str | None, *overrides: str):
    return load(name, None, overrides, None).source


def target(name: str | None, *overrides: str):
    return load(None, name, overrides, None).target


SOURCE_ONLY = {"dcp", "statedict"}


@pytest.mark.parametrize("name", topology_names())
def test_every_shipped_topology_loads_on_both_sides(name):
    for side in (source(name), target(name)):
        assert (side.format is None) == (name == "dcp")
        assert side.among
        assert set(side.among) <= set(formats.formats())
        assert side.format in (None, *side.among)
        assert side.path is None
        assert side.dtype is None


@pytest.mark.parametrize("name", sorted(set(topology_names()) - SOURCE_ONLY))
def test_every_shipped_topology_lays_out_a_model(name):
    model, side = read_model("llama2-7b"), target(name)
    parameters, mesh = families.parameters(model), side.options.axes
    layout = formats.named(side.format).layout(parameters, model, side.options)
    assert list(layout.places) == [parameter.name for parameter in parameters]
    copies = mesh.dp if side.format == "nanotron" else 1  # data-parallel ranks share its files
    assert layout.coordinates * copies == mesh.tp * mesh.pp * mesh.dp


@pytest.mark.parametrize(
    "overrides", [[], ["dst.path=there"], ["dst.mesh.dp=4"]], ids=["plain", "path", "mesh"]
)
def test_what_files_decide_is_no_target(overrides):
    config = load("hf", "dcp", ["src.model=llama2-7b", *overrides], None)
    assert config.target.format is None
    with pytest.raises(ConfigError, match=r"--dst: fsdp or titan\? name a topology of one of them"):
        prepare(config)


def test_a_source_may_leave_the_format_to_the_files():
    side = source("dcp", "src.path=there")
    assert (side.format, side.among, side.options.mesh) == (None, ("fsdp", "titan"), None)
    side = source("dcp", "src.format=titan")
    assert (side.format, side.among) == ("titan", ("titan",))
    side = source("dcp", "src.format=hf|meta|titan")
    assert (side.format, side.among) == (None, ("hf", "meta", "titan"))


@pytest.mark.parametrize("given", ["fsdb", "fsdp|titans", "fsdp||titan", "fsdp|"])
def test_a_choice_with_an_unknown_format_is_refused(tmp_path, given):
    side = source("dcp", f"src.format={given}", f"src.path={tmp_path}")
    known = r"format `\w*` is not known; use one of fsdp, gguf, hf, meta"
    with pytest.raises(ConfigError, match=known):
        open_source(side)


@pytest.mark.parametrize(
    ("name", "format_name", "mesh"),
    [
        ("meta8", "meta", Mesh(tp=8)),
        ("meta3", "meta", Mesh(tp=3)),
        ("hf", "hf", None),
        ("tp4", "nanotron", Mesh(tp=4)),
        ("tp3pp2", "nanotron", Mesh(tp=3, pp=2)),
        ("tp4pp2", "nanotron", Mesh(tp=4, pp=2)),
        ("pp10", "nanotron", Mesh(pp=10)),
        ("pp3", "nanotron", Mesh(pp=3)),
        ("dp2tp5", "nanotron", Mesh(tp=5, dp=2)),
        ("tp2pp2dp2", "nanotron", Mesh(tp=2, pp=2, dp=2)),
        ("tp123456", "nanotron", Mesh(tp=123456)),
        ("fsdp2", "fsdp", Mesh(dp=2)),
        ("fsdp3", "fsdp", Mesh(dp=3)),
        ("fsdp64", "fsdp", Mesh(dp=64)),
        ("titan1", "titan", Mesh(dp=1)),
        ("titan8", "titan", Mesh(dp=8)),
        ("titan4", "titan", Mesh(dp=4)),
    ],
)
def test_names_with_numbers_are_topologies(name, format_name, mesh):
    assert target(name).format == format_name
    assert target(name).options.mesh == mesh


def test_each_shipped_file_is_what_its_numbered_name_would_be():
    for name in topology_names():
        mesh = target(name).options.mesh
        word = name.rstrip("0123456789")
        if word in ("meta", "fsdp", "titan"):
            axis = "tp" if word == "meta" else "dp"
            assert mesh == Mesh(**{axis: int(name.removeprefix(word))})
            assert target(name).format == word
        elif mesh is not None:
            axes = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp}
            written = "".join(f"{axis}{size}" for axis, size in axes.items() if size > 1)
            assert name in (written, f"tp{mesh.tp}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mete8", "--dst: topology `mete8` is not known: did you mean `meta8`"),
        ("tp0", "topology `tp0`: sizes begin at 1"),
        ("tp2tp4", "topology `tp2tp4` is not known"),
        ("meta2pp2", "topology `meta2pp2` is not known"),
        ("hf4", "topology `hf4` is not known: did you mean `hf`"),
        ("4tp", "topology `4tp` is not known"),
        ("fsdp0", "topology `fsdp0`: sizes begin at 1"),
        ("titan8tp2", "topology `titan8tp2` is not known: did you mean `titan8`"),
        ("dcp4", "topology `dcp4` is not known: did you mean `dcp`"),
        ("statedicts", "did you mean `statedict`?"),
        ("zzzzzz", "use one of dcp, fsdp16"),
        ("../configs/hf.yaml", "no such directory or file"),
        ("absent.yaml", "--dst absent.yaml: no such directory or file"),
    ],
)
def test_unknown_topologies_are_refused_with_a_near_match(name, message):
    with pytest.raises(ConfigError) as caught:
        target(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_is_a_source_and_not_a_target(tmp_path):
    assert source(str(tmp_path)).path == tmp_path
    assert source(str(tmp_path)).format is None
    with pytest.raises(ConfigError, match=r"a directory is not a target; .* dst.path="):
        target(str(tmp_path))


def test_a_topology_file_may_say_everything(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "format: nanotron\nmesh: {tp: 2, pp: 3}\npath: there\ndtype: float16\nmodel: llama3-8b\n"
        "rope_interleaved: true\nvocab_multiple: 7\n"
    )
    side = target(str(file))
    assert (side.format, str(side.path), side.dtype) == ("nanotron", "there", torch.float16)
    assert side.options.mesh == Mesh(tp=2, pp=3)
    assert side.options.rope_interleaved is True
    assert side.options.vocab_multiple == 7
    assert side.options.model == read_model("llama3-8b")


def test_the_command_line_wins_over_the_job_file_and_that_over_the_topology(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(
        "src: {topology: meta8, path: a}\ndst: {topology: tp4pp2, mesh: {pp: 4}}\n"
        "engine: {memory: 1GB, timeout: 5, fsync: false}\n"
    )
    job = load(None, None, ["engine.memory=64MiB", "src.path=b"], str(file))
    assert (job.source.format, str(job.source.path)) == ("meta", "b")
    assert job.target.options.mesh == Mesh(tp=4, pp=4)
    assert (job.engine.memory, job.engine.timeout, job.engine.fsync) == (64 << 20, 5.0, False)
    job = load("hf", "meta2", ["dst.dtype=bf16", "dst.embedding_dim=1"], str(file))
    assert (job.source.format, job.target.format) == ("hf", "meta")
    assert (job.target.dtype, job.target.options.embedding_dim) == (torch.bfloat16, 1)


def test_defaults_are_those_of_the_contract():
    job = load("meta8", "hf", [], None)
    engine = job.engine
    assert (engine.memory, engine.exchange, engine.writers) == (256 << 20, "collective", "nearest")
    assert (engine.backend, engine.timeout, engine.fsync) == ("auto", 1800.0, True)
    assert job.target.options.max_shard_bytes == 5 * 10**9
    assert job.like is None
    assert not job.strict_replicas


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("src.pth=x", "unknown key `src.pth`: did you mean `path`?"),
        ("src.mesh.tpp=2", "unknown key `src.mesh.tpp`: did you mean `tp`?"),
        ("engine.memry=1GB", "unknown key `engine.memry`: did you mean `memory`?"),
        ("dst.replicas=first", "unknown key `dst.replicas`"),
        ("enigne.memory=1GB", "`enigne.memory=1GB` is not KEY=VALUE with a key below src, dst or"),
        ("src.path", "`src.path` is not KEY=VALUE"),
        ("src=x", "`src=x` is not KEY=VALUE"),
        ("engine.exchange=direkt", "engine.exchange: `direkt`: did you mean `direct`?"),
        ("engine.writers=nearst", "engine.writers: `nearst`: did you mean `nearest`?"),
        ("engine.backend=mpi", "engine.backend: `mpi`: use one of auto, nccl, gloo"),
        ("src.replicas=all", "src.replicas: `all`"),
        ("dst.dtype=bfloat", "dst.dtype: `bfloat`: did you mean `bfloat16`?"),
        ("dst.embedding_dim=2", "dst.embedding_dim: `2`"),
        ("engine.memory=lots", "engine.memory: `lots` is not a size; write it like 256MiB or 5GB"),
        ("dst.max_shard_size=-1", "dst.max_shard_size: `-1` is not a size"),
        ("engine.timeout=0", "engine.timeout: 0 is not a time in seconds"),
        ("engine.timeout=soon", "engine.timeout"),
        ("engine.fsync=maybe", "engine.fsync"),
        ("src.mesh.tp=0", "src.mesh: tp=0 pp=1 dp=1: sizes begin at 1"),
        ("src.mesh.tp=two", "src.mesh.tp"),
        ("src.mesh=3", "src.mesh"),
        ("dst.vocab_multiple=0", "dst.vocab_multiple: 0, expected 1 to"),
        ("src.model=llama9", "src.model: `llama9` is neither a file nor a known model"),
        ("src.model=llama3-80b", "did you mean `llama3-"),
    ],
)
def test_wrong_values_are_refused_in_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        load("meta8", "hf", [override], None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dst.dtype=q8_1", r"did you mean `q8_0`\?"),
        ("dst.dtype=int4", "use one of keep, bfloat16, .*, q8_0$"),
        ("dst.vocab_multiple=10000000", "expected 1 to"),
        ("src.rope_factor=0", "expected a factor such as 8 or 32"),
        ("src.rope_factor=-1", "expected a factor such as 8 or 32"),
        ("src.rope_factor=nan", "expected a factor such as 8 or 32"),
        ("src.version=4", "src.version: `4`"),
        ("src.vocab=many", "src.vocab: `many` is neither"),
    ],
)
def test_what_no_llama_and_no_file_has_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load("meta8", "gguf", [override], None)


@pytest.mark.parametrize("spelt", ["q8_0", "Q8_0", "q4_k_m", "Q4_K_M", "IQ4_NL"])
def test_codecs_are_named_as_tools_name_them(spelt):
    assert target("gguf", f"dst.dtype={spelt}").options.encoding == spelt.lower()


def test_a_file_in_place_of_a_directory_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    side = source("gguf", f"src.path={tmp_path / 'model.gguf'}")
    with pytest.raises(ConfigError, match=r"is a file; give .*, and src.file=model.gguf"):
        open_source(side)


@pytest.mark.parametrize(
    "override",
    ["src.mesh=[a", "src.path=${nope}", "src.path=${oc.env:NOPE_NOPE}", "engine.timeout=nan",
     "engine.timeout=inf", "engine.memory=" + "9" * 400, "src.mesh={a: b}", "src.mesh.tp=[1]"],
)  # fmt: skip
def test_odd_values_are_refused_by_type(override):
    with pytest.raises(ReshardError) as caught:
        load("meta8", "hf", [override], None)
    assert "\n" not in str(caught.value)


def test_direct_exchange_with_owners_is_refused():
    with pytest.raises(
        ConfigError, match=r"engine.writers=owner does not apply to engine.exchange"
    ):
        load("meta8", "hf", ["engine.exchange=direct", "engine.writers=owner"], None)


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "a: [\n", "just text", "1: 2\n", "src: 3\n", "src: {1: 2}\n",
     "src: {mesh: {1: 2}}\n",
     "src: {topology: 5}\n",
     "engine: {memory: [1]}\n", "src: {path: ${nope}}\n", "\x00"],
)  # fmt: skip
def test_odd_job_files_are_refused_by_type(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ReshardError) as caught:
        load(None, None, [], str(file))
    assert "\n" not in str(caught.value)


def test_a_job_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ReshardError, match=r"absent.yaml`: No such file"):
        load(None, None, [], str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256MiB", 256 << 20),
        ("5GB", 5 * 10**9),
        ("1.5GiB", 3 << 29),
        ("10 kb", 10_000),
        ("7KiB", 7 << 10),
        ("123", 123),
    ],
)
def test_sizes_are_read_as_written(text, expected):
    assert parse_size(text, "key") == expected


@pytest.mark.parametrize("text", ["", "MiB", "1TBB", "1 M", "-5GB", "1e9", "0x10", "5GB5"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"key: .* is not a size"):
        parse_size(text, "key")


COUNTS = {
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", model_names())
def test_shipped_models_have_the_published_number_of_parameters(name):
    model = read_model(name)
    parameters = families.parameters(model)
    assert sum(whole(parameter.shape).numel for parameter in parameters) == COUNTS[name]
    assert model.dtype in ("bfloat16", "float16")
    assert model.tied == name.startswith("llama3.2")
    scaled = name.startswith(("llama3.1", "llama3.2", "llama3.3"))
    assert (model.rope_scaling is not None) == scaled


def test_a_model_is_read_from_its_config_or_its_directory(tmp_path):
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model(str(tmp_path)) == read_model(str(tmp_path / "config.json"))
    assert read_model(str(tmp_path)).kv_heads == 2


@pytest.mark.parametrize("path", ["010", "2024_01_02", "1e3", "1:30", "yes", "a: b", "x #1", "[a"])
def test_a_path_is_taken_as_it_stands(path):
    assert load("meta8", "hf", [f"src.path={path}", f"dst.path={path}"], None).source.path == Path(
        path
    )


def test_a_path_that_yaml_reads_as_a_number_is_refused(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("src: {topology: meta8, path: 2024_01}\ndst: {topology: hf, path: out}\n")
    with pytest.raises(ConfigError, match=r"src.path is 202401, expected text; put it in quotes"):
        load(None, None, [], str(file))


def test_a_home_directory_is_expanded():
    side = load("meta8", "hf", ["src.path=~/a"], None).source
    assert side.path == Path("~/a").expanduser()
