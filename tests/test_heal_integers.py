"""Healing of weights in integers: scales and zeros train, codes stay bit for bit, over families and bits."""

import common
import pytest
import torch
from healing import TOKENS, Zoo, heal, healing_data, settings
from launching import make_run, verify_here
from torch import nn
from transformers import AutoModelForCausalLM

from rankfront.methods._integers import rounded
from rankfront.methods.integer_matrix import IntegerMatrix, IntegerTable
from rankfront.search.heal.arms import StraightThrough
from rankfront.search.heal.fit import Fit
from rankfront.search.heal.trainable import Parameter, factored_modules, stored, trainable, training
from rankfront.search.inputs.model import count_bytes

BASES = ("gptq", "svd-llm", "cospadi", "sltrain", "nystrom", "vo-svd", "lama")
ROWS = (*(f"{base}-int{bits}" for base in BASES for bits in (8, 4)), "rtn-int8", "rtn-int4", "lqer-int4")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, text_file):
    """Every treatment in both bits, and tables in integers."""
    folder = tmp_path_factory.mktemp("zoo")
    methods = [*(base for base in BASES if base != "gptq"), "rtn-int8", "rtn-int4", "lqer-int4"]
    return Zoo(folder, text_file, methods=methods, bits=[16, 8, 4])


def integers(model):
    """Path -> matrix in integers."""
    return {path: module for path, module in model.named_modules() if isinstance(module, IntegerMatrix)}


@pytest.mark.parametrize("method", ROWS)
def test_scales_train_and_codes_stay(zoo, method, tmp_path):
    student = zoo.student(method)
    before, size, held = stored(student), count_bytes(student), integers(student)
    assert held
    codes = {path: (module.integers, module.integers.clone()) for path, module in held.items()}
    scales = {path: module.scales.clone() for path, module in held.items()}
    assert {p.name for p in trainable(student) if p.kind == "scale"} == {f"{path}.scales" for path in held}
    results = heal(zoo, student, tmp_path, settings(rate=1e-3))
    assert results[-1].after < results[0].before
    assert stored(student) == before
    assert count_bytes(student) == size
    for path, module in integers(student).items():
        tensor, value = codes[path]
        assert module.integers is tensor, path
        assert torch.equal(tensor, value), path
    moved = [not torch.equal(module.scales, scales[path]) for path, module in held.items()]
    assert all(moved)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", [IntegerMatrix, IntegerTable])
def test_a_gradient_reaches_scales_and_is_that_of_the_restored_matrix(form, bits):
    """Of few tokens too, which a packed kernel takes where no gradient is wanted."""
    m, n = 12, 40
    generator = torch.Generator().manual_seed(1)
    codes = rounded(torch.randn(m, n, generator=generator), bits)
    module = form(*codes, bits, n)
    x, g = torch.randn(3, n, generator=generator), torch.randn(3, m, generator=generator)
    module.scales.requires_grad_(True)
    made = module(x) if form is IntegerMatrix else x @ module(torch.arange(m)).T
    (ours,) = torch.autograd.grad((made * g).sum(), module.scales)
    (slow,) = torch.autograd.grad((nn.functional.linear(x, module.matrix()) * g).sum(), module.scales)
    assert torch.allclose(ours, slow, rtol=1e-4, atol=1e-4)
    assert ours.any()


def test_a_step_of_a_scale_is_relative_to_its_size():
    """As of t in s = u t: the steps of two problems that differ in the unit alone differ by the unit."""
    steps = []
    for unit in (1.0, 1e-3):
        tensor = nn.Parameter(unit * torch.tensor([1.0, 2.0]))
        own = [Parameter("scales", tensor, "scale", unit)]
        with training(own):
            fit = Fit(own, 1e-2, 3)
            for _ in range(3):
                (tensor / unit).square().sum().backward()
                fit.step()
        steps.append(tensor.detach() / unit)
    assert torch.allclose(*steps, rtol=1e-5)
    assert not torch.allclose(steps[0], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("method", ["scales", "lora"])
def test_other_ways_train_scales_too(zoo, method, tmp_path):
    student = zoo.student("gptq-int4")
    before = stored(student)
    results = heal(zoo, student, tmp_path, settings(method=method, stages=("logits",)))
    assert results[-1].after < results[0].before
    assert stored(student) == before


@pytest.mark.parametrize("bits", [8, 4])
def test_supports_move_beside_integers(zoo, bits, tmp_path):
    student = zoo.student(f"cospadi-int{bits}")
    supports = [module.support.clone() for module in factored_modules(student).values()]
    results = heal(zoo, student, tmp_path, settings(method=StraightThrough.name, tokens=5_000))
    assert results[-1].after < results[0].before
    now = [module.support for module in factored_modules(student).values()]
    assert not all(torch.equal(one, other) for one, other in zip(now, supports, strict=True))


@pytest.mark.parametrize("method", ["gptq-int4", "svd-llm-int8"])
def test_what_is_stored_in_half_precision_heals_too(zoo, method, tmp_path):
    student = zoo.student(method).bfloat16()
    dtypes = {name: tensor.dtype for name, tensor in student.named_parameters()}
    (result,) = heal(zoo, student, tmp_path, settings(stages=("logits",), dtype="bfloat16"))
    assert result.after < result.before
    assert {name: tensor.dtype for name, tensor in student.named_parameters()} == dtypes


def test_a_study_heals_plans_of_integers_alone_and_exports_what_it_scored(
    model_folder, text_file, tmp_path, monkeypatch
):
    verify_here(monkeypatch)
    data = healing_data(model_folder, text_file, members=1, rate=1e-3)
    data["space"] = {"methods": ["rtn-int4"], "include": ["*"]}
    data["objectives"] = {"divergence": {}, "bytes": {}}
    study = make_run(data, tmp_path / "run")
    (member,) = study.read().healed.members.values()
    before = study.read().trial(member.row.number)
    assert member.row.values["divergence"] < before.values["divergence"]
    assert member.row.values["bytes"] == before.values["bytes"]
    assert member.record["tokens"] == TOKENS
    study.export_stored(tmp_path / "healed", member)
    study.export(tmp_path / "plain", before)
    healed, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("healed", "plain"))
    assert {path: module.integers.tolist() for path, module in integers(healed).items()} == {
        path: module.integers.tolist() for path, module in integers(plain).items()
    }
    ids = common.tokens(2, 24, seed=3)
    with torch.no_grad():
        assert not torch.equal(healed(input_ids=ids).logits, plain(input_ids=ids).logits)
