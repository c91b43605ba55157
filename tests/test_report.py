"""The report page: complete in itself, well formed, escaped."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mae_transfer.charts import Bar, Series, bar_chart, line_chart, ticks
from mae_transfer.report import Page

VOID = {"meta", "img"}


class Balance(HTMLParser):
    """Checks that every element that is opened is closed, in order; keeps ids, links and outside addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")
            if name == "src":
                self.sources.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """<line …/> opens and closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def page() -> Page:
    page = Page(title="A <title> & more", lead="What it is")
    page.facts([("12.5", "box AP")])
    page.section("What was run")
    page.commands(["python tools/pretrain.py a.yaml x='<b>'"])
    page.table(["start", "AP"], [["pretrained", "1.0"], ["random", "2.0"]], caption="<i>numbers</i>")
    page.section("Pictures")
    page.picture(Image.new("RGB", (8, 6), (200, 30, 10)), caption="red")
    page.picture_grid(["a", "b"], [[Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))]], caption="two", labels=["row"])
    page.legend([("cup", "rgb(1, 2, 3)")])
    page.chart([Series(name="loss", points=[(0, 1.0), (5, 0.5)])], x_label="step", y_label="loss", caption="falls")
    page.bars([Bar(group="AP", name="pretrained", value=3.0)], unit="AP", caption="bars")
    return page


def test_the_page_is_well_formed_and_its_navigation_leads_somewhere(page: Page) -> None:
    parser = Balance()
    parser.feed(page.render())
    assert parser.open == []
    assert parser.ids == ["what-was-run", "pictures"]
    assert parser.links == ["#what-was-run", "#pictures"]


def test_nothing_is_fetched(page: Page) -> None:
    text = page.render()
    parser = Balance()
    parser.feed(text)
    assert all(source.startswith("data:image/") for source in parser.sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)


def test_what_is_given_is_escaped(page: Page) -> None:
    text = page.render()
    assert "A &lt;title&gt; &amp; more" in text
    assert "<b>'" not in text
    assert "<i>numbers" not in text


def test_an_embedded_picture_is_the_picture(page: Page) -> None:
    content = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page.render())
    assert content is not None
    with Image.open(io.BytesIO(base64.b64decode(content[1]))) as image:
        assert image.size == (8, 6)
        red, green, blue = image.convert("RGB").getpixel((4, 3))
    assert abs(red - 200) < 6
    assert abs(green - 30) < 6
    assert abs(blue - 10) < 6


def test_written_whole(page: Page, tmp_path: Path) -> None:
    page.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.render()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-6, 1e7),
    count=st.integers(2, 10),
)
def test_ticks_are_round_inside_and_neither_none_nor_too_many(low: float, span: float, count: int) -> None:
    found = ticks(low, low + span, count)
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(low - slack <= tick <= low + span + slack for tick in found)
    assert 1 <= len(found) <= count + 2


def test_a_line_chart_draws_every_point_and_higher_values_higher_up() -> None:
    svg = ElementTree.fromstring(
        line_chart([Series(name="a", points=[(0, 1.0), (10, 0.2), (20, 0.6)])], x_label="s", y_label="l")
    )
    line = svg.find("polyline")
    assert line is not None
    points = [tuple(float(v) for v in point.split(",")) for point in line.attrib["points"].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] < points[2][1] < points[1][1]  # SVG counts rows downwards


def test_constant_and_single_point_curves_can_be_drawn() -> None:
    for points in ([(3, 1.0)], [(0, 2.0), (1, 2.0)]):
        ElementTree.fromstring(line_chart([Series(name="a", points=points)], x_label="x", y_label="y"))


def test_bars_are_in_proportion_and_a_zero_is_shown_as_zero() -> None:
    bars = [Bar(group="AP", name=name, value=value) for name, value in (("a", 40.0), ("b", 20.0), ("c", 0.0))]
    svg = ElementTree.fromstring(bar_chart(bars, unit="AP"))
    widths = [float(rect.attrib["width"]) for rect in svg.findall("rect") if rect.attrib["height"] == "20"]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert widths[2] == 0
    assert "0.0 AP" in "".join(svg.itertext())
