"""The documentation: links resolve, whatever a user may write is named, and what is shown works."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from rankfront.methods import method_names
from rankfront.objectives import OBJECTIVES
from rankfront.search.__main__ import app
from rankfront.search.choices import SAMPLERS
from rankfront.search.config import (
    ControlConfig,
    DataConfig,
    HealConfig,
    ModelConfig,
    ResourcesConfig,
    RuleConfig,
    SearchConfig,
    ShareConfig,
    SpaceConfig,
    SplitConfig,
    StudyConfig,
    make_config,
)
from rankfront.search.output.engines import kept
from rankfront.search.serve.doors import DOORS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
TABLES = (
    StudyConfig, ModelConfig, DataConfig, SplitConfig, ControlConfig, ShareConfig, SpaceConfig, RuleConfig,
    SearchConfig, ResourcesConfig, HealConfig,
)  # fmt: skip
COMMANDS = typer.main.get_command(app).commands
LONGEST = 30  # words of a sentence on the front page
MOST = 150  # lines of the front page


def read(page):
    return page.read_text(encoding="utf-8")


def named(page):
    """Everything that a page of docs/ sets in backticks outside of code blocks."""
    return set(re.findall(r"`([^`\n]+)`", prose(read(ROOT / "docs" / page))))


def prose(text):
    """``text`` without code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(language):
    """Every code block in ``language``, by page and line."""
    return [
        pytest.param(found[1], id=f"{page.name}-{read(page)[: found.start()].count(chr(10)) + 1}")
        for page in PAGES
        for found in re.finditer(rf"^```{language}\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)
    ]


def anchors(page):
    """The anchors that a host of Markdown gives the headings of ``page``."""
    titles = re.findall(r"^#+ (.+)$", prose(read(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_files_that_are_named_exist():
    """Paths of the repository in backticks, in CONTRIBUTING.md above all."""
    for page in PAGES:
        for path in re.findall(r"`((?:methods|objectives|search|studies|tests|docs)/[\w/.*]*)`", prose(read(page))):
            assert any(ROOT.glob(path)), f"{page.name}: {path}"


def test_every_page_is_reached_from_the_front_page():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", read(README)))
    missing = {f"docs/{page.name}" for page in PAGES[2:]} - linked
    assert missing == {"docs/faults.md"}  # which scale-and-faults.md links


# -- what a user may write


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_every_key_of_the_study_file_is_named(table):
    known = named("study-file.md")
    sections = {part for name in known for part in name.strip("[]").split(".")}
    assert set(table.model_fields) - known - sections == set()


def test_tables_of_the_study_file_are_all_looked_at():
    """A new table of settings has to be added above."""
    pending, seen = [StudyConfig], set()
    while pending:
        table = pending.pop()
        seen.add(table)
        found = {type_ for field in table.model_fields.values() for type_ in tables_in(field.annotation)}
        pending += found - seen
    assert seen == set(TABLES)


def tables_in(annotation):
    """The tables that a field's type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {each for inner in getattr(annotation, "__args__", ()) for each in tables_in(inner)}


def documented(section):
    """Key -> default as the study file's page has it, in a section's tables."""
    text = read(ROOT / "docs" / "study-file.md")
    body = re.split(r"^## ", text.partition(f"## `[{section}]`\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ", body, flags=re.MULTILINE)
    return dict(reversed(found))  # the first table is the section's own


@pytest.mark.parametrize(
    ("section", "table"),
    [("model", ModelConfig), ("space", SpaceConfig), ("search", SearchConfig), ("search.resources", ResourcesConfig)],
)
def test_defaults_of_the_study_file_are_those_that_are_documented(section, table):
    shown = documented(section)
    for key, field in table.model_fields.items():
        if isinstance(field.default, BaseModel):
            continue
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        said = shown[key]
        assert said == "none" if default is None else tomllib.loads(f"value = {said.strip('`')}")["value"] == default


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_named_with_its_settings(name):
    settings = {field.name for field in dataclasses.fields(OBJECTIVES[name]) if field.init}
    assert {name, *settings} - named("study-file.md") == set()


def test_every_sampler_is_named():
    assert set(SAMPLERS) - named("study-file.md") == set()


def test_every_method_is_named():
    assert set(method_names()) - named("methods.md") == set()


def test_formats_and_their_engines_are_those_of_the_table():
    lines = read(ROOT / "docs" / "serve.md").splitlines()
    for form, door in DOORS.items():
        engines = ", ".join(f"{name} ({asks})" if asks else name for name, asks in door.engines.items())
        assert f"| `{form}` | {door.written} | {kept(door)} | {engines} |" in lines


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_every_option_is_named(command):
    text = read(ROOT / "docs" / "commands.md")
    section = re.split(r"^## ", text.partition(f"## {command}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    assert section
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "option":
            for option in {*parameter.opts, *parameter.secondary_opts} - {"--help"}:
                assert re.search(rf"`{option}[ `]", section), option


# -- what is shown


@pytest.mark.parametrize("code", blocks("toml"))
def test_every_study_file_that_is_shown_is_valid(code):
    make_config(tomllib.loads(code))


@pytest.mark.parametrize("code", blocks("python"))
def test_every_python_example_compiles(code):
    compile(code, "example", "exec")


def command_lines():
    """Every ``rankfront ...`` that is shown, in code blocks and in backticks."""
    blocks = {page: "".join(re.findall(r"^```\n.*?^```", read(page), flags=re.DOTALL | re.MULTILINE)) for page in PAGES}
    return [
        pytest.param(line, id=f"{page.name}-{line}")
        for page, code in blocks.items()
        for line in (
            *re.findall(r"^rankfront .*$", code, flags=re.MULTILINE),
            *re.findall(r"`(rankfront [^`\n]+)`", prose(read(page))),
        )
    ]


@pytest.mark.parametrize("line", command_lines())
def test_every_command_that_is_shown_parses(line):
    words = shlex.split(re.split("   #| > ", line)[0])[1:]
    if words[0] in ("COMMAND", "--version"):
        return
    command = COMMANDS[words[0]]
    if len(words) > 1 and "--help" not in words:
        command.make_context(words[0], words[1:])  # parses, and runs nothing


# -- the front page


def test_the_front_page_is_short():
    assert len(read(README).splitlines()) <= MOST


def sentences(text):
    """The sentences of a page, those of table cells and of lists among them."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose(text))
    for paragraph in re.split(r"\n\s*\n|\n(?=[|#\-])", plain):
        for cell in paragraph.split("|"):
            yield from re.split(r"(?<=[.!?:])[*)]*\s+", " ".join(cell.split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    long = [each for each in sentences(read(page)) if len(each.split()) > LONGEST]
    assert long == []
