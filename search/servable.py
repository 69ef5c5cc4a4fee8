"""What each format of exports holds of a plan at its size, which spaces are filtered by."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rankfront.search.choices import Format

WIDTHS, ONE_WIDTH = "a width for each block", "one width for all blocks"
HALVES, WHOLE_BLOCKS = "attention or MLP", "whole blocks"
EVERYTHING = "every method"
LOW_RANK = (
    "asvd", "fwsvd", "hola", "hola-embedding", "kfac-svd", "lrt", "lrt-snmf", "shared-basis", "shared-basis-3",
    "shared-basis-4", "svd", "svd-llm",
)  # fmt: skip
IN_BLOCKS = tuple(method for method in LOW_RANK if method != "hola-embedding")
# Format -> method -> what of it stays as small as the plan has it. All others are multiplied out to dense weights,
# heads whole; `EVERYTHING` stands for all methods.
KEEPS: Mapping[Format, Mapping[str, str]] = {
    "factored": {EVERYTHING: "as factors"},
    "dense": {},
    "plain": {"nystrom": ONE_WIDTH, "drop-block": WHOLE_BLOCKS},
    "nemotron-nas": {"nystrom": WIDTHS, "drop-block": HALVES},
    "gguf": {"nystrom": WIDTHS, "drop-block": HALVES},
    "openvino": {
        "nystrom": WIDTHS,
        "drop-block": HALVES,
        **dict.fromkeys(("lama", "vo-svd"), "heads and cache"),
        **dict.fromkeys(LOW_RANK, "two products"),
    },
    "vllm": {
        "nystrom": WIDTHS,
        "drop-block": f"{HALVES}, caches whole",
        **dict.fromkeys(("lama", "vo-svd"), "heads, caches whole"),
        **dict.fromkeys(IN_BLOCKS, "two products"),
    },
}
STEPS: Mapping[str, int] = {"gguf": 32}  # what widths are multiples of: the blocks of Q8_0, Q4_0 and others like them
FIRST_ATTENTION = ("nemotron-nas", "gguf")  # formats that have attention in the first block, of zeros where it was gone


def holds(form: Format, method: str) -> str | None:
    """What of ``method`` a format holds at the size of the plan; None where it is multiplied out."""
    keeps = KEEPS[form]
    return keeps.get(EVERYTHING, keeps.get(method))


def held_by_all(forms: Collection[Format], method: str) -> bool:
    """Whether every one of these formats holds ``method`` at the size of the plan."""
    return all(holds(form, method) is not None for form in forms)
