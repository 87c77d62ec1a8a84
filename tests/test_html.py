"""The page: hostile text stays text, pictures have words, tags are nested as they must be."""

import base64
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.html import Code, Items, Picture, Section, Table, Text, render, write_page

HOSTILE = (
    "</pre></td></title><script>alert(1)</script><img src=x onerror='y'>\"&amp; {{ 7*7 }} {% x %}"
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks the nesting of a page and keeps (tag, attributes, text) of its elements."""

    def __init__(self, html):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][2] += data

    def texts(self, tag):
        return [text for name, _, text in self.elements if name == tag]

    def attributes(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


def page_of(*blocks):
    return Page(render("Title", [], [Section("Part", blocks)]))


EVERYTHING = [
    Text(HOSTILE),
    Text(HOSTILE, "note"),
    Items([HOSTILE, HOSTILE], "wrong"),
    Table([HOSTILE, "b"], [[HOSTILE, 1.5], [None]], text=True, last_is_total=True),
    Table([], [[HOSTILE]]),
    Picture(b"png", HOSTILE),
    Code(HOSTILE),
    Code(HOSTILE, HOSTILE),
]


def test_hostile_text_stays_text_wherever_it_stands():
    html = render(HOSTILE, EVERYTHING, [Section(HOSTILE, EVERYTHING)])
    page = Page(html)
    assert "script" not in {tag for tag, _, _ in page.elements}
    assert page.texts("title") == page.texts("h1") == page.texts("h2") == [HOSTILE]
    assert page.texts("p") == [HOSTILE] * 4
    assert page.texts("li") == [HOSTILE] * 4
    assert page.texts("th") == [HOSTILE, "b"] * 2
    assert page.texts("td") == [HOSTILE, "1.5", "None", HOSTILE] * 2
    assert page.texts("pre") == [HOSTILE] * 4
    assert page.texts("summary") == [HOSTILE] * 2
    assert [image["alt"] for image in page.attributes("img")] == [HOSTILE] * 2


def test_elements_are_nested_as_html_wants_them():
    page = Page(render("Title", EVERYTHING, [Section("A", EVERYTHING), Section("B")]))
    assert [name for name, _, _ in page.elements[:2]] == ["html", "head"]
    assert page.texts("h2") == ["A", "B"]
    assert page.attributes("html") == [{"lang": "en"}]


def test_the_check_of_nesting_can_fail():
    with pytest.raises(AssertionError):
        Page("<table><tr></table></tr>")


def test_a_picture_is_part_of_the_page_and_has_words():
    png = bytes(range(256))
    (image,) = page_of(Picture(png, "Loss over steps")).attributes("img")
    assert image["alt"] == "Loss over steps"
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == png


def test_a_page_needs_no_other_file():
    html = render("Title", EVERYTHING, [])
    for address in ("http", "<link", "url(", "@import", "<script"):
        assert address not in html


def test_kinds_and_tables_say_how_they_look():
    page = page_of(
        Text("plain"),
        Text("apart", "note"),
        Items(["bad"], "wrong"),
        Table(["a"], [[1]]),
        Table(["a"], [[1]], text=True),
        Table(["a"], [[1]], last_is_total=True),
        Table(["a"], [[1]], text=True, last_is_total=True),
    )
    assert page.attributes("p") == [{}, {"class": "note"}]
    assert page.attributes("ul") == [{"class": "wrong"}]
    classes = [table.get("class") for table in page.attributes("table")]
    assert classes == [None, "words", "total", "words total"]


def test_a_table_without_a_head_has_none_and_rows_may_be_a_generator():
    page = page_of(Table([], ([number, number**2] for number in range(3))))
    assert page.texts("th") == []
    assert page.texts("td") == ["0", "0", "1", "1", "2", "4"]


def test_code_is_folded_away_only_under_a_summary():
    page = page_of(Code("a\n  b"), Code("c", "Config"))
    assert page.texts("pre") == ["a\n  b", "c"]
    assert page.texts("summary") == ["Config"]


def test_what_is_not_a_block_is_refused():
    with pytest.raises((AttributeError, UndefinedError)):
        render("Title", ["text"], [])


def test_a_page_is_written_in_utf8_and_replaced_whole(tmp_path):
    path = tmp_path / "report.html"
    assert write_page(path, "Größe", [], []) == path
    assert "<h1>Größe</h1>" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_page(path, "New", [Picture(None, "no picture")], [])
    assert "<h1>Größe</h1>" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="must be writable"):
        write_page(tmp_path / "missing" / "report.html", "Title", [], [])
