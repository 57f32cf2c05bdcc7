"""Machines of which no two may write one file: how they are told apart, and real jobs of theirs."""

from pathlib import Path
from typing import Any

import pytest

from reshard import config as configuration
from reshard import job, machines
from reshard.distributed import Ranks
from reshard.errors import ConfigError
from reshard.machines import file_system
from reshard.storage import Files
from tests.oracles import meta
from tests.oracles.models import model_a
from tests.ranks import run_ranks

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:40 / /data rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2
31 22 0:41 / /data/fast rw - lustre mds@tcp:/fast rw,flock
32 22 0:42 / /with\\040blank rw - gpfs fs1 rw
35 22 0:45 / /données rw - nfs server:/more rw
33 22 0:43 / /twice rw - lustre one rw
34 22 0:44 / /twice rw master:2 propagate_from:1 - fuse.sshfs two rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/me", "ext4"),
        ("/data", "nfs4"),
        ("/data/fast/deep/er", "lustre"),
        ("/data/faster", "nfs4"),
        ("/with blank/x", "gpfs"),
        ("/données/x", "nfs"),
        ("/twice/x", "fuse.sshfs"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_mount(path: str, expected: str) -> None:
    assert file_system(Path(path), MOUNTS) == expected


def test_this_machine_and_its_mounts_are_told() -> None:
    assert machines.machine() == machines.machine() != ""
    assert file_system(Path("/proc/self"), machines.MOUNTS.read_text()) == "proc"


class Two:
    """Ranks of two machines that see the same."""

    world = 2

    def gather(self, value: tuple[str, bool]) -> list[tuple[str, bool]]:
        return [value, (f"not {value[0]}", value[1])]


def test_names_of_mounts_are_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(b"1 1 0:1 / / rw - lustre a rw\n2 1 0:2 / /mnt/\xff rw - nfs b rw\n")
    monkeypatch.setattr(machines, "MOUNTS", mounts)
    ranks: Any = Two()
    assert machines.machines_apart(ranks, Path("/data"), "auto") == ()
    assert machines.machines_apart(ranks, Path("/mnt/\udcff/x"), "auto") == (0, 1)


def on_two_machines(root: Path, shared: str, mount: str, mode: str) -> dict[str, Any]:
    """Run a job on ranks of which each two believe in a machine of their own; what each wrote."""
    ranks = Ranks()
    written: set[str] = set()
    said: list[str] = []
    plain = Files.write

    def noted(self: Files, file: str, *rest: Any) -> None:
        written.add(file)
        plain(self, file, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "write", noted)
        patch.setattr(machines, "machine", lambda: f"machine {ranks.rank // 2}")
        patch.setattr(machines, "file_system", lambda path, mounts: mount)
        paths = (f"src.path={root / 'src'}", f"dst.path={root / f'{shared}-{mount}'}")
        made = configuration.load(
            "meta2", "tp2", [*paths, f"engine.shared_files={shared}", *mode.split()], None
        )
        try:
            report = job.run(made, ranks, force=False, say=said.append)
        except ConfigError as error:
            return {"refused": str(error)}
        finally:
            ranks.close()
    return {"written": written, "bytes": report.record()["bytes"], "said": said}


@pytest.mark.parametrize(
    ("shared", "mount", "apart"),
    [("auto", "nfs4", True), ("auto", "lustre", False), ("never", "lustre", True)],
)
def test_a_file_is_written_by_one_machine_where_caches_may_differ(
    shared: str, mount: str, apart: bool, tmp_path: Path
) -> None:
    meta.write(model_a(), tmp_path / "src", mp=2)
    found = run_ranks(4, on_two_machines, tmp_path, shared, mount, "")
    first, second = (found[rank]["written"] | found[rank + 1]["written"] for rank in (0, 2))
    assert first
    assert second
    assert (not first & second) == apart
    assert any(line.startswith("engine.shared_files: ") for line in found[0]["said"]) == apart
    assert found[0]["bytes"]["exchanged"] == found[0]["bytes"]["exchanged_bound"]
    (plain,) = run_ranks(1, on_two_machines, tmp_path, "always", mount, "")
    assert plain["written"]
    for path in (tmp_path / f"always-{mount}").rglob("*.safetensors"):
        other = tmp_path / f"{shared}-{mount}" / path.relative_to(tmp_path / f"always-{mount}")
        assert other.read_bytes() == path.read_bytes()


def test_direct_mode_is_refused_where_caches_may_differ(tmp_path: Path) -> None:
    meta.write(model_a(), tmp_path / "src", mp=2)
    found = run_ranks(4, on_two_machines, tmp_path, "auto", "nfs", "engine.exchange=direct")
    assert all("use engine.exchange=collective" in one["refused"] for one in found)
    assert (
        "written"
        in run_ranks(4, on_two_machines, tmp_path, "always", "nfs", "engine.exchange=direct")[0]
    )
