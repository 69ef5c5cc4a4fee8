"""What is installed, under which names, and which way imports point."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("methods", "objectives", "search")
FORBIDDEN = {"methods": {"objectives", "search"}, "objectives": {"search"}, "search": set()}


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_the_packages_list_is_what_lies_on_disk():
    """`packages` is kept by hand: every folder with an ``__init__.py`` is in it, under ``rankfront``."""
    on_disk = {path.parent.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/__init__.py")}
    on_disk = {path for path in on_disk if not set(path.parts) & {"build", "dist", "tests"}}
    names = {"rankfront", *("rankfront." + ".".join(path.parts) for path in on_disk)}
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == names >= {f"rankfront.{folder}" for folder in FOLDERS}
    assert setuptools["package-dir"] == {"rankfront": ".", **{f"rankfront.{folder}": folder for folder in FOLDERS}}
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]  # all that the wheel takes from the root


@pytest.mark.parametrize(("folder", "depth"), [("methods", 1), ("objectives", 1), ("search", 2)])
def test_folders_stay_flat(folder, depth):
    """Methods and objectives are files; `search` is packages of files."""
    assert {len(path.relative_to(ROOT / folder).parts) for path in sources(folder)} <= {1, depth}


def test_the_package_is_imported_from_this_folder():
    import rankfront.methods

    assert Path(rankfront.methods.__file__).resolve().parent == ROOT / "methods"


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_generic_is_imported(folder, tmp_path):
    """In a fresh interpreter, `search`, `methods` and `objectives` never appear under their bare names."""
    code = f"import sys, rankfront.{folder}; print(*sorted(set(sys.modules) & {set(FOLDERS)}), 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]  # no bare name, and no ray


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    """search -> objectives -> methods, always by full name."""
    for path in sources(folder):
        for name in imported(path):
            parts = name.split(".")
            assert not name.startswith("."), f"{path.name} imports {name}: use the full name"
            assert parts[0] not in FOLDERS, f"{path.name} imports {name}: it is rankfront.{name}"
            inner = parts[1] if parts[0] == "rankfront" and len(parts) > 1 else None
            assert inner not in FORBIDDEN[folder], f"{folder}/{path.name} imports {name}"


def test_only_the_workers_import_ray():
    users = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sources(folder)
        if any(name.split(".")[0] == "ray" for name in imported(path))
    }
    assert users == {"search/run/workers.py"}


def test_only_the_configuration_imports_pydantic():
    users = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sources(folder)
        if any(name.split(".")[0].startswith("pydantic") for name in imported(path))
    }
    assert users == {"search/config.py"}


def test_every_package_has_a_lower_cap_and_those_whose_insides_are_used_an_upper_one():
    """A dependency's range says what it is tested from; private names, and tables, may change with any version."""
    ranges = dict(re.match(r"([\w-]+)(?:\[\w+])?(.*)", each).groups() for each in PROJECT["project"]["dependencies"])
    assert all(found.startswith(">=") for found in ranges.values())
    assert {name for name, found in ranges.items() if ",<" in found} == {"torch", "transformers", "optuna", "ray"}


def test_the_package_offers_the_study_and_its_version():
    import rankfront
    from rankfront.search.study import Study

    assert rankfront.Study is Study
    assert rankfront.__version__ == metadata.version("rankfront")
    with pytest.raises(AttributeError, match="nothing"):
        _ = rankfront.nothing


def test_the_command_exists():
    """`rankfront` points at a file that is there."""
    module, _, function = PROJECT["project"]["scripts"]["rankfront"].partition(":")
    path = ROOT / Path(*module.split(".")[1:]).with_suffix(".py")
    assert path.is_file()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
