"""HTML in a shop's descriptions as plain text."""

import html
import re
from html.parser import HTMLParser

_INLINE = re.compile("a|abbr|b|big|cite|code|em|font|i|ins|mark|q|s|small|span|strike|strong|sub|sup|tt|u|wbr")
_BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|center|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|head|"
    "header|hr|html|iframe|img|input|label|li|link|main|meta|nav|o:p|ol|p|picture|pre|section|source|style|script|summary|svg|"
    "table|tbody|td|template|tfoot|th|thead|title|tr|ul|video"
)
_UNSEEN = ("style", "script", "head", "template")
_TAG = re.compile(rf"</?(?:{_INLINE.pattern}|{_BLOCK.pattern})(?=[\s/>])[^<>]*>|<!--|<!\[CDATA\[|<!doctype", re.IGNORECASE)
_CDATA = re.compile(r"<!\[CDATA\[|\]\]>")
_MOST_ESCAPED = 3  # times, one in the other: &amp;lt;p&amp;gt;
_ENTITY = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")


def has_html(text: str) -> bool:
    """Whether it has a tag that HTML knows, a comment, or a character by its name or number: ``5 < 6 & 7`` has none."""
    named = (found[0] for found in _ENTITY.finditer(text))
    return _TAG.search(text) is not None or any(html.unescape(written) != written for written in named)


def without_html(text: str) -> str:
    """What a reader would see: blocks are apart by a space, styles and scripts are gone, characters are themselves."""
    for _ in range(_MOST_ESCAPED):
        if not has_html(text):
            break
        reader = _Reader()
        reader.feed(_CDATA.sub("", text))
        reader.close()
        text = " ".join("".join(reader.parts).split())
    return text


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._at(tag, self.get_starttag_text() or "", 1)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self._at(tag, self.get_starttag_text() or "", 0)

    def handle_endtag(self, tag: str) -> None:
        self._at(tag, f"</{tag}>", -1)

    def _at(self, tag: str, written: str, step: int) -> None:
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen + step)
        if not _INLINE.fullmatch(tag):
            self.parts.append(" " if _BLOCK.fullmatch(tag) else "" if self._unseen else written)

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        character = html.unescape(f"&{name};")
        self.handle_data(character if character != f"&{name};" else f"&{name}")

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))
