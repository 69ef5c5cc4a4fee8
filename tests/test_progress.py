"""The live line: what it says of the sampler's predictions."""

from pathlib import Path
from types import SimpleNamespace

from launching import quiet

from rankfront.search.optimise.accuracy import Calibration
from rankfront.search.run.progress import Display, line_of
from rankfront.search.run.scheduler import Status

GOOD = Calibration(trials=20, spearman=0.987, kendall=0.92, at_size=0.61, front_error=0.034, error=0.08)


def line(calibrated):
    config = SimpleNamespace(objectives={"perplexity": {}}, search=SimpleNamespace(time=None, where=()))
    return line_of(Status(config, [], 0, 0, 0.0, False), calibrated)


def test_the_line_has_all_figures_of_the_calibration():
    assert "Spearman 0.99 (at a size 0.61), Kendall 0.92, front within 3.4%" in line(GOOD)
    assert "poor" not in line(GOOD)


def test_the_line_says_where_predictions_are_poor():
    assert "poor: trust the measured trials" in line(Calibration(20, 0.987, 0.92, None, float("nan"), 0.5))
    assert "Spearman" not in line(None)


def test_a_log_says_how_far_a_phase_is_and_how_long_it_will_take():
    """One line where it begins, one now and then, one where it ends after long; none for what is over at once."""
    now, console = [0.0], quiet()
    display = Display(console, lambda: now[0])
    for done in range(9):
        display.phase("factor", done, 8)
        now[0] += 20
    display.phase("load", 0, 1)
    display.phase("load", 1, 1)
    display.phase("load", 0, 1)
    assert console.file.getvalue().splitlines() == [
        "factor (sites) ...",
        "factor (sites): 2 of 8, 2 min left",
        "factor (sites): 4 of 8, 80 s left",
        "factor (sites): 6 of 8, 40 s left",
        "factor (sites): 8 in 3 min",
        "load the model ...",
    ]


def test_a_log_says_how_many_predictions_are_made():
    console = quiet()
    display = Display(console)
    config = SimpleNamespace(
        objectives={"perplexity": {}}, search=SimpleNamespace(time=None, where=(), trials=4, tokens=None, sampler="tpe")
    )
    for preparing in (("menu", 0, 1), ("menu", 1, 22), None):
        display.search(Status(config, [], 0, 0, 0.0, False, preparing))
    assert console.file.getvalue().splitlines() == ["predict (jobs) ..."]
    assert (display.phases["menu"].done, display.phases["menu"].total) == (22, 22)


def test_the_time_that_is_left_goes_by_the_limit_that_comes_first():
    """Ten trials of a hundred have taken half of the tokens."""
    now, console = [0.0], quiet()
    display = Display(console, lambda: now[0])
    search = SimpleNamespace(time=None, where=(), trials=100, tokens=2_000, sampler="tpe")
    config = SimpleNamespace(
        objectives={"perplexity": {}}, search=search, trial_windows=2, data=SimpleNamespace(length=50)
    )
    for done in (0, 5, 10):
        now[0] += 60
        display.search(Status(config, [], done, 100 * done, 0.0, False))
    assert console.file.getvalue().splitlines()[-1].startswith("trial 10, 1,000 of 2,000 tokens")
    assert console.file.getvalue().splitlines()[-1].endswith("2 min left")


def test_reasons_and_names_are_printed_as_they_are():
    console = quiet()
    Display(console).unmade(
        SimpleNamespace(unmade={Path("svd-1/a.b.safetensors"): "RuntimeError: [/x] \x1b[2J :boom:"})
    )
    assert "(svd-1/a.b: RuntimeError: [/x] \\x1b[2J :boom:)" in console.file.getvalue()
