"""What healing needs of memory, before it starts, and what there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankfront.methods import InputError, Unpacked
from rankfront.methods.integer_matrix import IntegerMatrix
from rankfront.search.heal.arms import ARMS
from rankfront.search.heal.logits import AT_ONCE
from rankfront.search.heal.settings import HealSettings
from rankfront.search.heal.trainable import Parameter

STATE = 24  # bytes of a value that trains: fp32 master, gradient, two moments, the best state, and the first
PLACE = 8  # bytes of where a value of a sparse factor stands
RESTORED = 8  # bytes of a weight in integers that a backward pass keeps: its codes and itself, in fp32
KEPT = 2.0  # times the inputs and outputs of all linear layers that a backward pass keeps; guess


@dataclass(frozen=True)
class Need:
    """Bytes that healing takes at its most demanding stage, beside nothing else: both models included."""

    models: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        return self.models + self.training + self.activations


def need_of(
    student: Any,
    teacher: Any,
    parameters: Iterable[Parameter],
    blocks: Iterable[nn.Module],
    settings: HealSettings,
    tokens: int,
    length: int,
) -> Need:
    """An estimate for ``tokens`` of text in windows of ``length``."""
    models = sum(tensor.nbytes for model in (student, teacher) for tensor in (*model.parameters(), *model.buffers()))
    unpacked = [module for module in student.modules() if isinstance(module, Unpacked)]
    places = sum(module.get_parameter("values").numel() for module in unpacked)
    device = next(student.parameters()).device.type
    chosen = {id(parameter.tensor): parameter.tensor.numel() for parameter in parameters}
    found = list(blocks)
    width = student.get_input_embeddings().embedding_dim
    arm = ARMS[settings.method]

    def training_of(module: nn.Module) -> int:
        stored = sum(chosen.get(id(tensor), 0) for tensor in module.parameters())
        return stored + arm.added(module)

    most: Any = max(found, key=training_of)
    if settings.stages == ("blocks",):
        training, at_once, modules = training_of(most), settings.step_tokens, list(most.modules())
    else:
        by_factors = arm.first_alone and len(settings.stages) == 2
        training = max(training_of(most), sum(chosen.values())) if by_factors else training_of(student)
        at_once, modules = max(AT_ONCE[device], length), list(student.modules())
    kept = _features(modules) * at_once
    restored = RESTORED * sum(module.numel() for module in modules if isinstance(module, IntegerMatrix))
    if settings.error == "fisher" and "blocks" in settings.stages:
        kept = max(kept, _features(teacher.modules()) * length)  # one window through all blocks
    streams = 3 * tokens * width * 4 if "blocks" in settings.stages else 0
    return Need(models, STATE * training + PLACE * places, round(KEPT * 4 * kept) + restored + streams)


def _features(modules: Iterable[Any]) -> int:
    """Inputs and outputs of all linear modules, of one token."""
    return sum(module.in_features + module.out_features for module in modules if _is_linear(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def check(need: Need, free: int | None, settings: HealSettings) -> str:
    """One line of what is needed and what is free; `InputError` where it does not fit, with what would."""
    loaded = need.training + need.activations  # the models are in memory when this is asked
    line = f"healing takes about {need.total / 2**30:.1f} GiB, {need.models / 2**30:.1f} of them for both models"
    if free is None:
        return line
    if loaded > free:
        remedy = "heal with --stages blocks, which trains one block at a time" if "logits" in settings.stages else ""
        raise InputError(
            f"{line}, and {free / 2**30:.1f} GiB are free beside them: {remedy or 'use a smaller --batch or --tokens'}"
        )
    return f"{line}; {free / 2**30:.1f} GiB are free"
