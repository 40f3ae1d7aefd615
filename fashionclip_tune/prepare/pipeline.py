"""Turns a shop's tables of items and their photos into shards (``shards`` says what they look like).

Rows that cannot be used are dropped, counted by reason and reported; when most of them cannot, that is an error. The
result depends on the rows, the options and the seed only: not on the number of workers nor on having been stopped, and
for CSV and Parquet not on the order of the table, except where rows are equal.
"""

import errno
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL

from fashionclip_tune.data.shards import SAMPLES_PER_SHARD, SPLITS, write_dataset_json
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import write_json
from fashionclip_tune.machine.hardware import available_cores
from fashionclip_tune.prepare.caption_templates import CaptionTemplate, parse_template
from fashionclip_tune.prepare.columns import NOT_THERE, ColumnChoice, choose_column, choose_id, choose_images, choose_split
from fashionclip_tune.prepare.data_report import ReportedPhoto, report_on
from fashionclip_tune.prepare.hdf5_tables import IMAGES_DATASET
from fashionclip_tune.prepare.item_rows import DroppedPhotos, ItemRow, look_for_photos, settled_ids, usable_rows
from fashionclip_tune.prepare.options import PrepareOptions, check_images, check_options
from fashionclip_tune.prepare.photo_encoding import ImageHashes
from fashionclip_tune.prepare.photo_folder import PhotoFolder
from fashionclip_tune.prepare.photos import unique_keys
from fashionclip_tune.prepare.report import PrepareReport, SplitCounts
from fashionclip_tune.prepare.shard_building import FinishedShard, PlannedShard, Workspace, plan_shards
from fashionclip_tune.prepare.splits import (
    UselessDataError,
    count_leaking_products,
    drawn_splits,
    given_splits,
    refuse_if_empty,
    seeded_fraction,
)
from fashionclip_tune.prepare.tables import Tables, read_tables, splits_by_file
from fashionclip_tune.progress import OnProgress, no_progress

_FORMAT = 2  # of prepare.json; raised when the same input makes other bytes
_MIN_BLOCK, _MAX_BLOCK = 32, 128  # rows of a file that holds its photos, which are read and shuffled together
_LARGE_ROW_GROUP = 1_000
_FEWEST_GROUPS = 10


def prepare(
    options: PrepareOptions,
    *,
    on_progress: OnProgress = no_progress,
    on_note: Callable[[str], None] = lambda note: None,
) -> PrepareReport:
    """Writes the shards, then ``report.json`` and, last, ``dataset.json``. Called again after it was stopped, it goes on.

    Args:
        on_progress: called with (done, total) after each image; total leaves out the rows dropped before any is decoded.
        on_note: told in a line what a person who waits should know.

    Raises:
        UserError: an option, the table or the folder of images is wrong, or most of the rows cannot be used (then
            nothing is left behind).
    """
    check_options(options)
    tables = read_tables(options.tables, encoding=options.encoding, separator=options.separator)
    are_inside = check_images(options, tables)
    columns, templates, notes = _columns(options, tables, are_inside=are_inside)
    folder = None if are_inside or options.images is None else PhotoFolder(options.images)
    looked = look_for_photos(tables, folder, columns["image"].names)
    columns["id"], more = settled_ids(columns["id"], tables, looked)
    notes += more
    by_file = {} if columns["split"].names else splits_by_file(options.tables)
    dropped = DroppedPhotos(functools.partial(_advice, options), ", ".join(map(str, options.tables)))
    rows, more = usable_rows(tables, looked, columns, templates, by_file, dropped)
    notes += more
    dropped.refuse_if_most()
    block = min(max(_MIN_BLOCK, tables.photos_of_block), _MAX_BLOCK) if are_inside else 1
    rows = _shuffled_with_keys(rows, block, options.seed)
    columns["group"], rows, more = _splittable(columns["group"], rows)
    notes += more
    splits, splits_from, advice = _splits(options, columns, by_file, rows)
    by_split = {wanted: [row for row, split in zip(rows, splits, strict=True) if split == wanted] for wanted in SPLITS}
    plan = plan_shards(by_split, largest=SAMPLES_PER_SHARD, augmented=any(len(row.sample.captions) > 1 for row in rows))
    workspace = Workspace(options.out)
    with workspace.claimed(_identity(options, columns, plan)):
        _notes(on_note, workspace, plan, tables)
        finished = _build(options, workspace, plan, block, dropped, advice, on_progress)
        written = {split: [row for s in finished if s.planned.split == split for row, _ in s.written()] for split in SPLITS}
        names = {split: [s.planned.name for s in finished if s.planned.split == split and s.written()] for split in SPLITS}
        report = PrepareReport(
            out=options.out,
            num_rows=len(tables.records) + len(tables.broken),
            notes=tuple(notes),
            num_photos=dropped.num_photos,
            splits={
                split: SplitCounts(len(of_split), len({row.sample.product_id for row in of_split}), len(names[split]))
                for split, of_split in written.items()
            },
            columns=columns,
            dropped={reason: tuple(lost) for reason, lost in dropped.by_reason.items()},
            splits_from=splits_from,
            leaking_products=count_leaking_products([row.ties() for row in rows], splits) if splits_from else 0,
            data=report_on(
                [_reported(shard.planned.split, row, hashes) for shard in finished for row, hashes in shard.written()]
            ),
        )
        write_json(options.out / "report.json", report.as_json())
        described = {
            split: {"shards": names[split], "samples": counts.samples, "products": counts.products}
            for split, counts in report.splits.items()
            if counts.samples
        }
        write_dataset_json(options.out, described, source=_source(options, columns, drawn=splits_from is None))
    return report


def _build(
    options: PrepareOptions,
    workspace: Workspace,
    plan: Sequence[PlannedShard],
    block: int,
    dropped: DroppedPhotos,
    advice: str,
    on_progress: OnProgress,
) -> list[FinishedShard]:
    """All shards in their order. When the data turns out to be useless, nothing stays behind; a full disk leaves what is."""
    num_done, total = 0, sum(len(shard.rows) for shard in plan)

    def on_photo(count: int) -> None:
        nonlocal num_done
        num_done += count
        on_progress(num_done, total)

    finished: dict[str, FinishedShard] = {}
    workers = options.workers or available_cores()
    shards = workspace.build(plan, size=options.size, workers=workers, block=block, on_photo=on_photo)
    try:
        for shard in shards:
            finished[shard.planned.name] = shard
            for row in shard.lost():
                dropped.add(row.source.problem(), row.number, row.shown)
            dropped.refuse_if_most()
        refuse_if_empty([shard.planned.split for shard in finished.values() if shard.written()], advice)
    except UselessDataError:
        workspace.discard()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--out {options.out}: {error.strerror}: make space and start the same command again") from error
    finally:
        shards.close()
    return [finished[shard.name] for shard in plan]


def _advice(options: PrepareOptions, reason: str) -> str:
    """Which options to look at."""
    if "cells" in reason or "quotation" in reason or "bytes" in reason:
        return "Is the table whole? Its shape is found by looking at it, and said by --separator and --encoding"
    if reason == "caption empty":
        return f"Is {'--caption' if options.captions else '--caption-column'} right?"
    if options.images is None:
        return "Are these photos?"
    return f"Is --images {options.images} the right folder? Is --image-column right?"


def _notes(notify: Callable[[str], None], workspace: Workspace, plan: Sequence[PlannedShard], tables: Tables) -> None:
    if kept := sum(workspace.finished(shard) is not None for shard in plan):
        notify(f"going on: {kept} of {len(plan)} shards are finished")
    if tables.is_hdf5 and tables.photos_of_block > _MAX_BLOCK:
        notify(
            f"{IMAGES_DATASET} is stored in chunks of {tables.photos_of_block} photos, so reading is slow; this makes a faster "
            f"file: h5repack -l {IMAGES_DATASET}:CHUNK=1x256x256x3 OLD.h5 NEW.h5"
        )
    elif tables.photos_of_block > _LARGE_ROW_GROUP:
        notify(
            f"photos are stored in row groups of {tables.photos_of_block:,} rows, so reading is slow; faster are some 100: "
            "pyarrow.parquet.write_table(table, FILE, row_group_size=100)"
        )


def _identity(options: PrepareOptions, columns: Mapping[str, ColumnChoice], plan: Sequence[PlannedShard]) -> dict[str, Any]:
    """What decides the bytes of the data set. Paths do not count: a moved table or folder is the same."""
    content = hashlib.sha256()
    for shard in plan:
        for row in shard.rows:
            photo = [row.source.path.name, row.source.row, row.source.column, row.file_bytes]
            content.update(json.dumps([shard.name, photo, row.number, row.file, vars(row.sample) | {"jpeg": ""}]).encode())
    return {
        "format": _FORMAT,
        "arguments": {
            "--table": [path.name for path in options.tables],
            "--size": options.size,
            "--caption": list(options.captions),
            "--seed": options.seed,
            "--valid-share": options.valid_share,
            "--test-share": options.test_share,
            **{f"--{purpose}-column": str(choice.name) for purpose, choice in columns.items()},
        },
        "table_and_photos": content.hexdigest(),
        "pillow": PIL.__version__,
        "plan": {shard.name: len(shard.rows) for shard in plan},
    }


def _reported(split: str, row: ItemRow, hashes: ImageHashes) -> ReportedPhoto:
    return ReportedPhoto(row.shown, split, row.sample.product_id, row.sample.captions, hashes)


def _source(options: PrepareOptions, columns: Mapping[str, ColumnChoice], *, drawn: bool) -> str:
    """For dataset.json."""
    source = ", ".join(f"{purpose}: {choice.name}" for purpose, choice in columns.items())
    if drawn:
        source += f", splits drawn: seed {options.seed}, valid {options.valid_share}, test {options.test_share}"
    return f"{', '.join(path.name for path in options.tables)} ({source})"


def _columns(
    options: PrepareOptions, tables: Tables, *, are_inside: bool
) -> tuple[dict[str, ColumnChoice], list[CaptionTemplate], list[str]]:
    """The columns by purpose, the templates, and what is to be said of the guesses."""
    templates = [parse_template(text, tables.columns) for text in options.captions]
    # What is found in this look does not count as a name that stands for a file.
    folder = None if are_inside or options.images is None else PhotoFolder(options.images)
    columns = {"image": choose_images(options.image_columns, tables, folder)}
    if templates:
        names = tuple(dict.fromkeys(column for template in templates for column in template.columns))
        columns["caption"] = ColumnChoice(names, guessed=False)
    else:
        columns["caption"] = choose_column("caption", _chosen(options.caption_column), tables)
    columns["id"], notes = choose_id(_chosen(options.id_column), tables)
    columns["category"] = choose_column("category", _chosen(options.category_column), tables)
    columns["split"], more = choose_split(_chosen(options.split_column), tables)
    columns["group"] = choose_column("group", _chosen(options.group_column), tables)
    if columns["group"].guessed and columns["group"] in (columns["category"], columns["id"]):
        columns["group"] = NOT_THERE
    return columns, templates, [*tables.notes, *notes, *more]


def _chosen(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _splittable(choice: ColumnChoice, rows: Sequence[ItemRow]) -> tuple[ColumnChoice, list[ItemRow], list[str]]:
    """Without a guessed group of which there are too few, or one of which is too large, to be spread over splits."""
    sizes = Counter(row.group for row in rows if row.group)
    if not choice.guessed or not sizes or (len(sizes) >= _FEWEST_GROUPS and max(sizes.values()) <= len(rows) / 2):
        return choice, list(rows), []
    why = f"it has {len(sizes):,} values, and one of them {max(sizes.values()):,} photos"
    note = f"column {choice.name} is not kept in one split: {why} (guessed: --group-column)"
    return NOT_THERE, [replace(row, group="") for row in rows], [note]


def _shuffled_with_keys(rows: Sequence[ItemRow], block: int, seed: int) -> list[ItemRow]:
    """A table sorted by category would make shards that are all alike, so rows are shuffled, alike for any order.

    Image files are shuffled one by one, rows of a file that holds its photos in blocks, which are read at once.
    """

    def place(row: ItemRow) -> tuple[float, int]:
        if row.source.row is None:
            return seeded_fraction(seed, row.identity()), 0
        return seeded_fraction(seed, f"{row.source.path.name}\n{row.source.row // block}"), row.source.row

    shuffled = sorted(rows, key=place)
    keys = unique_keys(row.file if row.source.row is not None else row.source.path.name for row in shuffled)
    return [replace(row, sample=replace(row.sample, key=key)) for row, key in zip(shuffled, keys, strict=True)]


def _splits(
    options: PrepareOptions, columns: Mapping[str, ColumnChoice], by_file: Mapping[Path, str], rows: Sequence[ItemRow]
) -> tuple[list[str], str | None, str]:
    """The split of each row, what said so (None: drawn), and what to try where a split is empty."""
    column = columns["split"].name
    if column is not None or by_file:
        splits_from = "the names of the files" if column is None else f"the column {column}"
        splits = given_splits([(row.number, row.split) for row in rows], column=str(columns["split"]))
        advice = "give a file of that split with another --table" if column is None else "check --split-column"
    else:
        splits_from = None
        shares = {"valid_share": options.valid_share, "test_share": options.test_share}
        splits = drawn_splits([row.all_ties() for row in rows], **shares, seed=options.seed)
        advice = "rows of one product, group or caption stay together: try other --valid-share, --test-share or --seed"
    refuse_if_empty(splits, advice)
    return splits, splits_from, advice
