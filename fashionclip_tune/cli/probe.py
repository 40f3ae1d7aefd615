"""``python -m fashionclip_tune probe``: memory of a step on this card, its speed, and whether two at a time are a gain."""

import argparse
from typing import Any


def add_probe(commands: Any) -> None:
    parser = commands.add_parser(
        "probe",
        help="how much memory a step needs on this GPU, and how fast it is",
        description="Measures the largest micro-batch that fits this GPU, and one trial against two side by side, once; "
        "sweeps go by it. Weights are random, nothing is downloaded. Without a GPU, prints estimates of memory.",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="a setting, as for train: docs/settings.md"
    )
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.config.section import assignments
    from fashionclip_tune.profiling.probe import probe, report_lines
    from fashionclip_tune.profiling.throughput import known_pace, measure_pace

    config = ProjectConfig().with_overrides(assignments(parsed.set))
    report = probe(config)
    for line in report_lines(report):
        print(line)
    if report.best is None:
        return
    # At the micro-batch that a trial of a sweep would run with.
    config = config.with_overrides({"training.micro_batch_size": report.best.micro_batch_size})
    pace = known_pace(config) or measure_pace(config)
    print(f"speed       {pace.alone:,.0f} examples/s")
    if pace.packing_gain is None:
        print("two trials side by side do not fit")
    else:
        print(f"two trials side by side: {pace.packing_gain:+.0%} trials an hour against one after the other")
