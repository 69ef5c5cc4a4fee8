"""What a healed model's card says of its healing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankfront.search.heal.settings import ORDERED, HealSettings
from rankfront.search.heal.status import StageResult
from rankfront.search.plain import markdown, without_folders


@dataclass(frozen=True)
class HealText:
    """What a model is healed on: the part (start, end) of a text, in windows of ``length`` tokens."""

    name: str
    length: int = 512
    part: tuple[float, float] = (0.0, 1.0)


HEALED = """## Healed

After factorisation, what is stored was trained towards the dense model (method `{settings.method}`, loss
`{settings.loss}`) on {where}. **The figures above are of the model before that.** Divergence is KL(dense ‖ this model)
in nats a token{narrow}, on windows that nothing was trained on.

| stage | tokens seen | seconds | divergence before | after |
"""
ADAPTED = """

Beside every low-rank weight stands a wavelet adapter (WaRA, 2506.24092) of rank {settings.adapter}, which training
added. So the folder holds more values than the plan: `parameters` above leaves these out."""
FROM_SCRATCH = """## Trained from scratch

Of the model above nothing is left but its shapes: all that is stored was initialised anew, by seed {settings.seed}, and
trained on the next tokens of {where}. **The figures above are not of this model.** Cross-entropy is in nats a token, on
windows that nothing was trained on.

| stage | tokens seen | seconds | cross-entropy before | after |
"""


def note(results: Sequence[StageResult], text: HealText, settings: HealSettings) -> str:
    """A model card's section on how it was trained."""
    where = f"{markdown(without_folders(text.name))}, part {list(text.part)}, in windows of {text.length} tokens"
    rows = "\n".join(
        f"| {r.stage} | {r.tokens:,} | {r.seconds:,.0f} | {r.before:.4f} | {r.after:.4f} |" for r in results
    )
    narrow = ", the mean over whole, three quarters and half ranks" * (settings.method in ORDERED)
    head = (FROM_SCRATCH if settings.from_scratch else HEALED).format(settings=settings, where=where, narrow=narrow)
    if settings.adapter:
        rows += ADAPTED.format(settings=settings)
    return f"{head}| --- | --- | --- | --- | --- |\n{rows}\n"
