"""Training from scratch: what is drawn anew and how, that all of it trains, and what cannot be."""

import copy
import math

import common
import pytest
import torch
from healing import LENGTH, settings
from healing import zoo as zoo  # a fixture

from rankfront.methods import InputError
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.methods.layers_sparse_sum import LowRankSparseLinear
from rankfront.search.heal.healing import Healing, split_held_out
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.scratch import SCALE, everything, initialise
from rankfront.search.heal.trainable import copied, factored_modules, stored


def fresh_of(model, seed):
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(config)


def counting(count=24):
    """Windows (count, L) in which each token is one more than the one before: something to learn."""
    return (torch.arange(LENGTH) + 7 * torch.arange(count)[:, None]) % common.VOCABULARY


def scratch(student, folder, tokens=15_000, **more):
    asked = settings(tokens, stages=("logits",), loss="ce", from_scratch=True, **more)
    return Healing(student, student, counting(), asked, Keeper(folder, {"settings": repr(asked)})).run()


def test_factors_and_values_start_as_the_paper_says_and_the_support_stays(zoo):
    student = zoo.student("sltrain")
    supports = {path: module.columns() for path, module in factored_modules(student).items()}
    assert supports
    initialise(student, 3)
    for path, module in factored_modules(student).items():
        assert isinstance(module, LowRankSparseLinear)
        bound = module.in_features**-0.5
        assert not module.left.any()
        assert 0.9 * SCALE * bound < float(module.right.abs().max()) <= SCALE * bound
        assert 0.5 * bound < float(module.values.abs().max()) <= bound
        assert torch.equal(module.columns(), supports[path])


def test_low_rank_starts_at_the_truncated_svd_of_what_the_model_draws(zoo):
    student = zoo.student("svd-llm")
    initialise(student, 3)
    fresh = fresh_of(student, 3)
    done = 0
    for path, module in factored_modules(student).items():
        if isinstance(module, LowRankLinear) and "layers" in path:
            weight = fresh.get_submodule(path).weight
            left, values, right = torch.linalg.svd(weight)
            best = left[:, : module.rank] @ torch.diag(values[: module.rank]) @ right[: module.rank]
            assert torch.allclose(module.matrix(), best, atol=1e-5)
            done += 1
    assert done


@pytest.mark.parametrize("method", ["sltrain", "svd-llm"])
def test_everything_is_drawn_anew_the_same_for_a_seed(zoo, method):
    trained, one, same, other = (zoo.student(method) for _ in range(4))
    for student, seed in ((one, 3), (same, 3), (other, 4)):
        initialise(student, seed)
    fresh = dict(fresh_of(trained, 3).named_parameters())
    values = [copied(everything(student)) for student in (trained, one, same, other)]
    for name, value in values[1].items():
        assert torch.equal(value, values[2][name])
        if name in fresh:
            assert torch.equal(value, fresh[name]), name
        if value.ndim > 1 and value.any():  # norms start at ones, SLTrain's B at zeros
            assert not torch.equal(value, values[0][name]), name
            assert not torch.equal(value, values[3][name]), name


@pytest.mark.parametrize("method", ["sltrain", "svd-llm"])
def test_everything_trains_on_the_text_and_keeps_its_shape(zoo, method, tmp_path):
    student = zoo.student(method)
    before = stored(student)
    initialise(student, 3)
    start = copied(everything(student))
    (result,) = scratch(student, tmp_path / "work")
    assert result.before == pytest.approx(math.log(common.VOCABULARY), rel=0.2)
    assert result.after < result.before
    assert stored(student) == before
    assert all(not torch.equal(value, start[name]) for name, value in copied(everything(student)).items())
    losses = [float(student(input_ids=ids, labels=ids).loss) for ids in split_held_out(counting(), 0.05)[1].split(1)]
    assert result.after == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("method", ["oats", "nystrom", "dsformer", "wara"])
def test_a_plan_of_other_families_is_refused(zoo, method):
    with pytest.raises(InputError, match="has no initialisation: train plans of low-rank methods and sltrain"):
        initialise(zoo.student(method), 0)


@pytest.mark.parametrize("more", [{"stages": ("blocks", "logits")}, {"method": "lora"}, {"loss": "kl"}], ids=str)
def test_there_is_nothing_to_heal_towards(more):
    with pytest.raises(InputError, match="from scratch there is nothing to heal towards"):
        settings(LENGTH, **{"stages": ("logits",), "loss": "ce", "from_scratch": True, **more})
