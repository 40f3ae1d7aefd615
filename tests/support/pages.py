"""A report's page, read as HTML: its sections, its text, and a script that must not get into it."""

from html.parser import HTMLParser
from pathlib import Path

SECTIONS = ["Ranking", "Gain over zero-shot", "Learning curves", "What mattered", "Budget", "Quality against its cost"]
SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Headings, table rows, all visible text, and where pictures and links point."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open or "style" in self._open:
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data
        if "h2" in self._open:
            self.headings[-1] += data
