"""What healing minimises: an error of hidden states, and a divergence of next-token distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from rankfront.methods import InputError
from rankfront.objectives import Teacher, divergence_from
from rankfront.search.choices import Loss
from rankfront.search.inputs.forwards import running_as

AT_ONCE = {"cuda": 2**26, "cpu": 2**24}  # logits that exist at once, of each model: 64 MiB in fp32 on a CPU; guess
EPSILON = 1e-6  # of the mean square of a target, below which its error counts no more; guess


def relative_error(hidden: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖h − t‖² / ‖t‖² for hidden states (B, L, d), first tokens left out.

    A few tokens and channels of a residual stream are hundreds of times as large as the others: relative to each
    token's own size, none of them is all that counts. The first token is the largest, and predicts little.
    """
    hidden, target = hidden[:, 1:].float(), target[:, 1:].float()
    size = target.square().sum(-1)
    return ((hidden - target).square().sum(-1) / (size + EPSILON * size.mean())).mean()


def weighted_error(hidden: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens of Σ_c w_c (h_c − t_c)² for hidden states (B, L, d) and weights (d,), first tokens left out."""
    return ((hidden[:, 1:].float() - target[:, 1:].float()).square() @ weights).mean()


@dataclass
class _Given(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states as any body of a model gives them, that of a mixture too."""

    router_logits: Any = None


class Head:
    """Logits of a causal model from its last hidden states, as its own forward makes them: scaled or capped where it
    scales or caps. The body of the model, which makes these states, gives the ones at hand meanwhile."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @cached_property
    def body(self) -> nn.Module:
        """What the model calls for its last hidden states: the module that ends last of those that give them."""
        found: list[nn.Module] = []

        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if module is not self.model and hasattr(output, "last_hidden_state"):
                found.append(module)

        handles = [module.register_forward_hook(hook) for module in self.model.modules()]
        try:
            with torch.no_grad():
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise InputError(f"{type(self.model).__name__} has no body that gives hidden states: it cannot be healed")
        return found[-1]

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states (B, L, d) of ids (B, L)."""
        found: Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, L, V) from (B, L, d)."""
        given = _Given(last_hidden_state=hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with running_as(self.body, lambda *_, **__: given):
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found

    @torch.no_grad()
    def whole(self, ids: Tensor) -> bool:
        """Whether `logits` of `hidden` are those of the model, on ids (B, L)."""
        ours = self.logits(self.hidden(ids))
        theirs = self.model(input_ids=ids, use_cache=False).logits
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def runs_of(tokens: int, vocabulary: int, device: str) -> list[slice]:
    """Runs of positions whose logits may exist at once."""
    run = max(1, AT_ONCE[torch.device(device).type] // vocabulary)
    return [slice(start, start + run) for start in range(0, tokens, run)]


class _Kl(torch.autograd.Function):
    """Σ over rows of KL(p ‖ q), whose gradient for the logits of q is q − p."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        p = log_p.exp()
        found = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
        ctx.save_for_backward(log_q.exp_().sub_(p).to(student.dtype))
        return found

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * wanted[0], None


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ over rows of KL(p ‖ q) for logits (n, V) of q, the student, and p, the teacher; temperature 1, in nats.

    The teacher's logits get no gradient.
    """
    found: Tensor = _Kl.apply(student, teacher)
    return found


def _runs(head: Head, states: Tensor, targets: Tensor, loss: Loss, teacher: Target) -> Iterator[Tensor]:
    """Run of tokens by run, its loss: of last hidden states (n, d) and the tokens (n,) that follow them."""
    for rows in runs_of(len(targets), head.model.config.get_text_config().vocab_size, states.device.type):
        logits = head.logits(states[rows][None])[0]
        divergence = teacher.divergence(logits, rows) if loss != "ce" else logits.new_zeros((), dtype=torch.float32)
        if loss == "kl":
            yield divergence
            continue
        entropy = nn.functional.cross_entropy(logits.float(), targets[rows], reduction="sum")
        tiny = torch.finfo(torch.float32).tiny
        yield entropy if loss == "ce" else entropy + divergence * (entropy / divergence.clamp_min(tiny)).detach()


@torch.no_grad()
def summed(head: Head, hidden: Tensor, ids: Tensor, loss: Loss, teacher: Target) -> float:
    """The sum over predicted tokens of ``loss`` at hidden states (B, L, d) of ids (B, L)."""
    runs = _runs(head, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), loss, teacher)
    return sum(float(run) for run in runs)


def descend(head: Head, hidden: Tensor, ids: Tensor, loss: Loss, teacher: Target, scale: float) -> float:
    """``scale`` times `summed`, and its gradient added to that of all that made ``hidden`` or makes logits of it."""
    targets = ids[:, 1:].flatten()
    return run_by_run(
        hidden[:, :-1].flatten(0, 1),
        lambda states: (scale * run for run in _runs(head, states, targets, loss, teacher)),
    )


def run_by_run(hidden: Tensor, losses: Callable[[Tensor], Iterable[Tensor]]) -> float:
    """The sum of ``losses`` of hidden states (n, d), one of each run of tokens, and a backward pass of it.

    It goes run by run down to the hidden states, and from there once: logits exist for one run at a time, and are made
    once.
    """
    states = hidden.detach().requires_grad_(True)
    total = 0.0
    for loss in losses(states):
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    hidden.backward(states.grad)  # type: ignore[no-untyped-call]
    return total


class Target:
    """What a batch of the dense model says of its next tokens: by its last hidden states, or by a cut `Teacher`."""

    def __init__(self, head: Head | None = None, hidden: Tensor | None = None, cut: Teacher | None = None) -> None:
        self.head, self.cut = head, cut
        self.hidden = None if hidden is None else hidden[:, :-1].flatten(0, 1)

    def divergence(self, logits: Tensor, rows: slice) -> Tensor:
        """Σ KL(dense ‖ compressed) of the compressed model's ``logits`` (n, V) at the positions ``rows``."""
        if self.cut is not None:
            return divergence_from(logits.float().log_softmax(-1), self.cut, rows.start).float()
        assert self.head is not None
        assert self.hidden is not None
        with torch.no_grad():
            dense = self.head.logits(self.hidden[rows][None])[0]
        return kl(logits, dense)
