"""Which backend fits the ranks and the GPUs of a machine."""

import pytest

from reshard.distributed import choose_backend
from reshard.errors import ConfigError
from reshard.lastwords import report_failure
from reshard.meeting import launched_rank, launched_world


@pytest.mark.parametrize(
    ("asked", "ranks", "devices", "backend"),
    [
        ("auto", 1, 0, "gloo"),
        ("auto", 8, 0, "gloo"),
        ("auto", 1, 1, "nccl"),
        ("auto", 8, 8, "nccl"),
        ("auto", 4, 8, "nccl"),
        ("gloo", 8, 8, "gloo"),
        ("gloo", 8, 0, "gloo"),
        ("nccl", 8, 8, "nccl"),
        ("nccl", 1, 8, "nccl"),
    ],
)
def test_the_obvious_backend_needs_no_remark(asked, ranks, devices, backend):
    assert choose_backend(asked, ranks, devices) == (backend, None)


def test_more_ranks_than_gpus_fall_back_to_the_cpu_and_say_so():
    backend, remark = choose_backend("auto", 8, 4)
    assert backend == "gloo"
    assert remark == "8 ranks on 4 GPUs: using Gloo on CPU"


def test_nccl_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"no CUDA device was found; use engine.backend=gloo"):
        choose_backend("nccl", 1, 0)


def test_nccl_with_too_few_gpus_is_refused_with_the_number_that_works():
    with pytest.raises(ConfigError, match=r"8 ranks on this machine, but 4 GPUs; .*node 4, or use"):
        choose_backend("nccl", 8, 4)


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
