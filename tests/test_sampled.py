"""The model's own text: sampled once by model and seed, from the start token and through the chat template."""

import common
import pytest
import torch
from launching import make_run, quiet, small_data

from rankfront.methods import InputError
from rankfront.search.inputs import own_text as sampled
from rankfront.search.inputs.model import load_tokenizer
from rankfront.search.inputs.own_text import OwnText, Script, chat_script, degenerate, draw, plain_script
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.text import cut, hash_tokens
from rankfront.search.splits import Split
from rankfront.search.study import Study

TEMPLATE = "{% for m in messages %}U{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.fixture
def llama():
    return common.architecture("llama").build()


@pytest.fixture
def own(model_folder, tmp_path):
    """The text of the model in the folder; nothing is known of it."""
    return OwnText(resolve(str(model_folder)), "float32", "cpu", tmp_path)


def quietly():
    pass


def never(*_):
    raise AssertionError("sampled again")


def test_tokens_follow_the_models_distribution(llama):
    """Second tokens of many sequences have the frequencies that the model predicts after the start token."""
    rows = draw(llama, [Script(((5,),), frozenset())] * 4000, 2, 0, quietly)
    assert (rows[:, 0] == 5).all()
    p = llama(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(rows[:, 1], minlength=len(p))
    deviations = (counts - 4000 * p) / (4000 * p * (1 - p)).sqrt()
    assert deviations.abs().max() < 5
    assert 0.7 < float(deviations.square().mean()) < 1.3


def test_the_cache_of_keys_and_values_changes_nothing(llama):
    """The third token has the distribution that a pass without a cache gives: rows of one beginning are compared."""
    rows = draw(llama, [Script(((5, 9),), frozenset())] * 4000, 3, 1, quietly)
    p = llama(input_ids=torch.tensor([[5, 9]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(rows[:, 2], minlength=len(p))
    assert ((counts - 4000 * p) / (4000 * p * (1 - p)).sqrt()).abs().max() < 5


@pytest.mark.parametrize("name", [row.name for row in common.ARCHITECTURES])
def test_every_architecture_can_be_sampled(name):
    model = common.architecture(name).build()
    rows = draw(model, [Script(((0,),), frozenset())] * 3, 24, 0, quietly)
    assert rows.shape == (3, 24)
    assert 0 <= int(rows.min()) <= int(rows.max()) < common.VOCABULARY


def test_a_seed_gives_one_text(llama):
    scripts = [Script(((0,),), frozenset({1}))] * 3
    first, second, other = (draw(llama, scripts, 16, seed, quietly) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_after_an_end_the_script_goes_on():
    """Forced tokens come as they are; a sampled end is not said twice; after the last part the first begins again."""
    writer = sampled._Writer(Script(((7, 8), (1, 9)), frozenset({1})))
    assert [writer.next(token) for token in (-1, -1, 20, 1, -1, 21, 1, -1, -1, 22)] == [7, 8, 20, 1, 9, 21, 1, 7, 8, 22]


def test_half_of_the_sequences_are_conversations(llama, own, monkeypatch):
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(sampled, "load_tokenizer", lambda source: tokenizer)
    script = chat_script(llama, tokenizer)
    user, answer = tokenizer("U", add_special_tokens=False)["input_ids"], tokenizer("</s>A:")["input_ids"]
    assert script.parts == (tuple(user), tuple(answer))
    rows = own(0, sampled.BATCH * common.POSITIONS).view(sampled.BATCH, common.POSITIONS)
    chats = rows[:, 0] == user[0]
    assert set(rows[~chats, 0].tolist()) == {tokenizer.bos_token_id}
    assert abs(int(chats.sum()) - sampled.BATCH / 2) <= 2
    assert int(chats[::2].sum()) == pytest.approx(sampled.BATCH / 4, abs=2)


@pytest.mark.parametrize("template", [None, "{{ messages[0]['role'] }}"])
def test_no_conversations_without_a_template_that_shows_the_turn(llama, template):
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = template
    assert chat_script(llama, tokenizer) is None


def test_where_there_is_no_start_token_the_end_token_starts(llama):
    tokenizer = common.tiny_tokenizer()
    assert plain_script(llama, tokenizer).parts == ((tokenizer.bos_token_id,),)
    tokenizer.bos_token = None
    llama.config.bos_token_id = None
    assert plain_script(llama, tokenizer).parts == ((tokenizer.eos_token_id,),)
    tokenizer.eos_token = None
    assert plain_script(llama, tokenizer).parts == ((0,),)


def test_text_is_sampled_once_and_only_as_far_as_asked(own, monkeypatch):
    """A longer text begins with the shorter one; what is in the cache is not drawn again."""
    batch = sampled.BATCH * common.POSITIONS
    short = own(0, 100)
    folder = next(own.cache.iterdir())
    assert [path.name for path in folder.iterdir()] == ["0.safetensors"]
    longer = own(0, batch + 1)
    assert torch.equal(longer[:100], short)
    assert sorted(path.name for path in folder.iterdir()) == ["0.safetensors", "1.safetensors"]
    assert hash_tokens(own(3, 100)[None]) != hash_tokens(short[None])
    monkeypatch.setattr(sampled, "draw", never)
    assert torch.equal(own(0, batch + 1), longer)
    own.drawn.clear()
    assert torch.equal(own(0, batch + 1), longer)


def test_a_cached_text_with_a_changed_byte_is_sampled_again(own):
    text = own(0, 500)
    path = next(next(own.cache.iterdir()).iterdir())
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    own.drawn.clear()
    assert torch.equal(own(0, 500), text)
    assert path.read_bytes() != bytes(data)


def test_who_comes_second_takes_what_is_there(tmp_path):
    first, second = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    assert torch.equal(sampled._keep(first, tmp_path / "0.safetensors"), first)
    assert torch.equal(sampled._keep(second, tmp_path / "0.safetensors"), first)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


def test_a_model_that_repeats_one_token_is_refused(own, monkeypatch):
    rows = torch.arange(60).reshape(3, 20)
    assert degenerate(rows) == 0
    rows[0, :11] = 7
    assert degenerate(rows) == pytest.approx(1 / 3)
    monkeypatch.setattr(sampled, "draw", lambda model, scripts, length, *_: torch.full((len(scripts), length), 7))
    with pytest.raises(InputError, match=r"in 100% of the sequences .* one token is more than half") as caught:
        own(0, 100)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_refused(llama):
    llama.lm_head.weight[0] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        draw(llama, [Script(((0,),), frozenset())], 4, 0, quietly)


def test_splits_of_own_text_and_mixtures_are_disjoint(text_file, model_folder, own):
    """Of every text in a mixture each split takes its share, and no window twice."""
    mixture = {"self": 3.0, str(text_file): 1.0}
    splits = {
        "calibrate": Split(mixture, 8),
        "search": Split("self", 4, (0.25, 0.9)),
        "report": Split(str(text_file), 4),
        "control": Split("self:0", 3),
    }
    result = cut(load_tokenizer(resolve(str(model_folder))), splits, 16, own)
    assert {name: len(windows) for name, windows in result.items()} == {
        "calibrate": 8, "search": 4, "report": 4, "control": 3
    }  # fmt: skip
    windows = [tuple(window) for each in result.values() for window in each.tolist()]
    assert len(set(windows)) == len(windows)
    flat = "".join(chr(200 + token) for token in own(0, 5000).tolist())
    own_windows = ["".join(chr(200 + token) for token in window) in flat for window in result["calibrate"].tolist()]
    assert own_windows == [True] * 6 + [False] * 2


def test_a_text_of_a_mixture_that_gets_no_window_is_named():
    with pytest.raises(InputError, match=r"of 4 windows, text 'b' with weight 1 of 21 gets none"):
        Split({"a": 20.0, "b": 1.0}, 4).counts()
    assert Split({"a": 2.0, "b": 1.0, "c": 1.0}, 9).counts() == {"a": 5, "b": 2, "c": 2}


def test_a_run_keeps_the_text_it_was_begun_with(model_folder, text_file, tmp_path, monkeypatch):
    """Without the cache, where the same model may sample otherwise, the run still goes on and exports."""
    data = small_data(model_folder, text_file, trials=2)
    for name in ("calibrate", "search", "report"):
        data["data"][name]["text"] = "self"
    study = make_run(data, tmp_path / "run")
    before = {name: hash_tokens(windows) for name, windows in study.setup().tokens.items()}
    monkeypatch.setattr(sampled, "_read", lambda path: None)
    monkeypatch.setattr(sampled, "draw", never)
    data["search"]["trials"] = 3
    again = Study(data, tmp_path / "run")
    again.launch(quiet())
    assert {name: hash_tokens(windows) for name, windows in again.setup().tokens.items()} == before
    assert len(again.rows()) == 3
    study.run.own_text_file.write_bytes(b"\0" * 4)
    with pytest.raises(InputError, match=r"is corrupt .* to sample the text again"):
        again.setup()


def test_where_the_cache_would_be_large_fewer_sequences_are_drawn_together(own, monkeypatch):
    """A file has as many sequences as ever, no two parts alike, and progress reaches its total."""
    monkeypatch.setattr(sampled, "CACHE_BYTES", common.POSITIONS * 2048 * 40)
    monkeypatch.setattr(sampled, "cache_bytes", lambda model: 2048)
    reached = []
    text = OwnText(own.source, own.dtype, own.device, own.cache, progress=lambda *state: reached.append(state))
    rows = text(0, sampled.BATCH * common.POSITIONS).view(sampled.BATCH, common.POSITIONS)
    assert len(torch.unique(rows, dim=0)) == sampled.BATCH
    assert len(reached) == 3 * (common.POSITIONS - 1)
    assert reached[-1][1] <= reached[-1][2] == 3 * common.POSITIONS
