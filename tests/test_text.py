"""Token windows: disjoint splits of one text, parts by position, and texts from files and the hub."""

import copy
import itertools
import json
from pathlib import Path

import common
import pytest
import torch
from launching import quiet

from rankfront.methods import InputError
from rankfront.search.config import SplitConfig
from rankfront.search.inputs.text import cut, hash_tokens, read_text, scattered, tokenize
from rankfront.search.plain import without_folders
from rankfront.search.splits import Split
from rankfront.search.study import Study

LENGTH = 16


@pytest.fixture
def counted(tmp_path, monkeypatch, tokenizer):
    """A text whose tokens are their own positions, so that a window says where it comes from."""
    path = tmp_path / "counted.txt"
    path.write_text("x" * 4_000, encoding="utf-8")
    monkeypatch.setattr("rankfront.search.inputs.text.tokenize", lambda tokenizer, text: torch.arange(len(text)))
    return str(path)


def positions(result):
    return {name: windows.flatten().tolist() for name, windows in result.items()}


@pytest.mark.parametrize(
    "asked",
    [
        {"calibrate": (100, (0, 1)), "search": (50, (0, 1)), "report": (100, (0, 1))},
        {"calibrate": (60, (0, 0.5)), "search": (60, (0.5, 1)), "report": (100, (0, 1))},
        {"calibrate": (60, (0, 1)), "search": (60, (0, 1)), "report": (60, (0.6, 1))},
        {"calibrate": (40, (0, 0.4)), "search": (40, (0.2, 0.6)), "report": (40, (0.3, 0.7))},
        {"calibrate": (1, (0, 1)), "search": (1, (0, 1)), "report": (1, (0, 1))},
    ],
    ids=["all used up", "halves", "one part", "overlapping parts", "one window each"],
)
def test_splits_of_one_text_never_overlap(counted, tokenizer, asked):
    """No position serves two windows, and each window is a run of the text from its own part of it."""
    splits = {name: Split(counted, windows, part) for name, (windows, part) in asked.items()}
    result = cut(tokenizer, splits, LENGTH)
    used = list(itertools.chain(*positions(result).values()))
    assert len(used) == len(set(used))
    for name, (windows, (start, end)) in asked.items():
        assert result[name].shape == (windows, LENGTH)
        assert (result[name].diff(dim=1) == 1).all()
        assert result[name].min() >= start * 4_000
        assert result[name].max() < end * 4_000


def test_one_file_under_two_names_is_one_text(counted, tokenizer):
    """However its path is spelled, windows of one file never overlap."""
    path = Path(counted)
    splits = {"calibrate": Split(counted, 100), "search": Split(f"{path.parent}/./{path.name}", 100)}
    found = positions(cut(tokenizer, splits, LENGTH))
    assert not set(found["calibrate"]) & set(found["search"])


def test_windows_spread_over_the_whole_part(counted, tokenizer):
    windows = cut(tokenizer, {"search": Split(counted, 5, (0.5, 1.0))}, LENGTH)["search"]
    gaps = windows[:, 0].diff()
    assert gaps.max() - gaps.min() <= LENGTH
    assert windows.min() < 2_400
    assert windows.max() > 3_600


@pytest.mark.parametrize("count", [1, 2, 7, 112, 1000])
def test_every_beginning_of_scattered_windows_is_spread_over_the_text(count):
    """No gap between the first k, nor to the text's ends, is much longer than if they were evenly spaced."""
    places = scattered(torch.arange(count)[:, None])[:, 0].tolist()
    assert sorted(places) == list(range(count))
    for k in range(1, count + 1):
        found = [-1, *sorted(places[:k]), count]
        assert max(after - before for before, after in itertools.pairwise(found)) <= 3 * count / k + 1


def test_trials_read_windows_from_all_over_the_search_split(tmp_path, text_file, model_folder):
    data = common.study_data(model_folder, text_file)
    data["data"]["search"]["windows"] = 12
    data["search"]["trial_tokens"] = 64
    study = Study(data, run=tmp_path)
    setup = study.setup()
    splits = {name: split for name, split in study.config.data.splits().items() if name != "control"}
    in_order = cut(common.tiny_tokenizer(), splits, 32)["search"].tolist()
    places = [in_order.index(window) for window in setup.tokens["search"].tolist()]
    assert sorted(places) == list(range(12))
    first, second = places[: setup.config.trial_windows]
    assert abs(first - second) > 3


def test_a_run_that_an_earlier_version_began_goes_on_with_its_windows(tmp_path, text_file, model_folder, monkeypatch):
    data = common.study_data(model_folder, text_file)
    data["data"]["search"]["windows"] = 12
    data["search"] |= {"trial_tokens": 64, "trials": 2}
    with monkeypatch.context() as patch:
        patch.setattr("rankfront.search.run.resolving.scatters", lambda *_: False)
        study = Study(data, run=tmp_path)
        study.launch(quiet())
        windows = hash_tokens(study.setup().tokens["search"])
    data["search"]["trials"] = 3
    study = Study(data, run=tmp_path)
    assert hash_tokens(study.setup().tokens["search"]) == windows
    study.launch(quiet())
    assert len(study.rows()) >= 3


def test_cutting_again_gives_the_same(text_file, tokenizer):
    splits = {name: Split(str(text_file), 5) for name in ("calibrate", "search", "report")}
    first, second = cut(tokenizer, splits, LENGTH), cut(tokenizer, splits, LENGTH)
    assert {name: hash_tokens(windows) for name, windows in first.items()} == {
        name: hash_tokens(windows) for name, windows in second.items()
    }


def test_the_order_of_the_splits_does_not_matter(text_file, tokenizer):
    splits = {
        "calibrate": Split(str(text_file), 7),
        "search": Split(str(text_file), 5),
        "report": Split(str(text_file), 3),
    }
    first, second = cut(tokenizer, splits, LENGTH), cut(tokenizer, dict(reversed(splits.items())), LENGTH)
    assert all(torch.equal(first[name], second[name]) for name in splits)


def test_windows_are_text(text_file, tokenizer):
    windows = cut(tokenizer, {"search": Split(str(text_file), 4)}, LENGTH)["search"]
    text = text_file.read_text(encoding="utf-8")
    for window in windows:
        assert "".join(tokenizer.convert_ids_to_tokens(window.tolist())) in text
    assert windows.max() < common.VOCABULARY


def test_a_beginning_token_starts_every_window(text_file):
    """Where the tokenizer starts every sequence with a token, so does each window; the text still never repeats."""
    tokenizer = common.tiny_tokenizer(bos=True)
    splits = {name: Split(str(text_file), 6) for name in ("calibrate", "search", "report")}
    ids = tokenize(tokenizer, text_file.read_text(encoding="utf-8"))
    assert (ids != tokenizer.bos_token_id).all()
    for windows in cut(tokenizer, splits, LENGTH).values():
        assert windows.shape == (6, LENGTH)
        assert (windows[:, 0] == tokenizer.bos_token_id).all()
        assert (windows[:, 1:] != tokenizer.bos_token_id).all()


def test_no_beginning_token_where_the_tokenizer_adds_none(text_file, tokenizer):
    windows = cut(tokenizer, {"search": Split(str(text_file), 6)}, LENGTH)["search"]
    assert tokenizer.bos_token_id is not None
    assert (windows != tokenizer.bos_token_id).all()


def test_tokens_beyond_the_tokenizers_limit_are_kept(text_file, tokenizer, recwarn):
    text = text_file.read_text(encoding="utf-8")
    limit = tokenizer.model_max_length
    assert len(tokenize(tokenizer, text)) == len(text) > limit
    assert tokenizer.model_max_length == limit


@pytest.mark.parametrize(
    ("asked", "has", "needs"),
    [
        ({"search": Split("", 300)}, "4,000", "4,800"),
        ({"search": Split("", 200, (0.0, 0.5))}, "2,000", "3,200"),
        ({"calibrate": Split("", 200), "search": Split("", 100)}, "800", "1,600"),
    ],
    ids=["whole", "part", "taken by another"],
)
def test_too_short_a_text_is_refused_with_both_counts(counted, tokenizer, asked, has, needs):
    splits = {name: Split(counted, split.windows, split.part) for name, split in asked.items()}
    with pytest.raises(InputError) as caught:
        cut(tokenizer, splits, LENGTH)
    assert has in str(caught.value)
    assert needs in str(caught.value)
    assert "data." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pydoc_is_always_there():
    text = read_text("pydoc")
    assert text == read_text("pydoc")
    assert len(text) > 100_000


def test_an_unknown_text_is_refused_with_the_choices():
    with pytest.raises(InputError, match=r"'nowhere\.txt' is no file: use 'self', 'pydoc'"):
        read_text("nowhere.txt")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_text(str(path))


@pytest.mark.parametrize(
    "name", ["hub:", "hub:only-a-name", "hub:name:split", "hub:name/config", "hub:name/config:", "hub:/c:s"]
)
def test_a_hub_name_that_does_not_parse_is_refused(name):
    with pytest.raises(InputError, match=r"does not read as 'hub:NAME/CONFIG:SPLIT'") as caught:
        read_text(name)
    assert "\n" not in str(caught.value)


def test_a_hub_set_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        read_text("hub:nobody-at-all/nothing-here/default:train")
    assert "\n" not in str(caught.value)


def local_set(folder, rows):
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return f"hub:{folder}/default:train"


def test_a_data_set_is_its_text_column(tmp_path):
    name = local_set(tmp_path / "set", [{"text": "first row"}, {"text": "second row"}])
    assert read_text(name) == "first row\n\nsecond row"


def test_a_data_set_without_text_names_its_columns(tmp_path):
    name = local_set(tmp_path / "set", [{"body": "first row", "id": 1}])
    with pytest.raises(InputError, match="body"):
        read_text(name)


def test_rows_without_a_text_are_skipped(tmp_path):
    name = local_set(tmp_path / "set", [{"text": "first row"}, {"text": None}, {"text": "third row"}])
    assert read_text(name) == "first row\n\nthird row"


def test_the_hash_is_of_ids_and_shape():
    ids = torch.arange(12)
    assert hash_tokens(ids.view(3, 4)) == hash_tokens(ids.view(3, 4).clone())
    assert hash_tokens(ids.view(3, 4)) != hash_tokens(ids.view(4, 3))
    assert hash_tokens(ids.view(3, 4)) != hash_tokens(ids.flip(0).view(3, 4))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It is.", encoding="utf-8-sig")
    assert read_text(str(path)) == "It is."


# -- rows, and conversations

TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
SAID = "<user>What is it?</user><assistant>A test.</assistant>"


@pytest.fixture
def chatting(tokenizer):
    """A tokenizer with a chat template."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("place", ["file", "hub"])
def test_conversations_go_through_the_chat_template(tmp_path, chatting, place):
    """From files and data sets alike; the column is found, or named."""
    rows = [{"messages": TURNS, "source": "here"}, {"messages": TURNS, "source": "there"}]
    name = lines(tmp_path / "chat.jsonl", rows) if place == "file" else local_set(tmp_path / "set", rows)
    assert read_text(name, chatting) == SAID * 2
    assert read_text(f"{name}#messages", chatting) == SAID * 2
    assert read_text(f"{name}#source", chatting) == "here\n\nthere"
    with pytest.raises(InputError, match="no chat template") as caught:
        read_text(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no row with answer, but \['messages', 'source'\]"):
        read_text(f"{name}#answer", chatting)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, chatting):
    chatting.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        read_text(lines(tmp_path / "chat.jsonl", [{"messages": TURNS}]), chatting)


def test_the_first_rows_of_a_data_set_are_all_that_is_read(tmp_path):
    name = local_set(tmp_path / "set", [{"text": f"row {number}"} for number in range(5)])
    assert read_text(f"{name}[:2]") == "row 0\n\nrow 1"


@pytest.mark.parametrize(("content", "said"), [('{"text": "a"}\n[1]', "line 2 .* object"), ("no", "line 1 .* no JSON")])
def test_a_line_that_is_no_row_is_named(tmp_path, content, said):
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        read_text(str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(caught.value)


def test_a_column_of_a_file_is_one_text_however_it_is_named(tmp_path, monkeypatch, chatting):
    """Its windows never overlap, and its name goes into no export with its folder."""
    rows = lines(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 200)
    monkeypatch.chdir(tmp_path)
    asked = {"calibrate": Split("chat.jsonl#messages", 4), "search": Split(f"{rows}#messages", 4)}
    found = cut(chatting, asked, 16)
    assert len(torch.cat(list(found.values())).unique(dim=0)) > 1
    assert len({name for split in asked.values() for name in split.counts()}) == 1
    assert without_folders(f"{rows}#messages") == "chat.jsonl#messages"
    config = SplitConfig(text=[{"text": "chat.jsonl#messages", "weight": 3}, {"text": "self"}], windows=8)
    assert config.text[0].text == f"{rows}#messages"
    assert config.label_by(without_folders) == "3 chat.jsonl#messages + 1 self"
