"""The study file: what is read, and one line for each thing wrong with it."""

import copy
import json
import math

import pytest

from rankfront.methods import InputError, method_names
from rankfront.objectives import OBJECTIVES
from rankfront.search.choices import SAMPLERS
from rankfront.search.config import StudyConfig, definition_of, load_config, make_config, parse_duration

EXAMPLE = """
[model]
name = "smollm2-135m"
dtype = "auto"
device = "auto"
[data]
length = 512
calibrate = { text = "pydoc", windows = 64 }
search    = { text = "pydoc", windows = 16 }
report    = { text = "pydoc", windows = 32 }
[space]
include = ["*"]
exclude = []
methods = ["svd", "asvd", "fwsvd", "svd-llm"]
keep = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
rank_multiple = 8
[[space.rule]]
match = "*.v_proj"
methods = ["svd-llm"]
[objectives.perplexity]
[objectives.parameters]
[objectives.latency]
batch = 1
prompt = 128
decode = 16
[search]
sampler = "tpe"
trials = 32
time = "10m"
seed = 0
workers = 1
[search.resources]
cpu = 2
gpu = 0
"""


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    return path


def refusal(data, overrides=()):
    """The one line that refuses ``data``."""
    with pytest.raises(InputError) as caught:
        make_config(copy.deepcopy(data), overrides)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def nested(path, value):
    """{"a": {"b": value}} for "a.b"; "[0]" after a name makes a list of one table."""
    head, _, rest = path.partition(".")
    inner = nested(rest, value) if rest else value
    return {head.removesuffix("[0]"): [inner]} if head.endswith("[0]") else {head: inner}


def test_the_example_loads_as_written(example):
    config = load_config(example)
    assert config.model.name == "smollm2-135m"
    assert config.data.length == 512
    assert [split.windows for split in config.data.splits().values()] == [64, 16, 32, 16]
    assert [split.text for split in config.data.splits().values()] == ["pydoc", "pydoc", "pydoc", "self"]
    assert config.space.methods == ("svd", "asvd", "fwsvd", "svd-llm")
    assert config.space.keep == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert config.space.rule[0].match == "*.v_proj"
    assert config.space.rule[0].methods == ("svd-llm",)
    assert list(config.objectives) == ["perplexity", "parameters", "latency"]
    assert config.objectives["latency"] == {"batch": 1, "prompt": 128, "decode": 16}
    assert (config.search.sampler, config.search.trials, config.search.time) == ("tpe", 32, 600.0)
    assert (config.search.resources.cpu, config.search.resources.gpu) == (2, 0)


def test_an_empty_file_is_a_study_of_defaults(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("", encoding="utf-8")
    assert load_config(path) == StudyConfig()


def test_every_registered_name_is_accepted():
    for method in method_names():
        assert make_config({"space": {"methods": [method]}}).space.methods == (method,)
    for sampler in SAMPLERS:
        assert make_config({"search": {"sampler": sampler}}).search.sampler == sampler
    settings = {name: {"names": ["arc_easy"], "search": True} if name == "tasks" else {} for name in OBJECTIVES}
    assert list(make_config({"objectives": settings}).objectives) == list(OBJECTIVES)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("serach", "search"),
        ("modle", "model"),
        ("model.nam", "name"),
        ("model.dytpe", "dtype"),
        ("data.lenght", "length"),
        ("data.calibration", "calibrate"),
        ("data.search.window", "windows"),
        ("space.methdos", "methods"),
        ("space.rank_multiples", "rank_multiple"),
        ("space.rules", "rule"),
        ("space.rule[0].mathc", "match"),
        ("space.rule[0].methds", "methods"),
        ("search.smapler", "sampler"),
        ("search.resource", "resources"),
        ("search.resources.cpus", "cpu"),
    ],
)
def test_an_unknown_key_names_the_nearest(path, nearest):
    data = nested(path, 1)
    if path.startswith("data.search"):
        data["data"]["search"] |= {"windows": 3}
    if "rule[0]" in path:
        data["space"]["rule"][0].setdefault("match", "*")
    message = refusal(data)
    assert path.rpartition(".")[2] in message
    assert f"did you mean '{nearest}'?" in message
    assert "known:" in message


def test_an_unknown_key_far_from_all_lists_them():
    message = refusal({"search": {"zzzz": 1}})
    assert "did you mean" not in message
    assert "sampler" in message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"space": {"methods": ["svd-lmm"]}}, ["unknown method 'svd-lmm'", "did you mean 'svd-llm'?"]),
        ({"space": {"rule": [{"match": "*", "methods": ["fwsvdd"]}]}}, ["unknown method", "'fwsvd'"]),
        ({"search": {"sampler": "tpee"}}, ["unknown sampler 'tpee'", "did you mean 'tpe'?", "nsga2"]),
        (
            {"objectives": {"perplexty": {}, "parameters": {}}},
            ["unknown objective", "did you mean 'perplexity'?"],
        ),
        ({"objectives": {"latency": {"promt": 3}, "parameters": {}}}, ["'promt'", "'prompt'"]),
        (
            {"objectives": {"perplexity": {"length": 3}, "parameters": {}}},
            ["perplexity", "no settings", "'length'"],
        ),
        ({"objectives": {"latency": {"batch": 0}, "parameters": {}}}, ["objectives.latency.batch", "0"]),
        ({"objectives": {"latency": {"batch": 1.5}, "parameters": {}}}, ["objectives.latency.batch", "1.5"]),
        (
            {"objectives": {"latency": {"batch": True}, "parameters": {}}},
            ["objectives.latency.batch", "True"],
        ),
        ({"objectives": {"perplexity": {}}}, ["two or more objectives", "perplexity"]),
        ({"objectives": {}}, ["two or more objectives", "none"]),
        ({"objectives": {"perplexity": 3, "parameters": {}}}, ["objectives.perplexity"]),
        ({"space": {"keep": [0.5, 1.0]}}, ["keep", "1.0"]),
        ({"space": {"keep": [0.0]}}, ["keep", "0.0"]),
        ({"space": {"keep": [-0.5, 0.5]}}, ["keep", "-0.5"]),
        ({"space": {"keep": []}}, ["keep", "empty"]),
        ({"space": {"keep": ["half"]}}, ["space.keep.0", "half"]),
        ({"space": {"rule": [{"match": "*", "keep": [1.5]}]}}, ["keep", "1.5"]),
        ({"space": {"rule": [{"match": "*", "keep": []}]}}, ["keep", "empty"]),
        ({"space": {"rule": [{"methods": ["svd"]}]}}, ["space.rule.0.match", "missing"]),
        ({"space": {"rule": {"match": "*"}}}, ["space.rule"]),
        ({"space": {"methods": []}}, ["space.methods"]),
        ({"space": {"rank_multiple": 0}}, ["rank_multiple", "0"]),
        ({"space": {"rank_multiple": "eight"}}, ["space.rank_multiple", "eight"]),
        ({"data": {"length": 2}}, ["data.length", "8", "2"]),
        ({"data": {"search": {"text": "pydoc"}}}, ["data.search.windows", "missing"]),
        ({"data": {"search": {"windows": 0}}}, ["data.search.windows", "0"]),
        ({"data": {"search": {"windows": 3, "part": [0.5, 0.2]}}}, ["data.search.part", "0.5", "0.2"]),
        ({"data": {"search": {"windows": 3, "part": [0.5]}}}, ["data.search.part"]),
        ({"search": {"trials": -1}}, ["search.trials", "-1"]),
        ({"search": {"trials": 0}}, ["search.trials", "0"]),
        ({"search": {"time": math.inf}}, ["search.time", "inf"]),
        ({"search": {"time": math.nan}}, ["search.time", "nan"]),
        ({"search": {"time": "9" * 400 + "h"}}, ["search.time", "hundred years"]),
        ({"search": {"workers": 10**9}}, ["search.workers", "1000000000"]),
        ({"search": {"resources": {"cpu": math.inf}}}, ["search.resources.cpu", "inf"]),
        ({"search": {"resources": {"cpu": math.nan}}}, ["search.resources.cpu", "nan"]),
        ({"search": {"resources": {"cpu": 1e9}}}, ["search.resources.cpu", "1000000000"]),
        ({"search": {"resources": {"gpu": math.inf}}}, ["search.resources.gpu", "inf"]),
        ({"search": {"resources": {"gpu": math.nan}}}, ["search.resources.gpu", "nan"]),
        ({"search": {"trials": "many"}}, ["search.trials", "many"]),
        ({"search": {"time": "10 minutes"}}, ["search.time", "10 minutes", "1h30m"]),
        ({"search": {"time": 0}}, ["search.time", "0"]),
        ({"search": {"time": "0s"}}, ["search.time", "0s"]),
        ({"search": {"workers": -1}}, ["search.workers", "-1"]),
        ({"search": {"anchors": [1.0]}}, ["anchors", "1.0"]),
        ({"search": {"resources": {"cpu": 0}}}, ["search.resources.cpu", "0"]),
        ({"search": 3}, ["search", "3"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(data, said):
    message = refusal(data)
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("search.trials=6", lambda c: c.search.trials == 6),
        ("search.time=90s", lambda c: c.search.time == 90.0),
        ("search.time='1h'", lambda c: c.search.time == 3600.0),
        ("model.name=/some/folder", lambda c: c.model.name == "/some/folder"),
        ('space.methods=["svd"]', lambda c: c.space.methods == ("svd",)),
        ("search.resources.cpu=1.5", lambda c: c.search.resources.cpu == 1.5),
        ("data.search.windows=3", lambda c: (c.data.search.windows, c.data.search.text) == (3, "pydoc")),
        ("objectives.latency.rounds=2", lambda c: c.objectives["latency"]["rounds"] == 2),
        ("objectives.divergence={}", lambda c: "divergence" in c.objectives),
        (" search.seed = 4", lambda c: c.search.seed == 4),
    ],
)
def test_set_overrides_the_file(example, override, read):
    assert read(load_config(example, [override]))


def test_the_last_override_wins(example):
    assert load_config(example, ["search.trials=6", "search.trials=7"]).search.trials == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.trials", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("search.trails=3", "did you mean 'trials'?"),
        ("search.trials=-2", "search.trials"),
        ("search.trials.more=3", "not a table"),
        ("space.rule.match=x", "not a table"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(example, override, said):
    with pytest.raises(InputError) as caught:
        load_config(example, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overriding_leaves_the_callers_data_alone():
    data = {"search": {"trials": 3}}
    make_config(data, ["search.trials=6"])
    assert data == {"search": {"trials": 3}}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("2d", 172800),
        ("1d1h1m1s", 90061),
        (45, 45),
        (0.5, 0.5),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "10 m", "1h 30m", "ten", "-5m", "5y", 0, -1, True, None, [], "10m!"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"[search\ntrials = 3", b"trials = ", b"\xff\xfe", b"[a]\n[a]\n"])
def test_what_is_not_toml_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.toml.*not valid TOML") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_limits_do_not_define_a_study(example):
    """Trials, time, workers and resources may change between launches; a seed may not."""
    before = definition_of(load_config(example))
    limits = ["search.trials=6", "search.time=1h", "search.workers=0", "search.resources.cpu=1"]
    assert definition_of(load_config(example, limits)) == before
    assert definition_of(load_config(example, ["search.seed=1"])) != before


def test_a_definition_loads_again(example):
    config = load_config(example)
    assert make_config(config.model_dump(mode="json")) == config


# -- numbers and nesting that nobody means

NUMBERS = (
    "data.length",
    "data.search.windows",
    "space.rank_multiple",
    "search.time",
    "search.trials",
    "search.tokens",
    "search.workers",
    "search.groups",
    "search.untie",
    "search.trial_tokens",
    "search.seed",
    "search.resources.cpu",
    "search.resources.gpu",
    "objectives.latency.prompt",
    "objectives.latency.seconds",
)
HUGE = {"inf": "inf", "1e400": "1e400", "-inf": "-inf", "nan": "nan", "10**30": f"1{'0' * 30}", "-1": "-1"}
HUGE |= {"a thousand nines": "9" * 1000, "hexadecimal": f"0x{'f' * 9000}"}


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_nobody_means_are_refused_by_key(key, number, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text("[objectives]\nperplexity = {}\nlatency = {}\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path, [f"{key}={HUGE[number]}"])
    assert key.rpartition(".")[2] in str(caught.value) or "duration" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("stages", [["refit"], ["logits", "blocks"], ["blocks", "refit"], ["refit", "refit", "logits"]])
def test_stages_of_healing_that_nothing_runs_are_refused(stages):
    assert "name blocks, logits" in refusal({}, [f"heal.stages={json.dumps(stages)}"])
    make_config({}, ['heal.stages=["refit", "logits"]'])


@pytest.mark.parametrize("value", ["[1e400]", "[nan]", "[0.5, inf]", "[-inf]", "[0]", f"[{'9' * 400}]"])
@pytest.mark.parametrize("key", ["space.keep", "search.anchors"])
def test_kept_fractions_that_nobody_means_are_refused(key, value):
    assert "kept fractions" in refusal({}, [f"{key}={value}"]) or key in refusal({}, [f"{key}={value}"])


@pytest.mark.parametrize("multiple", [0, -8, 2**60])
def test_ranks_are_multiples_of_something(multiple):
    assert "rank_multiple" in refusal({"space": {"rank_multiple": multiple}})


DEEP = {
    "brackets": "[space]\nkeep = " + "[" * 5000,
    "inline tables": "a = " + "{a = " * 5000,
    "dotted keys": ".".join(["a"] * 5000) + " = 1",
    "a table's name": f"[{'.'.join(['search'] * 5000)}]",
    "a number of many digits": f"[search]\ntrials = {'9' * 5000}",
}


@pytest.mark.parametrize("deep", DEEP)
def test_what_is_nested_too_deep_or_too_long_is_refused_in_one_line(deep, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(DEEP[deep], encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, ".".join(["a"] * 5000)])
def test_overrides_too(value):
    refusal({}, [f"space.keep={value}"])
    refusal({}, [f"{'a.' * 5000}b=1"])


@pytest.mark.parametrize(
    "value", ["1e400", "inf", "nan", f"{'9' * 400}d", "200000d", math.inf, math.nan, 10**400, 1e12]
)
def test_durations_have_an_end(value):
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(value)


def test_a_study_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(EXAMPLE, encoding="utf-8-sig")
    assert load_config(path).search.time == 600


def test_dense_alone_is_nothing_to_choose():
    assert "nothing to choose" in refusal({"space": {"methods": ["dense"]}})
    assert "nothing to choose" in refusal(
        {"space": {"methods": ["dense"], "rule": [{"match": "*", "methods": ["dense"]}]}}
    )
    rule = {"match": "*.q_proj", "methods": ["svd"]}
    assert make_config({"space": {"methods": ["dense"], "rule": [rule]}}).space.rule[0].methods == ("svd",)
