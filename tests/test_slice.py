"""`rankfront slice`: an exported folder cut to lower ranks, and what it refuses."""

import json

import pytest
import torch
from common import tokens
from launching import measured, small_data, tree, verify_here
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError, get_method
from rankfront.search.__main__ import run as command_line
from rankfront.search.errors import ExportError
from rankfront.search.heal.settings import HealSettings
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output import derived, sliced
from rankfront.search.output.card import Verified
from rankfront.search.output.export import export
from rankfront.search.output.healed import heal_folder
from rankfront.search.output.healing_card import HealText
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

METHODS = ["svd-llm", "hola", "hola-embedding", "wara", "nystrom"]


@pytest.fixture(scope="module")
def exported(tied_folder, text_file, tmp_path_factory):
    """Factored exports of a tiny Llama with tied embeddings: many methods, one of them alone that has no ranks."""
    folder = tmp_path_factory.mktemp("exported")
    data = small_data(tied_folder, text_file)
    data["space"] = {"include": ["*", "lm_head"], "methods": METHODS, "keep": [0.8], "rank_multiple": 2}
    resident = JobRunner(Study(data).setup())
    wanted = {site: {o.method: o for o in options} for site, options in resident.compressed.space.wanted().items()}
    mixed, taken = {}, set()
    for method, kind in (("hola", "layers.0"), ("wara", "o_proj"), ("hola-embedding", ""), ("svd-llm", "layers.")):
        for site, options in wanted.items():
            if method in options and kind in site.name and taken.isdisjoint(weight.path for weight in site.weights):
                mixed[site.name] = options[method]
                taken |= {weight.path for weight in site.weights}
    neurons = {site.name: options["nystrom"] for site, options in wanted.items() if "nystrom" in options}
    assert {option.method for option in mixed.values()} == {*METHODS} - {"nystrom"}
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        for name, plan in (("small", mixed), ("neurons", neurons)):
            export(resident.setup, measured(resident, Plan.of(plan)), folder / name, "factored")
    return folder


def given(exported, text_file, out, most=0.7, *more, name="small"):
    options = {"text": text_file, "length": 32, "rank-multiple": 1, "max-parameters": most, "out": out}
    return ["slice", str(exported / name), *(f"--{key}={value}" for key, value in options.items()), *more]


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def values(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_slice_is_within_the_size_and_has_the_first_components_of_what_was_exported(
    exported, text_file, tmp_path, monkeypatch, capsys
):
    verify_here(monkeypatch)
    out = tmp_path / "sliced"
    assert command_line(given(exported, text_file, out, 0.7, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    before, after = model_of(exported / "small"), model_of(out)
    assert printed["parameters"] <= 0.7 < printed["parameters_before"]
    assert values(after) < values(before)
    plan = Plan.from_json((out / "plan.json").read_text())
    old = Plan.from_json((exported / "small" / "plan.json").read_text())
    assert plan.origin == old.origin
    assert plan.by_site.keys() == old.by_site.keys()
    smaller = 0
    for path, spec in after.config.rankfront["modules"].items():
        one, other = after.get_submodule(path), before.get_submodule(path)
        if spec["kind"] != "low-rank":
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
            continue
        smaller += spec["rank"] < other.rank
        assert spec["rank"] == one.rank
        assert torch.equal(one.left, other.left[:, : one.rank])
        assert torch.equal(one.right, other.right[: one.rank])
    assert smaller > 0
    assert after.get_submodule("lm_head").left is after.get_input_embeddings().left  # tied stays tied
    layer = after.model.layers[0]
    assert layer.mlp.gate_proj.right is layer.mlp.up_proj.right
    card = (out / "README.md").read_text()
    assert "## Sliced" in card
    assert f"| {printed['parameters']:.4f} | {printed['perplexity']:.6g} |" in card
    assert not list(tmp_path.glob(".*"))
    root = str(tmp_path.parent).encode()  # of the export, too, and of the text
    assert str(text_file).encode().startswith(root)
    assert not [file for file, content in tree(out).items() if root in content]


def test_a_slice_may_be_sliced_again(exported, text_file, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    assert command_line(given(exported, text_file, tmp_path / "once", 0.75)) == 0
    assert command_line(given(tmp_path, text_file, tmp_path / "twice", 0.6, name="once")) == 0
    assert values(model_of(tmp_path / "twice")) < values(model_of(tmp_path / "once"))


def test_prepared_tensors_of_a_running_model_truncate_to_what_it_runs(exported):
    source = sliced.resolve(str(exported / "small"))
    model, plan = model_of(exported / "small"), sliced.plan_of(exported / "small", source)
    levels = sliced.offered(model, sliced.find_sites(sliced.dense_skeleton(source)), plan, 2)
    held = sliced._Held(model)
    assert {get_method(options[0].method).name for options in levels.values()} == {"svd-llm", "hola", "hola-embedding"}
    for site, options in levels.items():
        assert options[0] == plan.option(site.name)
        factors = held.factors(site, options[0])
        for weight in site.weights:
            tensors, module = factors[weight.role].tensors, model.get_submodule(weight.path)
            assert torch.equal(tensors["left"], module.left)
            assert torch.equal(tensors["right"], module.right)


def test_ranks_are_of_the_least_predicted_divergence_within_the_size(exported):
    """Every other choice of ranks that differs at two sites stores too much, or is predicted to be no better."""
    source = sliced.resolve(str(exported / "small"))
    model, plan = model_of(exported / "small"), sliced.plan_of(exported / "small", source)
    levels = sliced.offered(model, sliced.find_sites(sliced.dense_skeleton(source)), plan, 2)
    menu = sliced.priced(model, levels, tokens(4, 24), 0)
    assert all(line.divergence[0] == 0 and bool((line.divergence[1:] > 0).all()) for line in menu.lines)
    assert all(bool((line.divergence[1:] >= line.divergence[:-1]).all()) for line in menu.lines)
    budget = int(0.8 * menu.dense)
    places = menu.encode(sliced.within(menu, budget, menu.dense))
    assert menu.size(places) <= budget
    for i, one in enumerate(menu.lines):
        for j, other in enumerate(menu.lines[:i]):
            for a in range(len(one.options)):
                for b in range(len(other.options)):
                    moved = list(places)
                    moved[i], moved[j] = a, b
                    assert menu.size(moved) > budget or menu.divergence(moved) >= menu.divergence(places) - 1e-12


@pytest.mark.parametrize(
    ("most", "more", "said"),
    [
        (0.99, [], "give a fraction above 0 and below that"),
        (-1, [], "give a fraction above 0 and below that"),
        (0.1, [], "more than --max-parameters: raise it"),
        (0.7, ["--length", "20000"], "20000"),
        (0.7, ["--part", "0.5", "0.2"], "0 <= start < end <= 1"),
        (0.7, ["--text", "nowhere.txt"], "nowhere.txt"),
    ],
    ids=str,
)
def test_what_a_user_may_get_wrong_is_one_line(exported, text_file, tmp_path, capsys, most, more, said):
    assert command_line(given(exported, text_file, tmp_path / "sliced", most, *more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "sliced").exists()


def test_a_plan_without_ranks_and_a_folder_that_is_no_export_are_refused(exported, tied_folder, text_file, tmp_path):
    for folder, said in ((exported / "neurons", "no low-rank factors"), (tied_folder, "is no factored export")):
        with pytest.raises(InputError, match=said):
            sliced.slice_folder(folder, HealText(str(text_file), 32), 0.6, tmp_path / "sliced")


def test_a_disk_that_is_full_or_a_folder_that_reloads_otherwise_leaves_nothing(
    exported, text_file, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    def other(*_):
        return Verified(1e9, 1, 1)

    for verify in (full, other):
        monkeypatch.setattr(derived, "verify_folder", verify)
        with pytest.raises(ExportError):
            sliced.slice_folder(exported / "small", HealText(str(text_file), 32), 0.7, tmp_path / "out", multiple=1)
        assert not tree(tmp_path)


def test_one_healing_serves_every_size(exported, tied_folder, text_file, tmp_path, monkeypatch):
    """Healed by ordered dropout with a lasso, in a folder of its own, and cut twice."""
    verify_here(monkeypatch)
    asked = HealSettings(2_000, ("logits",), "fjord", rate=3e-3, batch=128, lasso=1e-6)
    nested = tmp_path / "nested"
    heal_folder(exported / "small", HealText(str(text_file), 32), asked, nested, dense=str(tied_folder))
    assert "half ranks" in (nested / "README.md").read_text()
    for most in (0.75, 0.6):
        out = tmp_path / str(most)
        assert command_line(given(tmp_path, text_file, out, most, name="nested")) == 0
        assert (out / "healing.json").read_text() == (nested / "healing.json").read_text()
        before, after = model_of(nested), model_of(out)
        assert torch.equal(after.lm_head.left, before.lm_head.left[:, : after.lm_head.rank])
