"""What a study's model is for, by ``model.task``: the classes that load it, and how its tokenizer frames a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL, Task
from rankfront.objectives._model_task import MaskedLM, SequenceClassification


@dataclass(frozen=True)
class Loading:
    """How models of one task are loaded.

    Attributes:
        auto: the class of transformers that does.
        mapping: configuration class -> model class, of those that it knows.
        what: a model of another task is none of these.
        dropped: parts of a checkpoint that such models run without, by the beginning of their names.
    """

    auto: Any
    mapping: Any
    what: str
    dropped: tuple[str, ...] = ()


# Of checkpoints that were trained for more at once, as BERT's were, the other heads stay unread.
OTHER_HEADS = ("cls.seq_relationship.", "bert.pooler.", "roberta.pooler.", "electra.pooler.")
LOADING = {
    CAUSAL.name: Loading(
        AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "language model that predicts the next token"
    ),
    MaskedLM.name: Loading(
        AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING, "language model that predicts masked tokens", OTHER_HEADS
    ),
    SequenceClassification.name: Loading(
        AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "model that classifies texts"
    ),
}


def check_task(name: str, task: str, config: Any) -> None:
    """Raise `InputError` where the model ``name`` with this configuration is none for the ``task``, or transformers has
    none such."""
    wanted = LOADING[task]
    own = wanted.auto.__name__ in getattr(config, "auto_map", {})
    decoder = getattr(config, "is_decoder", False)
    masked = any(kind in LOADING[MaskedLM.name].mapping for kind in type(config).__mro__)  # factored ones too
    encoder = masked and not decoder
    causal, classifies = task == CAUSAL.name, task == SequenceClassification.name
    wrong = {
        "an encoder and a decoder": getattr(config, "is_encoder_decoder", False),
        "an encoder, whose tokens see those after them": causal and encoder,
        f"no {wanted.what}": not own and type(config) not in wanted.mapping,
        "a decoder, whose tokens see none after them": (task == MaskedLM.name and decoder)
        or (classifies and not own and not encoder),
        "a regression, which has no classes": classifies and config.num_labels < 2,
    }
    for what, true in wrong.items():
        if true:
            remedy = f"rankfront takes causal language models, those of {CAUSAL.auto}, and encoders"
            if causal and encoder:
                others = " or ".join(repr(each) for each in LOADING if each != task)
                remedy += f" where model.task (--task of evaluate) is {others}"
            raise InputError(f"model {name!r} is {what} ({config.model_type}): {remedy}")


def make_task(name: str, tokenizer: Any) -> Task:
    """The task ``name`` with this tokenizer; `InputError` where that lacks a token which the task needs."""
    if name == CAUSAL.name:
        return CAUSAL
    if name == SequenceClassification.name:
        return SequenceClassification(-1 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id))
    if tokenizer.mask_token_id is None:
        raise InputError(f"model.task is {name!r} and the model's tokenizer has no mask token: name another model")
    return MaskedLM(int(tokenizer.mask_token_id), tuple(sorted(tokenizer.all_special_ids)))


def frame_of(tokenizer: Any, task: Task = CAUSAL) -> tuple[list[int], list[int]]:
    """What every row starts with and ends with. Of text that goes on, a start token alone (Gemma's BOS), if any."""
    whole = tokenizer("a")["input_ids"]
    if task.generates:
        first = tokenizer.bos_token_id
        return ([first] if first is not None and whole[:1] == [first] else []), []
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
