"""``train``: one run."""

import argparse
from pathlib import Path
from typing import Any

from fashionclip_tune.cli.flags import add_reading_flags, reading_settings
from fashionclip_tune.config.project import override_paths
from fashionclip_tune.config.section import assignments
from fashionclip_tune.errors import StoppedError, command
from fashionclip_tune.progress import phase_bars

_SHOWN_BAD = 20


def add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="one run",
        description="One run: fine-tunes a model, with an evaluation before the first step and after each stage. SIGTERM ends "
        "it with a checkpoint at the next step, status 143 and the command that goes on.",
        epilog=f"Settings, which docs/settings.md explains: {', '.join(override_paths())}",
    )
    parser.add_argument("--data", required=True, metavar="DIR|URL", help="folder of shards, or its URL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a setting, such as clip_model=ViT-B-16; may be given again",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add_reading_flags(parser)
    parser.set_defaults(run=_train)


def _train(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.data.index import count_kinds
    from fashionclip_tune.training.callbacks import RunCallbacks
    from fashionclip_tune.training.train import outcome_lines, print_row, run_training

    config = ProjectConfig(dataset_root=parsed.data).with_overrides({**assignments(parsed.set), **reading_settings(parsed)})
    try:
        with phase_bars() as on_phase:
            callbacks = RunCallbacks(on_evaluation=print_row, on_progress=on_phase)
            result = run_training(config, parsed.out, callbacks, resume_from=parsed.out if parsed.resume else None)
    except StoppedError as error:
        raise StoppedError(f"{error}\ngo on with: {_resuming(parsed)}") from error
    if bad := result.bad_samples:
        print(f"{len(bad)} samples could not be read ({count_kinds(bad)}); all are in {parsed.out / 'bad_samples.csv'}")
        for sample in bad[:_SHOWN_BAD]:
            print(f"  {sample}")
    print("\n".join(outcome_lines(config, result)))
    print(f"weights: {result.checkpoint}")


def _resuming(parsed: argparse.Namespace) -> str:
    """The command that goes on with a run."""
    words: list[object] = ["train", "--data", parsed.data, "--out", parsed.out, "--resume"]
    for text in parsed.set:
        words += ["--set", text]
    if parsed.allow_remote:
        words.append("--allow-remote")
    if parsed.scratch is not None:
        words += ["--scratch", parsed.scratch]
    if parsed.scratch_gb is not None:
        words += ["--scratch-gb", parsed.scratch_gb]
    return command(*words)
