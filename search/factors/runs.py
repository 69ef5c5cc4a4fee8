"""Runs of a calibration text through a model, of the blocks alone that the sites of a pass are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rankfront.methods import Site
from rankfront.search.factors.stretch import Span, Stretches, parked
from rankfront.search.inputs.reached import differentiated

Attended = Callable[[Tensor | None], None]


class Runs:
    """Runs windows (W, L), ``size`` at once, through a model for each of ``passes``, sites that are measured together.

    Where the model can be run by stretches of its blocks, a pass runs those alone that its sites are in, on the hidden
    states that the pass before has left. With ``gradients`` the last pass comes first: each leaves the gradients at
    its first block to the next one, after a run without gradients that leaves the hidden states of all.

    Attributes:
        order: of the passes, as they have to be run.
    """

    def __init__(
        self,
        stretches: Stretches,
        windows: Tensor,
        size: int,
        passes: list[list[Site]],
        gradients: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        self.stretches, self.gradients, self.progress = stretches, gradients, progress
        self.model, self.task = stretches.model, stretches.task
        self.batches = [windows[start : start + size] for start in range(0, len(windows), size)]
        self.order = passes[::-1] if gradients else passes
        self.spans = spans_of([self.stretches.span(sites) for sites in self.order], self.stretches.end, gradients)
        starts = sorted({span.start for span in self.spans} - {0})
        first = windows[:1, :8].to(next(self.model.parameters()).device)
        if not stretches.resumes(first, starts):
            self.spans, starts = [Span(0, self.stretches.end)] * len(passes), []
        self.hidden: dict[int, list[Tensor]] = {}  # block -> what enters it, of every batch
        self.slopes: dict[int, list[Tensor]] = {}  # block -> the loss's gradient there, of every batch
        self.done, self.total = 0, len(windows) * (len(passes) + bool(gradients and starts))
        if gradients and starts:
            self._through(Span(0, starts[-1]), starts)

    def next(self, attended: Attended) -> None:
        """The next pass, whose hooks are in the model; before each batch ``attended`` is told what is no padding."""
        span, *later = self.spans
        self.spans = later
        with differentiated(self.model, gradients=self.gradients):
            if self.gradients:
                self._back(span, later[0].stop if later else 0, attended)
            else:
                self._through(span, [later[0].start] if later and later[0].start else [], attended)

    def _through(self, span: Span, kept: list[int], attended: Attended | None = None) -> None:
        """Run the blocks of a ``span``, keeping what enters those ``kept``, and nothing else."""
        found: dict[int, list[Tensor]] = {number: [] for number in kept}

        def kept_in(own: list[Tensor]) -> Callable[[Tensor], None]:
            return lambda hidden: own.append(parked(hidden, hidden.nbytes * len(self.batches) * len(kept)))

        seen = {number: kept_in(own) for number, own in found.items()}
        with torch.no_grad():
            for number, ids in self._batches(attended):
                self.stretches.run(ids, span, self._entering(span, number), seen)
        self.hidden = found

    def _back(self, span: Span, before: int, attended: Attended) -> None:
        """Run the blocks of a ``span`` and back, keeping the gradients at the block ``before`` which the next ends."""
        slopes = self.slopes.pop(span.stop, [])
        found: list[Tensor] = []

        def keep(hidden: Tensor) -> None:
            hidden.register_hook(lambda gradient: found.append(gradient.cpu()))

        seen = {before: keep} if 0 < before < self.stretches.end else {}
        for number, ids in self._batches(attended):
            entering = self._entering(span, number)
            if entering is not None:
                entering = entering.detach().requires_grad_().clone()  # a leaf cannot be scaled in place
            made = self.stretches.run(ids, span, entering, seen)
            if span.stop < self.stretches.end:
                made.backward(slopes[number].to(made.device))
            else:
                predicted = made[:, : self.task.predicted(ids.shape[1])].flatten(0, 1).float()
                targets = self.task.targets(ids).flatten()
                nn.functional.cross_entropy(predicted, targets, reduction="sum").backward()
        self.slopes[before] = found

    def _entering(self, span: Span, batch: int) -> Tensor | None:
        return self.hidden[span.start][batch].to(next(self.model.parameters()).device) if span.start else None

    def _batches(self, attended: Attended | None) -> Iterator[tuple[int, Tensor]]:
        """Number and ids of every batch; progress hears of it once it was run."""
        device = next(self.model.parameters()).device
        for number, batch in enumerate(self.batches):
            ids = batch.to(device)
            if attended is not None:
                attended(self.task.attended(ids))
            yield number, ids
            self.done += len(ids)
            self.progress(self.done, self.total)


def spans_of(wanted: Sequence[Span], end: int, gradients: bool) -> list[Span]:
    """What each pass has to run, of what the passes want in their order: with ``gradients`` down from the last block's
    to its own first one, else up to where the next begins."""
    found: list[Span] = []
    for number, span in enumerate(wanted):
        rest, later = wanted[number:], wanted[number + 1 :]
        if gradients:
            stop = max(each.stop for each in rest) if found else end
            found.append(Span(min(span.start, max((each.stop for each in later), default=stop)), stop))
        else:
            start = min(each.start for each in rest) if found else 0
            found.append(Span(start, max(span.stop, min((each.start for each in later), default=0))))
    return found
