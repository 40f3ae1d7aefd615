"""``python -m fashionclip_tune COMMAND``: prepare, synthesize, pretrain, train, evaluate, probe, doctor.

Sweeps are started by ``sweeps/run_sweep.py``.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fashionclip_tune.assignments import assignments
from fashionclip_tune.doctor_command import add_doctor
from fashionclip_tune.errors import BadDataError, DivergedError, LoaderError, OutOfMemoryError, StoppedError, UserError
from fashionclip_tune.probe_command import add_probe
from fashionclip_tune.progress_bars import phase_bars, progress_bar

_SHOWN_BAD = 20
_SIGTERM_STATUS = 143  # as a shell reports a process that SIGTERM ended


def finite(text: str) -> float:
    """The value of a flag: no NaN, which every comparison lets pass, and nothing infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number expected")
    return value


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists what is allowed)\n")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a mistake of the user into one line on stderr and exit status 2; a run that failed into status 1."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (BadDataError, DivergedError, LoaderError, OutOfMemoryError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except StoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(_SIGTERM_STATUS)
    except KeyboardInterrupt as error:
        print("; ".join(["interrupted", *map(str, error.args)]), file=sys.stderr)
        sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m fashionclip_tune", description="Fine-tune OpenCLIP models on photos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_prepare, _add_synthesize, _add_pretrain, _add_train, _add_evaluate, add_probe, add_doctor):
        add(commands)
    parsed = parser.parse_args(arguments)
    with user_errors():
        parsed.run(parsed)


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="tables and photos to shards",
        description="Tables and photos to shards, with a report on the data. Stopped and started again, it goes on.",
    )
    parser.add_argument(
        "--table",
        dest="tables",
        metavar="FILE",
        type=Path,
        action="append",
        required=True,
        help="CSV or Parquet file, one row a photo or a product, or Fashion-Gen's HDF5 (.h5); may be given again: then "
        "train, valid or test in the names of the files is the split, where no column says it",
    )
    parser.add_argument("--images", type=Path, help="folder of the photos (an .h5 file holds them)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards: new, empty, or of a stopped prepare")
    parser.add_argument(
        "--image-column",
        dest="image_columns",
        action="append",
        default=[],
        metavar="NAME",
        help="may be given again; a cell holds a name, several separated by | or ;, or a glob such as 1163_*.jpg "
        "(default: guessed by its name)",
    )
    parser.add_argument(
        "--caption",
        dest="captions",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help="such as '{title}. {colour} {category}', instead of --caption-column; given several times, the first is "
        "the original caption and the others are further ones, in _aug shards",
    )
    for purpose in ("caption", "id", "category", "split", "group"):
        parser.add_argument(f"--{purpose}-column", metavar="NAME", help="default: guessed by its name")
    parser.add_argument("--valid-share", type=finite, default=0.1, help="where nothing says the split (default: %(default)s)")
    parser.add_argument("--test-share", type=finite, default=0.1, help="likewise (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", type=int, default=288, help="pixels of a photo's short side; smaller ones stay (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="processes that encode photos (default: one for each available core)")
    parser.set_defaults(run=_prepare)


def _prepare(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.prepare import prepare
    from fashionclip_tune.prepare.options import PrepareOptions

    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(parsed).items() if name != "run"
    }
    try:
        with progress_bar("preparing photos") as on_progress:
            report = prepare(PrepareOptions(**given), on_progress=on_progress, on_note=print)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(report)


def _add_synthesize(commands: Any) -> None:
    parser = commands.add_parser("synthesize", help="renders the embedded garments as shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards, new or empty")
    parser.add_argument("--num-products", type=int, default=2_000, help="default: %(default)s")
    parser.add_argument("--views-per-product", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_synthesize)


def _synthesize(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

    if parsed.out.exists() and (not parsed.out.is_dir() or any(parsed.out.iterdir())):
        raise UserError(f"--out {parsed.out} is not an empty folder: choose another")
    recipe = GarmentRecipe(
        num_products=parsed.num_products,
        views_per_product=parsed.views_per_product,
        image_size=parsed.image_size,
        seed=parsed.seed,
    )
    with progress_bar("rendering garments") as on_progress:
        render_dataset(parsed.out, recipe, on_progress=on_progress)
    print(f"{parsed.num_products} products with {parsed.views_per_product} photos each written to {parsed.out}")


def _add_pretrain(commands: Any) -> None:
    parser = commands.add_parser("pretrain", help="makes the weights that the tiny models start from (a sweep does it too)")
    parser.set_defaults(run=_pretrain)


def _pretrain(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.pretraining import pretrain_missing
    from fashionclip_tune.tiny import TINY_MODELS, pretrained_tiny_dir

    pretrain_missing(TINY_MODELS, print)
    for name in TINY_MODELS:
        print(f"{name}: {pretrained_tiny_dir(name)}")


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="one run")
    parser.add_argument("--data", required=True, help="folder of shards, or its URL")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="a setting, such as clip_model=ViT-B-16"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add_reading_flags(parser)
    parser.set_defaults(run=_train)


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """How shards are reached; the same for one run and for a sweep."""
    parser.add_argument(
        "--allow-remote", action="store_true", default=None, help="read https://, s3://, gs:// and pipe: (runs commands)"
    )
    parser.add_argument("--scratch", metavar="DIR", help="copy shards to this fast local folder ahead of use")
    parser.add_argument("--scratch-gb", type=finite, metavar="G", help="for all copies together (default: 20)")


def _reading_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    flags = {name: getattr(parsed, name) for name in ("allow_remote", "scratch", "scratch_gb")}
    return {f"reading.{name}": value for name, value in flags.items() if value is not None}


def _train(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.config import ProjectConfig
    from fashionclip_tune.evaluate import counted_as, gain
    from fashionclip_tune.index import count_kinds
    from fashionclip_tune.run import starting_point
    from fashionclip_tune.starts import loading_call
    from fashionclip_tune.training import print_row, train

    config = ProjectConfig(dataset_root=parsed.data).with_overrides({**assignments(parsed.set), **_reading_settings(parsed)})
    try:
        with phase_bars() as on_phase:
            resume_from = parsed.out if parsed.resume else None
            result = train(config, parsed.out, on_eval=print_row, resume_from=resume_from, on_phase=on_phase)
    except StoppedError as error:
        raise StoppedError(f"{error}\ngo on with: {_resuming(parsed)}") from error
    if bad := result.bad_samples:
        print(f"{len(bad)} samples could not be read ({count_kinds(bad)}); all are in {parsed.out / 'bad_samples.csv'}")
        for sample in bad[:_SHOWN_BAD]:
            print(f"  {sample}")
    untouched, last = (row["recall_at_10"] for row in (result.history[0], result.metrics))
    print(f"recall_at_10 {last:.4f}: {counted_as(result.metrics)}; untouched {untouched:.4f}, {gain(last, untouched)}")
    if last < untouched:
        start = starting_point(config)
        call = loading_call(start.model_name, start.model.pretrained)
        print("the trained weights are below zero-shot: use the untouched ones" + (f", {call}" if call else ""))
    print(f"weights: {result.checkpoint}")


def _resuming(parsed: argparse.Namespace) -> str:
    """The command that goes on with a run."""
    command = ["train", "--data", str(parsed.data), "--out", str(parsed.out), "--resume"]
    for text in parsed.set:
        command += ["--set", text]
    if parsed.allow_remote:
        command.append("--allow-remote")
    if parsed.scratch is not None:
        command += ["--scratch", parsed.scratch]
    if parsed.scratch_gb is not None:
        command += ["--scratch-gb", str(parsed.scratch_gb)]
    return f"python -m fashionclip_tune {shlex.join(command)}"


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="retrieval figures of a model on a data set",
        description="Retrieval figures of a model on a data set, by one protocol or several (docs/evaluation.md).",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|CHECKPOINT|DIR",
        help="an OpenCLIP architecture, or the folder of a checkpoint, a run, a sweep (its best) or an OpenCLIP model",
    )
    parser.add_argument("--data", required=True, help="folder of shards, or its URL")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid", help="default: %(default)s")
    parser.add_argument("--use-test-split", action="store_true", help="needed for --split test; who and when is noted")
    parser.add_argument(
        "--protocol",
        dest="protocols",
        action="append",
        choices=("instance", "product", "candidates_101", "all_captions"),
        help="may be given again (default: instance and product)",
    )
    parser.add_argument(
        "--gallery", choices=("split", "all"), default="split", help="all: search among the photos and captions of all splits"
    )
    parser.add_argument("--json", metavar="FILE", help="writes the figures as JSON, too; -: prints them, and no table")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="a setting, such as device=cpu")
    add_reading_flags(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from fashionclip_tune.config import ProjectConfig, Protocol
    from fashionclip_tune.evaluate_command import EvaluateOptions, run_evaluate
    from fashionclip_tune.files import write_json

    if parsed.json and parsed.json != "-":  # said now, not when all is measured
        written = Path(parsed.json)
        if written.is_dir() or not written.absolute().parent.is_dir():
            raise UserError(f"--json {written} cannot be written: name a file in a folder that exists, or - to print it")
    config = ProjectConfig(dataset_root=parsed.data).with_overrides({**assignments(parsed.set), **_reading_settings(parsed)})
    options = EvaluateOptions(
        model=parsed.model,
        data=config.dataset_dir,
        split=parsed.split,
        use_test_split=parsed.use_test_split,
        protocols=tuple(Protocol(name) for name in dict.fromkeys(parsed.protocols or ("instance", "product"))),
        gallery=parsed.gallery,
        config=config,
    )
    with phase_bars() as on_phase:
        report = run_evaluate(options, on_phase)
    if parsed.json == "-":
        print(json.dumps(report.as_json(), indent=2))
        return
    if parsed.json:
        write_json(Path(parsed.json), report.as_json())
    console = Console()
    console.print(report.table())
    for line in report.lines():
        console.print(line, highlight=False, soft_wrap=True, markup=False)
