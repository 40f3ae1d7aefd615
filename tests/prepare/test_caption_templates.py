"""Caption templates: what an empty column leaves behind, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.caption_templates import parse_template

COLUMNS = ("title", "colour", "category", "Product name")
SHIRT = {"title": "Shirt", "colour": "Blue", "category": "Tops", "Product name": "N"}


@pytest.mark.parametrize(
    ("template", "empty", "caption"),
    [
        ("{title}. {colour} {category}", "", "Shirt. Blue Tops"),
        ("{title}. {colour} {category}", "colour", "Shirt. Tops"),
        ("{title}. {colour} {category}", "category", "Shirt. Blue"),
        ("{title}. {colour} {category}", "colour category", "Shirt"),
        ("{title}. {colour} {category}", "title", "Blue Tops"),
        ("{title}. {colour} {category}", "title colour", "Tops"),
        ("{title}. {colour} {category}", "title colour category", ""),
        ("{title}. {colour} {category}.", "colour category", "Shirt."),
        ("{title}. {colour} {category}.", "title colour category", ""),
        ("{title}, {colour}, {category}", "colour", "Shirt, Tops"),
        ("{title} ({colour}) {category}", "colour", "Shirt Tops"),
        ("{title} ({colour}, {category})", "category", "Shirt (Blue)"),
        ("{title} ({colour}, {category})", "colour", "Shirt (Tops)"),
        ("{title} ({colour}, {category})", "colour category", "Shirt"),
        ("{title} - {colour}/{category}", "colour", "Shirt - Tops"),
        ("{title}\u2013{colour}", "colour", "Shirt"),
        ("a photo of a {colour} {category}, {title}", "colour", "a photo of a Tops, Shirt"),
        ("{{{title}}} {Product name}", "", "{Shirt} N"),
        ("{title} {title}", "", "Shirt Shirt"),
    ],
)
def test_empty_columns_leave_nothing_behind(template: str, empty: str, caption: str) -> None:
    values = SHIRT | dict.fromkeys(empty.split(), "")
    assert parse_template(template, COLUMNS).fill(values) == caption


def test_what_stands_in_a_column_is_kept() -> None:
    values = {"title": "Size S. - (new),", "colour": "", "category": " Tops!  and\nmore ", "Product name": ""}
    assert parse_template("{title}. {colour} {category}", COLUMNS).fill(values) == "Size S. - (new),. Tops! and more"


@given(
    literals=st.lists(st.text(alphabet=" .,;:-/|", max_size=4), min_size=4, max_size=4),
    values=st.lists(st.sampled_from(["", "Red", "two words"]), min_size=3, max_size=3),
)
def test_no_double_spaces_and_no_punctuation_at_the_ends(literals: list[str], values: list[str]) -> None:
    names = ("title", "colour", "category")
    template = "".join(a + "{" + b + "}" for a, b in zip([" ", *literals[1:3]], names, strict=True))
    caption = parse_template(template, COLUMNS).fill(dict(zip(names, values, strict=True)))
    assert "  " not in caption
    assert caption == caption.strip(" .,;:-/|")
    assert re.findall(r"Red|two words", caption) == [value for value in values if value]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{titel} {colour}", r"no column 'titel'; the columns are title, colour, category, Product name"),
        ("{title.upper}", r"no column 'title.upper'"),
        ("{title!r}", r"no column 'title!r'"),
        ("{title:>9}", r"no column 'title:>9'"),
        ("{} {0}", r"no column ''"),
        ("{title", "write columns as {name}"),
        ("title}", "write columns as {name}"),
        ("a photo", r"names no column, so that all captions would be alike: write e.g. {title}"),
        ("", "names no column"),
    ],
)
def test_wrong_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_template(template, COLUMNS)
