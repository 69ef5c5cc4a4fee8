"""The model's own text: token ids sampled from the dense model, which need no corpus and match what it was trained on.

Data-free calibration text as in LLM-QAT (Liu et al. 2305.17888, section 2.1): each sequence starts with the start token
and goes on by sampling at temperature 1 from the whole vocabulary. In expectation the excess loss of a compressed q on
such text is its divergence from the dense p: E_p[log p(x) − log q(x)] = KL(p ‖ q). Where the tokenizer has a chat
template, half of the sequences are conversations: the template up to the user's turn, a turn that the model samples,
then the template's header and the answer, as in Magpie (Xu et al. 2406.08464, section 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rankfront.methods import InputError
from rankfront.search.atomic import write_whole
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.inputs.decoding import cache_bytes, decoder
from rankfront.search.inputs.device import DTYPES
from rankfront.search.inputs.model import load_model, load_tokenizer
from rankfront.search.inputs.reached import check_causal
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import GOLDEN, hash_tokens

VERSION = 2  # of how rows are drawn; part of the cache's key
ROW = 256  # tokens of a sequence: attention over longer ones takes most of the time; two make a default window
BATCH = 112  # sequences of a file: two files are what the default study reads
CACHE_BYTES = 4 << 30  # guess: of keys and values at once, by which fewer sequences are drawn together
DEGENERATE = 0.5  # of a sequence's tokens the same: it says nothing of language
MARK = "rankfront-marks-the-users-turn"  # stands in the chat template where the user's turn goes

Progress = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class Script:
    """What a sequence is made of: forced tokens, then sampled ones up to an end, and so on, then from the beginning.

    Attributes:
        parts: forced tokens before each sampled part; () where there is no such script.
        ends: tokens that end a sampled part.
    """

    parts: tuple[tuple[int, ...], ...]
    ends: frozenset[int]


class _Writer:
    """Follows a script along one sequence."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.part = 0
        self.forced = list(script.parts[0])

    def next(self, sampled: int) -> int:
        """The next token: a forced one, or ``sampled``, which may end its part."""
        if self.forced:
            return self.forced.pop(0)
        if sampled in self.script.ends:
            self.part = (self.part + 1) % len(self.script.parts)
            following = self.script.parts[self.part]
            self.forced = list(following[following[:1] == (sampled,) :])  # templates may begin with the end token
        return sampled


def plain_script(model: Any, tokenizer: Any) -> Script:
    """Documents from the start token on; the end token where there is none, else the padding token, else id 0."""
    candidates = [tokenizer.bos_token_id, getattr(model.config, "bos_token_id", None), tokenizer.eos_token_id]
    start = next((token for token in [*candidates, tokenizer.pad_token_id] if isinstance(token, int)), 0)
    return Script(((start,),), _ends(model, tokenizer))


def chat_script(model: Any, tokenizer: Any) -> Script | None:
    """A conversation of one turn each by the tokenizer's template; None where it has none that shows both headers."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, mark, after = text.partition(MARK)
    ends = _ends(model, tokenizer)
    if not (before and mark and after and ends):
        return None
    return Script(
        tuple(tuple(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in (before, after)), ends
    )


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = known if isinstance(known, list) else [known]
    return frozenset(token for token in [*several, tokenizer.eos_token_id] if isinstance(token, int))


@torch.inference_mode()
def draw(model: Any, scripts: Sequence[Script], length: int, seed: int, step: Callable[[], None]) -> Tensor:
    """Sequences (B, length) by ``scripts`` at temperature 1; ``step`` is called after each token.

    One uniform number a token picks from the cumulative distribution in fp32 on the CPU, so that equal logits and an
    equal seed give equal text. Raises `InputError` where the model's logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    writers = [_Writer(script) for script in scripts]
    device = next(model.parameters()).device
    ids = torch.tensor([[writer.next(-1)] for writer in writers])  # (B, 1)
    drawn = [ids]
    with decoder(model, length) as decode:
        for _ in range(length - 1):
            cumulative = decode(ids.to(device)).float().cpu().softmax(-1).cumsum(-1)  # (B, V)
            if not torch.isfinite(cumulative[:, -1]).all():  # which any other entry makes NaN
                raise InputError(
                    "text 'self': the model's logits are not finite: set model.dtype, or name another text"
                )
            points = torch.rand(len(ids), 1, generator=generator) * cumulative[:, -1:]
            sampled = torch.searchsorted(cumulative, points).clamp_max(cumulative.shape[1] - 1)
            ids = torch.tensor([[w.next(token)] for w, token in zip(writers, sampled[:, 0].tolist(), strict=True)])
            drawn.append(ids)
            step()
    return torch.cat(drawn, dim=1)


def degenerate(rows: Tensor) -> float:
    """The share of ``rows`` (B, L) of which one token is more than half."""
    repeated = (rows == rows.mode(dim=1, keepdim=True).values).double().mean(dim=1)
    return float((repeated > DEGENERATE).double().mean())


@dataclass(frozen=True)
class OwnText:
    """The texts ``self`` of a model: for every seed an endless sequence of batches, drawn as far as it is asked for.

    A batch is a file in the cache, written whole; found there, it is not drawn again. ``drawn`` has what is known
    already, seed -> ids, which comes before the cache, and what was asked for is added.
    """

    source: Source
    dtype: str
    device: str
    cache: Path
    drawn: dict[str, Tensor] = field(default_factory=dict)
    progress: Progress = lambda phase, done, total: None

    def __call__(self, seed: int, tokens: int) -> Tensor:
        """The first ``tokens`` ids of the text of ``seed``; `InputError` where most of it is one token repeated."""
        if len(known := self.drawn.get(str(seed), torch.empty(0))) >= tokens:
            return known[:tokens]
        tokenizer = load_tokenizer(self.source)
        named = [str(VERSION), self.source.fingerprint, self.dtype, str(seed), str(ROW), str(BATCH)]
        key = hashlib.sha256("\0".join([*named, str(tokenizer.chat_template)]).encode()).hexdigest()[:16]
        rows: list[Tensor] = []
        model = None
        while sum(batch.numel() for batch in rows) < tokens:
            path = self.cache / f"self-{key}" / f"{len(rows)}.safetensors"
            found = _read(path)
            if found is None:
                if model is None:
                    model = load_model(self.source, DTYPES[self.dtype], self.device)
                    check_causal(model)
                found = _keep(self._batch(model, tokenizer, seed, len(rows), tokens), path)
            rows.append(found)
        share = degenerate(torch.cat(rows))
        if share > DEGENERATE:
            raise InputError(
                f"text 'self': in {share:.0%} of the sequences sampled from the model one token is more than half:"
                " name a text for data.calibrate, data.search and data.report"
            )
        self.drawn[str(seed)] = torch.cat(rows).flatten()[:tokens]
        return self.drawn[str(seed)]

    def _batch(self, model: Any, tokenizer: Any, seed: int, number: int, tokens: int) -> Tensor:
        context = getattr(model.config, "max_position_embeddings", None) or ROW  # what rotary ones were trained for
        length = min(ROW, capacity_of(model).positions or ROW, context)
        together = min(BATCH, max(1, CACHE_BYTES // max(1, length * cache_bytes(model))))
        parts = range(0, BATCH, together)
        steps = length * len(parts)
        total, done = -(-tokens // (BATCH * length)) * steps, number * steps

        def step() -> None:
            nonlocal done
            done += 1
            self.progress("sample", done, total)

        plain, chat = plain_script(model, tokenizer), chat_script(model, tokenizer)
        # Spread by the golden ratio, so that every part of the text and every even choice of windows has both.
        kinds = [(number * BATCH + row) * GOLDEN % 1 < 1 / 2 for row in range(BATCH)]
        scripts = [chat if chat and conversation else plain for conversation in kinds]
        seeds = (seed * 1_000_003 + number * BATCH + first for first in parts)
        drawn = (scripts[first : first + together] for first in parts)
        return torch.cat([draw(model, each, length, own, step) for each, own in zip(drawn, seeds, strict=True)])


def _read(path: Path) -> Tensor | None:
    """The batch at ``path``; None where there is none, or its checksum says that it is another."""
    try:
        with safe_open(path, framework="pt") as file:
            rows = file.get_tensor("rows")
            return rows if (file.metadata() or {}).get("hash") == hash_tokens(rows) else None
    except (OSError, SafetensorError):
        return None


def _keep(rows: Tensor, path: Path) -> Tensor:
    """Write ``rows`` whole to ``path``, unless another process was first: then that one's are used."""
    winner = _read(path)
    if winner is not None:
        return winner
    write_whole(path, save({"rows": rows.contiguous()}, {"hash": hash_tokens(rows)}))
    return rows
