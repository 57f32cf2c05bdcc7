"""`fit`: which layouts fit which GPUs, against published figures, transformers and accelerate."""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.accelerate import _get_device_map

from reshard import config, families
from reshard.encodings import ENCODINGS
from reshard.errors import ConfigError, ReshardError
from reshard.fit import Answer, Request, fit
from reshard.fitting import devicemap, vllm
from reshard.fitting.case import positions
from reshard.fitting.gpus import CAPACITY, GIB, parse
from reshard.fitting.memory import ALLOWANCE, first_share, shares
from reshard.fitting.meshes import with_fewer
from reshard.fitting.rows import Row, Section, about
from reshard.fitting.subject import Subject, laid_out, subject_of
from reshard.formats.options import Mesh, Options
from tests.commands import done
from tests.oracles import gguf, hf, meta, mllama, nanotron
from tests.oracles.compare import assert_same
from tests.oracles.models import (
    Model,
    build,
    expected_parameter_count,
    model_a,
    model_b,
    with_normal_values,
)

LLAMA_70B = 70_553_706_496
EVEN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 96,
    "head_dim": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 7,
}


def asked(src: str, gpus: str, *overrides: str, **wishes: Any) -> Answer:
    """What fits, as the command line asks for it."""
    side = config.load(src, None, overrides, None).source
    return fit(side, Request(gpus, words=("--src", src, *overrides), **wishes))


@cache
def imagined(name: str, gpus: str, src: str = "hf", **wishes: Any) -> Answer:
    """What of a model that comes with the program fits."""
    return asked(src, gpus, f"src.model={name}", **wishes)


def subject(src: str, *overrides: str) -> Subject:
    """A model alone."""
    return subject_of(config.load(src, None, overrides, None).source, ())


def section(answer: Answer, use: str) -> Section:
    return next(part for part in answer.sections if part.use == use)


def names(answer: Answer, use: str) -> list[str]:
    return [row.name for row in section(answer, use).rows]


def row(answer: Answer, use: str, name: str) -> Row:
    return next(found for found in section(answer, use).rows if name in found.name)


def reasons(answer: Answer, use: str) -> dict[str, str]:
    return {item.name: item.reason for item in section(answer, use).fallen_out}


# GPUs


@pytest.mark.parametrize(
    ("text", "count", "nodes", "name"),
    [
        ("H100", 1, 1, "H100"),
        ("4xh100", 4, 1, "H100"),
        ("10 x L40", 10, 1, "L40"),
        ("2x8xA100-SXM4-40GB", 16, 2, "A100-40"),
        ("3×NVIDIA RTX 4090", 3, 1, "RTX4090"),
        ("8xMI300X", 8, 1, "MI300X"),
        ("7x3090", 7, 1, "RTX3090"),
        ("2xV100-32GB", 2, 1, "V100-32"),
        ("1xA10G", 1, 1, "A10"),
    ],
)
def test_gpus_are_named_in_every_usual_way(text, count, nodes, name):
    found = parse(text)
    assert (found.count, found.nodes, found.name) == (count, nodes, name)
    assert found.memory == int(CAPACITY[name] * GIB)


def test_memory_can_be_given_instead_of_a_name():
    assert parse("10x48GiB").memory == 48 * GIB
    assert parse("10x48GB").memory == 48 * 10**9
    assert (parse("2x3x1.5GiB").count, parse("2x3x1.5GiB").memory) == (6, 3 * GIB // 2)


def test_no_gpu_has_more_than_its_data_sheet_says():
    sheet = {"H100": 80, "H200": 141, "A100": 80, "A100-40": 40, "L40": 48, "L4": 24, "T4": 16}
    sheet |= {"L40S": 48, "A10": 24, "V100": 16, "V100-32": 32, "RTX4090": 24, "MI300X": 192}
    for name, nominal in sheet.items():
        assert 0.88 * nominal < CAPACITY[name] < nominal


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("4xH101", "did you mean `H100`"),
        ("4xRTX4080", "did you mean `RTX4090`"),
        ("toaster", "use one of B200, H200"),
        ("0xH100", "numbers begin at 1"),
        ("4x0xH100", "numbers begin at 1"),
        ("99999999xH100", "99,999,999 GPUs in 1 node, expected up to 4,096"),
        ("600x1xH100", "600 GPUs in 600 nodes"),
        ("4x999999GiB", "expected 1GiB to 4096GiB"),
        ("4x1MiB", "expected 1GiB to 4096GiB"),
        ("4x", "`4x` is not in the table"),
        ("", "names no GPU"),
        ("10x٣GiB", "not in the table"),
        ("H100\n" * 3, "names no GPU"),
    ],
)
def test_gpus_that_are_none_are_refused_in_one_line(text, pattern):
    with pytest.raises(ConfigError, match=re.escape(pattern)) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wish", "flag"),
    [
        ({"context": 0}, "--context"),
        ({"batch": -1}, "--batch"),
        ({"context": 1 << 40}, "--context"),
    ],
)
def test_absurd_wishes_are_refused(wish, flag):
    with pytest.raises(ConfigError, match=f"{flag}: .* expected 1 to"):
        imagined("llama3-8b", "1xL4", **wish)


# Llama 3.3 70B has the shapes of llama3-70b: the answers that are expected of its figures.


def test_70b_on_4_h100():
    answer = imagined("llama3-70b", "4xH100", "meta8")
    assert answer.subject.elements == LLAMA_70B
    assert names(answer, "inference")[0] == "hf, vLLM -tp 4 on all 4 GPUs"
    assert row(answer, "inference", "meta4").fits
    assert answer.best is section(answer, "inference").rows[0]
    assert section(answer, "training").rows[0].target == "tp4"
    verdict = section(answer, "training").said[0]
    assert verdict.startswith("full AdamW training does not fit: needs 1,1")
    assert f"({LLAMA_70B * 16 / GIB:,.1f} GiB of states)" in verdict
    assert not any(found.fits for found in section(answer, "training").rows)
    assert all("weights only" in found.said[0] for found in section(answer, "training").rows)


def test_70b_on_10_l40():
    answer = imagined("llama3-70b", "10xL40")
    assert names(answer, "inference")[:3] == [
        "hf, vLLM -tp 2 -pp 5 on all 10 GPUs",
        "hf, vLLM -tp 1 -pp 10 on all 10 GPUs",
        "hf, vLLM -tp 8 on 8 of 10 GPUs",
    ]
    assert "64 heads, 8 kv heads" in reasons(answer, "inference")["tp10"]
    targets = [found.target for found in section(answer, "training").rows]
    assert targets == ["tp2pp5", "pp10", "tp8", "fsdp10", "titan10"]
    assert "64 heads, 8 key-value heads" in reasons(answer, "training")["tp10"]
    assert "10 files do not divide 64 heads" in reasons(answer, "inference")["meta10"]
    assert "Nanotron on 8 of 10 GPUs" in row(answer, "training", "tp8").name


def test_the_first_line_is_what_to_type_and_lines_fit_a_terminal():
    for gpus in ("4xH100", "10xL40", "2x8xH100"):
        lines = imagined("llama3-70b", gpus, "meta8").lines()
        assert lines[0] == (
            f"type: launch/torchrun --nproc {8 if 'x8x' in gpus else parse(gpus).count} -m reshard "
            "--src meta8 src.path=DIR --dst hf dst.path=DIR-hf"
        )
        assert lines[1].startswith("then: vllm serve DIR-hf --tensor-parallel-size ")
        assert max(map(len, lines)) <= 100


def test_figures_of_70b_are_those_of_its_published_sizes():
    hidden, layers, width, vocab, kv = 8192, 80, 28672, 128256, 8 * 128
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width + 2 * hidden
    assert layers * layer + 2 * vocab * hidden + hidden == LLAMA_70B
    found = row(imagined("llama3-70b", "4xH100"), "inference", "-tp 4").figures
    norms = (2 * layers + 1) * hidden
    weights = 2 * ((LLAMA_70B - norms) // 4 + norms)
    assert found["weights_bytes"] == weights
    room = int(79.1 * GIB * 0.9 // 1) - 2 * GIB - weights
    assert abs(found["kv_room_bytes"] - room) <= 1
    assert found["kv_bytes_per_token"] == 320 * 1024
    assert found["kv_tokens"] == room // (80 * 2 * 2 * 128 * 2)
    uneven = row(imagined("llama3-70b", "10xL40"), "inference", "-pp 5").figures
    stage = 16 * (2 * (layer - 2 * hidden) // 2 + 2 * 2 * hidden) + vocab * hidden
    assert uneven["weights_bytes"] == stage + 2 * hidden  # the last stage has the norm as well


@pytest.mark.parametrize(
    ("name", "kib"),
    [("llama3-70b", 320), ("llama3-8b", 128), ("llama3.1-405b", 504), ("llama3.2-1b", 32)],
)
def test_kv_cache_per_token_is_the_published_figure(name, kib):
    answer = imagined(name, "8xB200")
    assert f"KV cache {kib} KiB per token" in section(answer, "inference").said[0]


@pytest.mark.parametrize("gpus", ["1xL4", "1x24GiB"])
def test_8b_fits_one_small_gpu(gpus):
    answer = imagined("llama3-8b", gpus)
    best = row(answer, "inference", "vLLM -tp 1 on 1 GPU")
    assert answer.best is best
    usable = int(parse(gpus).memory * 0.9) - 2 * GIB - 2 * 8_030_261_248
    assert best.figures["kv_tokens"] == usable // (128 * 1024)
    assert row(answer, "huggingface", "device_map on 1 GPU").figures["device_map"] == {"": 0}
    assert "does not fit" in section(answer, "training").said[0]


def test_405b_needs_two_nodes_of_8_h100():
    small = imagined("llama3.1-405b", "8xH100")
    assert small.subject.elements == 405_853_388_800
    assert section(small, "inference").said[0] == (
        "bfloat16 does not fit vLLM on 8xH100 (632.8 GiB); 2x8xH100 would do"
    )
    assert small.best is row(small, "inference", "gguf q8_0")
    assert "find no place" in reasons(small, "huggingface")["hf"]
    large = imagined("llama3.1-405b", "2x8xH100")
    assert large.best is not None
    assert large.best.name == "hf, vLLM -tp 8 -pp 2 on all 16 GPUs"
    assert "would cross nodes of 8 GPUs" in reasons(large, "inference")["tp16"]
    assert row(large, "inference", "meta16").fits
    assert large.best.commands[-1][-2:] == ("--distributed-executor-backend", "ray")


def test_what_would_do_does_and_nothing_smaller():
    assert imagined("llama3-70b", "3xH100").best is not None
    answer = imagined("llama3-70b", "1xL40")
    found = re.search(r"; (\S+) would do", section(answer, "inference").said[0])
    assert found is not None
    enough = parse(found[1])
    vllm_names = names(imagined("llama3-70b", found[1]), "inference")
    assert "vLLM" in vllm_names[0]
    fewer = names(imagined("llama3-70b", f"{enough.count - 1}xL40"), "inference")
    assert not [name for name in fewer if "vLLM" in name]


# Replicas


@pytest.mark.parametrize(
    ("name", "gpus", "flags"),
    [
        ("llama3-8b", "8xH100", "--data-parallel-size 8"),
        ("llama3-8b", "7xH100", "--data-parallel-size 7"),
        ("llama3-8b", "8xL4", "--tensor-parallel-size 2 --data-parallel-size 4"),
        ("llama3-8b", "3x1xH100", "--data-parallel-size 3"),
        ("llama3-70b", "8xH100", "--tensor-parallel-size 4 --data-parallel-size 2"),
        ("llama3.3-70b", "2x8xH100", "--tensor-parallel-size 4 --data-parallel-size 4"),
        ("llama3-70b", "2xB200", "--tensor-parallel-size 2"),
        ("llama3-70b", "2x8xL40", "--tensor-parallel-size 8 --pipeline-parallel-size 2"),
        ("llama3.3-70b", "4xH100", "--tensor-parallel-size 4"),
        ("llama3.3-70b", "10xL40", "--tensor-parallel-size 2 --pipeline-parallel-size 5"),
        ("llama3.1-405b", "2x8xH100", "--tensor-parallel-size 8 --pipeline-parallel-size 2"),
        ("llama3-8b", "1xL4", ""),
    ],
)
def test_what_fits_a_part_of_a_node_is_replicated_on_all_gpus(name, gpus, flags):
    answer = imagined(name, gpus)
    assert answer.best is not None
    line = " ".join(answer.best.commands[-1])
    assert line.startswith(" ".join(("vllm serve DIR", flags)).strip() + " --max-model-len ")
    assert not re.search(r"-parallel-size 1\b", "\n".join(answer.lines()))
    assert answer.best.gpus == answer.gpus.count
    said = [line for line in section(answer, "inference").said if "replicas" in line]
    assert len(said) == (answer.gpus.count > 1)
    assert all(("no replicas" in line) == ("--data" not in flags) for line in said)


def test_replicas_on_several_nodes_are_placed_by_ray_some_on_each():
    best = imagined("llama3.3-70b", "2x8xH100").best
    assert best is not None
    assert " ".join(best.commands[-1]).endswith(
        "--data-parallel-size-local 2 --data-parallel-backend ray"
    )


@pytest.mark.parametrize(("more", "first"), [(1, "-tp 1 -dp 2"), (-1, "-tp 2 ")])
def test_a_replica_has_as_much_room_for_kv_cache_as_for_weights(more, first):
    weights = 2 * 8_030_261_248
    memory = (2 * weights + 2 * GIB) / 0.9 + more * MIB
    answer = imagined("llama3-8b", f"2x{memory / GIB:.6f}GiB")
    assert f"vLLM {first}" in names(answer, "inference")[0]


def test_each_replica_serves_the_whole_batch_that_is_wanted():
    room = int(79.1 * GIB * 0.9) - 2 * GIB - 2 * 8_030_261_248
    batch = room // (8192 * 128 * 1024)
    fits, more = (imagined("llama3-8b", "8xH100", batch=size) for size in (batch, batch + 1))
    assert names(fits, "inference")[0] == "hf, vLLM -tp 1 -dp 8 on all 8 GPUs"
    assert names(more, "inference")[0] == "hf, vLLM -tp 2 -dp 4 on all 8 GPUs"
    found = row(fits, "inference", "-dp 8")
    assert found.figures["largest_batch"] == 8 * batch
    assert f"largest batch at 8,192: 8 x {batch}" in " ".join(found.said)
    assert found.figures["kv_tokens"] == room // (128 * 1024)


def test_a_model_of_nine_heads_is_replicated_not_cut_into_stages(tmp_path):
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
    hf.write(build(EVEN | sizes, False, torch.bfloat16, {}), tmp_path / "m")
    best = asked(str(tmp_path / "m"), "4xH100").best
    assert best is not None
    assert best.name == "hf, vLLM -tp 1 -dp 4 on all 4 GPUs"


# Contexts and batches


def test_longest_context_and_largest_batch_are_the_last_that_fit():
    plain = row(imagined("llama3-8b", "1xL4"), "inference", "vLLM").figures
    tokens, batch = plain["kv_tokens"], plain["largest_batch"]
    assert row(imagined("llama3-8b", "1xL4", batch=batch), "inference", "vLLM").fits
    more = imagined("llama3-8b", "1xL4", batch=batch + 1, context=8192)
    assert f"KV cache for {tokens:,} tokens" in reasons(more, "inference")["tp1"]
    tokens = row(imagined("llama3.2-3b", "1xT4"), "inference", "vLLM").figures["kv_tokens"]
    exact = imagined("llama3.2-3b", "1xT4", context=tokens)
    assert row(exact, "inference", "vLLM").figures["context"] == tokens
    assert "tp1" in reasons(imagined("llama3.2-3b", "1xT4", context=tokens + 1), "inference")


def test_a_context_beyond_the_models_positions_is_recommended_by_nobody():
    answer = imagined("llama3-70b", "4xH100", context=8193)
    said = "the model has 8,192 positions, asked for 8,193"
    assert answer.lines()[0].startswith("nothing fits 4xH100")
    for use, runners in (("inference", {"vLLM", "meta", "gguf"}), ("huggingface", {"hf"})):
        assert not section(answer, use).rows
        assert set(reasons(answer, use)) == runners
        assert all(reason.startswith(f"{said}; ") for reason in reasons(answer, use).values())
    assert reasons(answer, "inference")["vLLM"].endswith("vLLM refuses more")
    assert imagined("llama3-70b", "4xH100", context=8192).best is not None
    best = imagined("llama3.3-70b", "4xH100", context=32768).best
    assert best is not None
    assert best.commands[-1][-2:] == ("--max-model-len", "32768")


def test_llama_3_3_is_llama_3_with_more_positions():
    older, newer = (imagined(f"llama3{dot}-70b", "4xH100", "meta8") for dot in ("", ".3"))
    assert newer.subject.elements == older.subject.elements == LLAMA_70B
    assert names(newer, "inference") == names(older, "inference")
    # The runner of Llama 3.1 and later has the tokenizer in itself.
    flags = [" ".join(row(a, "inference", "meta4").commands[-1]) for a in (older, newer)]
    assert ["--tokenizer_path" in line for line in flags] == [True, False]


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 2.5}, 10240),
        ({"type": "dynamic", "factor": 2}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 2048}, 4096),
        ({"rope_type": "llama3", "factor": 8.0}, 4096),
    ],
)
def test_positions_count_the_scaling_that_comes_on_top(scaling, most):
    assert positions(_known(max_position_embeddings=4096, rope_scaling=scaling)) == most


def test_a_context_that_was_not_asked_for_is_shortened():
    found = row(imagined("llama3.2-3b", "1xT4"), "inference", "vLLM").figures
    assert 1024 < found["context"] < 131072
    assert found["context"] % 16 == 0
    assert found["context"] <= found["kv_tokens"] < found["context"] + 16
    refused = imagined("llama3.2-3b", "1xT4", context=131072)
    assert "context 131,072 x batch 1" in reasons(refused, "inference")["tp1"]


def test_what_serves_a_usual_context_goes_before_what_was_shortened():
    answer = imagined("llama3-70b", "7x24GiB")
    contexts = [found.context for found in section(answer, "inference").rows]
    assert contexts == [8192, 8192, 8192, 2640]
    assert answer.best is row(answer, "inference", "gguf bfloat16")
    assert "shortened" not in "".join(answer.lines())
    assert "--max-model-len 2640" in " ".join(row(answer, "inference", "-pp 7").commands[-1])


def test_the_head_says_that_its_context_is_shortened():
    answer = imagined("llama3.2-3b", "1xT4")
    assert answer.best is not None
    head = answer.lines()[: answer.lines().index("")]
    assert head[-1] == (
        f"      context {answer.best.context:,}, shortened to what fits: 131,072 is the model's "
        "max_position_embeddings"
    )
    assert "shortened" not in "".join(imagined("llama3.2-3b", "1xT4", context=8192).lines())


# vLLM's rules


def test_layers_that_are_left_over_go_before_the_last_stage():
    assert vllm.layers_of(10, 4) == [2, 3, 3, 2]
    assert vllm.layers_of(11, 4) == [3, 3, 3, 2]
    assert vllm.layers_of(126, 4) == [31, 32, 32, 31]
    assert vllm.layers_of(5, 5) == [1] * 5


@pytest.mark.parametrize(
    ("heads", "kv", "legal"),
    [(12, 6, {1, 2}), (8, 2, {1, 2, 4, 8}), (6, 1, {1, 2}), (9, 3, {1})],
)
def test_tensor_parallel_sizes_are_those_that_vllm_takes(heads, kv, legal):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": 720}
    known = _known(**sizes)
    found = {tp for tp in range(1, 13) if vllm.refused(known, Mesh(tp, 1)) is None}
    assert found == legal


def _known(**sizes: int) -> Any:
    return families.from_hf(build(EVEN | sizes, False, torch.bfloat16, {}).config, "config.json")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (8, 1), (2, 3), (4, 7)])
def test_vllm_stages_hold_every_weight_once_but_copies(tmp_path, tied, tp, pp):
    model = build(EVEN, tied, torch.bfloat16, {})
    hf.write(model, tmp_path / "m")
    held = subject(str(tmp_path / "m"))
    stages = vllm.weights_of(held, held.known, Mesh(tp, pp))
    hidden, kv, layers = 64, 4 * 8, 7
    norms = 2 * (layers * 2 + 1) * hidden
    table = 2 * 128 * hidden  # 96 rows, padded to 128
    twice = 2 * layers * 2 * kv * hidden * (max(tp, 4) // 4 - 1)  # copies of key-value heads
    copied_table = table if tied and pp > 1 else 0
    plain = 2 * expected_parameter_count(model.config)
    padding = (1 if tied else 2) * 2 * 32 * hidden
    expected = plain + padding + twice + copied_table + norms * (tp - 1)
    assert tp * sum(stages) == expected


@pytest.mark.parametrize(
    ("gpus", "layers", "rest"),
    [("17xL4", 40, Mesh(2, 8)), ("17xL4", 7, Mesh(2, 7)), ("3x5xL4", 40, Mesh(2, 6))],
)
def test_the_largest_legal_tp_of_a_node_is_tried_on_what_it_leaves(gpus, layers, rest):
    legal = {1, 2}.__contains__
    every = [Mesh(17, 1), Mesh(1, 17)]
    assert with_fewer(every, parse(gpus), layers, legal) == [*every, rest]
    assert with_fewer([rest], parse(gpus), layers, legal) == [rest]


# accelerate and transformers


MIB = 1 << 20


def both(tied: bool, kind: str, layers: int = 9) -> tuple[Any, Any]:
    """A model of transformers without weights, tied as its config says, and our skeleton of it.

    Layers of 4 MiB and tables of 2 MiB, since a max_memory is in whole MiB.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 704, "vocab_size": 1800, "head_dim": 64}
    given = build(EVEN, tied, torch.bfloat16, {"model_type": kind}).config
    given = {**given, **sizes, "num_hidden_layers": layers}
    with init_empty_weights():
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**given), dtype=torch.bfloat16
        )
    theirs.tie_weights()
    known = families.from_hf(given, "config.json")
    return theirs, devicemap.skeleton(families.parameters(known), known)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_skeleton_is_mapped_as_the_real_model(kind, tied):
    theirs, ours = both(tied, kind)
    whole = sum(tensor.nbytes for tensor in theirs.parameters())
    split = list(theirs._no_split_modules)
    for count, most in ((1, whole + 9 * MIB), (2, whole), (3, whole // 2), (5, 11 * MIB)):
        placed = devicemap.device_map(ours, count, most)
        found, caps, given = placed.places, list(placed.caps), dict(enumerate(placed.caps))
        assert found == infer_auto_device_map(theirs, dict(given), split)
        # What transformers makes of the device_map and max_memory that are printed.
        assert found == _get_device_map(theirs, placed.how, dict(given), None)
        used = {gpu: cap for gpu, cap in given.items() if gpu <= max(placed.used)}
        assert found == _get_device_map(theirs, placed.how, used, None)
        if len(set(found.values())) == count:
            balanced = get_balanced_memory(theirs, dict.fromkeys(range(count), most), split)
            assert caps == [cap // MIB * MIB for cap in balanced.values()]


def test_bytes_on_each_device_are_those_of_the_real_modules():
    theirs, ours = both(True, "llama")
    found = devicemap.device_map(ours, 3, 40 * MIB).places
    held = devicemap.held_by(ours, found)
    assert set(held) == {0, 1, 2}
    expected = dict.fromkeys(held, 0)
    for name, device in found.items():
        module = theirs.get_submodule(name)
        expected[device] += sum(
            tensor.nbytes for tensor in (*module.parameters(), *module.buffers())
        )
    table = theirs.lm_head.weight.nbytes  # tied: in two modules, there once
    expected[found["lm_head"]] -= table
    assert held == expected


def test_shares_that_are_too_small_for_the_embedding_are_no_end():
    """Balanced, GPU 0 keeps room for the largest layer, a table here, and the rest spills."""
    answer = imagined("llama3.2-1b", "8x2.6GiB", context=1024)
    found = row(answer, "huggingface", "device_map")
    assert max(found.figures["held_bytes"].values()) <= parse("2.6GiB").memory - ALLOWANCE
    # "auto" would balance again.
    assert 'device_map="sequential",' in found.commands[-1]
    assert len(found.figures["max_memory_bytes"]) == 6


def test_no_gpu_before_the_last_is_left_empty():
    """Eighths of a small model are less than its table: on 8 GPUs the last one would have all."""
    found = row(imagined("llama3.2-1b", "8xH100"), "huggingface", "device_map on 4 of 8").figures
    assert set(found["device_map"].values()) == {0, 1, 2, 3}
    assert found["device_map"]["lm_head"] == found["device_map"]["model.embed_tokens"] == 0


def test_the_map_is_checked_whoever_made_it(monkeypatch):
    def all_on_one(*_):
        return devicemap.Placed({"": 1}, (0, 0), "auto")

    monkeypatch.setattr(devicemap, "device_map", all_on_one)
    answer = asked("hf", "2x10GiB", "src.model=llama3-8b")
    assert "15.0 GiB of 15.0 GiB find no place" in reasons(answer, "huggingface")["hf"]


def test_a_map_that_spills_is_no_fit():
    answer = imagined("llama3-8b", "3x7GiB")
    assert not section(answer, "huggingface").rows
    assert re.search(
        r"GiB of 15.0 GiB find no place on 3x7GiB", reasons(answer, "huggingface")["hf"]
    )


def test_the_printed_map_keeps_every_gpu_within_its_memory():
    answer = imagined("llama3-70b", "10xL40")
    found = row(answer, "huggingface", "device_map").figures
    held = found["held_bytes"]
    assert sorted(held) == [str(gpu) for gpu in range(10)]
    assert max(held.values()) <= parse("10xL40").memory - ALLOWANCE
    assert sum(held.values()) == 2 * LLAMA_70B + 2 * 64 * 4  # two buffers of frequencies
    line = " ".join(row(answer, "huggingface", "device_map").commands[-1])
    assert 'from_pretrained("DIR", device_map="auto", dtype="bfloat16", max_memory=' in line
    said = row(answer, "huggingface", "device_map").said
    assert "cuda:0: model.embed_tokens, model.layers.0-6: 13.1 GiB" in said
    memory = eval(line[line.index("max_memory=") + 11 : -1], {"dict": dict, "range": range})
    assert [int(memory[gpu][:-3]) * MIB for gpu in range(10)] == found["max_memory_bytes"]


# GGUF


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("encoding", ["q8_0", "q4_0"])
def test_gguf_sizes_are_those_of_the_codecs_which_need_not_be_there(
    tmp_path, monkeypatch, encoding, tied
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    model = build(EVEN, tied, torch.bfloat16, {})
    hf.write(model, tmp_path / "m")
    found = row(asked(str(tmp_path / "m"), "1xL4"), "inference", encoding).figures
    codec = ENCODINGS[encoding]
    assert found["file_bytes"] == sum(
        tensor.numel() // 32 * codec.nbytes if tensor.dim() > 1 else 4 * tensor.numel()
        for tensor in model.tensors.values()
    )


def test_gguf_sizes_of_8b_are_the_published_ones():
    # Meta-Llama-3-8B-Instruct-Q8_0.gguf is 8.54 GB, Q4_0 with its output in Q4_0 is 4.52 GB.
    answer = imagined("llama3-8b", "1xL40")
    assert 8.52e9 < row(answer, "inference", "q8_0").figures["file_bytes"] < 8.55e9
    assert 4.50e9 < row(answer, "inference", "q4_0").figures["file_bytes"] < 4.55e9


# Training


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 4), (2, 3), (6, 2)])
def test_shares_are_those_of_nanotrons_own_walk(tmp_path, tied, tp, pp):
    model = model_a(tied)
    hf.write(model, tmp_path / "m")
    made = laid_out(subject(str(tmp_path / "m")), "nanotron", Options(mesh=Mesh(tp, pp)))
    found = [share.elements for share in shares(made)]
    where, expected = nanotron.stage_of_blocks(model.config, pp), [0] * (tp * pp)
    # Tied over several stages, the last one has a copy of the table.
    copied = {**model.config, "tie_word_embeddings": tied and pp == 1}
    table = model.tensors["model.embed_tokens.weight"]
    for parameter in nanotron.parameters(copied):
        numel = sum(model.tensors.get(name, table).numel() for name in parameter.sources)
        for rank in range(tp):
            share = numel if parameter.dim is None else numel // tp
            expected[where[parameter.block] * tp + rank] += share
    assert max(found) == max(expected)
    if tied and pp > 1:
        expected[-tp:] = [share - table.numel() // tp for share in expected[-tp:]]
    assert found[::tp] == expected[::tp]  # the first rank of each stage
    assert sum(found) == expected_parameter_count(model.config)


@pytest.mark.parametrize("world", [1, 3, 7, 64])
def test_the_first_fsdp_rank_holds_what_torch_chunks_give_it(tmp_path, world):
    model = model_b(tied=True)
    hf.write(model, tmp_path / "m")
    made = laid_out(subject(str(tmp_path / "m")), "fsdp", Options(mesh=Mesh(dp=world)))
    chunks = [tensor.chunk(world) for tensor in model.tensors.values()]
    ranks = [sum(parts[r].numel() for parts in chunks if r < len(parts)) for r in range(world)]
    assert [share.elements for share in shares(made)] == ranks
    assert first_share(made).elements == max(ranks)


def test_training_counts_18_bytes_in_nanotron_and_16_in_fsdp():
    answer = imagined("llama3-8b", "8xH100", context=2048)
    elements, hidden, layers, vocab = 8_030_261_248, 4096, 32, 128256
    activations = 2048 * (2 * layers * hidden + 34 * hidden + 6 * vocab)
    norms = (2 * layers + 1) * hidden
    tp8 = row(imagined("llama3-8b", "8xL40", context=2048), "training", "tp8").figures
    rank = (elements - norms) // 8 + norms
    assert tp8["weights_bytes"] == 2 * rank
    assert tp8["training_bytes"] == 18 * rank + activations // 8 + ALLOWANCE
    fsdp = row(answer, "training", "fsdp8").figures
    gathered = 6 * (2 * vocab * hidden + hidden)  # what is outside of the layers is the largest
    assert fsdp["training_bytes"] == 16 * elements // 8 + activations + gathered + ALLOWANCE


def test_what_is_counted_for_fsdp_gives_the_figure():
    answer = imagined("llama3-70b", "4xH100")
    verdict, counted = section(answer, "training").said
    outside = 2 * 128256 * 8192 + 8192  # tables and norm
    assert f"6 x {outside:,} bytes, 11.7 GiB" in counted
    activations = 4096 * (2 * 80 * 8192 + 34 * 8192 + 6 * 128256)
    total = 16 * LLAMA_70B // 4 + 6 * outside + activations + 2 * GIB
    assert row(answer, "training", "fsdp4").figures["training_bytes"] == total
    assert f"training takes {total / GIB:.1f} GiB" in row(answer, "training", "fsdp4").said[0]
    assert verdict.endswith(" with sequences of 4,096 tokens, the default: --context sets it")
    longer = imagined("llama3-70b", "4xH100", context=8192)
    assert section(longer, "training").said[0].endswith(" with sequences of 8,192 tokens")


def test_the_smallest_number_of_gpus_for_training_is_the_first_that_fits():
    answer = imagined("llama3-8b", "1xA100")
    found = re.search(r"; (\d+) of them would do \(fsdp\1\)", section(answer, "training").said[0])
    assert found is not None
    count = int(found[1])
    assert row(imagined("llama3-8b", f"{count}xA100"), "training", "fsdp").fits
    fewer = imagined("llama3-8b", f"{count - 1}xA100")
    assert not any(r.fits and r.target.startswith("fsdp") for r in section(fewer, "training").rows)


def test_training_that_fits_comes_first_and_is_data_parallel_where_it_can():
    answer = imagined("llama3.2-1b", "8xH100")
    assert section(answer, "training").said[0] == "full AdamW training fits"
    assert [found.target for found in section(answer, "training").rows][:2] == ["dp8", "tp2dp4"]
    assert all(found.fits for found in section(answer, "training").rows)


def test_where_activations_alone_are_too_much_no_number_is_named():
    said = section(imagined("llama3.1-405b", "8xL40"), "training").said[0]
    assert "no number of them would do" in said


# Sources


def write_source(kind: str, path: Path) -> Model:
    """A small source of a kind; the model that it holds."""
    model = model_b() if kind != "gguf" else build(EVEN, False, torch.float32, {})
    if kind == "hf":
        hf.write(model, path)
    elif kind == "float32":
        model = model_a(dtype=torch.float32)
        hf.write(model, path)
    elif kind == "meta":
        meta.write(model, path, 3)
    elif kind == "nanotron":
        nanotron.write(model, path, 3, 1)
    else:
        gguf.write(with_normal_values(model), path, Kind.Q8_0)
    return model


def test_a_layout_that_is_there_already_is_not_made_again(tmp_path):
    for kind, use, name in (
        ("hf", "inference", "vLLM"),
        ("meta", "inference", "meta3"),
        ("nanotron", "training", "tp3: Nanotron"),
        ("gguf", "inference", "gguf q8_0"),
    ):
        path = tmp_path / kind
        write_source(kind, path)
        answer = asked(str(path), "3xL4")
        held = row(answer, use, name)
        lines = [*section(answer, use).said, *held.said]
        assert sum(line.startswith("the source is ") for line in lines) == 1, held
        assert not held.check
        assert not any("reshard" in command for command in held.commands)
        assert use == "training" or str(path) in " ".join(held.commands[-1])
    assert (
        tmp_path / "gguf" / Path(row(asked(str(path), "3xL4"), use, name).commands[0][2]).name
    ).is_file()


def test_a_quantised_source_is_sized_as_it_is_de_quantised(tmp_path):
    model = write_source("gguf", tmp_path / "q8")
    answer = asked(str(tmp_path / "q8"), "2xL4")
    assert answer.subject.nbytes == 2 * expected_parameter_count(model.config)
    assert any("quantised (q8_0)" in note for note in answer.subject.notes)
    assert answer.best is not None
    assert "dst.dtype=bfloat16" in answer.best.commands[0]


def test_float32_is_sized_as_bfloat16_and_cast_in_every_command(tmp_path):
    model = write_source("float32", tmp_path / "f32")
    answer = asked(str(tmp_path / "f32"), "3xL4")
    assert answer.subject.nbytes == 2 * expected_parameter_count(model.config)
    for part in answer.sections:
        for found in part.rows:
            assert any("dst.dtype=" in word for word in found.commands[0]), found


def test_a_model_of_three_heads(tmp_path):
    hf.write(model_b(), tmp_path / "b")
    answer = asked(str(tmp_path / "b"), "3xL4")
    assert row(answer, "training", "tp3").fits
    assert row(answer, "inference", "meta3").fits
    assert "padded vocabulary 128" in reasons(answer, "inference")["tp3"]
    assert (
        "rows of 36 elements are no whole q8_0 blocks" in reasons(answer, "inference")["gguf q8_0"]
    )
    four = asked(str(tmp_path / "b"), "4xL4")
    assert "6 heads, 3 kv heads" in reasons(four, "inference")["tp4"]
    assert row(four, "training", "tp3: Nanotron on 3 of 4 GPUs").fits


def test_a_vocabulary_that_tp_does_not_divide_is_padded_by_the_command(tmp_path):
    hf.write(model_a(vocab_size=223), tmp_path / "m")
    found = row(asked(str(tmp_path / "m"), "2x24GiB"), "training", "tp2: Nanotron")
    assert "dst.vocab_multiple=1" in found.commands[0]


def test_a_family_that_is_not_known_has_sizes_and_a_map(tmp_path):
    model = mllama.tiny()
    mllama.write_config(tmp_path)
    tensors = mllama.published(model.state_dict())
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    answer = asked(str(tmp_path), "2xL4")
    assert not section(answer, "inference").rows
    assert "heads and layers are not" in section(answer, "inference").said[0]
    assert answer.best is row(answer, "huggingface", "device_map")
    assert row(answer, "training", "fsdp2").fits
    assert "model type mllama is not known" in reasons(answer, "training")["tp2"]
    expected = 2 * sum(tensor.numel() for tensor in tensors.values())
    assert answer.subject.nbytes == expected


def test_commands_name_the_source_as_the_user_did(tmp_path):
    path = tmp_path / "a model"
    meta.write(model_a(), path, 2)
    spoken = asked(str(path), "2xL4", "src.version=3").best
    assert spoken is not None
    assert spoken.commands[0][5:] == (
        *("--src", f"'{path}'", "src.version=3"),
        *("--dst", "hf", f"'dst.path={path}-hf'"),
    )
    side = config.load("meta2", None, [f"src.path={path}"], None).source
    plain = fit(side, Request("2xL4")).best
    assert plain is not None
    assert plain.commands[0][5:8] == ("--src", "meta2", f"'src.path={path}'")


def test_every_printed_reshard_command_runs(tmp_path):
    model = build(EVEN | {"num_hidden_layers": 2}, False, torch.bfloat16, {"vocab_size": 128})
    meta.write(model, tmp_path / "m", 2)
    answer = asked(str(tmp_path / "m"), "2xL4")
    made = set()
    for part in answer.sections:
        for found in part.rows:
            command = found.commands[0]
            if command[0] == "launch/torchrun" and command not in made:
                made.add(command)
                done(*command[5:])
    assert len(made) >= 6
    assert answer.best is not None
    assert answer.best.check[:4] == ("python", "-m", "reshard", "verify")
    done(*answer.best.check[3:])
    assert_same(hf.read(tmp_path / "m-hf"), model)
    sizes = row(answer, "inference", "q8_0").figures["file_bytes"]
    file = tmp_path / "m-gguf-q8_0" / "model-Q8_0.gguf"
    assert sizes < file.stat().st_size < sizes + 16384


# The answer


def test_json_has_every_row_and_every_reason():
    answer = imagined("llama3-70b", "10xL40")
    record = json.loads(json.dumps(answer.to_json()))
    assert record["best"]["commands"][-1].startswith("vllm serve DIR --tensor-parallel-size 2")
    assert record["parameters"] == LLAMA_70B
    assert record["gpus"] == {
        "spec": "10xL40",
        "count": 10,
        "nodes": 1,
        "memory_bytes": int(CAPACITY["L40"] * GIB),
        "known": True,
    }
    assert set(record["uses"]) == {"inference", "huggingface", "training"}
    assert "tp10" in record["uses"]["training"]["fallen_out"]
    assert record["uses"]["huggingface"]["rows"][0]["figures"]["device_map"]["lm_head"] == 9


def test_the_head_names_the_check_of_what_is_written():
    lines = imagined("llama3-70b", "4xH100", "meta8").lines()
    assert [line[:6] for line in lines[:3]] == ["type: ", "then: ", "check:"]
    assert lines[2] == "check: python -m reshard verify DIR-hf --load"
    there = imagined("llama3-70b", "4xH100")
    assert "check:" not in "".join(there.lines())
    assert (
        "".join(
            there.lines()[
                : there.lines().index("HUGGING FACE transformers, device_map by accelerate")
            ]
        ).count("the source is hf already")
        == 1
    )
    checks = {found.check for part in there.sections for found in part.rows if found.check}
    assert ("python", "-m", "reshard", "verify", "DIR-gguf-q8_0", "--load") in checks


def test_many_tokens_are_told_in_three_digits_rounded_down():
    assert [about(count) for count in (99_999, 100_999, 476_237, 1_239_999)] == [
        *("99,999", "100,000", "476,000", "1,230,000")
    ]
    found = row(imagined("llama3-70b", "4xH100"), "inference", "-tp 4")
    assert found.said[0].endswith(" per GPU: 476,000 tokens")
    assert found.to_json()["figures"]["kv_tokens"] == 476_237


def test_where_nothing_fits_the_first_line_says_so():
    lines = imagined("llama3.1-405b", "1xT4").lines()
    assert lines[0] == "nothing fits 1xT4: why, and what would, is said below"


@pytest.mark.parametrize(
    "gpus", ["7xT4", "100xRTX3090", "64x8xB200", "1x2GiB", "3x5xA10", "4096xH100"]
)
@pytest.mark.parametrize("name", ["llama3.2-3b", "llama3.1-405b"])
def test_any_number_of_gpus_has_an_answer(name, gpus):
    answer = imagined(name, gpus)
    assert max(map(len, answer.lines())) <= 100
    for part in answer.sections:
        assert part.rows or part.fallen_out
        for found in part.rows:
            assert found.gpus <= answer.gpus.count


def test_a_source_that_is_none_is_refused():
    with pytest.raises(ReshardError, match="which checkpoint"):
        asked("hf", "4xH100")
