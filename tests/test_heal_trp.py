"""Trained rank pruning: truncation to an energy, its subgradient, and a healing that ends at the plan's rank."""

from types import SimpleNamespace

import pytest
import torch
from healing import LENGTH, heal, settings, stopped_and_gone_on_with
from healing import zoo as zoo  # a fixture
from torch import nn

from rankfront.methods import InputError
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.methods.truncation import least_rank, truncated
from rankfront.search.heal import healing, trp
from rankfront.search.heal.fit import Fit
from rankfront.search.heal.memory import need_of
from rankfront.search.heal.trainable import Parameter, factored_modules, stored, trainable, training


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(n, seed=7):
    x = random(200, n, seed=seed) @ random(n, n, seed=seed + 1)
    return x.T @ x


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999, 1.0])
def test_the_rank_of_an_energy_is_the_least_that_holds_it(share):
    energy = torch.linalg.svdvals(random(12, 10)).square()
    rank, total = least_rank(energy, share), float(energy.sum())
    assert float(energy[:rank].sum()) >= share * total * (1 - 1e-12)
    assert float(energy[: rank - 1].sum()) < share * total


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("whitened", [False, True])
def test_truncation_is_the_best_of_its_rank_and_changes_nothing_when_done_again(shape, whitened):
    weight = random(*shape)
    gram = gram_of(shape[1]) if whitened else None
    once = truncated(weight, gram, 4)
    assert torch.linalg.matrix_rank(once.weight) == once.left.shape[1] == 4
    assert torch.allclose(truncated(once.weight, gram, 4).weight, once.weight, atol=1e-9)
    root = torch.eye(shape[1], dtype=torch.float64) if gram is None else torch.linalg.cholesky(gram)
    values = torch.linalg.svdvals(weight @ root)
    error = float(torch.linalg.norm((weight - once.weight) @ root))
    assert error == pytest.approx(float(values[4:].square().sum().sqrt()), rel=1e-6)


def test_the_rank_falls_to_the_plans_as_the_energy_anneals():
    weight = random(20, 16)
    ranks = [truncated(weight, None, 5, progress / 10).left.shape[1] for progress in range(11)]
    assert ranks[0] == 16
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 5
    assert truncated(truncated(weight, None, 3).weight, None, 5, 0.5).left.shape[1] == 5  # never below the plan's


def test_a_subgradient_step_lowers_every_kept_singular_value_by_the_step():
    cut = truncated(random(12, 10), gram_of(10), 4)
    before = torch.linalg.svdvals(cut.weight)
    after = torch.linalg.svdvals(cut.weight - 0.01 * cut.subgradient)
    assert torch.allclose(before[:4] - after[:4], torch.full((4,), 0.01, dtype=torch.float64), atol=1e-6)
    assert float(after[4:].max()) < 1e-8


def test_what_is_left_of_the_momentum_does_not_raise_the_rank_to_first_order():
    cut, moment = truncated(random(12, 10), None, 4), random(12, 10, seed=3)
    kept = cut.projected(moment)
    assert torch.allclose(cut.projected(kept), kept, atol=1e-7)
    outside = torch.linalg.qr(torch.cat([cut.left, random(12, 8, seed=4)], 1)).Q[:, 4:]
    beyond = torch.linalg.qr(torch.cat([cut.inner.T, random(10, 6, seed=5)], 1)).Q[:, 4:]
    assert float((outside.T @ kept @ beyond).abs().max()) < 1e-7
    assert torch.allclose(cut.left.T @ kept, cut.left.T @ moment, atol=1e-7)


def test_a_decomposition_that_fails_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        truncated(torch.full((4, 3), float("nan")), None, 2)


# -- as a way of healing


class One(nn.Module):
    """A single weight of a model, low-rank or dense."""

    def __init__(self, module):
        super().__init__()
        self.site = module


def one(rank=4):
    dense = nn.Linear(10, 12)
    cut = truncated(dense.weight.detach(), None, rank)
    return One(LowRankLinear(cut.left.float(), cut.inner.float(), dense.bias.detach())), One(dense)


def steps_of(arm, module, count, run):
    """``count`` of ``run`` steps on a fixed target; the site's dense weight after each."""
    seen = []
    x, y = random(64, 10).float(), random(64, 12, seed=1).float()
    fit = Fit(arm.parameters if arm else module, 1e-2, run)
    if arm:
        arm.fit = fit
    for step in range(count):
        if arm:
            arm.before(step, run)
            made = arm.model.site(x)
        else:
            made = nn.functional.linear(x, module[0].tensor, module[1].tensor)
        ((made - y) ** 2).mean().backward()
        fit.step()
        if arm:
            arm.after(step, run)
            seen.append(arm.sites[0].weight.detach().clone())
        else:
            seen.append(module[0].tensor.detach().clone())
    return seen


def arm_of(student, dense):
    own = [
        Parameter(name, tensor, "small" if tensor.ndim == 1 else "factor")
        for name, tensor in student.named_parameters()
    ]
    return trp.RankPruning(student, dense, own)


def test_without_truncation_and_subgradient_the_dense_weight_trains_as_it_would_by_itself(monkeypatch):
    monkeypatch.setattr(trp, "NUCLEAR", 0.0)
    monkeypatch.setattr(trp, "ROUNDS", 1)
    student, dense = one()
    plain = [
        Parameter("weight", nn.Parameter(dense.site.weight.detach().clone()), "weight"),
        Parameter("bias", nn.Parameter(dense.site.bias.detach().clone()), "small"),
    ]
    arm = arm_of(student, dense)
    with training(arm.parameters):
        ours = steps_of(arm, None, 20, 30)
    theirs = steps_of(None, plain, 20, 30)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[-1], ours[0])


def test_the_weight_is_truncated_on_the_way_and_stored_at_the_plans_rank():
    student, dense = one()
    arm = arm_of(student, dense)
    with training(arm.parameters):
        steps_of(arm, None, 20, 30)
        assert not arm.storable
        before = arm.sites[0].weight.detach().clone()
        arm.before(20, 30)
        x = random(64, 10).float()
        made = student.site(x)
    assert arm.storable
    arm.finish()
    module = student.site
    assert dict(module.named_parameters()).keys() == {"left", "right", "bias"}
    assert (module.left.shape, module.right.shape) == ((12, 4), (4, 10))
    cut = truncated(before, x.T @ x, 4)
    assert torch.allclose(module.matrix(), cut.weight.float(), atol=1e-5)
    assert torch.allclose(module(x), made, atol=1e-5)
    assert torch.allclose(module.left.norm(dim=0), module.right.norm(dim=1), rtol=1e-4)


def test_several_processes_truncate_by_what_they_all_have(monkeypatch):
    """Each reads inputs of its own, so the weight alone decides, before any is read."""
    monkeypatch.setattr(trp, "Processes", lambda: SimpleNamespace(count=2))
    student, dense = one()
    arm = arm_of(student, dense)
    with training(arm.parameters):
        steps_of(arm, None, 20, 30)
        before = arm.sites[0].weight.detach().clone()
        arm.before(20, 30)
    assert arm.storable
    assert torch.allclose(student.site.matrix(), truncated(before, None, 4).weight.float(), atol=1e-5)


@pytest.mark.parametrize("stages", [("blocks",), ("logits",), ("blocks", "logits")])
def test_it_heals_and_changes_no_shape(zoo, stages, tmp_path):
    student = zoo.student("svd-llm")
    before = stored(student)
    results = heal(zoo, student, tmp_path / "work", settings(20_000, method="trp", stages=stages))
    assert results[-1].after < results[0].before
    assert stored(student) == before


def test_weights_without_singular_values_end_the_stage_at_its_best_state(zoo, tmp_path):
    results = heal(
        zoo, zoo.student("svd-llm"), tmp_path / "work", settings(method="trp", stages=("logits",), rate=1e30)
    )
    assert "ended at its best state" in results[0].note
    assert results[0].after == results[0].before


def test_a_plan_without_low_rank_weights_is_refused(zoo, tmp_path):
    with pytest.raises(InputError, match="the plan has none: use --method factors"):
        heal(zoo, zoo.student("oats"), tmp_path / "work", settings(method="trp"))


def test_its_memory_is_that_of_dense_weights_of_one_block_or_of_the_whole_model(zoo):
    student, teacher = zoo.student("svd-llm"), zoo.teacher()
    layers = list(student.model.layers)

    def values(method, stages):
        asked = settings(method=method, stages=stages)
        return need_of(student, teacher, trainable(student), layers, asked, 1000, LENGTH).training

    sizes = [
        [m.out_features * m.in_features for m in factored_modules(each).values() if isinstance(m, LowRankLinear)]
        for each in (student, layers[0])
    ]
    for stages, own in ((("logits",), sizes[0]), (("blocks",), sizes[1])):
        assert values("trp", stages) - values("factors", stages) == 24 * sum(own)
    assert values("trp", ("blocks", "logits")) == max(values("trp", ("blocks",)), values("factors", ("logits",)))


def test_stopped_before_at_and_after_the_last_truncation_it_ends_where_it_would_have(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "KEEP_EVERY", 0.0)
    asked = settings(LENGTH * 4 * 30, method="trp", stages=("logits",))  # thirty steps, of which twenty dense
    whole = zoo.student("svd-llm")
    results = heal(zoo, whole, tmp_path / "whole", asked)
    assert results[0].after < results[0].before
    for stop in (4, 20, 21):
        again, *_ = stopped_and_gone_on_with(zoo, "svd-llm", asked, tmp_path / str(stop), stop)
        for (name, one), other in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
            assert torch.allclose(one, other, atol=1e-6), (stop, name)
