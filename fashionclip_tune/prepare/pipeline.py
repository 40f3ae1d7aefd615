"""Turns a shop's tables of items and their photos into shards (``shards`` says what they look like).

Rows that cannot be used are dropped, counted by reason and reported; when most of them cannot, that is an error. The
result depends on the rows, the options and the seed only: not on the number of workers nor on having been stopped, and
for CSV and Parquet not on the order of the table, except where rows are equal.
"""

import errno
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import PIL

from fashionclip_tune.data.shards import SAMPLES_PER_SHARD, SPLITS, write_dataset_json
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import write_json
from fashionclip_tune.machine.hardware import available_cores
from fashionclip_tune.prepare.columns import ColumnChoice, choose_columns
from fashionclip_tune.prepare.data_report import ReportedPhoto, report_on
from fashionclip_tune.prepare.item_rows import DroppedPhotos, ItemRow, RecordPhotos, look_for_photos, settled_ids, usable_rows
from fashionclip_tune.prepare.options import PrepareOptions, check_images, check_options
from fashionclip_tune.prepare.photo_encoding import ImageHashes
from fashionclip_tune.prepare.photo_folder import PhotoFolder
from fashionclip_tune.prepare.photos import unique_keys
from fashionclip_tune.prepare.report import PrepareReport, SplitCounts
from fashionclip_tune.prepare.shard_building import FinishedShard, PlannedShard, Workspace, plan_shards
from fashionclip_tune.prepare.split_rows import other_products, splits_of, without_useless_group
from fashionclip_tune.prepare.splits import UselessDataError, count_leaking_products, refuse_if_empty, seeded_fraction
from fashionclip_tune.prepare.tables.hdf5_reader import IMAGES_DATASET
from fashionclip_tune.prepare.tables.tables import Tables, read_tables, refuse_if_mostly_broken, splits_by_file
from fashionclip_tune.progress import OnProgress, no_progress

_FORMAT = 2  # of prepare.json; raised when the same input makes other bytes
_MIN_BLOCK, _MAX_BLOCK = 32, 128  # rows of a file that holds its photos, which are read and shuffled together
_LARGE_ROW_GROUP = 1_000


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
    refuse_if_mostly_broken(tables)
    folder = None if are_inside or options.images is None else PhotoFolder(options.images)
    columns, templates, notes = choose_columns(options, tables, folder)
    looked = look_for_photos(tables, folder, columns["image"].names)
    columns["id"], more = settled_ids(columns["id"], tables, looked)
    notes += more
    if folder is not None:
        notes += _unnamed(folder, looked)
    by_file = {} if columns["split"].names else splits_by_file(options.tables)
    dropped = DroppedPhotos(functools.partial(_advice, options), ", ".join(map(str, options.tables)))
    rows, counts = usable_rows(tables, looked, columns, templates, by_file, dropped)
    notes += counts.notes()
    dropped.refuse_if_most()
    block = min(max(_MIN_BLOCK, tables.photos_of_block), _MAX_BLOCK) if are_inside else 1
    rows = _shuffled_with_keys(rows, block, options.seed)
    columns["group"], rows, more = without_useless_group(columns["group"], rows)
    notes += more
    splits, splits_from, advice = splits_of(options, columns, by_file, rows)
    notes += other_products(columns, tables, rows, splits)
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
                [_reported(shard.planned.split, row, hashes) for shard in finished for row, hashes in shard.written()],
                template_of=counts.template_of,
                notes_protocol=not tables.is_hdf5,  # Fashion-Gen's published figures are at instance level
            ),
        )
        write_json(options.out / "report.json", report.as_json())
        described = {
            split: {"shards": names[split], "samples": counts.samples, "products": counts.products}
            for split, counts in report.splits.items()
            if counts.samples
        }
        source = _source(options, columns, drawn=splits_from is None)
        write_dataset_json(options.out, described, source=source, protocol=report.data.protocol)
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
    if "several" in reason:
        return "Names are told apart where the table has the folders of its photos, too"
    return f"Is --images {options.images} the right folder? Is --image-column right?"


def _unnamed(folder: PhotoFolder, looked: Sequence[RecordPhotos]) -> list[str]:
    named = {source.path for each in looked for _, source, _, _ in each.photos if source is not None}
    names = folder.unnamed(named)
    return [f"photos in --images that no row names: {len(names):,} (such as {names[0]})"] if names else []


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
