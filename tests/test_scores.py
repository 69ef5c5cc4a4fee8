"""Perplexity against the model's own loss, divergence against a loop over the vocabulary."""

import math

import common
import pytest
import torch

from rankfront.objectives import Scores, _scores, score, teach

WINDOWS, LENGTH = 3, 10


@pytest.fixture
def windows():
    return common.tokens(WINDOWS, LENGTH, seed=5)


@pytest.fixture
def student(architecture):
    """The same architecture with its weights moved a little."""
    model = architecture.build()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for site in common.single_sites(model):
            weight = model.get_submodule(site.name).weight
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def log_probabilities(model, window):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=window[None], use_cache=False).logits[0].double(), -1)


def slow_divergence(teacher, student, windows):
    """(1/N) Σ_t Σ_v p_v (log p_v − log q_v), over every predicted token."""
    total, count = 0.0, 0
    for window in windows:
        p, q = log_probabilities(teacher, window), log_probabilities(student, window)
        for t in range(len(window) - 1):
            total += sum(math.exp(a) * (a - b) for a, b in zip(p[t].tolist(), q[t].tolist(), strict=True))
            count += 1
    return total / count


def test_perplexity_is_exp_of_the_models_own_loss(model, windows):
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    scores = score(model, windows)
    assert scores.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert scores.tokens == WINDOWS * LENGTH
    assert math.isnan(scores.divergence)


def test_divergence_over_the_whole_vocabulary_is_kl(model, student, windows):
    teacher = teach(model, windows, top_k=common.VOCABULARY)
    found = score(student, windows, teacher).divergence
    assert found == pytest.approx(slow_divergence(model, student, windows), rel=1e-3, abs=1e-6)
    assert found > 1e-4


@pytest.mark.parametrize("top_k", [1, 8, 48, 95])
def test_a_cut_teacher_gives_at_most_kl(top_k, windows):
    """Merging outcomes never raises KL (data processing), and most of it lies in the likeliest tokens."""
    row = common.architecture("llama")
    model, student = row.build(), row.build()
    with torch.no_grad():
        student.get_submodule("lm_head").weight.mul_(0.7)
    full = score(student, windows, teach(model, windows, common.VOCABULARY)).divergence
    cut = score(student, windows, teach(model, windows, top_k)).divergence
    assert 0 <= cut <= full + 1e-6
    assert cut >= {1: 0.0, 8: 0.3, 48: 0.85, 95: 0.999}[top_k] * full


def test_cut_divergence_is_that_of_merged_outcomes(windows):
    """Σ over the top k and one outcome that holds the rest."""
    row, k = common.architecture("llama"), 5
    model, student = row.build(), row.build()
    with torch.no_grad():
        student.get_submodule("lm_head").weight.mul_(0.7)
    total = 0.0
    for window in windows:
        p, q = (log_probabilities(each, window)[:-1].exp() for each in (model, student))
        for a, b in zip(p, q, strict=True):
            top = a.argsort(descending=True)[:k]
            merged = [torch.cat([each[top], (1 - each[top].sum())[None]]) for each in (a, b)]
            total += float((merged[0] * (merged[0] / merged[1]).log()).sum())
    found = score(student, windows, teach(model, windows, k)).divergence
    assert found == pytest.approx(total / (WINDOWS * (LENGTH - 1)), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 8, common.VOCABULARY, 10 * common.VOCABULARY])
def test_a_model_does_not_diverge_from_itself(model, windows, top_k):
    assert score(model, windows, teach(model, windows, top_k)).divergence == pytest.approx(0, abs=1e-6)


def test_divergence_of_a_certain_teacher_is_finite(windows):
    """A teacher that puts all its mass on one token leaves nothing for the rest."""
    row = common.architecture("llama")
    model, student = row.build(), row.build()
    with torch.no_grad():
        model.get_submodule("lm_head").weight.mul_(1000)
    found = score(student, windows, teach(model, windows, 4)).divergence
    assert math.isfinite(found)
    assert found >= 0


@pytest.mark.parametrize(
    ("limit", "elements"),
    [("LOGITS_AT_ONCE", 1), ("LOGITS_AT_ONCE", 2 * LENGTH * common.VOCABULARY)]
    + [("NORMALISED_AT_ONCE", elements) for elements in (1, 5 * common.VOCABULARY, (LENGTH - 1) * common.VOCABULARY)],
)
def test_batches_do_not_change_the_scores(monkeypatch, windows, limit, elements):
    row = common.architecture("llama")
    model, student = row.build(), row.build()
    with torch.no_grad():
        student.get_submodule("lm_head").weight.mul_(0.7)
    whole = score(student, windows, teach(model, windows, 8))
    monkeypatch.setitem(getattr(_scores, limit), "cpu", elements)
    again = score(student, windows, teach(model, windows, 8))
    assert again.loss == pytest.approx(whole.loss, rel=1e-5)
    assert again.divergence == pytest.approx(whole.divergence, rel=1e-4)


def test_perplexity_overflows_to_infinity():
    assert Scores(loss=1e6, divergence=math.nan, tokens=1).perplexity == math.inf
    assert Scores(loss=0.0, divergence=math.nan, tokens=1).perplexity == 1.0


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(math.nan, math.nan), (math.inf, math.inf), (1e3, math.inf), (0.0, 1.0)]
)
def test_a_loss_that_is_no_number_gives_no_perplexity(loss, perplexity):
    assert Scores(loss, math.nan, 1).perplexity == pytest.approx(perplexity, nan_ok=True)
