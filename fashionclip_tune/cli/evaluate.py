"""``evaluate``: a model's figures on a data set."""

import argparse
from pathlib import Path
from typing import Any

from fashionclip_tune.cli.flags import add_reading_flags, reading_settings
from fashionclip_tune.config.choices import RetrievalProtocol
from fashionclip_tune.config.section import assignments
from fashionclip_tune.errors import UserError
from fashionclip_tune.progress import phase_bars


def add_evaluate(commands: Any) -> None:
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
    parser.add_argument("--data", required=True, metavar="DIR|URL", help="folder of shards, or its URL")
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="valid", help="which photos (default: %(default)s)"
    )
    parser.add_argument("--use-test-split", action="store_true", help="needed for --split test; who used it and when is noted")
    parser.add_argument(
        "--protocol",
        dest="protocols",
        action="append",
        choices=[protocol.value for protocol in RetrievalProtocol],
        help="how recall is counted; may be given again (default: instance and product)",
    )
    parser.add_argument(
        "--gallery",
        choices=("split", "all"),
        default="split",
        help="what is searched: the photos and captions of the split, or those of all splits (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="writes the figures as JSON, too; -: prints them, and no table")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="a setting, such as device=cpu: docs/settings.md"
    )
    add_reading_flags(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from fashionclip_tune.config.choices import RetrievalProtocol as Protocol
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.evaluation.evaluate_model import EvaluateOptions, run_evaluate
    from fashionclip_tune.files import write_json

    if parsed.json and parsed.json != "-":  # said now, not when all is measured
        written = Path(parsed.json)
        if written.is_dir() or not written.absolute().parent.is_dir():
            raise UserError(f"--json {written} cannot be written: name a file in a folder that exists, or - to print it")
    config = ProjectConfig(dataset_root=parsed.data).with_overrides({**assignments(parsed.set), **reading_settings(parsed)})
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
