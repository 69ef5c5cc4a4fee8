"""A tokenizer as GGUF files describe it: carried over from another GGUF file, or read from a fast tokenizer.

llama.cpp does not read the rules by which a tokenizer splits a text before it merges; it has them by name. Names of
rules that are known here are in `SPLITS`; a text that is split by others would get other tokens, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType

from rankfront.methods import InputError

# What GPT-4's splitting became in Llama 3 and Qwen2: contractions, words, digits by up to three or one by one, ...
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of a pre-tokenizer, and whether words that are tokens are taken whole -> llama.cpp's name of them.
SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("bytes by GPT-2's pattern",), False): "gpt-2",
    (("each digit", "bytes by GPT-2's pattern"), False): "smollm",
    ((WORDS % "{1,3}", "bytes"), True): "llama-bpe",
    ((WORDS % "", "bytes"), False): "qwen2",
}
SPACE = "\u2581"  # of SentencePiece, in the place of a space


def carry_tokenizer(writer: GGUFWriter, file: Path, rows: int) -> None:
    """Copy what the GGUF ``file`` says of its tokenizer; `InputError` where it has not as many tokens as ``rows``."""
    fields = GGUFReader(file).fields
    tokens = len(fields["tokenizer.ggml.tokens"].data)
    if tokens != rows:
        raise InputError(f"{str(file)!r} has {tokens:,} tokens and the model {rows:,} rows: name the file it came from")
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            kind, part = field.types[0], field.types[-1]
            writer.add_key_value(name, field.contents(), kind, part if kind == GGUFValueType.ARRAY else None)


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Describe a fast ``tokenizer`` of a model with so many ``rows`` in its embedding table.

    Raises `InputError` where llama.cpp has no such tokenizer, or none that is known here.
    """
    raw = getattr(tokenizer, "backend_tokenizer", None)
    data = {} if raw is None else json.loads(raw.to_str())
    model = data.get("model", {})
    if model.get("type") != "BPE":
        raise InputError(
            f"the tokenizer is a {model.get('type') or type(tokenizer).__name__} and gguf takes BPE ones: use --format"
            " nemotron-nas or plain"
        )
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model.get("byte_fallback"):
        _sentencepiece(writer, data, merges, rows)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(data))
        texts, kinds = _tokens(data, rows)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _special(writer, tokenizer)


def _tokens(data: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """(texts, types) by id; ids that the tokenizer never gives have a text of their own."""
    vocabulary, added = data["model"]["vocab"], data["added_tokens"]
    texts, kinds = [f"[PAD{number}]" for number in range(rows)], [int(TokenType.UNUSED)] * rows
    named = {**{number: text for text, number in vocabulary.items()}, **{each["id"]: each["content"] for each in added}}
    if max(named) >= rows:
        raise InputError(f"the tokenizer gives ids up to {max(named)} and the model has {rows} rows: restore its files")
    special = {each["id"]: TokenType.CONTROL if each["special"] else TokenType.USER_DEFINED for each in added}
    for number, text in named.items():
        texts[number], kinds[number] = text, int(special.get(number, TokenType.NORMAL))
    return texts, kinds


def _sentencepiece(writer: GGUFWriter, data: Mapping[str, Any], merges: list[list[str]], rows: int) -> None:
    """SentencePiece's BPE: the pair whose token has the highest score is merged first, so ranks become scores."""
    texts, kinds = _tokens(data, rows)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    unknown = data["model"].get("unk_token")
    for number, text in enumerate(texts):
        if text == unknown:
            kinds[number] = int(TokenType.UNKNOWN)
        elif len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">"):
            kinds[number] = int(TokenType.BYTE)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores([-float(ranks.get(text, len(merges))) for text in texts])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(_prepends(data))


def _prepends(data: Mapping[str, Any]) -> bool:
    """Whether a space comes before a text. Raises `InputError` where spaces do not become `SPACE`."""
    steps = _steps(data.get("normalizer")) + _steps(data.get("pre_tokenizer"))
    spaces = [step for step in steps if step["type"] in ("Replace", "Metaspace")]
    if not spaces or any(step.get("content", step.get("replacement")) != SPACE for step in spaces):
        raise InputError("the tokenizer treats spaces in a way that llama.cpp has no name for: use another --format")
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first") for step in steps)


def _steps(found: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or a pre-tokenizer, one after another."""
    if not found:
        return []
    if found["type"] != "Sequence":
        return [found]
    return [step for part in (*found.get("normalizers", ()), *found.get("pretokenizers", ())) for step in _steps(part)]


def _split(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits a text; `InputError` where none is known."""
    steps = tuple(_step(step) for step in _steps(data.get("pre_tokenizer")))
    name = SPLITS.get((steps, bool(data["model"].get("ignore_merges"))))
    normalised = {step["type"] for step in _steps(data.get("normalizer"))} - {"NFC"}  # texts mostly are
    if name is None or normalised:
        raise InputError(
            "how the tokenizer splits a text has no name in llama.cpp that is known here: name the model by a GGUF file"
            " of it (model.name), whose tokenizer is carried over, or use another --format"
        )
    return name


def _step(step: Mapping[str, Any]) -> str:
    """A step of a pre-tokenizer, as `SPLITS` has it."""
    if step["type"] == "Digits":
        return "each digit" if step["individual_digits"] else "digits"
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes by GPT-2's pattern" if step["use_regex"] else "bytes"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", ""))
    return f"another {step['type']}"


def _special(writer: GGUFWriter, tokenizer: Any) -> None:
    """Ids of special tokens, which of them are added to every text, and the chat template."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    text = tokenizer("a").input_ids
    writer.add_add_bos_token(ids["bos"] is not None and text[:1] == [ids["bos"]])
    writer.add_add_eos_token(ids["eos"] is not None and text[-1:] == [ids["eos"]])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
