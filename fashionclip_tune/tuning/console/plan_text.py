"""A sweep's plan as people read it: the first lines of a run, and all of a dry run."""

from collections.abc import Sequence

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import command
from fashionclip_tune.machine.hardware import this_machine
from fashionclip_tune.reporting.sweep_files import loss_label
from fashionclip_tune.tuning.planning.disk import decoded_bytes
from fashionclip_tune.tuning.planning.forecast import ModelPace
from fashionclip_tune.tuning.planning.gpu_memory import GB
from fashionclip_tune.tuning.planning.plan import SweepPlan

_LABEL_WIDTH = 10


def plan_lines(plan: SweepPlan) -> list[str]:
    """One line a subject, some with continuations."""
    budget, stage = plan.budget_examples, plan.stage_examples
    lines = [
        f"space:    {plan.space.name}: {'; '.join(plan.check.parameters)} (100 draws are valid configurations)",
        *_labelled("starts:", [facts.line() for facts in plan.starts.values()]),
        *_labelled("note:", [f"{facts.label}: {note}" for facts in plan.starts.values() for note in facts.notes]),
        f"losses:   {', '.join(map(loss_label, plan.check.losses))}"
        + (f"; at least {plan.quota.min_trials} trials for each start, in turns of like cost" if plan.quota else ""),
        f"data:     {plan.base.dataset_dir}: {plan.num_shards} shards, {plan.num_train:,} photos to train on,"
        f" {plan.num_valid:,} to evaluate on",
        f"trials:   {plan.num_trials}, at most {plan.slots.count} side by side, on {plan.base.device}",
        *_machine_lines(plan),
        *_share_lines(plan),
        *_memory_lines(plan),
        _disk_line(plan),
        f"budget:   {budget:,} examples a trial ({budget / plan.num_train:.1f} epochs), evaluated every {stage:,}"
        + (f" ({plan.preset_note})" if plan.preset_note else ""),
        f"stopping: {plan.rule}",
        f"metric:   {plan.settings.maximised.name}, protocol {plan.base.evaluation.protocol.value}",
        *_time_lines(plan),
    ]
    lines += [f"cut:      {cut}" for cut in plan.allotment.cuts]
    memory = "" if plan.gpu is None else "; where memory runs out, the micro-batch is halved"
    last = f"the last of the {plan.num_trials} trials are cut first: --num-trials N, or --time-budget MIN and --resume"
    return [*lines, f"tight?    {last}{memory}"]


def _machine_lines(plan: SweepPlan) -> list[str]:
    """What is taken for granted where the plan is for a card that is not here."""
    if plan.gpu is None or plan.gpu.card.is_here:
        return []
    machine, gigabytes = plan.allotment.machine, plan.gpu.card.memory_bytes / GB
    whose = "as this machine has" if machine == this_machine() else "as stated"
    host = f"{machine.cores} cores and {machine.memory_bytes / GB:.1f} GB of host memory, {whose}"
    return [f"machine:  a card of {gigabytes:.1f} GB, which is not here, beside {host}"]


def _share_lines(plan: SweepPlan) -> list[str]:
    """What each model gets of the machine; a line for each share, where that depends on what is drawn."""
    kinds: dict[str, dict[int, list[ProjectConfig]]] = {}
    for config in plan.check.configs:
        kinds.setdefault(config.model_name, {}).setdefault(plan.allotment.at_a_time(config), []).append(config)
    return _labelled(
        "shares:", [_share_line(plan, by_count[count]) for by_count in kinds.values() for count in sorted(by_count)]
    )


def _share_line(plan: SweepPlan, configs: Sequence[ProjectConfig]) -> str:
    """Of configurations of one model with the same share."""
    fitted, frozen = plan.allotment.fitted(configs[0]), [config.freeze.token_embedding for config in configs]
    share = plan.allotment.share_of(fitted)
    text = f"{plan.starts[fitted.model_name].label}: {share.cpus:g} CPU, {fitted.training.num_workers} loader processes"
    if share.gpus:
        text += f", {share.gpus:.2f} GPU, {plan.allotment.at_a_time(fitted)} side by side"
    if plan.gpu is not None:
        needs = [plan.gpu.need(config) for config in configs]
        memory = _range([f"{bytes_ / GB:.1f}" for bytes_ in sorted(need.memory_bytes for need in needs)])
        sources = " or ".join(sorted({need.source for need in needs}))
        text += f": {memory} of {plan.gpu.card.memory_bytes / GB:.1f} GB ({sources})"
        sizes = {(config.training.batch_size, need.micro_batch_size) for need, config in zip(needs, configs, strict=True)}
        if cut := [f"{micro} of {batch}" for batch, micro in sorted(sizes) if micro < batch]:
            text += f" at micro-batch {', '.join(cut)}"
        if (gain := plan.gpu.packing_gain(configs[0])) is not None:
            text += f"; two side by side: {gain:+.0%} (measured)"
    if all(frozen) and not plan.base.freeze.token_embedding:
        text += "; token embedding frozen (a card below 20 GB; --set freeze.token_embedding=false trains it)"
    return text


def _range(ascending: Sequence[str]) -> str:
    return ascending[0] if ascending[0] == ascending[-1] else f"{ascending[0]} to {ascending[-1]}"


def _memory_lines(plan: SweepPlan) -> list[str]:
    kinds = list({kind.count: kind for kind in plan.allotment.groups.values()}.values())
    if plan.allotment.host_bytes is None:
        return []
    each = list[str]()
    for kind in kinds:
        labels = " or ".join(plan.starts[model].label for model in kind.models)
        each.append(f"{kind.count} x {(kind.host.trial_bytes + kind.host.worker_bytes) / GB:.1f} of {labels}")
    parts = f"{kinds[0].host.shared_bytes / GB:.1f} for all, beside it {', or '.join(each)}"
    there = plan.allotment.machine.memory_bytes / GB
    return [f"host RAM: at most {plan.allotment.host_bytes / GB:.1f} of {there:.1f} GB ({parts}; estimate)"]


def _disk_line(plan: SweepPlan) -> str:
    local, durable = plan.disk.local_bytes(plan.at_a_time) / GB, plan.disk.durable_bytes(plan.at_a_time) / GB
    copies = plan.base.reading.scratch_gb
    decoded = f"{decoded_bytes(plan.starts.values(), plan.num_valid, copies) / GB:.1f} GB of decoded photos"
    if plan.settings.scratch is None:
        return (
            f"disk:     at most {local:.1f} GB in the results (with --scratch: {durable:.1f} GB there), {decoded} in the cache"
        )
    return (
        f"disk:     at most {durable:.1f} GB in the results, {local:.1f} GB, {copies:g} GB of shards and {decoded} in scratch"
    )


def _time_lines(plan: SweepPlan) -> list[str]:
    forecast = plan.forecast
    trained = f"{forecast.examples / 1e6:.2f} million" if forecast.examples >= 1e6 else f"{forecast.examples:,.0f}"
    lines = [f"examples: about {trained} trained on in all, {forecast.trials_to_budget:.0f} trials to their budget"]
    if forecast.hours is None:
        known_by = f"`{command('probe')}` measures it, --samples-per-second states it"
        return [*lines, f"time:     not known before the first stages: no rate is known here ({known_by})"]
    low, middle, high = (_duration(forecast.hours * (1 + part * forecast.error)) for part in (-1, 0, 1))
    lines.append(f"time:     {middle} ({low} to {high})")
    return [
        *lines,
        *_labelled(
            "rates:", [_rate_line(plan.starts[model].label, paces) for model, paces in plan.course.paces_of_models().items()]
        ),
    ]


def _rate_line(model: str, paces: Sequence[ModelPace]) -> str:
    rates = _range([f"{rate:,.{0 if rate >= 10 else 1}f}" for rate in sorted({pace.samples_per_second for pace in paces})])
    return f"{model}: {rates} examples/s a trial ({' or '.join(dict.fromkeys(pace.source for pace in paces))})"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 30 else f"{3600 * hours:.0f} s"


def _labelled(label: str, lines: list[str]) -> list[str]:
    return [f"{label if number == 0 else '':<{_LABEL_WIDTH}}{line}" for number, line in enumerate(lines)]
