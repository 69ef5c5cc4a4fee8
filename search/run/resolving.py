"""A study resolved on this machine: device, dtype, tokens, the grid of ranks, and how many workers it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rankfront.methods import InputError
from rankfront.search.choices import OURS
from rankfront.search.config import StudyConfig, preferred_loss
from rankfront.search.inputs.acceptance import refused
from rankfront.search.inputs.device import DTYPES, count_devices, pick_device, pick_dtype
from rankfront.search.inputs.labelled import rows_of
from rankfront.search.inputs.model import load_model, load_tokenizer, read_config, use_attention
from rankfront.search.inputs.outline import outline_of
from rankfront.search.inputs.own_text import OwnText, Progress
from rankfront.search.inputs.reached import check_causal, unreached
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.source import cache_folder
from rankfront.search.inputs.tasks import make_task
from rankfront.search.inputs.text import LAST, cut, hash_tokens, scattered
from rankfront.search.measure.ranks import measured_multiple, shapes_of
from rankfront.search.measure.setup import Setup, make_space
from rankfront.search.plans.latency_table import timed_objectives
from rankfront.search.serve.engines import check_engines
from rankfront.search.serve.writing import check_servable
from rankfront.search.storage.folder import Run

REFUSED = "refused"  # sites that numbers refuse
SCATTERED = "scattered"  # the order of windows of the search split where a trial reads some of them


def make_setup(
    run: Run,
    config: StudyConfig,
    progress: Progress = lambda phase, done, total: None,
    drawn: dict[str, Tensor] | None = None,
) -> Setup:
    """Resolve the study on this machine: tokens, dtype, device, fingerprint, the grid of ranks.

    ``drawn`` has the model's own texts that the run knows, by default from its folder; what is sampled is added.
    """
    source = resolve(config.model.name, config.model.trust_remote_code, config.model.task)
    earlier = run.resolved()
    device = pick_device(earlier.get("device", config.model.device))
    search = config.search
    if device.startswith("cuda") and (search.workers or 0) > 1 and search.resources.gpu == 0:
        raise InputError(
            f"search.workers is {search.workers} on {device} and search.resources.gpu is 0: say what share of a GPU"
            " a trial takes, such as 0.5"
        )
    dtype = pick_dtype(earlier.get("dtype", config.model.dtype), device)
    cache = cache_folder().resolve()
    engines = {each.engine for each in timed_objectives(config.objectives).values() if each.engine is not None}
    if config.space.servable or engines:
        described = read_config(source)
        check_servable(described, config.space.servable)
        check_engines(described, sorted(engines))
    outline = outline_of(source, config.model.attention)
    outline.coverage.check(config.space)
    outline.capacity.check_length(config.data.length, "data.length")  # before minutes of sampling
    own = OwnText(source, dtype, device, cache, own_text(run) if drawn is None else drawn, progress)
    tokenizer = load_tokenizer(source)
    task = make_task(source.task, tokenizer)
    tokens = rows_of(source, tokenizer, task, config.data.splits(), config.data.length, own)
    if scatters(config, earlier):
        tokens["search"] = scattered(tokens["search"])
    config = run.settled(config)
    if config.space.rank_multiple == "device":
        timed = next(iter(timed_objectives(config.objectives).values()), None)
        shapes = shapes_of(outline.sites)
        config = config.on_grid(measured_multiple(shapes, config.space.every_keep, timed, device, dtype, cache))
    groups = 0 if search.sampler == OURS else search.groups
    loss = preferred_loss(config) or "perplexity"
    setup = Setup(
        config, source, outline, dtype, device, source.fingerprint, tokens, str(cache), groups, loss, task=task
    )
    return setup.without(json.loads(earlier.get(REFUSED, "{}")))


def accepted(setup: Setup, progress: Progress) -> Setup:
    """``setup`` without the sites that the model, loaded here, refuses by numbers; joint ones are those of its space.

    Raises `InputError` where too little is left, where it is not causal, or lets no gradient through."""
    make_space(setup)  # which refuses what a study asks for before the model is loaded
    progress("load", 0, 1)
    model = load_model(setup.source, DTYPES[setup.dtype], setup.device)
    use_attention(model, setup.config.model.attention)
    progress("load", 1, 1)
    windows = setup.tokens["calibrate"]
    if setup.task.generates:
        check_causal(model)
    found = setup.without(unreached(model, setup.outline.sites, windows, setup.task))
    found.outline.coverage.check(setup.config.space)
    joint = [site for site in make_space(found).choices if len(site.weights) > 1]
    return setup.without({**found.refused, **refused(model, joint, windows, setup.task)})


def heal_windows(
    run: Run, config: StudyConfig, setup: Setup, progress: Progress, drawn: dict[str, Tensor] | None = None
) -> Tensor:
    """Windows (W, L) of ``data.heal``, none of which another split has; `InputError` where the study names no text, or
    one that is too short. ``drawn`` as of `make_setup`."""
    if config.data.heal is None:
        raise InputError(
            'the study names no text to heal on: set data.heal = { text = "my.txt", windows = 512 } and launch it'
            " again, or export the plan and use rankfront heal"
        )
    known = own_text(run) if drawn is None else drawn
    own = OwnText(setup.source, setup.dtype, setup.device, Path(setup.cache), known, progress)
    splits = {**config.data.splits(), LAST: config.data.heal.split}
    return cut(load_tokenizer(setup.source), splits, config.data.length, own)[LAST]


def own_text(run: Run) -> dict[str, Tensor]:
    """The model's own texts that the run's folder has."""
    return {seed: torch.from_numpy(ids) for seed, ids in run.own_text().items()}


def scatters(config: StudyConfig, earlier: Mapping[str, str]) -> bool:
    """Whether trials read windows from all over the search split; runs that an ``earlier`` version began, by what they
    were resolved to, go on as they were, with the text's beginning."""
    return config.search.trial_tokens is not None and (not earlier or earlier.get("windows") == SCATTERED)


def resolved_as(run: Run, config: StudyConfig, setup: Setup) -> dict[str, str]:
    """What ``auto``, the texts and the device came to, as the run's definition keeps it."""
    hashes = {f"tokens.{name}": hash_tokens(windows) for name, windows in setup.tokens.items()}
    found = {"dtype": setup.dtype, "device": setup.device, "weights": setup.fingerprint, **hashes}
    if config.space.rank_multiple == "device":
        found["rank_multiple"] = str(setup.config.space.rank_multiple)
    if setup.refused:
        found[REFUSED] = json.dumps(setup.refused)
    return found | ({"windows": SCATTERED} if scatters(config, run.resolved()) else {})


def placed(config: StudyConfig, device: str, address: str | None) -> StudyConfig:
    """The configuration with a number of workers: one for each device unless it says how many, none for a single
    device that needs no cluster, and a whole GPU for each where it does not say how much."""
    search = config.search
    if search.workers is not None:
        return config
    devices = count_devices(device)
    workers = devices if devices > 1 or address is not None else 0
    share = search.resources.gpu or float(device.startswith("cuda") and workers > 0)
    resources = search.resources.model_copy(update={"gpu": share})
    search = search.model_copy(update={"workers": workers, "resources": resources})
    return config.model_copy(update={"search": search})
