"""The live line: what it says of the sampler's predictions."""

from pathlib import Path
from types import SimpleNamespace

from launching import quiet

from rankfront.search.optimise.accuracy import Calibration
from rankfront.search.run.progress import Display, line_of
from rankfront.search.run.scheduler import Status

GOOD = Calibration(trials=20, spearman=0.987, kendall=0.92, at_size=0.61, front_error=0.034, error=0.08)


def line(calibrated):
    config = SimpleNamespace(objectives={"perplexity": {}}, search=SimpleNamespace(time=None))
    return line_of(Status(config, [], 0, 0.0, False), calibrated)


def test_the_line_has_all_figures_of_the_calibration():
    assert "Spearman 0.99 (at a size 0.61), Kendall 0.92, front within 3.4%" in line(GOOD)
    assert "poor" not in line(GOOD)


def test_the_line_says_where_predictions_are_poor():
    assert "poor: trust the measured trials" in line(Calibration(20, 0.987, 0.92, None, float("nan"), 0.5))
    assert "Spearman" not in line(None)


def test_reasons_and_names_are_printed_as_they_are():
    console = quiet()
    Display(console).unmade(
        SimpleNamespace(unmade={Path("svd-1/a.b.safetensors"): "RuntimeError: [/x] \x1b[2J :boom:"})
    )
    assert "(svd-1/a.b: RuntimeError: [/x] \\x1b[2J :boom:)" in console.file.getvalue()
