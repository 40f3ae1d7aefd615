"""``python -m fashionclip_tune evaluate``: a model's figures on a data set, beside those of its zero-shot weights."""

import getpass
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

from fashionclip_tune.config.choices import RetrievalProtocol
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index, dataset_shards, storage_of
from fashionclip_tune.data.index import BadSample, gaps_in_captions
from fashionclip_tune.data.shard_cache import copy_first
from fashionclip_tune.data.shards import DatasetShards, Shard
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.dataset import EvaluationSet, evaluation_set
from fashionclip_tune.evaluation.encode import embed
from fashionclip_tune.evaluation.evaluate import Metrics, cached_zero_shot, coverage_line, describe, gain, relative_gain
from fashionclip_tune.evaluation.protocols import KS, Candidates, Retrieval, compare
from fashionclip_tune.evaluation.statistics import PairedTest
from fashionclip_tune.files import cache_dir
from fashionclip_tune.models.named_model import named_model, starting_point, use_zero_shot
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.progress import OnPhase

_USES_NAME = "test_split_uses.jsonl"
_DIRECTIONS = {"text to image": "text_to_image", "image to text": "image_to_text"}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is measured, as the command's flags say."""

    model: str
    """An OpenCLIP architecture, or the folder of a checkpoint, a run, a sweep or an OpenCLIP model."""
    data: Path | str
    split: str = "valid"
    use_test_split: bool = False
    protocols: tuple[RetrievalProtocol, ...] = (RetrievalProtocol.INSTANCE, RetrievalProtocol.PRODUCT)
    gallery: str = "split"
    """``all``: the split's photos and captions are searched among those of all splits, as in a shop."""
    config: ProjectConfig = field(default_factory=ProjectConfig)
    """Device, precision and inner batch; architecture and weights, where ``model`` names an architecture."""


@dataclass(frozen=True)
class Report:
    """``figures`` and ``zero_shot`` (None: not known what the model started from) have a dict of metrics a protocol.

    ``tests``, of the gain over ``zero_shot``: None where not the same photos could be read.
    """

    about: dict[str, Any]
    figures: list[Metrics]
    zero_shot: list[Metrics] | None
    tests: list[PairedTest | None]
    notes: list[str]
    bad_samples: tuple[BadSample, ...]
    use_zero_shot: str = ""
    """To be said where it is below zero-shot."""

    def as_json(self) -> dict[str, Any]:
        bad = [str(sample) for sample in self.bad_samples]
        figures = {"figures": self.figures, "untouched": self.zero_shot, "gains": self._gains()}
        return {**self.about, **figures, "notes": self.notes, "not_readable": bad}

    def _gains(self) -> list[dict[str, Any]] | None:
        """Of recall_at_10 over the zero-shot weights, a protocol each."""
        if self.zero_shot is None:
            return None
        gains = []
        for metrics, before, test in zip(self.figures, self.zero_shot, self.tests, strict=True):
            recall, base = metrics["recall_at_10"], before["recall_at_10"]
            certainty = {"low": test.low, "high": test.high, "p_value": test.p_value} if test else {}
            gains.append({"absolute": recall - base, "relative": relative_gain(recall, base), **certainty})
        return gains

    def table(self) -> Table:
        title = escape(f"{self.about['model']} on {self.about['split']}, {self.about['data']}")
        table = Table(title=title, caption="R@k: Recall@k", caption_justify="left", box=None, pad_edge=False)
        for header in ("protocol", "direction"):
            table.add_column(header, no_wrap=True)
        for header in (*(f"R@{k}" for k in KS), "median\nrank", "queries", "gallery"):
            table.add_column(header, justify="right", no_wrap=True)
        for metrics in self.figures:
            for (title, name), queries, gallery in zip(
                _DIRECTIONS.items(), ("text", "image"), ("images", "texts"), strict=True
            ):
                recalls = [f"{metrics[f'recall_at_{k}_{name}']:.4f}" for k in KS]
                rank, asked = f"{metrics[f'median_rank_{name}']:g}", f"{metrics[f'num_{queries}_queries']:,}"
                table.add_row(metrics["protocol"], title, *recalls, rank, asked, f"{metrics[f'num_gallery_{gallery}']:,}")
        return table

    def lines(self) -> Iterator[str]:
        """What stands below the table."""
        for number, metrics in enumerate(self.figures):
            recall, low, high = (metrics[f"recall_at_10{end}"] for end in ("", "_low", "_high"))
            line = f"{metrics['protocol']}: recall_at_10 {recall:.4f}, 95 % interval {low:.4f} to {high:.4f}"
            line += f" ({metrics['num_products']:,} products)"
            if self.zero_shot is not None:
                base = self.zero_shot[number]["recall_at_10"]
                line += f"; zero-shot {base:.4f}, {gain(recall, base)}"
                if (test := self.tests[number]) is not None:
                    line += f", {'a tie' if test.is_tie else 'more than chance'} (p {test.p_value:.4f})"
            yield line
            if self.zero_shot is not None and recall < self.zero_shot[number]["recall_at_10"]:
                yield f"{metrics['protocol']}: {self.use_zero_shot}"
            if (asked := coverage_line(metrics)) is not None:
                yield asked
        yield from self.notes
        yield from (f"not readable: {sample}" for sample in self.bad_samples)


def run_evaluate(options: EvaluateOptions, on_phase: OnPhase) -> Report:
    """Measures a model under each protocol, and the weights that it started from, where they are known.

    Raises:
        UserError: no such model or split, the test split without leave, or protocols none of which the data can serve.
        BadDataError: too many photos cannot be read; the message names files and keys.
    """
    config = options.config
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    plan = plan_precision(config)
    shards = _shards_of(options, dataset_shards(replace(config, dataset_root=options.data)))
    storage = storage_of(config)
    named = named_model(options.model, config)
    named.loaded.network.to(plan.device)
    index = cached_index(shards.searched_for + shards.searched_too, storage, on_progress=partial(on_phase, "indexing shards"))
    copy_first(storage, zip(index.shards, index.contents, strict=True), partial(on_phase, "copying shards"))
    photos = evaluation_set(shards.searched_for, named.loaded.preprocessing, storage, gallery=shards.searched_too)
    all_captions = RetrievalProtocol.ALL_CAPTIONS in options.protocols
    not_measured: dict[str, str] = {}
    protocols = [protocol for protocol in options.protocols if _can_be_measured(protocol, photos, not_measured)]
    if not protocols:  # said now, not when all is encoded
        raise UserError("; ".join(not_measured.values()))
    notes = _note_test_use(options, photos) if options.split == "test" else []
    notes += [gaps] if (gaps := gaps_in_captions(index)) is not None else []
    settings: dict[str, Any] = {
        "batch_size": config.evaluation.batch_size,
        "plan": plan,
        "max_bad_share": config.training.max_bad_share,
    }
    encoding = partial(on_phase, "encoding photos")
    pool, bad, _ = embed(named.loaded, photos, all_captions=all_captions, **settings, on_progress=encoding)
    found = list[tuple[Metrics, Retrieval]]()
    for protocol in protocols:
        try:
            found.append(describe(pool, protocol))
        except UserError as error:  # photos that could not be read are missing
            not_measured[protocol.value] = str(error)
    if not found:
        raise UserError("; ".join(not_measured.values()))
    protocols = [retrieval.protocol for _, retrieval in found]
    notes += [f"{name}: not measured: {reason}" for name, reason in not_measured.items()]
    zero_shot, tests, advice = None, list[PairedTest | None](), ""
    if named.started_from is not None:
        try:
            start = starting_point(named.started_from)
            advice = use_zero_shot(start.model_name, start.model.pretrained)
            base = load_model(start)
            base.network.to(plan.device)
            same_photos = evaluation_set(shards.searched_for, base.preprocessing, storage, gallery=shards.searched_too)
            encoding_before = partial(on_phase, "encoding photos with the zero-shot weights")
            before = [
                cached_zero_shot(base, same_photos, protocol=protocol, **settings, on_progress=encoding_before)
                for protocol in protocols
            ]
            zero_shot = [evaluation.metrics for evaluation in before]
            tests = [compare(ours, theirs.retrieval) for (_, ours), theirs in zip(found, before, strict=True)]
        except UserError as error:
            notes.append(f"no figures of the zero-shot weights: {error}")
    about = {
        "model": options.model,
        "architecture": named.loaded.name,
        "data": str(options.data),
        "data_fingerprint": photos.fingerprint,
        "split": options.split,
        "gallery": options.gallery,
        "precision": str(plan.autocast_dtype or "fp32"),
        "not_measured": not_measured,
    }
    return Report(about, [metrics for metrics, _ in found], zero_shot, tests, notes, bad, advice)


def _can_be_measured(protocol: RetrievalProtocol, photos: EvaluationSet, reasons: dict[str, str]) -> bool:
    """Whether the data can serve a protocol; else why not is added to ``reasons``."""
    if protocol is RetrievalProtocol.CANDIDATES_101:
        try:
            Candidates(photos.products_N, photos.categories_N, torch.arange(len(photos)) < photos.num_query_photos)
        except UserError as error:
            reasons[protocol.value] = str(error)
            return False
    return True


class _Shards(NamedTuple):
    searched_for: tuple[Shard, ...]
    searched_too: tuple[Shard, ...]


def _shards_of(options: EvaluateOptions, found: DatasetShards) -> _Shards:
    splits = {"train": found.train, "valid": found.valid, "test": found.test}
    if not splits[options.split]:
        with_shards = ", ".join(name for name, shards in splits.items() if shards)
        raise UserError(f"--split {options.split}: {options.data} has no such shards, only {with_shards}")
    if options.split == "test" and not options.use_test_split:
        raise UserError(
            "--split test is for the end, once, with the settings chosen before: add --use-test-split to use it; a note of "
            "who did and when is kept beside the data"
        )
    others = [shard for name, shards in splits.items() if name != options.split for shard in shards]
    return _Shards(splits[options.split], tuple(others) if options.gallery == "all" else ())


def _note_test_use(options: EvaluateOptions, photos: EvaluationSet) -> list[str]:
    """Adds a line to the data set's list, before anything is measured, and says what stood there."""
    use = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "user": _user(),
        "host": platform.node(),
        "model": options.model,
        "protocols": [protocol.value for protocol in options.protocols],
        "gallery": options.gallery,
    }
    # Beside the data, where everyone who has it sees it; where that cannot be written, on this machine.
    in_cache = cache_dir() / "test_split_uses" / f"{photos.reader.index.fingerprint}.jsonl"
    beside = options.data / _USES_NAME if isinstance(options.data, Path) else in_cache
    places = dict.fromkeys([beside, in_cache])
    earlier = [line for place in places if place.is_file() for line in place.read_text().splitlines()]
    try:
        _append(beside, use)
    except OSError:
        in_cache.parent.mkdir(parents=True, exist_ok=True)
        _append(in_cache, use)
    if not earlier:
        return ["the test split was used for the first time, as far as is noted"]
    last = json.loads(earlier[-1])
    times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
    return [f"the test split was used {times} before, last by {last['user']} at {last['time']}: {last['model']}"]


def _append(path: Path, use: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(use) + "\n")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
