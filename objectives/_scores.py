"""One pass over token windows: negative log-likelihood, and divergence from a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfront.objectives._model_task import CAUSAL, Task

TEACHER_TOP_K = 1024  # of the vocabulary; the remainder's mass is kept as one more outcome (see Teacher)
LOGITS_AT_ONCE = {"cuda": 2**27, "cpu": 2**25}  # elements of a batch of logits
NORMALISED_AT_ONCE = {"cuda": 2**25, "cpu": 2**20}  # elements normalised in fp32; 4 MB stay in a CPU's cache


@dataclass(frozen=True)
class Teacher:
    """The dense model's distributions of predicted tokens, cut to their k likeliest tokens and the rest.

    Attributes:
        indices: the k likeliest tokens at each of the P predicted positions, (W, P, k); P = L - 1 of causal models.
        log_probabilities: theirs, (W, P, k), natural logarithms.
    """

    indices: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Scores:
    """Means over every predicted token, in nats.

    Attributes:
        loss: mean negative log-likelihood.
        divergence: mean KL(dense ‖ compressed) of the distributions; NaN without a teacher.
        tokens: how many tokens went through the model.
        error_rate: the share of which another is likelier; NaN where it was not counted.
    """

    loss: float
    divergence: float
    tokens: int
    error_rate: float = math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows, NaN where the loss is."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


def predictions(model: nn.Module, windows: Tensor, task: Task) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first position p, targets (n,), log-probabilities (n, V) in fp32) for runs of predicted tokens.

    Positions count the W P predicted tokens of ``windows`` (W, L) in order; causal models predict P = L - 1. Windows go
    through the model as many at once as `LOGITS_AT_ONCE` lets their logits be, at least one.
    """
    device = next(model.parameters()).device
    kind = device.type if device.type in LOGITS_AT_ONCE else "cuda"
    vocabulary, predicted = task.outcomes(model), task.predicted(windows.shape[1])
    step = max(1, LOGITS_AT_ONCE[kind] // (windows.shape[1] * vocabulary))
    run = max(1, NORMALISED_AT_ONCE[kind] // vocabulary)
    for start in range(0, len(windows), step):
        ids = windows[start : start + step].to(device)
        logits = task.logits(model, ids)[:, :predicted].flatten(0, 1)  # (b P, V)
        targets = task.targets(ids).flatten()
        for first in range(0, len(targets), run):
            rows = slice(first, first + run)
            yield start * predicted + first, targets[rows], torch.log_softmax(logits[rows].float(), dim=-1)


@torch.inference_mode()
def score(
    model: nn.Module, windows: Tensor, teacher: Teacher | None = None, task: Task = CAUSAL, errors: bool = False
) -> Scores:
    """Score ``model`` on ``windows`` (W, L), each on its own; ``errors`` are counted where that is asked for.

    With a teacher, KL(p ‖ q) = Σ_{i in top k} p_i (log p_i − log q_i) + p_rest (log p_rest − log q_rest), where
    rest is the mass outside the teacher's k likeliest tokens. By the data-processing inequality this is at most
    the full KL, and equal to it where k is the vocabulary.
    """
    loss = torch.zeros((), dtype=torch.float64)
    divergence, wrong = torch.zeros((), dtype=torch.float64), 0
    for start, targets, student in predictions(model, windows, task):
        loss -= student.gather(-1, targets[:, None]).double().sum().cpu()
        if errors:
            wrong += int((student.argmax(-1) != targets).sum())
        if teacher is not None:
            divergence += divergence_from(student, teacher, start).cpu()
    predicted = len(windows) * task.predicted(windows.shape[1])
    return Scores(
        loss=float(loss) / predicted,
        divergence=float(divergence) / predicted if teacher is not None else math.nan,
        tokens=windows.numel(),
        error_rate=wrong / predicted if errors else math.nan,
    )


def error_rate(model: nn.Module, windows: Tensor, task: Task = CAUSAL) -> float:
    """The share of predicted tokens, or classes, of ``windows`` (W, L) of which another is likelier to ``model``."""
    return score(model, windows, task=task, errors=True).error_rate


def divergence_from(student: Tensor, teacher: Teacher, start: int) -> Tensor:
    """Σ over positions of the cut KL (see `score`) of log-probabilities (n, V), those from position ``start`` on."""
    rows = slice(start, start + len(student))
    p = teacher.log_probabilities.flatten(0, 1)[rows].to(student.device).double()  # (n, k)
    q = student.gather(-1, teacher.indices.flatten(0, 1)[rows].to(student.device).long()).double()  # (n, k)
    shared = (p.exp() * (p - q)).sum()
    if p.shape[-1] == student.shape[-1]:
        return shared
    p_rest, q_rest = (-torch.expm1(t.logsumexp(-1).clamp_max(0)) for t in (p, q))
    tiny = torch.finfo(torch.float32).tiny
    return shared + (p_rest * (p_rest.clamp_min(tiny).log() - q_rest.clamp_min(tiny).log())).sum()


@torch.no_grad()
def teach(model: nn.Module, windows: Tensor, top_k: int = TEACHER_TOP_K, task: Task = CAUSAL) -> Teacher:
    """The teacher that ``model`` (dense) makes on ``windows`` (W, L)."""
    indices, values = [], []
    for _, _, log_probabilities in predictions(model, windows, task):
        top = log_probabilities.topk(min(top_k, log_probabilities.shape[-1]), dim=-1)
        indices.append(top.indices.int().cpu())
        values.append(top.values.cpu())
    shape = (len(windows), task.predicted(windows.shape[1]), -1)
    return Teacher(torch.cat(indices).view(shape), torch.cat(values).view(shape))
