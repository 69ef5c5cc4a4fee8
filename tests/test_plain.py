"""What others named is shown as it is: no markup of theirs, no control characters."""

from html import unescape

import pytest
from markdown_it import MarkdownIt

from rankfront.search.plain import markdown, plain


@pytest.mark.parametrize(
    "text",
    ["org/my_model-1.0", "a|b", "[x](http://y)", "<script>", "`code`", "*bold* _it_ ~~no~~", "![i](u)", "\\|", "&amp;"],
)
def test_markdown_shows_foreign_text_as_it_is(text):
    page = MarkdownIt("commonmark").enable("table").render(f"| name | value |\n| --- | --- |\n| {markdown(text)} | 1 |")
    cell = page.partition("<td>")[2].partition("</td>")[0]
    assert "<" not in cell
    assert unescape(cell) == text


def test_what_does_not_print_is_an_escape():
    assert plain("a\nb\x1b[2J\u202e") == "a\\nb\\x1b[2J\\u202e"
    assert "\n" not in markdown("a\n# b")
