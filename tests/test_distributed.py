"""Which backend fits the ranks and the GPUs of a machine, and that all machines take the same."""

import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from reshard import backends, distributed
from reshard.backends import Build, Word, choose_backend, common
from reshard.errors import ConfigError, PeerError
from reshard.lastwords import report_failure
from reshard.meeting import launched_rank, launched_world
from tests.commands import move
from tests.interrupted import Undisturbed
from tests.launched import SHIM, environment, ours, start
from tests.oracles.compare import assert_same_files

CPU_BUILD = Build("torch 2.13.0+cpu", cuda=False, nccl=False, starts=False)
CUDA_BUILD = Build("torch 2.13.0+cu128")
NO_DRIVER = Build("torch 2.13.0+cu128", starts=False)
NO_NCCL = Build("torch 2.13.0+cu128", nccl=False)
NO_GLOO = Build("torch 2.13.0+cu128", gloo=False)


@pytest.mark.parametrize(
    ("asked", "ranks", "devices", "build", "backend"),
    [
        ("auto", 1, 0, CPU_BUILD, "gloo"),
        ("auto", 8, 0, CPU_BUILD, "gloo"),
        ("auto", 8, 0, NO_DRIVER, "gloo"),
        ("auto", 1, 1, CUDA_BUILD, "nccl"),
        ("auto", 8, 8, CUDA_BUILD, "nccl"),
        ("auto", 4, 8, CUDA_BUILD, "nccl"),
        ("gloo", 8, 8, CUDA_BUILD, "gloo"),
        ("gloo", 8, 4, NO_NCCL, "gloo"),
        ("gloo", 8, 4, CPU_BUILD, "gloo"),
        ("gloo", 8, 0, CPU_BUILD, "gloo"),
        ("nccl", 8, 8, CUDA_BUILD, "nccl"),
        ("nccl", 1, 8, CUDA_BUILD, "nccl"),
    ],
)
def test_the_obvious_backend_needs_no_remark(asked, ranks, devices, build, backend):
    assert choose_backend(asked, ranks, devices, build) == (backend, None)


LACKS = [
    (8, 4, CUDA_BUILD, "8 ranks on 4 GPUs", "so start --nproc-per-node 4"),
    (2, 1, CUDA_BUILD, "2 ranks on 1 GPU", "so start --nproc-per-node 1"),
    (4, 4, CPU_BUILD, "4 GPUs, but torch 2.13.0+cpu was built without CUDA", "build with CUDA"),
    (1, 1, CPU_BUILD, "1 GPU, but torch 2.13.0+cpu was built without CUDA", "build with CUDA"),
    (4, 4, NO_DRIVER, "4 GPUs, but CUDA does not start on them", "driver is new enough for torch"),
    (4, 4, NO_NCCL, "4 GPUs, but torch 2.13.0+cu128 was built without NCCL", "build with NCCL"),
]
NO_GPUS = [
    (1, 0, CUDA_BUILD, "no CUDA device was found", "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"),
    (1, 0, NO_DRIVER, "no CUDA device was found", "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"),
    (1, 0, CPU_BUILD, "no CUDA device, and torch 2.13.0+cpu was built", "a build with CUDA"),
]


@pytest.mark.parametrize(("ranks", "devices", "build", "what", "remedy"), LACKS + NO_GPUS)
def test_nccl_that_cannot_be_is_refused_with_what_is_missing(ranks, devices, build, what, remedy):
    with pytest.raises(ConfigError) as caught:
        choose_backend("nccl", ranks, devices, build)
    said = str(caught.value)
    assert said.startswith(f"engine.backend=nccl: {what}")
    assert remedy in said
    assert said.endswith(", or use engine.backend=gloo")


@pytest.mark.parametrize(("ranks", "devices", "build", "what", "remedy"), LACKS)
def test_gpus_that_are_not_used_are_remarked_on(ranks, devices, build, what, remedy):
    assert choose_backend("auto", ranks, devices, build) == ("gloo", f"{what}: using Gloo on CPU")


@pytest.mark.parametrize(("ranks", "devices", "build", "what", "remedy"), NO_GPUS)
def test_a_machine_without_gpus_is_not_remarked_on(ranks, devices, build, what, remedy):
    assert choose_backend("auto", ranks, devices, build) == ("gloo", None)


@pytest.mark.parametrize(("asked", "devices", "taken"), [("gloo", 8, "gloo"), ("auto", 8, "nccl")])
def test_no_backend_works_without_gloo(asked, devices, taken):
    with pytest.raises(ConfigError, match=rf"={taken}: torch 2.13.0\+cu128 was built without Gloo"):
        choose_backend(asked, 2, devices, NO_GLOO)


def test_a_rank_that_is_alone_can_do_without_gloo(monkeypatch):
    monkeypatch.setattr(backends, "build_here", lambda: NO_GLOO)
    assert backends.own_word("gloo", 1, alone=True) == Word("gloo", "gloo")
    assert "built without Gloo" in backends.own_word("gloo", 1, alone=False).refusal


def test_gpus_are_counted_where_torch_sees_none(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "DRIVER", tmp_path)
    assert backends.gpus_here() == 0
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:02:00.0").mkdir()
    assert backends.gpus_here() == 2
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert backends.gpus_here() == 1


# What machines agree on.

GLOO, NCCL = Word("auto", "gloo"), Word("auto", "nccl")
NO_GPU = Word("nccl", refusal="engine.backend=nccl: no CUDA device")
FEW = Word("auto", "gloo", "8 ranks on 4 GPUs: using Gloo on CPU")
AGREED = {
    "alike": ([NCCL, NCCL], NCCL),
    "on the CPU": ([GLOO, GLOO, GLOO], GLOO),
    "asked in two ways": ([Word("nccl", "nccl"), NCCL], Word("nccl", "nccl")),
    "a remark of any": ([GLOO, FEW], FEW),
    "auto, one without": (
        [NCCL, NCCL, GLOO],
        Word("auto", "gloo", "rank 2 has no GPU, others have: using Gloo on CPU"),
    ),
    "auto, one with too few": ([FEW, NCCL], FEW),
    "all refuse": ([NO_GPU, NO_GPU], Word("", refusal=NO_GPU.refusal)),
    "one refuses": (
        [Word("nccl", "nccl"), NO_GPU],
        Word("", refusal=f"{NO_GPU.refusal} (rank 1)"),
    ),
    "two commands": (
        [Word("gloo", "gloo"), Word("gloo", "gloo"), NCCL],
        Word(
            "",
            refusal="engine.backend: gloo (engine.backend=gloo) on rank 0 and nccl "
            "(engine.backend=auto) on rank 2; give the same one on all machines",
        ),
    ),
}


@pytest.mark.parametrize("name", AGREED)
def test_all_ranks_take_the_same_backend(name):
    words, agreed = AGREED[name]
    assert common(words) == agreed


@pytest.mark.parametrize("name", ["alike", "auto, one without", "one refuses"])
def test_ranks_agree_through_the_store_and_the_first_goes_last(name):
    words, agreed = AGREED[name]
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    found, ended = dict[int, Word](), list[int]()

    def come(rank):
        own = TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=20))
        found[rank] = backends.exchanged(own, rank, len(words), words[rank])
        ended.append(rank)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(words))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(len(words)), agreed)
    if agreed.refusal:
        assert int(store.add("seen", 0)) == len(words) - 1


def test_a_rank_that_refuses_and_meets_nobody_says_why_it_refuses():
    def meet():
        raise PeerError("the ranks could not meet: not all of 2 came")

    with pytest.raises(ConfigError, match="no CUDA device"):
        backends.agreed(NO_GPU, 1, 2, meet)
    with pytest.raises(PeerError, match="not all of 2 came"):
        backends.agreed(NCCL, 1, 2, meet)


def test_nccl_on_two_machines_of_which_one_has_no_gpu_is_refused_in_a_line(tmp_path):
    words = ["-m", "tests.believing", "1", "run", "engine.backend=nccl", "engine.timeout=60"]
    words += ["--src", "hf", f"src.path={tmp_path}", "--dst", "tp2", f"dst.path={tmp_path / 'dst'}"]
    found = start([*SHIM, *words], tmp_path)
    (line,) = ours(found.stderr)
    assert "engine.backend=nccl: no CUDA device" in line
    assert line.endswith("or use engine.backend=gloo (rank 0)")
    assert found.returncode == 2


def test_ranks_without_a_launchers_store_agree_too(undisturbed: Undisturbed, tmp_path: Path):
    """As srun or mpirun start them: rank 0 keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = move("meta4", undisturbed.source, "tp2", tmp_path / "dst")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.believing", "1", *map(str, words)],
            env=environment(**place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "rank 0 has no GPU, others have: using Gloo on CPU" in said[0][0]
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])


@pytest.mark.parametrize(
    ("place", "ranks"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 4),
        ({"LOCAL_RANK": "2"}, 3),
        ({"LOCAL_WORLD_SIZE": "3"}, 3),
        ({}, 1),
    ],
)
def test_ranks_of_a_machine_are_counted_by_what_the_launcher_says(monkeypatch, place, ranks):
    """No two ranks ever get one GPU: the device is that of the local rank."""
    monkeypatch.setattr(backends, "build_here", lambda: CUDA_BUILD)
    monkeypatch.setattr(backends, "gpus_here", lambda: ranks)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    word, _ = distributed._agreed("nccl", timedelta(seconds=1))
    assert word == Word("nccl", "nccl")
    monkeypatch.setattr(backends, "gpus_here", lambda: ranks - 1)
    with pytest.raises(ConfigError, match=rf"{ranks} ranks on|no CUDA device"):
        distributed._agreed("nccl", timedelta(seconds=1))


def test_a_process_without_a_launcher_is_the_only_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_world()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert (launched_rank(), launched_world()) == (3, 5)


def test_a_failure_is_one_line_on_stderr(capsys):
    report_failure("what is wrong")
    assert capsys.readouterr() == ("", "reshard: what is wrong\n")
