"""What a user says of healing, and what ``auto`` comes to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from rankfront.methods import InputError, check_choice
from rankfront.search.choices import STAGES, BlockError, Loss, Stage, TeacherChoice, Window

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
# Settings by tokens seen in all. On one plan of smollm2-135m at keep 0.6, 40,000 tokens of `logits` closed 26% of the
# excess with steps of 2,048 tokens and 21% with 4,096; 100,000 closed 37% at a rate of 1e-3 and 32% at 5e-4
# (studies/results/healing.md). All else is a guess.
SMALL_BUDGET = 500_000  # tokens; below, steps are few, so batches are smaller and rates higher
BATCHES = (2_048, 4_096)  # tokens a step, below and above
BLOCK_RATES = (2e-3, 1e-3)  # of factors
LOGIT_RATES = (1e-3, 3e-4)
SCRATCH_RATE = 3e-3  # of everything: SLTrain's (2406.02214)
# Of `blocks`: passes over its windows, where these are of so many tokens. Guesses, but eight passes over 3,000 tokens
# made searched plans worse on a text of the same kind: studies/results/heal_ranking.md.
MOST_PASSES = 8
LEAST_DIFFERENT = 32_768

ORDERED = ("lod", "fjord")  # methods by ordered dropout


def parse_tokens(value: str | int) -> int:
    """``"300k"``, ``"1M"`` or ``1_000_000`` as a whole number of tokens; `InputError` where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", str(value).replace("_", "").replace(",", ""))
    tokens = float(match[1]) * UNITS[match[2]] if match else 0.0
    if not 1 <= tokens < 2**53:
        raise InputError(f"{value!r} is no number of tokens: write 300k, 1M or 1000000")
    return round(tokens)


@dataclass(frozen=True)
class HealSettings:
    """How a plan is healed.

    Attributes:
        tokens: that go through the compressed model in all, passes counted.
        stages: in this order; each keeps the best state that it saw on held-out windows, its start included.
        method: what trains, one of `arms.ARMS`.
        loss: of the last stage: KL(dense ‖ healed) at temperature 1, cross-entropy, or both, the latter scaled to the
            size of the former at every step.
        error: of hidden states in the first stage: relative to each token's size, or weighted by the Fisher information
            of each channel.
        window: what the first stage trains at once: attention and MLP in turn, or a block.
        share: of the tokens that the first stage gets where there are two.
        teacher: the dense model ``beside``, or its likeliest tokens ``cached`` in the working folder.
        rate: of factors, at its peak; None: by the budget. Smaller dense weights get a fifth of it.
        batch: tokens of a step; None: by the budget.
        held_out: share of the windows that nothing is trained on, up to `healing.MOST_HELD_OUT` tokens.
        dtype: of products: float32, bfloat16, or auto, the latter where the hardware has it; masters are fp32.
        from_scratch: everything that is stored trains, from a fresh initialisation, on the text's next tokens.
        lasso: strength of the group lasso of ordered dropout, 0 for none; see `ordered`.
        adapter: rank of what is added beside low-rank weights, which alone makes a model larger; 0 for nothing.
        seed: of the order of the windows and of what is drawn.
    """

    tokens: int
    stages: tuple[Stage, ...] = ("logits",)
    method: str = "factors"
    loss: Loss = "kl"
    error: BlockError = "relative"
    window: Window = "block"
    share: float = 0.5  # guess
    teacher: TeacherChoice = "auto"
    rate: float | None = None
    batch: int | None = None
    held_out: float = 0.05  # guess
    dtype: str = "auto"
    lasso: float = 0.0
    seed: int = 0
    from_scratch: bool = False
    adapter: int = 0

    def __post_init__(self) -> None:
        for stage in self.stages:
            check_choice("heal stage", stage, get_args(Stage))
        check_choice("heal loss", self.loss, get_args(Loss))
        check_choice("heal error", self.error, get_args(BlockError))
        check_choice("heal window", self.window, get_args(Window))
        check_choice("heal teacher", self.teacher, get_args(TeacherChoice))
        if self.stages not in STAGES:
            raise InputError(f"heal stages are {list(self.stages)}: name blocks, logits, or blocks and then logits")
        if self.from_scratch and (self.stages, self.method, self.loss) != (("logits",), "factors", "ce"):
            raise InputError(
                f"from scratch there is nothing to heal towards: stages are logits, method factors and loss ce, and not"
                f" {', '.join(self.stages)}, {self.method} and {self.loss}"
            )
        if self.adapter and (self.from_scratch or self.method != "factors"):
            raise InputError(
                f"adapter is {self.adapter}, and adapters train beside an export's own factors: leave --from-scratch"
                " out and --method at factors"
            )
        check_choice("heal dtype", self.dtype, ("auto", "float32", "bfloat16"))
        if self.rate is not None and not self.rate > 0:
            raise InputError(f"heal rate is {self.rate}: it must be above 0, such as 1e-4")
        if self.method in ORDERED and self.stages != ("logits",):
            raise InputError(
                f"heal method {self.method} trains by the loss of the whole model: leave blocks out of the stages"
                " (--stages logits)"
            )
        if not self.lasso >= 0 or (self.lasso and self.method not in ORDERED):
            raise InputError(
                f"heal lasso is {self.lasso} with method {self.method}: leave it out, or set it above 0 with method"
                f" {' or '.join(ORDERED)}"
            )

    def budget(self, stage: Stage) -> int:
        """Tokens that ``stage`` may see."""
        if len(self.stages) == 1:
            return self.tokens
        blocks = round(self.share * self.tokens)
        return blocks if stage == "blocks" else self.tokens - blocks

    @property
    def block_tokens(self) -> int:
        """Different tokens that the first stage goes over, some of them several times."""
        budget = self.budget("blocks")
        return max(budget // MOST_PASSES, min(budget, LEAST_DIFFERENT))

    def rate_of(self, stage: Stage) -> float:
        """The peak learning rate of factors."""
        if self.from_scratch:
            return self.rate or SCRATCH_RATE
        by_budget = BLOCK_RATES if stage == "blocks" else LOGIT_RATES
        return self.rate if self.rate is not None else by_budget[self.tokens >= SMALL_BUDGET]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch or BATCHES[self.tokens >= SMALL_BUDGET]
