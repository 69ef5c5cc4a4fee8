"""Commands import what they need, when they need it: asserted on modules in fresh interpreters, never on a clock."""

import gc
import json
import shlex
import subprocess
import sys

import pytest
import typer
from launching import make_run, small_data

from rankfront.search.__main__ import app, run
from rankfront.search.choices import OURS
from rankfront.search.importing import uncollected

HEAVY = ("torch", "transformers", "ray", "scipy", "pandas", "optuna", "numpy")
SCRIPT = """
import json, sys
from rankfront.search.__main__ import run
code = run(json.loads(sys.argv[1]))
print("\\n" + json.dumps([code, sorted(set(sys.argv[2:]) & sys.modules.keys())]))
"""


def fresh(code, *arguments):
    """The last line that ``code`` prints in an interpreter of its own, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imported(*arguments):
    """(exit code, which of `HEAVY` are imported) of a command line."""
    return fresh(SCRIPT, json.dumps(arguments), *HEAVY)


def test_help_a_wrong_argument_and_the_version_wait_for_nothing():
    assert imported("launch", "--help") == [0, []]
    assert imported("--version") == [0, []]
    assert imported("frnt", "runs/demo") == [2, []]


def test_methods_are_listed_without_what_they_run_on():
    code, found = imported("methods", "--json")
    assert code == 0
    assert not {"torch", "transformers", "ray", "scipy"} & set(found)


READERS = """
import json, sys
from rankfront.search.__main__ import run
imported = []
for arguments in json.loads(sys.argv[1]):
    code = run(arguments)
    imported.append([code, sorted(set(sys.argv[2:]) & sys.modules.keys())])
print("\\n" + json.dumps(imported))
"""


def test_a_run_is_read_without_what_measured_it(model_folder, text_file, tmp_path):
    """Nor are frames imported where none is made."""
    study = make_run(small_data(model_folder, text_file, sampler=OURS, trials=9), tmp_path / "run")
    found, run = study.read(), str(tmp_path / "run")
    assert found.calibration() is not None
    treated = next(row.number for row in found.front() if not row.is_dense)
    commands = [
        ["front", run],
        ["front", run, "--json", "--where", "parameters<=0.9"],
        ["show", run, str(treated)],
        ["show", run, "0", "--json"],
        ["report", run, "--out", str(tmp_path / "page.html")],
        ["front", run, "--csv", str(tmp_path / "trials.csv")],
    ]
    heavy = ["torch", "transformers", "ray", "scipy", "pandas"]
    found = fresh(READERS, json.dumps(commands), *heavy)
    assert found == [[0, []]] * 5 + [[0, ["pandas"]]]


def test_importing_the_methods_imports_none_of_them():
    names = ["Cost", "Grid", "InputError", "Option", "Site", "Storage", "get_method", "method_names"]
    code = f"import json, sys; from rankfront.methods import {', '.join(names)}; names = method_names()"
    code += f"; print(json.dumps(sorted(set({HEAVY}) & sys.modules.keys())))"
    assert fresh(code) == []


def test_objectives_are_known_without_what_measures_them():
    code = "import json, sys; from rankfront.objectives import make_objective; make_objective('latency', {})"
    code += "; print(json.dumps(sorted({'torch', 'transformers', 'ray', 'scipy'} & sys.modules.keys())))"
    assert fresh(code) == []


EXPORTS_LOAD = """
import json, sys
import rankfront.methods
before = "torch" in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(json.dumps([before, "rankfront" in AUTO_QUANTIZER_MAPPING, "scipy.stats" in sys.modules]))
"""


def test_the_loader_of_exports_is_registered_as_soon_as_transformers_has_a_place_for_it():
    assert fresh(EXPORTS_LOAD) == [False, True, False]


def test_the_version_is_printed(capsys):
    import rankfront

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"rankfront {rankfront.__version__}\n"


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_that_parses(name, capsys):
    """Split as a shell would, and taken by the command's own parser."""
    assert run([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    example = COMMANDS[name].epilog.removeprefix("Example: ")
    assert example in shown
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("rankfront", name)
    COMMANDS[name].make_context(name, arguments)


def test_garbage_is_looked_for_again_after_imports():
    """Whatever became of them, and not where nobody looked before."""
    for looked in (True, False):
        (gc.enable if looked else gc.disable)()
        with pytest.raises(ModuleNotFoundError), uncollected():
            _nothing()
        assert gc.isenabled() is looked
    gc.enable()


def _nothing():
    assert not gc.isenabled()
    import rankfront.nothing  # noqa: F401
