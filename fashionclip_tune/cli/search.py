"""``search``: photos by words, or by a photo."""

import argparse
from pathlib import Path
from typing import Any

from fashionclip_tune.cli.flags import add_reading_flags, reading_settings
from fashionclip_tune.config.section import assignments
from fashionclip_tune.errors import UserError

_MOST_SHOWN = 10_000


def add_search(commands: Any) -> None:
    parser = commands.add_parser(
        "search",
        help="photos of a folder by words, or by a photo",
        description="Finds the photos that are nearest to words or to a photo. Each photo is embedded once; its vector is kept "
        "(docs/retrieval.md). The search is exact.",
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="WORDS", help="what to look for, such as 'red floral dress'; several are several searches")
    add("--model", required=True, metavar="NAME|DIR", help="as for evaluate: a sweep (its best), a run, a folder, a name")
    add("--images", required=True, metavar="DIR|URL", help="a folder of photos, sub-folders included, or of shards")
    add("--image", action="append", default=[], type=Path, metavar="FILE", help="look for photos like this one, too")
    add("--top", type=int, default=10, metavar="N", help="photos of an answer (default: %(default)s)")
    add(
        "--where",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only photos whose attribute is this, such as category=Dresses; may be given again: all must hold",
    )
    add("--html", type=Path, metavar="FILE", help="write the answers as a page with the photos, too")
    add("--vectors", type=Path, metavar="DIR", help="where vectors are kept (default: in the cache, by model and photos)")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="a setting, such as device=cpu: docs/settings.md")
    add_reading_flags(parser)
    parser.set_defaults(run=_search)


def _search(parsed: argparse.Namespace) -> None:
    if not parsed.words and not parsed.image:
        raise UserError("nothing to look for: give words, or --image FILE")
    if any(not words.strip() for words in parsed.words):
        raise UserError("words to look for are empty")
    if not 1 <= parsed.top <= _MOST_SHOWN:
        raise UserError(f"--top {parsed.top} is not allowed: a number from 1 to {_MOST_SHOWN:,} expected")
    where = dict[str, str]()
    for each in parsed.where:
        name, equals, value = each.partition("=")
        if not equals or not name or not value:
            raise UserError(f"--where {each}: NAME=VALUE expected, such as category=Dresses")
        where[name] = value
    for file in parsed.image:
        if not file.is_file():
            raise UserError(f"--image {file}: no such file")
    if parsed.html and (parsed.html.is_dir() or not parsed.html.absolute().parent.is_dir()):
        raise UserError(f"--html {parsed.html} cannot be written: name a file in a folder that exists")

    from rich.console import Console

    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.progress import messages_on, progress_bar
    from fashionclip_tune.retrieval.page import attributes_text, write_page
    from fashionclip_tune.retrieval.search import search

    config = ProjectConfig().with_overrides({**assignments(parsed.set), **reading_settings(parsed)})
    console = Console()
    with messages_on(console), progress_bar("embedding photos", console) as on_progress:
        done = search(
            parsed.model,
            parsed.images,
            words=parsed.words,
            photos=parsed.image,
            count=parsed.top,
            where=where,
            folder=parsed.vectors,
            config=config,
            on_progress=on_progress,
        )
    for found in done.searches:
        print(f"\n{found.query}")
        for rank, answer in enumerate(found.answers, start=1):
            print(f"{rank:>3}. {answer.score:.3f}  {'  '.join(filter(None, (answer.row['id'], attributes_text(answer.row))))}")
    print(f"\n{done.about}\nvectors: {done.folder}")
    if parsed.html:
        try:
            write_page(parsed.html, done.searches, done.about, done.read)
        except OSError as error:
            raise UserError(f"--html {parsed.html} cannot be written: {error}") from error
        print(f"page: {parsed.html}")
