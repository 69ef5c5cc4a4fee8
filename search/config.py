"""The study file: TOML in, validated settings out. The only place where pydantic is used."""

from __future__ import annotations

import copy
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from rankfront.methods import DENSE, INTEGER_BITS, Grid, InputError, check_choice, method_names, nearest, shown
from rankfront.objectives import make_objective
from rankfront.objectives.tasks import Tasks
from rankfront.search.choices import (
    OURS,
    SAMPLERS,
    STAGES,
    BlockError,
    Loss,
    ModelTask,
    Servable,
    Stage,
    TeacherChoice,
    Window,
)
from rankfront.search.constraint import Constraint
from rankfront.search.names import BUNDLED
from rankfront.search.servable import STEPS, held_by_all
from rankfront.search.splits import PYDOC, SELF, SPLITS, Split, column_of, own_text_seed, trial_windows
from rankfront.search.urls import parse_url
from rankfront.search.without_decoding import refusal, with_defaults

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
MIN_WINDOW = 8  # tokens; shorter windows predict next to nothing
LONGEST = 100 * 365 * UNITS["d"]  # of a search; a guess at what nobody means
QUALITY = ("divergence", "perplexity")  # losses that our sampler can model, the preferred one first
ALWAYS = ("block_parameters", "bytes", "parameters", "perplexity")  # figures of every trial, objectives or not
MOST = 2**53  # of anything counted: beyond, figures are not exact
MOST_AT_ONCE = 2**16  # workers, and CPUs or GPUs for one; a guess


Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]


def parse_duration(value: Any) -> float:
    """Seconds from ``"10m"``, ``"1h30m"``, ``"90s"`` or a number of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LONGEST:
        return float(value)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value) if isinstance(value, str) else []
    if not parts or "".join(number + unit for number, unit in parts) != value:
        raise ValueError(f"{shown(value)} is no duration: write 90s, 20m or 1h30m")
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"{shown(value)} is no duration: it must be longer than nothing and at most a hundred years")
    return seconds


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


KNOWN = {"pydoc", "self", *BUNDLED}  # names that no file stands for


def located(name: str) -> str:
    """The absolute path of a file or folder called ``name``, or ``name`` where there is none; ``~`` is the home."""
    if name in KNOWN or name.startswith("hub:") or own_text_seed(name) is not None:
        return name
    text, column = (name, None) if Path(name).expanduser().exists() else column_of(name)
    path = Path(text).expanduser()
    there = str(path.absolute()) if path.exists() or name.startswith("~") else text
    return there if column is None else f"{there}#{column}"


Name = Annotated[str, AfterValidator(located)]  # of something known by name, or a path


class ModelConfig(Strict):
    """A bundled name, a hub id, a local folder or a .gguf file; what it is evaluated in and on.

    ``attention`` is one of transformers' implementations, such as sdpa or eager; None leaves it to transformers.
    ``trust_remote_code`` lets Python code that comes with the model run. ``task`` is what the model is for.
    """

    name: Name = "smollm2-135m"
    task: ModelTask = "causal-lm"
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    trust_remote_code: bool = False


class ShareConfig(Strict):
    """One text of a mixture, which gives windows in proportion to its weight."""

    text: Name
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


ONE, SEVERAL = "one text", "several texts"  # tags, which errors leave out
Texts = Annotated[
    Annotated[Name, Tag(ONE)] | Annotated[tuple[ShareConfig, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(lambda given: SEVERAL if isinstance(given, list | tuple) else ONE),
]


class SplitConfig(Strict):
    """``text`` is a name (see `text.read_text`), ``self`` for what the dense model samples, or a mixture of them."""

    text: Texts = SELF
    windows: Count
    part: tuple[float, float] = (0.0, 1.0)

    @field_validator("part")
    @classmethod
    def _ordered(cls, part: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"part is {list(part)}: give [start, end] with 0 <= start < end <= 1")
        return part

    @model_validator(mode="after")
    def _every_text_has_windows(self) -> SplitConfig:
        if self.windows:
            self.split.counts()
        return self

    @property
    def split(self) -> Split:
        weights: dict[str, float] = {}
        for share in () if isinstance(self.text, str) else self.text:
            weights[share.text] = weights.get(share.text, 0.0) + share.weight
        return Split(self.text if isinstance(self.text, str) else weights, self.windows, self.part)

    @property
    def label(self) -> str:
        """The text's name; of a mixture, its texts with their weights."""
        return self.label_by(str)

    def label_by(self, naming: Callable[[str], str]) -> str:
        """`label`, with what ``naming`` makes of each text's name."""
        if isinstance(self.text, str):
            return naming(self.text)
        return " + ".join(f"{share.weight:g} {naming(share.text)}" for share in self.text)


class ControlConfig(SplitConfig):
    """The second corpus that figures are checked on; no windows, no check."""

    windows: Annotated[int, Field(ge=0)] = 16


class DataConfig(Strict):
    """Window length in tokens, and what each split takes.

    ``control`` is a text of another domain: by default pydoc where a split has the model's own text, else that.
    ``heal`` is what plans are healed on: windows that no other split has.
    """

    length: Annotated[int, Field(ge=MIN_WINDOW, le=MOST)] = 512
    calibrate: SplitConfig = SplitConfig(windows=64)
    search: SplitConfig = SplitConfig(windows=16)
    report: SplitConfig = SplitConfig(windows=32)

    control: ControlConfig = Field(default_factory=ControlConfig, validate_default=True)
    heal: SplitConfig | None = None

    @field_validator("control", mode="before")
    @classmethod
    def _of_another_domain(cls, control: Any, info: ValidationInfo) -> Any:
        if isinstance(control, ControlConfig):
            control = control.model_dump(exclude_unset=True)
        if not isinstance(control, Mapping) or "text" in control:
            return control
        texts = {text for name in SPLITS if name in info.data for text in info.data[name].split.counts()}
        return {**control, "text": PYDOC if any(own_text_seed(text) is not None for text in texts) else SELF}

    @model_validator(mode="after")
    def _heals_on_a_text_of_its_own(self) -> DataConfig:
        """What the model samples is as long as all splits of it need: one more would move the others' windows."""
        if self.heal is not None:
            others = {text for split in self.splits().values() for text in split.counts()}
            again = sorted(text for text in others & {*self.heal.split.counts()} if own_text_seed(text) is not None)
            if again:
                raise ValueError(f"heal reads {again[0]!r} as another split does: name self:SEED")
        return self

    def splits(self) -> dict[str, Split]:
        """The three splits, and ``control`` where there is one."""
        names = [*SPLITS, "control"] if self.control.windows else SPLITS
        return {name: getattr(self, name).split for name in names}


FINEST = 8  # multiple that ranks may be of where the device is asked
Methods = Annotated[tuple[str, ...], Field(min_length=1)]
Keep = tuple[float, ...]
FULL_BITS = 16  # stands for the dtype of the model


def _widths(bits: tuple[int, ...]) -> tuple[int, ...]:
    """Bits that a kernel multiplies by, each once."""
    unknown = [each for each in bits if each not in (FULL_BITS, *INTEGER_BITS)]
    if unknown or not bits:
        raise ValueError(f"bits are {list(bits)}: kernels read {FULL_BITS} (the dtype of the model), 8 and 4")
    return tuple(dict.fromkeys(bits))


Bits = Annotated[tuple[int, ...], AfterValidator(_widths)]


def _listed(given: Any) -> Any:
    """A list of one where one is named."""
    return [given] if isinstance(given, str) else given


class RuleConfig(Strict):
    """Narrower choices for the sites that ``match``; the last rule that matches wins, key by key."""

    match: str
    methods: Methods | None = None
    keep: Keep | None = None
    bits: Bits | None = None


class SpaceConfig(Strict):
    """Which weights may be treated, how, and at which levels.

    ``bits`` are those of the matrices that treatments leave, and of the dense weight, each a choice of its own: 16, the
    dtype of the model, 8 and 4. Ranks are multiples of ``rank_multiple``; ``"device"`` is the one of 8, 16, 32 and 64
    at which the device multiplies fastest, measured at the first launch. ``servable`` names formats of exports that
    hold every plan at its size. ``allow_partial`` lets a model be searched of whose blocks less than half can be
    treated. ``experts`` of a layer take one option of each projection ``together``, or each its own, ``apart``.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    methods: Methods = ("svd-llm", "lama", "vo-svd", "nystrom", "drop-block")
    keep: Keep = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    bits: Bits = (FULL_BITS,)
    rank_multiple: Annotated[int, Field(le=MOST)] | Literal["device"] = 8
    allow_partial: bool = False
    experts: Literal["together", "apart"] = "together"
    servable: Annotated[tuple[Servable, ...], BeforeValidator(_listed)] = ()
    rule: tuple[RuleConfig, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> SpaceConfig:
        for names in (self.methods, *(rule.methods for rule in self.rule if rule.methods)):
            for name in names:
                check_choice("method", name, (DENSE, *method_names()))
        for keep in self._levels:
            self.grid(keep)
        named = {name for names in (self.methods, *(rule.methods for rule in self.rule)) for name in names or ()}
        narrow = any(bits != (FULL_BITS,) for bits in (self.bits, *(rule.bits for rule in self.rule if rule.bits)))
        if named == {DENSE} and not narrow:
            raise ValueError(
                f"the methods are {DENSE!r} alone, which every site may stay anyway, so there is nothing to choose:"
                f" name another, such as {SpaceConfig.model_fields['methods'].default[0]!r}"
            )
        if not narrow and not any(held_by_all(self.servable, name) for name in named - {DENSE}):
            held = [name for name in method_names() if held_by_all(self.servable, name)]
            raise ValueError(
                f"servable is {list(self.servable)}, which holds none of {sorted(named - {DENSE})} at its size: name"
                f" {' or '.join(held)}"
            )
        return self

    def grid(self, keep: Keep) -> Grid:
        """What methods are asked for at these kept fractions, the finest grid until the device has been asked."""
        multiple = FINEST if self.rank_multiple == "device" else self.rank_multiple
        steps = [STEPS.get(form, 1) for form in self.servable]
        return Grid(keep, math.lcm(multiple, *steps) if multiple > 0 else multiple)

    @property
    def _levels(self) -> list[Keep]:
        return [self.keep, *(rule.keep for rule in self.rule if rule.keep is not None)]

    @property
    def every_keep(self) -> list[float]:
        """The kept fractions that some site may take, each once."""
        return sorted({keep for levels in self._levels for keep in levels})


class ResourcesConfig(Strict):
    """What one trial takes, as Ray counts it."""

    cpu: Annotated[float, Field(gt=0, le=MOST_AT_ONCE)] = 2
    gpu: Annotated[float, Field(ge=0, le=MOST_AT_ONCE)] = 0


class SearchConfig(Strict):
    """The sampler, what it may spend, and how trials run.

    ``groups`` ties the variables of general samplers: one (method, keep) pair for each kind of projection and
    each of that many bands of depth; 0 gives every site a variable of its own, as our sampler always has; ``untie``
    gives variables of their own to the sites of that many groups, those that the menu says hurt most. ``menu`` is
    where predictions come from: a gradient pass scaled by a measured probe of each group of sites, a gradient pass
    alone, the spectrum alone, one measured probe per site and method, or a few.
    ``tokens`` limits what trials, slopes and the menu may run through the model in all. ``anchors`` are the kept
    fractions at which every method is measured uniformly before the sampler starts; by our sampler, which has its menu
    first, those methods that no other is predicted to beat there. ``trial_tokens`` are what a trial reads of the
    search split, by default all of it. ``where`` are limits on objectives, such as ``block_parameters<=0.8``, that the
    search keeps to: plans beyond them are measured only to learn from.
    ``workers`` are trials at once, in a Ray actor each; 0 runs them in this process. By default there is one for every
    device that trials run on, and a single device needs no actor.
    ``refit`` is what is done to members of the front before they are measured on the report split once more, and by
    default to what is exported. ``heal`` is what is healed once the limits are reached: nothing, members of the front,
    or several plans of a size of which the best go on, as ``[heal]`` says.
    """

    sampler: str = "rankfront"
    menu: Literal["grouped", "gradient", "spectrum", "probe", "probes"] = "grouped"
    trials: Count = 32  # the dense model is the first
    time: Annotated[float, BeforeValidator(parse_duration)] | None = None
    tokens: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what NumPy's generators take
    workers: Annotated[int, Field(ge=0, le=MOST_AT_ONCE)] | None = None
    groups: CountOrZero = 4
    untie: CountOrZero = 0
    anchors: tuple[float, ...] = (0.9, 0.7, 0.5)
    trial_tokens: Count | None = None
    where: tuple[str, ...] = ()
    refit: Literal["none", "sequential"] = "none"
    heal: Literal["none", "front", "halving"] = "none"
    storage: str | None = None
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("sampler")
    @classmethod
    def _sampler(cls, name: str) -> str:
        check_choice("sampler", name, SAMPLERS)
        return name

    @field_validator("storage")
    @classmethod
    def _storage(cls, storage: str | None) -> str | None:
        if storage is not None:
            parse_url(storage)
        return storage

    @field_validator("anchors")
    @classmethod
    def _anchors(cls, anchors: tuple[float, ...]) -> tuple[float, ...]:
        bad = [keep for keep in anchors if not 0 < keep < 1]
        if bad:
            raise ValueError(f"anchors hold {bad}: kept fractions lie strictly between 0 and 1")
        return anchors


class HealConfig(Strict):
    """How plans are healed: see `heal.settings.HealSettings`, whose keys most of these are.

    ``stages`` may begin with ``refit``, the closed form that exports have too. Of the front, ``members`` at most are
    healed, for ``tokens`` each, of those that meet ``where``, which are limits on their figures before healing.
    Halving heals ``entrants`` at most of each of ``sizes``, limits such as ``parameters<=0.7``, by ``tokens`` together:
    each at first by ``first_rung`` of them, by default so that all rungs cost the same; one in ``eta`` goes on.
    """

    tokens: Count = 1_000_000
    stages: Annotated[tuple[Literal["refit"] | Stage, ...], Field(min_length=1)] = ("logits",)
    method: str = "factors"
    loss: Loss = "kl"
    error: BlockError = "relative"
    window: Window = "block"
    teacher: TeacherChoice = "auto"
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    batch: Count | Literal["auto"] = "auto"
    lasso: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    adapter: Annotated[int, Field(ge=0, le=MOST)] = 0
    device: str = "auto"
    members: Count = 4  # guess
    where: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    entrants: Count = 9
    eta: Annotated[int, Field(ge=2, le=MOST)] = 3
    first_rung: Count | None = None

    @field_validator("stages")
    @classmethod
    def _stages(cls, stages: tuple[Literal["refit"] | Stage, ...]) -> tuple[Literal["refit"] | Stage, ...]:
        if stages[stages[0] == "refit" :] not in STAGES:
            raise ValueError(
                f"stages are {list(stages)}: name blocks, logits, or blocks and then logits; refit may come first"
            )
        return stages


TASKS = "tasks"


class StudyConfig(Strict):
    """A whole study file."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    space: SpaceConfig = SpaceConfig()
    objectives: dict[str, dict[str, Any]] = {"perplexity": {}, "parameters": {}}
    tasks: dict[str, Any] | None = None  # of lm-eval, by which members of the front are reported; [objectives.tasks]
    search: SearchConfig = SearchConfig()
    heal: HealConfig = HealConfig()

    @model_validator(mode="before")
    @classmethod
    def _tasks_apart(cls, data: Any) -> Any:
        """``objectives.tasks`` is no objective unless trials are to be scored by it, which ``search`` says."""
        objectives = data.get("objectives") if isinstance(data, Mapping) else None
        if not isinstance(objectives, Mapping) or not isinstance(objectives.get(TASKS), Mapping):
            return data
        asked = objectives[TASKS]
        if isinstance(asked.get("include_path"), str):
            asked = {**asked, "include_path": located(asked["include_path"])}
        if asked.get("search"):
            return {**data, "objectives": {**objectives, TASKS: asked}}
        rest = {key: value for key, value in data.items() if key != "objectives"}
        others = {name: settings for name, settings in objectives.items() if name != TASKS}
        return rest | {TASKS: asked} | ({"objectives": others} if others else {})

    @model_validator(mode="before")
    @classmethod
    def _without_decoding(cls, data: Any) -> Any:
        return with_defaults(data, {name: DataConfig.model_fields[name].default.windows for name in SPLITS})

    @model_validator(mode="after")
    def _decodes_where_it_can(self) -> StudyConfig:
        why = refusal(self)
        if why is not None:
            raise ValueError(why)
        return self

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, tasks: dict[str, Any] | None) -> dict[str, Any] | None:
        if tasks is not None:
            make_objective(TASKS, tasks)
        return tasks

    @model_validator(mode="after")
    def _limits_on_objectives(self) -> StudyConfig:
        for text in self.search.where:
            check_choice("objective in search.where", Constraint.parse(text).figure, list(self.objectives))
        known = sorted({*self.objectives, *ALWAYS})
        for name, limits in (("where", self.heal.where), ("sizes", self.heal.sizes)):
            for text in limits:
                check_choice(f"figure in heal.{name}", Constraint.parse(text).figure, known)
        return self

    @model_validator(mode="after")
    def _can_heal(self) -> StudyConfig:
        if self.search.heal == "none":
            return self
        if preferred_loss(self) is None:
            raise ValueError(
                f"search.heal is {self.search.heal!r} and the objectives are {list(self.objectives)}, none of which"
                f" healing changes: add {' or '.join(QUALITY)}"
            )
        if self.heal.adapter:
            raise ValueError(
                f"search.heal is {self.search.heal!r} and heal.adapter {self.heal.adapter}, and a plan with adapters is"
                " larger than what its trial measured: leave one of them out, and export with --heal"
            )
        if self.data.heal is None:
            raise ValueError(
                f"search.heal is {self.search.heal!r} and the study names no text to heal on: set data.heal ="
                ' { text = "my.txt", windows = 512 }'
            )
        if self.data.heal.windows < 2:
            raise ValueError("data.heal has 1 window, and healing holds one out: give it 2 or more")
        if self.search.heal == "halving":
            bounds = [Constraint.parse(text) for text in self.heal.sizes]
            if not bounds or any(bound.operator not in ("<", "<=") or bound.bound <= 0 for bound in bounds):
                raise ValueError(
                    f"heal.sizes are {list(self.heal.sizes)}, and halving needs one or more upper limits above 0: set"
                    ' heal.sizes = ["parameters<=0.7"]'
                )
        return self

    @model_validator(mode="after")
    def _enough_windows(self) -> StudyConfig:
        _ = self.trial_windows
        return self

    @property
    def task_names(self) -> list[str]:
        """The tasks that members of the front are reported by."""
        return list(self.tasks["names"]) if self.tasks else []

    def on_grid(self, multiple: int) -> StudyConfig:
        """The same study with ranks that are multiples of this."""
        return self.model_copy(update={"space": self.space.model_copy(update={"rank_multiple": multiple})})

    @property
    def trial_windows(self) -> int:
        """How many windows of the search split a trial reads, its first; `InputError` where the split has fewer."""
        return trial_windows(self.search.trial_tokens, self.data.search.windows, self.data.length)

    @field_validator("objectives")
    @classmethod
    def _two_or_more(cls, objectives: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in objectives.items():
            make_objective(name, settings)
        if len(objectives) < 2:
            raise ValueError(
                f"a front needs two or more objectives and there is {list(objectives) or 'none'}:"
                " add a table such as [objectives.parameters]"
            )
        return objectives


def check_tasks(config: StudyConfig) -> None:
    """Raise `InputError` where the study asks for tasks and what runs them is not installed."""
    settings = config.tasks or config.objectives.get(TASKS)
    if settings is not None:
        Tasks(**settings).check()


def preferred_loss(config: StudyConfig) -> str | None:
    """The first of `QUALITY` that is among the objectives."""
    return next((name for name in QUALITY if name in config.objectives), None)


def quality_of(config: StudyConfig) -> str:
    """The objective that our sampler models; `InputError` where the study has none."""
    name = preferred_loss(config)
    if name is not None:
        return name
    raise InputError(
        f"sampler {OURS!r} models {' or '.join(QUALITY)} and the objectives are {list(config.objectives)}: add"
        " one of them, or choose another sampler"
    )


def moved(before: Any, now: Any) -> Any:
    """Plain data ``now`` with paths of ``before`` in place of relative ones that those end with: the same file, named
    from another folder."""
    if isinstance(before, dict) and isinstance(now, dict):
        return {key: moved(before.get(key), value) for key, value in now.items()}
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [moved(old, new) for old, new in zip(before, now, strict=True)]
    if isinstance(before, str) and isinstance(now, str) and Path(before).is_absolute():
        parts = Path(now).parts
        return before if parts and Path(before).parts[-len(parts) :] == parts else now
    return now


LEFT = {  # keys of earlier versions -> what to do
    "search.rungs": "trials have one fidelity, set search.trial_tokens to the tokens that each reads",
    "search.reduction": "remove it, trials have one fidelity",
}
LIMITS = {"search": ("trials", "time", "tokens", "workers", "resources", "refit", "heal")}


def definition_of(config: StudyConfig) -> dict[str, Any]:
    """What defines the trials of a study: everything but the limits and healing, which may change between launches."""
    data = config.model_dump(mode="json")
    del data["heal"], data["data"]["heal"], data["tasks"], data["space"]["allow_partial"]
    for key in LIMITS["search"]:
        del data["search"][key]
    del data["search"]["storage"]  # where they lie, which the run looks after
    return data


def load_config(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study in the TOML file at ``path`` with ``KEY=VALUE`` overrides applied; `InputError` if invalid."""
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"study file {str(path)!r} does not exist: name a TOML file, such as studies/demo.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # the first of numbers with thousands of digits too
        raise InputError(f"study file {str(path)!r} is not valid TOML: {error}") from error
    return make_config(data, overrides)


def make_config(data: dict[str, Any], overrides: Sequence[str] = ()) -> StudyConfig:
    """A validated study from plain data; `InputError` with one line naming the first thing wrong."""
    try:
        return StudyConfig.model_validate(overridden(data, overrides))
    except ValidationError as error:
        raise InputError(_one_line(error.errors()[0])) from error
    except RecursionError as error:
        raise InputError("the study is nested deeper than any key of it: write tables in tables, no more") from error


def overridden(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with ``KEY=VALUE`` overrides applied; `InputError` where one does not read as that."""
    data = copy.deepcopy(data)
    for override in overrides:
        _override(data, override)
    return data


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text!r} does not read as KEY=VALUE, such as search.trials=6")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    except ValueError as error:
        raise InputError(f"--set {shown(text)} is no value that TOML has: {error}") from error
    *parents, last = key.strip().split(".")
    table = data
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {text!r}: {name!r} is a value, not a table")
    table[last] = parsed


def _one_line(error: ErrorDetails) -> str:
    location = tuple(part for part in error["loc"] if part not in (ONE, SEVERAL))
    where = ".".join(str(part) for part in location) or "the study"
    if error["type"] == "extra_forbidden" and where in LEFT:
        return f"{where} is no key of a study any more: {LEFT[where]}"
    if error["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        return f"unknown key {where!r} in the study{nearest(str(location[-1]), known)} (known: {', '.join(known)})"
    message = error["msg"].removeprefix("Value error, ")
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return message
    if error["type"] == "missing":
        return f"{where} is missing from the study"
    given = error.get("input")
    got = f" (got {shown(given)})" if not isinstance(given, dict) and shown(given) not in message else ""
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at ``location`` may hold."""
    model: Any = StudyConfig
    for part in location:
        if isinstance(part, int):
            continue
        model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The first table that a field's type holds; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
