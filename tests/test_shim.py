"""Every system call below `storage` and `locks`, with every fault: all is published, or nothing."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import jobs
from tests.commands import call, done, model, move, one_line, write
from tests.oracles.compare import assert_same_files, files_in
from tests.sabotage import sabotage
from tests.shim import CALLS, Fault, Shim, Site, below_storage, public_functions

pytestmark = pytest.mark.fault

# What makes no call of its own.
CALLS_NOTHING = {"explained", "opened", "Files.__init__", "Files.sync", "sync_all"}
SHORT_SHARE = 4  # without --long, one in so many cases
FUNCTIONS = sorted(set(public_functions()) - CALLS_NOTHING)


@dataclass(frozen=True)
class Scene:
    """A job to be disturbed: its words and its calls.

    `before` is the directory as it finds it, `whole` the target when nothing goes wrong.
    """

    before: Path
    whole: Path
    more: tuple[str, ...]
    calls: Counter[Site]

    def words(self, root: Path) -> list[str]:
        """The job's command in a copy of its directory."""
        return words_of(root, *self.more)


def fresh(root: Path) -> Path:
    return write("meta2", root / "src", model())


def resumed(root: Path) -> Path:
    source = write("meta2", root / "src", model())
    words = [*words_of(root), "engine.memory=13MiB"]
    job = jobs.finished(
        1, words, root / "said", sabotage, "reshard.commit:finish_file", 0, 1, "kill"
    )
    assert job.wait(0) == [-9]
    for suffix in (".out", ".err"):
        (root / "said").with_suffix(suffix).unlink()
    return source


def replacing(root: Path) -> Path:
    source = write("meta2", root / "src", model())
    done(*move("meta2", source, "hf", root / "dst", "dst.dtype=float32"))
    return source


SCENES = {"fresh": fresh, "resumed": resumed, "replacing": replacing}


def words_of(root: Path, *more: str) -> list[str]:
    return move("meta2", root / "src", "hf", root / "dst", *more)


@pytest.fixture(scope="module", params=SCENES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A scene, and what its job calls when nothing goes wrong."""
    root = tmp_path_factory.mktemp(request.param)
    SCENES[request.param](root)
    more = ("engine.verify=true", *(["--force"] if request.param == "replacing" else []))
    copy = copied(root, root.with_name(f"{root.name}-copy"))
    made = Scene(root, copy / "dst", more, Counter())
    with below_storage(Shim()) as shim:
        done(*made.words(copy))
    made.calls.update(shim.calls)
    return made


def copied(root: Path, to: Path) -> Path:
    """A copy of a scene, times included, so that its job is another one only by its paths."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(root, to)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_fault_costs_nothing_that_was_whole(
    function: str,
    scene: Scene,
    tmp_path: Path,
    long: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """`function` fails, or is slow, or does a part, at each of its calls."""
    tried = 0
    for site, fault, nth in cases(scene, function, long):
        root = copied(scene.before, tmp_path / "here")
        shim = Shim(site, nth, fault.act)
        with below_storage(shim):
            found = call(*scene.words(root))
        label = f"{site} call {nth}: {fault.name}: {found.err or found.last}"
        assert shim.struck, f"{label}: was not called"
        assert found.code in ((0,) if fault.harmless else (0, 1, 2)), label
        if found.code:
            assert "unexpected" not in one_line(found.err), label
        check_place(root, scene, label, finished=found.code == 0)
        done(*scene.words(root))
        check_place(root, scene, label, finished=True)
        assert set(os.listdir(root)) == {"src", "dst"}, label
        tried += 1
    record_property("faults", tried)


def cases(scene: Scene, function: str, long: bool) -> Iterator[tuple[Site, Fault, int]]:
    """Every fault at every call of a function; in short at one of them, and for some faults."""
    chosen = random.Random(f"{function} {scene.more}")
    for site in sorted(site for site in scene.calls if site[0] == function):
        faults = next(calls[site[1]] for calls in CALLS.values() if site[1] in calls)
        for fault in faults:
            places = range(1, scene.calls[site] + 1)
            if long:
                yield from ((site, fault, nth) for nth in places)
            elif chosen.randrange(SHORT_SHARE) == 0 or fault == faults[0]:
                yield site, fault, chosen.choice(places)


def check_place(root: Path, scene: Scene, label: str, *, finished: bool) -> None:
    """The target is whole, or it is as before: nothing half-published, nothing lost."""
    target, before = root / "dst", scene.before / "dst"
    others = {name for name in os.listdir(root) if not name.startswith("dst.partial-")}
    assert others <= {"src", "dst", "dst.lock"}, label
    if finished or (target.exists() and files_in(target) == files_in(scene.whole)):
        try:
            assert_same_files(target, scene.whole)
        except AssertionError:
            assert not finished, label
            assert_same_files(target, before)
        return
    aside = next(root.glob("dst.partial-*/replaced"), target)
    assert not before.exists() or files_in(aside) == files_in(before), f"{label}: the old is lost"
    if before.exists():
        assert_same_files(aside, before)
    else:
        assert not target.exists(), f"{label}: half a result is published"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_public_function_is_called_in_a_scene(
    function: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A new function needs a scene that calls it."""
    assert function in reached(tmp_path_factory), f"no scene calls {function}"


_reached: set[str] = set()


def reached(factory: pytest.TempPathFactory) -> set[str]:
    """The functions that a fresh and a resumed job call."""
    for name in () if _reached else ("fresh", "resumed"):
        root = factory.mktemp(name)
        SCENES[name](root)
        with below_storage(Shim()) as shim:
            done(*words_of(root, "engine.verify=true"))
        _reached.update(function for function, _ in shim.calls)
    return _reached
