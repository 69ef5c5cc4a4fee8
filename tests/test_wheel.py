"""The wheel, built and put into an empty folder, works from there."""

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import rankfront

ROOT = Path(__file__).parent.parent
PACKAGES = ("methods", "objectives", "search")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="building needs setuptools here, for nothing is downloaded"
)


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources: building leaves folders beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (found,) = folder.glob("rankfront-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the wheel's contents and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def test_the_wheel_holds_the_packages_and_nothing_generic(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rankfront"}
    for package in PACKAGES:
        on_disk = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        for data in ("*.json", "*.html"):
            on_disk |= {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob(data)}
        assert {name.partition("/")[2] for name in names if name.startswith(f"rankfront/{package}/")} == on_disk
    assert {name for name in names if name.count("/") == 1 and name.startswith("rankfront/")} == {
        "rankfront/__init__.py",
        "rankfront/py.typed",
    }


def test_it_brings_the_licence_and_says_what_it_is(installed):
    (folder,) = installed.glob("rankfront-*.dist-info")
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    (found,) = metadata.distributions(name="rankfront", path=[str(installed)])
    assert found.version == rankfront.__version__
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in found.metadata.get_all("Classifier")


RUN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, sys.argv[1])
import rankfront.methods, rankfront.objectives, rankfront.search
from rankfront.search.__main__ import run
for module in (rankfront.methods, rankfront.objectives, rankfront.search):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert not {"methods", "objectives", "search"} & sys.modules.keys()
sys.exit(run(sys.argv[2:]))
"""


def test_it_works_from_where_it_was_installed(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, str(installed), "methods", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert {"svd", "asvd", "fwsvd", "svd-llm"} <= {method["name"] for method in json.loads(done.stdout)}


def test_the_console_script_is_declared(installed):
    (entries,) = installed.glob("rankfront-*.dist-info/entry_points.txt")
    assert "rankfront = rankfront.search.__main__:main" in entries.read_text(encoding="utf-8")
