"""The page of a demo."""

import base64
import math
import re
from html.parser import HTMLParser

from nnunetv2_meddinov3.demo.report import write_report

TABLE = {"a": {"spleen": 0.5, "liver": math.nan}, "b": {"spleen": 1.0, "liver": 0.25}}


class _Cells(HTMLParser):
    """Text of the table cells of a page, row by row."""

    def __init__(self, page):
        super().__init__()
        self.rows, self._in_cell = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")

    def handle_data(self, data):
        if self._in_cell and data.strip():
            self.rows[-1].append(data)


def test_the_report_holds_table_picture_commands_and_versions(tmp_path):
    png = b"\x89PNG picture"
    (tmp_path / "overlay.png").write_bytes(png)
    page = tmp_path / "report.html"
    write_report(
        page,
        title="Demo <1>",
        note="Nothing about accuracy & all that.",
        table=TABLE,
        overlay=tmp_path / "overlay.png",
        commands=["nnUNetv2_train 900 2d_128 0", "nnUNetv2_predict -i 'a & b'"],
        versions={"torch": "2.99"},
    )
    text = page.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.part"))
    assert "Demo &lt;1&gt;" in text
    assert "Nothing about accuracy &amp; all that." in text
    assert "nnUNetv2_train 900 2d_128 0\nnnUNetv2_predict -i &#39;a &amp; b&#39;" in text
    assert _Cells(text).rows == [
        ["case", "spleen", "liver", "mean"],
        ["a", "0.500", "-", "0.500"],
        ["b", "1.000", "0.250", "0.625"],
        ["mean", "0.750", "0.250", "0.500"],
        ["software", "version"],
        ["torch", "2.99"],
    ]
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    assert base64.b64decode(embedded) == png
    assert "http" not in text  # no other file, from nowhere
