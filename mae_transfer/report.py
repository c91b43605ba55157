"""A self-contained HTML page: text, tables, pictures and charts in one file that opens without a network.

    page = Page(title="…", lead="…")
    page.section("Pretraining")
    page.chart([Series(name="loss", points=[(0, 1.0), (100, 0.4)])], x_label="step", y_label="loss", caption="…")
    page.write(Path("report.html"))

Pictures are embedded, charts are SVG, there is no script. All text given is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mae_transfer.charts import Bar, Series, bar_chart, line_chart
from mae_transfer.engine.files import write_text

_STYLE = Path(__file__).parent / "assets" / "report.css"


class Page:
    """A page that grows from top to bottom."""

    def __init__(self, *, title: str, lead: str) -> None:
        self.title = title
        self._head = f"<h1>{html.escape(title)}</h1>\n<p class=lead>{html.escape(lead)}</p>\n"
        self._sections: list[tuple[str, list[str]]] = []

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Large numbers above the sections: (number, what it is)."""
        boxes = (f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in facts)
        self._head += f"<div class=facts>{''.join(boxes)}</div>\n"

    def section(self, title: str) -> None:
        """Begin a section; it appears in the navigation."""
        self._sections.append((title, []))

    def heading(self, text: str) -> None:
        self._add(f"<h3>{html.escape(text)}</h3>")

    def text(self, text: str, *, note: bool = False) -> None:
        """A paragraph; a note is set apart."""
        self._add(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def commands(self, commands: Sequence[str]) -> None:
        """What somebody would type."""
        self._add(f"<pre>{html.escape(chr(10).join(commands))}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> None:
        """A table whose first column is text and whose others are numbers, as they should be printed."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        below = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._add(f"<div class=scroll><table>{below}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")

    def picture(self, image: Image.Image, *, caption: str) -> None:
        self._figure(_img(image, caption), caption)

    def picture_grid(
        self, columns: Sequence[str], rows: Sequence[Sequence[Image.Image]], *, caption: str, labels: Sequence[str] = ()
    ) -> None:
        """Rows of pictures under the titles of their columns; labels, if given, stand left of the rows."""
        cells = ["<span></span>"] if labels else []
        cells += [f"<span>{html.escape(column)}</span>" for column in columns]
        for number, row in enumerate(rows):
            cells += [f"<span>{html.escape(labels[number])}</span>"] if labels else []
            cells += [_img(image, f"{column}, row {number + 1}") for column, image in zip(columns, row)]
        template = f"{'auto ' if labels else ''}repeat({len(columns)}, minmax(0, 1fr))"
        self._figure(f'<div class=grid style="grid-template-columns: {template}">{"".join(cells)}</div>', caption)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Names with their CSS colours."""
        items = (f'<span><i style="background: {colour}"></i>{html.escape(name)}</span>' for name, colour in entries)
        self._add(f"<div class=legend>{''.join(items)}</div>")

    def chart(self, series: Sequence[Series], *, x_label: str, y_label: str, caption: str) -> None:
        """Lines over a common x axis."""
        self._figure(line_chart(series, x_label=x_label, y_label=y_label), caption)

    def bars(self, bars: Sequence[Bar], *, unit: str, caption: str) -> None:
        """Horizontal bars from 0, each with its value."""
        self._figure(bar_chart(bars, unit=unit), caption)

    def render(self) -> str:
        """The page as HTML."""
        links = "".join(f'<a href="#{_anchor(title)}">{html.escape(title)}</a>' for title, _ in self._sections)
        sections = "".join(
            f'<section id="{_anchor(title)}">\n<h2>{html.escape(title)}</h2>\n{chr(10).join(parts)}\n</section>\n'
            for title, parts in self._sections
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
            f"<nav><div><b>mae-transfer</b>{links}</div></nav>\n<main>\n{self._head}{sections}</main>\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page whole or not at all."""
        write_text(path, self.render())

    def _add(self, part: str) -> None:
        assert self._sections, "section() comes before what stands in it"
        self._sections[-1][1].append(part)

    def _figure(self, content: str, caption: str) -> None:
        self._add(f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>")


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _img(image: Image.Image, description: str) -> str:
    """An <img> that holds its picture: JPEG, which for photographs is a fifth of PNG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=90, subsampling=0)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img width="{image.width}" height="{image.height}" alt="{html.escape(description)}" '
        f'src="data:image/jpeg;base64,{content}">'
    )
