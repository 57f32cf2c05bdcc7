"""The wheel: what is installed from it works from any directory, without the source tree."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what the wheel holds."""
    root = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, root / "tree", ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(root)]
    if importlib.util.find_spec("setuptools"):
        build.append("--no-build-isolation")
    subprocess.run([*build, str(root / "tree")], check=True, cwd=root, timeout=100)
    wheels = list(root.glob("*.whl"))
    assert len(wheels) == 1, wheels
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(root / "site")
    shutil.rmtree(root / "tree")
    return root / "site"


def test_the_wheel_holds_the_package_and_its_configs(installed: Path) -> None:
    for folder in ("reshard", "configs"):
        held = "reshard" if folder == "reshard" else "reshard/configs"
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".yaml", ".typed"):
                name = path.relative_to(ROOT / folder)
                assert (installed / held / name).is_file(), f"{folder}/{name} is not in the wheel"
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"reshard"}


def test_the_wheel_works_from_any_directory(installed: Path, tmp_path: Path) -> None:
    words = ["plan", "--src", "meta8", "--dst", "tp4", "src.model=llama3-8b"]
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "reshard", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("meta8 (8 files, 16.1 GB) -> tp4 ")
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import reshard; print(reshard.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(installed)), "another reshard was tested"
