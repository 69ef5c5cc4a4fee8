"""Compressed tiny models for tests of healing: every family, with the dense model that it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import pytest
import torch
from launching import small_data, write_study
from transformers import AutoModelForCausalLM

from rankfront.methods import get_method
from rankfront.search.__main__ import run as command_line
from rankfront.search.heal.healing import Healing
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.settings import HealSettings
from rankfront.search.heal.status import StageResult, Status
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.output import front_healing
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

# One method of every layer that has something to train.
FAMILIES = (
    "svd-llm", "nystrom", "vo-svd", "lama", "shared-basis", "hola", "wara", "wara-ordered", "tensor-train", "tucker",
    "kronecker", "cp", "tensor-ring", "block-term", "cospadi", "dsformer", "dsformer-nm", "sltrain", "oats",
)  # fmt: skip
LENGTH = 16
BOTH = ("blocks", "logits")


def settings(tokens: int = LENGTH * 4 * 16, **more: Any) -> HealSettings:
    """Both stages, sixteen steps of four windows in all, in fp32."""
    own = {"tokens": tokens, "stages": BOTH, "batch": LENGTH * 4, "rate": 3e-3, "dtype": "float32"}
    return HealSettings(**{**own, **more})


class Zoo:
    """Models compressed by one method each, kept for all tests of a file."""

    def __init__(self, folder: Path, text: Path, architecture: str = "llama-tied", **space: Any) -> None:
        self.folder = common.save_folder(architecture, folder / architecture)
        data = small_data(self.folder, text)
        data["space"] = {"include": ["*"], "methods": list(FAMILIES), "keep": [0.5], "rank_multiple": 2, **space}
        self.compressed = CompressedModel(Study(data).setup())
        self.dense = AutoModelForCausalLM.from_pretrained(self.folder).eval().requires_grad_(False)

    def plan(self, method: str) -> Plan:
        """The method wherever it treats something, and nothing else."""
        chosen, taken = {}, set()
        for site, options in self.compressed.space.wanted().items():
            own = [option for option in options if option.method == method]
            if own and taken.isdisjoint(weight.path for weight in site.weights):
                chosen[site.name] = min(own, key=lambda option: get_method(method).storage(site, option).parameters)
                taken |= {weight.path for weight in site.weights}
        return Plan.of(chosen, self.compressed.setup.origin())

    def student(self, method: str) -> Any:
        """A copy of the model that runs the method's plan."""
        self.compressed.apply(self.plan(method))
        found = copy.deepcopy(self.compressed.model)
        self.compressed.apply(Plan(()))
        return found

    def teacher(self) -> Any:
        return copy.deepcopy(self.dense)


def windows(count: int = 24, seed: int = 5) -> Any:
    return common.tokens(count, LENGTH, seed)


def heal(zoo: Zoo, student: Any, folder: Path, asked: HealSettings, **more: Any) -> list[StageResult]:
    """Heal ``student`` in place."""
    keeper = Keeper(folder, {"settings": repr(asked)})
    return Healing(student, zoo.teacher(), more.pop("windows", windows()), asked, keeper, **more).run()


def stopped_and_gone_on_with(zoo: Zoo, plan: str, asked: HealSettings, folder: Path, stop: int) -> Any:
    """A student healed after Ctrl-C when it had been shown ``stop`` times; its results, and the tokens seen at every
    showing before and after."""
    before: list[int] = []
    after: list[int] = []

    def show(status: Status) -> None:
        before.append(status.done)
        if len(before) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(zoo, zoo.student(plan), folder, asked, show=show)
    again = zoo.student(plan)
    results = heal(zoo, again, folder, asked, show=lambda status: after.append(status.done))
    return again, results, before, after


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, text_file):
    return Zoo(tmp_path_factory.mktemp("zoo"), text_file)


# -- studies that heal

TOKENS = 12_000


def healing_data(folder: Path, text: Path, **heal: Any) -> dict[str, Any]:
    """A study that heals two members of its front."""
    data = small_data(folder, text, trials=8, anchors=[0.4, 0.6, 0.8], heal="front")
    data["data"]["heal"] = {"text": str(text), "windows": 300}
    data["objectives"] = {"divergence": {}, "parameters": {}}
    data["heal"] = {"tokens": TOKENS, "rate": 0.003, "members": 2, "stages": list(BOTH), **heal}
    return data


def healing(folder: Path, heals: str = "front", **heal: Any) -> Study:
    """The study of a run, asked to heal."""
    data = Study.open(folder).config.model_dump(mode="json")
    data["search"]["heal"] = heals
    data["heal"] |= heal
    return Study(data, folder)


def interrupt(*_: Any) -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


# -- studies whose healing fails


def wrong_shapes(*_: Any) -> torch.Tensor:
    return torch.ones(2, 3) @ torch.ones(2, 3)


def too_large(*_: Any) -> torch.Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


def spoilt(patch: pytest.MonkeyPatch, fails: Callable[..., Any], owner: Any, name: str, plans: int = 1) -> list[str]:
    """Let ``owner.name`` fail by ``fails`` while the first ``plans`` are healed; the list of those that were begun."""
    begun: list[str] = []
    write, real = front_healing.export_healed, getattr(owner, name)

    def begin(setup: Any, row: Any, *given: Any) -> Any:
        begun.append(row.plan_key)
        return write(setup, row, *given)

    patch.setattr(front_healing, "export_healed", begin)
    patch.setattr(owner, name, lambda *given, **named: (fails if len(set(begun)) <= plans else real)(*given, **named))
    return begun


def launch(run: Path, capsys: Any, heals: str = "front", **heal: Any) -> tuple[int, str]:
    """The exit code of a launch that heals, and what it printed."""
    file = write_study(healing(run, heals, **heal).config.model_dump(mode="json"), run.parent / "study.toml")
    code = command_line(["launch", str(file), "--run", str(run)])
    return code, capsys.readouterr().err
