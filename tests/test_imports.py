"""Who may import whom: a table that is as tight as the code is today."""

import ast
from pathlib import Path

import pytest

import reshard

ROOT = Path(reshard.__file__).parent
PACKAGES = ("containers", "families", "fitting", "formats", "pictures", "tokenizers")

# A unit is a module of the package, or one of its folders. Lines stand in the order in which they
# build on each other: a unit imports what stands above it, and of that only what is named here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "geometry": set(),
    "units": set(),
    "logs": {"errors"},
    "encodings": {"errors"},
    "placement": {"geometry"},
    "layout": {"encodings", "errors", "geometry", "placement"},
    "native": set(),
    "storage": {"errors", "native"},
    "locks": {"errors", "storage"},
    "packing": {"geometry", "placement"},
    "moves": {"geometry", "layout"},
    "blocks": {"encodings", "geometry", "layout"},
    "dealing": {"encodings", "geometry", "layout"},
    "crews": {"blocks", "dealing", "layout"},
    "plan": {"blocks", "crews", "dealing", "errors", "layout", "moves"},
    "schedule": {"dealing", "moves", "plan"},
    "bounds": {"errors", "moves", "plan", "schedule", "units"},
    "journal": {"storage"},
    "buffers": {"encodings", "geometry", "layout", "packing", "storage"},
    "casts": {"buffers", "encodings"},
    "checks": {"buffers", "geometry", "layout", "moves"},
    "wire": {"moves"},
    "earlier": {"buffers", "casts", "journal", "layout", "moves", "packing"},
    "room": {"buffers", "errors", "plan", "schedule"},
    "engine": {
        "buffers",
        "casts",
        "checks",
        "earlier",
        "journal",
        "layout",
        "moves",
        "packing",
        "plan",
        "schedule",
        "storage",
        "units",
        "wire",
    },
    "containers": {"encodings", "errors", "geometry", "storage"},
    "families": {"errors", "layout"},
    "vocabulary": {"errors", "families", "layout"},
    "formats": {
        "containers",
        "encodings",
        "errors",
        "families",
        "geometry",
        "layout",
        "placement",
        "storage",
        "vocabulary",
    },
    "parent": set(),
    "meeting": {"errors", "parent"},
    "lastwords": {"logs"},
    "watcher": {"lastwords"},
    "backends": {"errors"},
    "carrier": {"errors"},
    "distributed": {"backends", "carrier", "errors", "lastwords", "logs", "meeting", "watcher"},
    "machines": {"distributed"},
    "yamltext": {"containers", "errors", "families", "formats"},
    "topologies": {"containers", "errors", "families", "formats", "yamltext"},
    "schema": set(),
    "config": {
        "containers",
        "encodings",
        "errors",
        "families",
        "formats",
        "schema",
        "topologies",
        "yamltext",
    },
    "space": {"errors", "storage"},
    "workspace": {"errors", "families", "formats", "locks", "storage"},
    "manifest": {"errors", "families", "formats"},
    "resume": {"distributed", "errors", "journal", "plan", "storage", "workspace"},
    "commit": {"containers", "errors", "geometry", "journal", "layout", "storage"},
    "replicas": {"checks", "containers", "errors", "geometry", "layout", "packing", "storage"},
    "assets": {"errors", "formats", "storage"},
    "tokenizers": {"errors"},
    "conversions": {"errors", "families", "tokenizers"},
    "smallfiles": {
        "assets",
        "containers",
        "conversions",
        "errors",
        "families",
        "formats",
        "tokenizers",
    },
    "sources": {"assets", "config", "errors", "families", "formats", "layout"},
    "sights": {"dealing", "smallfiles"},
    "telling": {"containers", "encodings", "errors", "smallfiles", "storage"},
    "view": {
        "containers",
        "dealing",
        "errors",
        "formats",
        "sights",
        "smallfiles",
        "storage",
        "telling",
    },
    "elsewhere": {
        "assets",
        "config",
        "containers",
        "errors",
        "formats",
        "sights",
        "smallfiles",
        "sources",
        "telling",
        "view",
    },
    "targets": {"config", "errors", "formats", "placement"},
    "prepare": {
        "assets",
        "casts",
        "config",
        "dealing",
        "elsewhere",
        "encodings",
        "errors",
        "families",
        "formats",
        "layout",
        "plan",
        "smallfiles",
        "sources",
        "targets",
        "units",
        "view",
    },
    "traffic": {"blocks", "dealing", "layout", "moves", "plan", "schedule"},
    "report": {"assets", "engine", "moves", "plan", "prepare", "schedule", "traffic", "units"},
    "pictures": {"dealing", "geometry", "layout", "moves", "plan", "report", "traffic", "units"},
    "progress": {"logs", "units"},
    "readback": {"distributed", "errors", "manifest", "progress", "storage"},
    "finish": {
        "commit",
        "dealing",
        "distributed",
        "errors",
        "formats",
        "journal",
        "manifest",
        "plan",
        "prepare",
        "readback",
        "storage",
        "workspace",
    },
    "job": {
        "casts",
        "checks",
        "commit",
        "config",
        "dealing",
        "distributed",
        "engine",
        "errors",
        "finish",
        "formats",
        "geometry",
        "journal",
        "logs",
        "machines",
        "plan",
        "prepare",
        "progress",
        "replicas",
        "report",
        "resume",
        "room",
        "space",
        "storage",
        "units",
        "view",
        "workspace",
    },
    "values": {"buffers", "encodings"},
    "differences": {"errors", "geometry", "layout", "plan", "values"},
    "compare": {
        "buffers",
        "commit",
        "differences",
        "distributed",
        "errors",
        "formats",
        "geometry",
        "layout",
        "moves",
        "packing",
        "plan",
        "progress",
        "room",
        "schedule",
        "sources",
        "storage",
        "units",
        "values",
    },
    "verify": {"distributed", "errors", "formats", "manifest", "readback", "units"},
    "libraries": {"buffers", "containers", "formats"},
    "transformed": {"containers", "errors", "families", "formats"},
    "loading": {
        "containers",
        "distributed",
        "encodings",
        "errors",
        "families",
        "formats",
        "geometry",
        "libraries",
        "storage",
        "transformed",
        "verify",
    },
    "damage": {
        "containers",
        "errors",
        "families",
        "formats",
        "journal",
        "manifest",
        "units",
        "verify",
    },
    "inspect": {
        "assets",
        "containers",
        "damage",
        "errors",
        "families",
        "formats",
        "units",
        "verify",
    },
    "demo": {"config", "distributed", "errors", "families", "formats", "job"},
    "fitting": {
        "config",
        "containers",
        "errors",
        "families",
        "formats",
        "layout",
        "sources",
        "topologies",
    },
    "fit": {"config", "errors", "fitting"},
    "orders": {"config", "errors", "families"},
    "jobfiles": {"errors", "locks", "storage"},
    "arrivals": {"errors", "formats", "jobfiles", "storage"},
    "serve": {
        "arrivals",
        "config",
        "distributed",
        "errors",
        "families",
        "job",
        "jobfiles",
        "lastwords",
        "orders",
        "smallfiles",
        "yamltext",
    },
    "arguments": {"errors"},
    "verbs": {
        "bounds",
        "buffers",
        "compare",
        "config",
        "demo",
        "distributed",
        "errors",
        "fit",
        "formats",
        "inspect",
        "job",
        "loading",
        "meeting",
        "orders",
        "pictures",
        "plan",
        "prepare",
        "report",
        "room",
        "schedule",
        "serve",
        "storage",
        "traffic",
        "verify",
    },
    "cli": {
        "arguments",
        "distributed",
        "errors",
        "lastwords",
        "logs",
        "meeting",
        "smallfiles",
        "topologies",
        "verbs",
    },
    "__main__": {"cli", "parent"},
}
# Of the modules of `formats`, those that all formats share; and the others that are no format, each
# with the modules that use it.
SHARED_BY_FORMATS = {"common", "options"}
HELPERS = {
    "dcp": {"fsdp", "titan", "titan_mesh"},
    "foreign": {"__init__"},
    "gguf_files": {"gguf"},
    "gguf_keys": {"gguf"},
    "meta_files": {"meta"},
    "meta_params": {"meta", "titan"},
    "nanotron_files": {"nanotron"},
    "nanotron_tree": {"nanotron"},
    "sampling": {"meta"},
    "titan_mesh": {"titan"},
    "weights": {"dcp", "fsdp", "hf", "statedict"},
}
# Of `formats`, modules below prepare see only what all formats share.
SHARED_ONLY = ("yamltext", "topologies", "config", "workspace", "commit", "assets")


def files_of(unit: str) -> list[Path]:
    if unit in PACKAGES:
        return sorted((ROOT / unit).rglob("*.py"))
    return [ROOT / f"{unit}.py"]


def imports_of(path: Path) -> set[str]:
    """Dotted names below `reshard` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        inside = (name for name in names if name.split(".")[0] == "reshard")
        found |= {name.removeprefix("reshard.") for name in inside}
    return found


def units_of(unit: str) -> dict[str, set[str]]:
    """The other units that a unit imports, each with the dotted names."""
    found: dict[str, set[str]] = {}
    for path in files_of(unit):
        for name in imports_of(path):
            if (other := name.split(".")[0]) != unit:
                found.setdefault(other, set()).add(name)
    return found


def test_every_module_stands_in_the_table():
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"configs"}
    assert folders == set(PACKAGES)
    assert modules | folders == set(MAY_IMPORT)


@pytest.mark.parametrize("unit", MAY_IMPORT)
def test_a_unit_imports_what_the_table_says(unit):
    assert set(units_of(unit)) == MAY_IMPORT[unit]


def test_imports_run_one_way():
    seen: set[str] = set()
    for unit, below in MAY_IMPORT.items():
        assert below <= seen, f"{unit} imports {sorted(below - seen)}, which stand below it"
        seen.add(unit)


def test_formats_do_not_know_each_other():
    used: dict[str, set[str]] = {}
    for path in files_of("formats"):
        for name in imports_of(path):
            if name.startswith("formats."):
                used.setdefault(name.split(".")[1], set()).add(path.stem)
    assert {other: users for other, users in used.items() if other not in SHARED_BY_FORMATS} == (
        HELPERS
    )


def test_what_formats_share_knows_none_of_their_helpers():
    for path in files_of("formats"):
        if path.stem in SHARED_BY_FORMATS:
            names = {name for name in imports_of(path) if name.startswith("formats.")}
            assert {name.split(".")[1] for name in names} <= SHARED_BY_FORMATS, path.stem


def test_every_module_of_formats_is_a_format_or_declared():
    for path in files_of("formats"):
        is_format = any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAME"
            for node in ast.parse(path.read_text()).body
        )
        declared = path.stem in {*SHARED_BY_FORMATS, *HELPERS, "__init__"}
        assert is_format != declared, path.stem


@pytest.mark.parametrize("unit", SHARED_ONLY)
def test_below_prepare_only_what_all_formats_share_is_known(unit):
    names = {name for group in units_of(unit).values() for name in group}
    seen = {name.split(".")[1] for name in names if name.startswith("formats.")}
    assert seen <= SHARED_BY_FORMATS


def test_no_unit_names_a_single_format():
    single = {path.stem for path in files_of("formats")} - SHARED_BY_FORMATS - {"__init__"}
    for unit in set(MAY_IMPORT) - {"formats"}:
        for path in files_of(unit):
            named = {name for name in imports_of(path) if name.startswith("formats.")}
            assert not {name.split(".")[1] for name in named} & single, path


def test_imports_stand_at_the_top_of_a_file():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inner, f"{path}:{node.lineno}"


def sites(wanted) -> set[tuple[str, str]]:
    """(module, function) of every node for which `wanted` holds."""
    found = set()
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        stack: list[tuple[ast.AST, str]] = [(ast.parse(path.read_text()), "")]
        while stack:
            node, where = stack.pop()
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                where = f"{where}.{node.name}".strip(".")
            if wanted(node):
                found.add((module, where))
            stack += [(child, where) for child in ast.iter_child_nodes(node)]
    return found


def is_name(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in names


def test_only_the_cli_prints():
    def prints(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and is_name(
            node.func, "print", "sys.stdout.write", "sys.stderr.write"
        )

    elsewhere = {place for place in sites(prints) if place[0] != "cli"}
    assert elsewhere == {("progress", "Progress.add"), ("lastwords", "report_failure")}


def test_what_is_printed_elsewhere_goes_to_stderr():
    for module in ("progress", "lastwords"):
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
            if isinstance(node, ast.Call) and is_name(node.func, "print"):
                files = [ast.unparse(item.value) for item in node.keywords if item.arg == "file"]
                assert files == ["sys.stderr"], f"{module}:{node.lineno}"


def test_only_the_start_and_distributed_read_the_environment():
    found = sites(lambda node: is_name(node, "os.environ", "os.getenv", "environ", "getenv"))
    assert {module for module, _ in found} == {"__main__", "meeting", "distributed"}


def test_only_config_and_what_it_reads_by_know_yaml():
    reading = ("OmegaConf.load", "OmegaConf.from_dotlist", "yaml.safe_load", "yaml.load")
    assert {module for module, _ in sites(lambda node: is_name(node, *reading))} == {"yamltext"}
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(word in path.read_text() for word in ("import yaml", "from omegaconf"))
    }
    assert users == {
        "config.py",
        "yamltext.py",
        "formats/nanotron_files.py",
    }  # the latter writes one


def test_only_storage_and_readers_of_headers_open_files():
    """No mmap, and no tensor library reads data, but where `verify --load` tries just that."""
    tried = {ROOT / "libraries.py", ROOT / "loading.py"}
    for path in set(ROOT.rglob("*.py")) - tried:
        text = path.read_text()
        for word in ("import mmap", "safe_open", "torch.load(", "load_file(", "np.memmap"):
            assert word not in text, f"{path}: {word}"
