"""``--refit N``: the winner's setting, trained from its first weights with N times the examples.

A cosine schedule that has ended cannot be continued, so this is a run of its own; what it can be compared with is the trial.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fashionclip_tune.checkpoint import newest_weights
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluate import gain
from fashionclip_tune.history import Row
from fashionclip_tune.model import load_model
from fashionclip_tune.training import print_row, train
from fashionclip_tune.tuning.engine import DurablePlan
from fashionclip_tune.tuning.plan import SweepPlan
from fashionclip_tune.tuning.trainable import RunSync
from fashionclip_tune.tuning.winner import export_whole


def refuse_refit(saved: Mapping[str, Any], times: int) -> None:
    """Raises UserError where the sweep has no winner or is unfinished, or ``times`` is below 1."""
    if times < 1:
        raise UserError(f"--refit {times} is not allowed: at least 1")
    if saved["state"] != "FINISHED" or saved["best"] is None:
        raise UserError(f"sweep {saved['name']} has no winner yet: --refit wants a finished sweep (finish it with --resume)")


def refit_winner(
    plan: SweepPlan,
    saved: Mapping[str, Any],
    sweep_dir: Path,
    times: int,
    say: Callable[[str], None],
    durable: DurablePlan | None = None,
) -> dict[str, Any]:
    """Trains in ``SWEEP/refit/``, goes on there if it was stopped, and leaves ``refit/best/`` as an OpenCLIP folder.

    ``durable``: where its state and its figures are kept as well, as those of a trial.

    Returns:
        The row of its last evaluation.
    """
    best = saved["best"]
    examples = plan.base.training.budget_examples
    assert examples is not None
    config = plan.build(best["config"]).with_overrides({"training.budget_examples": times * examples})
    folder = sweep_dir / "refit"
    say(f"refit:    trial {best['trial_id']}, {config.model_name}, {times * examples:,} examples, in {folder}")
    sync = RunSync(durable, config, folder, "refit") if durable is not None else None
    if sync is not None:
        sync.run.fetch_state(folder)

    def report(row: Row) -> None:
        print_row(row)
        if sync is not None:
            sync.keep(row)

    result = train(config, folder, on_eval=report, resume_from=folder, durable=sync.run if sync is not None else None)
    weights = newest_weights(folder)
    assert weights is not None
    loaded = load_model(config)
    loaded.network.load_state_dict(load_file(weights))
    export_whole(loaded, folder / "best")
    recall, before = result.metrics["recall_at_10"], best["metrics"]["recall_at_10"]
    say(f"refit: recall_at_10 {recall:.4f}; trial {best['trial_id']} {before:.4f}; {gain(recall, before)}")
    say(f'      load it: open_clip.create_model_and_transforms("local-dir:{folder / "best"}")')
    if sync is not None:
        sync.run.forget_state()
    return dict(result.metrics)
