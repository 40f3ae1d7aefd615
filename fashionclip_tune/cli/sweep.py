"""``sweep``: a search over models, losses, learning rates and augmentation."""

import argparse
import sys
from typing import Any

from fashionclip_tune.cli.doctor import refuse_problems
from fashionclip_tune.cli.flags import add_reading_flags, finite
from fashionclip_tune.config.section import assignments


def add_sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="a search over models, losses, learning rates and augmentation",
        description="Searches over models, losses, learning rates and augmentation; without arguments, on embedded synthetic "
        "garments.",
        epilog="A finished sweep is extended by a new one with --warm-start and its folder. Data, space, budget and metric "
        "must be the same. The new sweep's own trials alone are counted, ranked and exported. Ctrl-C once, or SIGTERM, stops "
        "each trial at its next step with a checkpoint (one that is being evaluated finishes that first) and prints the "
        "command that goes on. Exit status: 0 done, or out of --time-budget; 1 no trial has a result; 2 something given "
        "is wrong, or the machine cannot run it; 130 interrupted.",
    )
    add = parser.add_argument
    add("--data", metavar="DIR|URL", help="folder of shards, or its URL (default: synthetic garments)")
    add(
        "--space",
        metavar="NAME|FILE",
        help="tiny, openclip, fashion, published, or a Python file like those in fashionclip_tune/spaces/: docs/spaces.md "
        "(default: openclip on a GPU, else tiny)",
    )
    add("--name", metavar="NAME", help="the sweep's folder in --results (default: the next free one, sweep-001 and so on)")
    add("--results", default="results", metavar="DIR", help="folder of all sweeps, or s3://... (default: %(default)s)")
    add(
        "--num-trials",
        type=int,
        metavar="N",
        help="trials in all (default: 16; of a space that is nothing but its points, their number)",
    )
    add(
        "--max-concurrent",
        type=int,
        metavar="N",
        help="trials side by side (default: a core each, a third of the trials at most; on GPUs what fits)",
    )
    add("--seed", type=int, metavar="N", help="of the search and of each trial (default: 0)")
    add(
        "--budget-examples",
        type=int,
        metavar="N",
        help="examples that a trial trains on: photos, repetitions counted (default: the space's epochs)",
    )
    add(
        "--scheduler",
        metavar="NAME",
        help="which trials go on: asha, where they wait at rungs and a model decides; asha-stopping, where they end at rungs; "
        "median, judged at every stage by the median stopping rule; none (default: asha)",
    )
    add(
        "--metric",
        metavar="NAME",
        help="what is maximised: recall_at_1, recall_at_5 or recall_at_10, means of both directions, or one direction alone, "
        "such as recall_at_1_text_to_image or recall_at_10_image_to_text; by which protocol: --set evaluation.protocol=NAME "
        "(default: recall_at_10)",
    )
    add(
        "--grace-examples",
        type=int,
        metavar="N",
        help="examples of a stage, which ends with an evaluation, a checkpoint and a report, and of rung 1 (default: a ninth "
        "of the budget)",
    )
    add("--reduction-factor", type=int, metavar="N", help="one trial in N goes on at a rung (default: 3)")
    add(
        "--keep-paused",
        type=int,
        metavar="N",
        help="trials of each start that may wait at rungs with their state on disk, the best predicted ones (default: 3, fewer "
        "where --disk-budget-gb leaves no room)",
    )
    add(
        "--min-trials-per-model",
        type=int,
        metavar="N",
        help="with other schedulers than asha: trials of each model, in turns of like cost, before the search chooses among "
        "models; 0: none (default: 6, half of the trials at most)",
    )
    add("--warm-start", metavar="DIR", help="an older sweep's folder, or s3://...: its ended trials inform this one")
    add(
        "--gpus-per-trial",
        type=finite,
        metavar="F",
        help="share of a GPU, at most 1; a model of which one photo does not fit it is refused (default: by the memory that a "
        "trial needs)",
    )
    add(
        "--gpu-memory-gb",
        type=finite,
        metavar="G",
        help="of a card, at most; a dry run plans for such a card, here or not, beside this machine's cores and memory "
        "(default: what it has)",
    )
    add("--preset", metavar="NAME", help="quick, evening or night: trials and rungs for a T4, where no flag says them")
    add(
        "--time-budget",
        type=finite,
        metavar="MIN",
        help="of this run: ten minutes before its end (a sixth of it where that is less) all is kept, and the command that "
        "goes on is printed (default: none)",
    )
    add(
        "--samples-per-second",
        type=finite,
        metavar="N",
        help="a trial's training rate, for the plan's hours (default: measured or estimated)",
    )
    add("--device", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="fix a setting for all trials, whatever the space says, e.g. training.epochs=2; may be given again: "
        "docs/settings.md",
    )
    add_reading_flags(parser)
    add(
        "--sync-every",
        type=finite,
        metavar="MIN",
        help="with --scratch: what a lost machine costs at most (default: 15)",
    )
    add(
        "--disk-budget-gb",
        type=finite,
        metavar="G",
        help="of the sweep's folder in --results: as many trials at a time as fit it together, and nothing large is written "
        "that would pass it (default: no limit)",
    )
    add(
        "--address",
        metavar="ADDR",
        help="of a running Ray cluster, or auto: docs/machines.md (default: local, this machine alone)",
    )
    add(
        "--refit",
        type=int,
        metavar="N",
        help="train the named finished sweep's winner anew with N times the examples; it is in the sweep's refit/best/",
    )
    add("--dry-run", action="store_true", help="print the plan and start nothing")
    add(
        "--resume",
        action="store_true",
        help="go on with the named sweep, or the latest unfinished one; with nothing to resume, start; a changed setting, "
        "space or data set is refused with the difference",
    )
    parser.set_defaults(run=_sweep)


def _sweep(parsed: argparse.Namespace) -> None:
    arguments = {name: value for name, value in vars(parsed).items() if name != "run"}
    own = {name: arguments.pop(name) for name in ("name", "results", "dry_run", "resume", "refit")}

    from rich.console import Console

    from fashionclip_tune.tuning.planning.settings import SweepSettings
    from fashionclip_tune.tuning.sweep import sweep

    elsewhere = own["dry_run"] and arguments["gpu_memory_gb"] is not None
    if arguments["address"] in (None, "local") and not elsewhere:
        refuse_problems(own["results"], arguments["scratch"], arguments["device"])
    settings = SweepSettings(overrides=assignments(arguments.pop("set")), **arguments)
    result = sweep(settings, **own, console=Console())
    sys.exit(0 if result is None else _status(result))


def _status(result: dict[str, Any]) -> int:
    """0: done, or out of time as was asked; 1: no trial has a result; 130: interrupted."""
    if "time_is_up" in result:
        return 0
    return 130 if result["state"] == "INTERRUPTED" else 0 if result["best"] else 1
