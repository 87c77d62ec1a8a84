"""One HTML page for every report: text, tables and pictures in a file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from jinja2 import DictLoader, Environment, StrictUndefined

from nnunetv2_meddinov3.files import write_text


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Plain text; it is escaped.
        kind: ``""``, ``"note"`` (set apart) or ``"wrong"`` (red).
    """

    text: str
    kind: str = ""
    block: ClassVar[str] = "text"


@dataclass(frozen=True)
class Items:
    """A list of sentences; see ``Text`` for ``kind``."""

    items: Sequence[str]
    kind: str = ""
    block: ClassVar[str] = "items"


@dataclass(frozen=True)
class Table:
    """A table with right-aligned numbers and a left-aligned first column.

    Attributes:
        head: Names of the columns, empty for a table without a head.
        rows: Cells, turned to text; a row may have any length.
        text: Whether all columns hold words, which are left-aligned.
        last_is_total: Whether the last row is set in bold.
        summary: Where there is one, the table is folded away under it.
    """

    head: Sequence[str]
    rows: Iterable[Sequence[object]]
    text: bool = False
    last_is_total: bool = False
    summary: str = ""
    block: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG that becomes part of the page.

    Attributes:
        png: Its bytes.
        alt: What it shows, in words, for those who cannot see it.
    """

    png: bytes
    alt: str
    block: ClassVar[str] = "picture"

    @property
    def base64(self) -> str:
        """The bytes as a ``data:`` address holds them."""
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Code:
    """Lines that a reader may copy; folded away under ``summary`` where there is one."""

    text: str
    summary: str = ""
    block: ClassVar[str] = "code"


Block = Text | Items | Table | Picture | Code


@dataclass(frozen=True)
class Section:
    """A heading and what follows it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def render(title: str, blocks: Sequence[Block], sections: Sequence[Section]) -> str:
    """Return a page as HTML.

    Args:
        title: Of the page.
        blocks: What comes before the first section.
        sections: The rest, in order.
    """
    return _page.render(title=title, blocks=blocks, sections=sections)


def write_page(
    path: Path, title: str, blocks: Sequence[Block], sections: Sequence[Section]
) -> Path:
    """Write a page, whole or not at all; see ``render``.

    Returns:
        Its path.

    Raises:
        UserError: If it cannot be written.
    """
    write_text(path, render(title, blocks, sections))
    return path


_TEMPLATES = {
    "block": """
{% macro show(block) -%}
{% if block.block == "text" -%}
<p{% if block.kind %} class="{{ block.kind }}"{% endif %}>{{ block.text }}</p>
{% elif block.block == "items" -%}
<ul{% if block.kind %} class="{{ block.kind }}"{% endif %}>
{% for item in block["items"] %}<li>{{ item }}</li>
{% endfor %}</ul>
{% elif block.block == "table" -%}
{% if block.summary %}<details><summary>{{ block.summary }}</summary>
{% endif -%}
<table{% if block.text or block.last_is_total %} class="
{{- ['words' if block.text, 'total' if block.last_is_total]|select|join(' ') }}"{% endif %}>
{% if block.head %}<tr>{% for cell in block.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% endif %}
{% for row in block.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{%- if block.summary %}

</details>
{%- endif %}

{% elif block.block == "picture" -%}
<img alt="{{ block.alt }}" src="data:image/png;base64,{{ block.base64 }}">
{% elif block.summary -%}
<details><summary>{{ block.summary }}</summary><pre>{{ block.text }}</pre></details>
{% else -%}
<pre>{{ block.text }}</pre>
{% endif %}
{%- endmacro %}
""",
    "page": """{% from "block" import show %}<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; color: #222;
  padding: 0 1rem }
table { border-collapse: collapse }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd;
  overflow-wrap: anywhere }
th:first-child, td:first-child, .words th, .words td { text-align: left }
.total tr:last-child { font-weight: bold }
img { max-width: 100% }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 13px }
.note { border-left: 4px solid #c60; padding-left: 1rem }
.wrong { color: #a02030 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for block in blocks %}{{ show(block) }}{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}{{ show(block) }}{% endfor %}
{% endfor %}
</body>
</html>
""",
}
_page = Environment(
    loader=DictLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
).get_template("page")
