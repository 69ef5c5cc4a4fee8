"""Studies of models that go on with no text, such as encoders: what they read by default, and what they cannot have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rankfront.objectives import CAUSAL
from rankfront.objectives._model_task import SequenceClassification
from rankfront.search.splits import PYDOC, SPLITS, own_text_seed

DECODING = ("kv_bytes", "memory", "latency_decode", "tasks")  # objectives of models that go on with a text
FORWARD = ("latency", "latency_prefill")  # those that are of a forward pass where nothing is decoded


def with_defaults(data: Any, windows: Mapping[str, int]) -> Any:
    """The study ``data``, in which such a model reads `PYDOC` where no text is named, and ``windows`` of it where no
    number is, and latency is that of a forward pass. Other studies, and what is none, as they are."""
    model = data.get("model") if isinstance(data, Mapping) else None
    if not isinstance(model, Mapping) or model.get("task", CAUSAL.name) == CAUSAL.name:
        return data
    texts, objectives = data.get("data", {}), data.get("objectives", {})
    if not isinstance(texts, Mapping) or not isinstance(objectives, Mapping):
        return data
    asked: dict[str, dict[str, Any]] = {
        name: {"text": PYDOC, "windows": windows[name], **_table(texts.get(name))} for name in SPLITS
    }
    named = all(split["text"] != PYDOC for split in asked.values())
    there = named and model["task"] != SequenceClassification.name  # a second corpus for control, then
    control = {"text": PYDOC, **({} if there else {"windows": 0}), **_table(texts.get("control"))}
    timed = {
        name: {"decode": 0, **settings} if name in FORWARD and isinstance(settings, Mapping) else settings
        for name, settings in objectives.items()
    }
    return {**data, "data": {**texts, **asked, "control": control}, **({"objectives": timed} if timed else {})}


def _table(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def refusal(config: Any) -> str | None:
    """Why there is no such study as the `StudyConfig`, in a line; None where there is."""
    task = config.model.task
    return None if task == CAUSAL.name else next((f"model.task is {task!r}, {why}" for why in _refusals(config)), None)


def _refusals(config: Any) -> Iterator[str]:
    splits = {**config.data.splits(), **({} if config.data.heal is None else {"heal": config.data.heal.split})}
    for name, split in splits.items():
        if any(own_text_seed(text) is not None for text in split.counts()):
            yield f"and such a model samples no text: name one for data.{name}"
    for name, settings in config.objectives.items():
        if name in DECODING:
            yield f"and such a model decodes nothing: leave out objectives.{name}"
        if settings.get("decode") and name in FORWARD:
            yield f"and such a model decodes nothing: leave out objectives.{name}.decode"
        if settings.get("engine"):
            yield f"which no engine runs that is known here: leave out objectives.{name}.engine"
    if config.tasks:
        yield "and lm-eval asks causal language models: leave out objectives.tasks"
    if config.space.servable:
        yield "which no engine runs that is known here: leave out space.servable"
    if config.model.task == SequenceClassification.name and config.search.refit != "none":
        yield "and a refit reads windows of one length: leave out search.refit"
    if config.search.heal != "none":
        yield "and healing is of causal language models: leave out search.heal"
