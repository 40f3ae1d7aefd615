"""The replay of sweeps: its clock on curves that can be counted by hand, its arms, its worlds, its figures."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.search import search, worlds
from benchmarks.search.replay import PausingSearch, StockSearch, random_level, replay, trial_seconds
from benchmarks.search.worlds import FAMILIES, SHARES, STAGES, World, family

NONE = np.zeros(STAGES)


def plain_space(trial: Any) -> None:
    trial.suggest_float("end", 0.0, 1.0)


def plain(**others: Any) -> World:
    """A trial is worth its setting, times the share of its budget; 18 s each."""
    values: dict[str, Any] = {
        "space": plain_space,
        "points": [{"end": 0.5}],
        "curves": lambda points: np.array([point["end"] * SHARES for point in points]),
        "noise_S": NONE,
        "spread_S": NONE,
        "start": lambda params: "one",
        "stage_seconds": lambda params: NONE + 2.0,
        "cost_of_start": {"one": 18.0},
    }
    return World(**{**values, **others})


class Told:
    """Starts 0.9, 0.3 and 0.6; pauses the second after its first stage, and goes on with it when the first one has ended."""

    def __init__(self) -> None:
        self.waiting = [(0, {"end": 0.9}), (1, {"end": 0.3}), (2, {"end": 0.6}), (1, {"end": 0.3})]
        self.told = list[Any]()

    def ask(self) -> Any:
        return self.waiting.pop(0) if self.waiting else None

    def tell(self, number: int, stage: int, value: float) -> bool:
        self.told.append((number, stage, round(value, 3)))
        return stage < STAGES - 1 and (number, stage) != (1, 0)


def test_the_clock_counts_slots_stages_and_what_thawing_costs() -> None:
    world, arm = plain(), Told()
    found = replay(world, arm, 0, horizon=100)
    assert trial_seconds(world) == 18.0
    # Two slots. The second trial pauses after 2 s, the third takes its slot until 20 s; the first ends at 18 s, and then the
    # second goes on: 0.36 s to thaw, then its eight other stages, to 34.36 s.
    assert len(found.spent) == 3 * STAGES
    assert found.spent[-1] == pytest.approx(34.36 * 2 / 18)
    assert [stage for number, stage, _ in arm.told if number == 1] == list(range(STAGES))
    assert sorted(found.ended) == [0, 1, 2]
    # The winner is who has the highest last report, at any time.
    assert found.winner.tolist() == [0] * len(found.winner)
    assert found.true[0] == pytest.approx(0.1)
    assert found.true[-1] == pytest.approx(0.9)
    assert replay(world, Told(), 0, horizon=1).spent[-1] <= 1


def test_noise_decides_who_wins_but_not_what_that_is_worth_and_is_the_same_for_all_arms() -> None:
    noisy = plain(noise_S=NONE + 0.3)
    runs = [replay(noisy, Told(), seed, horizon=100) for seed in range(20)]
    assert {run.winner[-1] for run in runs} > {0}
    assert {round(run.true[-1], 3) for run in runs} <= {0.9, 0.3, 0.6}
    assert replay(noisy, Told(), 3, horizon=100).winner.tolist() == runs[3].winner.tolist()
    spread = replay(plain(spread_S=SHARES), Told(), 3, horizon=100)
    assert round(spread.true[-1], 3) not in (0.9, 0.3, 0.6)


@pytest.mark.parametrize("arm", search.ARMS)
def test_every_arm_is_driven_and_repeats_itself(arm: str) -> None:
    world = family("mixed", 0)
    first, again = (replay(world, search.ARMS[arm](world, 5), 5, horizon=4) for _ in range(2))
    assert first.params == again.params
    assert first.true.tolist() == again.true.tolist()
    assert all(1e-5 <= params["rate"] <= 1e-3 for params in first.params)
    assert (first.params[: len(world.points)] == world.points) == ("points" in arm or arm == search.OURS)
    whole = len(first.ended) / len(first.params)
    assert whole > 0.5 if arm == "random" else whole < 0.5


def test_a_paused_trial_goes_on_and_three_are_kept_of_each_start() -> None:
    """The first trial is behind at its first rung; once that is known of late starters, it is thawed."""
    world = family("best one starts late", 3)
    arm = PausingSearch(world, 3, world.points)
    found = replay(world, arm, 3, horizon=6)
    waiting = [trial for trial in arm._known.values() if trial.state == "waiting"]
    assert all(sum(trial.start == start for trial in waiting) <= 4 for start in world.cost_of_start)
    assert all(0 < spent <= 6 for spent in found.ended.values())
    assert len(arm.seconds) > len(found.params)
    states = [trial.state for trial in arm._known.values()]
    assert states.count("running") == 2


def test_stock_is_given_the_same_points() -> None:
    world = family("mixed", 0)
    arm = StockSearch(world, 0, world.points)
    assert [arm.ask()[1] for _ in world.points] == world.points


def test_families_are_what_their_names_say() -> None:
    """Correlation of first rung and end over random settings, and where the default rate is."""
    found: dict[str, list[float]] = {kind: [] for kind in FAMILIES}
    off: dict[str, list[float]] = {kind: [] for kind in FAMILIES}
    for kind, seed in itertools.product(FAMILIES, range(12)):
        world, generator = family(kind, seed), np.random.default_rng(seed)
        curves = world.curves([world.draw(generator).params for _ in range(200)])
        assert ((curves >= 0) & (curves <= 1)).all()
        found[kind].append(np.corrcoef(curves[:, 0], curves[:, -1])[0, 1])
        rates = np.geomspace(1e-5, 1e-3, 41)
        ends = world.curves([{**world.points[0], "rate": rate} for rate in rates])[:, -1]
        off[kind].append(abs(np.log10(rates[ends.argmax()]) + 4))
    assert np.mean(found["best one starts late"]) < np.mean(found["mixed"]) < np.mean(found["best one ahead"])
    assert np.mean(off["mixed"]) < 0.35 < 0.5 < np.mean(off["bad default"])
    assert (
        family("mixed", 1).curves(family("mixed", 1).points).tolist()
        != family("mixed", 2).curves(family("mixed", 2).points).tolist()
    )


def test_the_recorded_tables_are_worlds_under_each_surrogate() -> None:
    pytest.importorskip("sklearn")
    from benchmarks.search.table_worlds import SURROGATES, TABLES, table_world

    for name, surrogate in itertools.product(TABLES, SURROGATES):
        world = table_world(name, surrogate, 1)
        curves = world.curves([*world.points, world.draw(np.random.default_rng(0)).params])
        assert curves.shape == (3, STAGES)
        assert (curves[:2, -1] > curves[:2, 0]).all(), "good defaults learn"
        assert world.cost_of_start.keys() == {"tiny-clip", "tiny-sig"}
        assert world.stage_seconds(world.points[0]).sum() == pytest.approx(world.cost_of_start["tiny-clip"], rel=0.3)
        assert (world.spread_S > 0).all() == (surrogate == "halves")


def write_published(folder: Path) -> None:
    head = "step,model,loss_function,recall@10_mean\n"
    runs = [("ViT-B-32", "contrastive", 0.6), ("ViT-B-16", "contrastive", 0.7), ("ViT-B-16-SigLIP2-256", "contrastive", 0.75)]
    rows = [*runs, ("ViT-B-16-SigLIP2-256", "SIGLIP", 0.78)]
    lines = [f"{step},{model},{loss},{end - 0.1 + step * 1e-4}\n" for model, loss, end in rows for step in (0, 500, 1000)]
    (folder / "seed_curves_original.csv").write_text(head + "".join(lines))
    late = [f"{step},ViT-B-16-SigLIP2-256,SIGLIP,{0.6 + step * 2e-4}\n" for step in (0, 500, 1000, 1500)]
    (folder / "seed_curves_augmented.csv").write_text(head + "".join(late))


def test_the_published_runs_are_worlds_where_their_curves_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "published runs" not in search.worlds(tmp_path / "elsewhere")
    write_published(tmp_path)
    runs = worlds.published_runs(tmp_path)
    assert len(runs) == 5
    as_run = worlds.published_as_run(tmp_path)
    ends = as_run.curves(as_run.points)[:, -1]
    assert ends == pytest.approx([0.6, 0.7, 0.75, 0.78, 0.8]), "at the last step that all have"
    assert search.worlds(tmp_path)["published runs"](0).cost_of_start["ViT-B-16-SigLIP2-256"] == 1000
    orders = list(itertools.permutations(range(5)))[::40]
    monkeypatch.setattr(search.itertools, "permutations", lambda _: orders)
    wins, at = search.orders_kept(tmp_path)
    assert 0 <= wins <= 1
    assert 1 / 5 < at <= 1


def rows_of(*curves: list[float], level: float = 0.5) -> list[dict[str, Any]]:
    """Each with as many values, repeated over the grid."""
    return [
        {"level": level, "true": np.repeat(curve, 64 // len(curve)).tolist(), "seed": seed} for seed, curve in enumerate(curves)
    ]


def test_figures_are_counted_over_seeds() -> None:
    rows = rows_of([0.1, 0.6, 0.6, 0.6], [0.1, 0.1, 0.6, 0.6], [0.1, 0.1, 0.1, 0.1])
    assert search.time_to_level(rows) == 8.25, "the first quarter of a trial at which two of three have it"
    assert search.time_to_level(rows_of([0.1], [0.1])) == float("inf")
    other = rows_of([0.1, 0.1, 0.6, 0.7], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0])
    assert [share for share, _, _ in search.ahead(rows, other)] == pytest.approx([0.5, (1 + 0 + 1) / 3, (0 + 1 + 1) / 3])
    low, high = search.wilson(0.63, 60)
    assert low == pytest.approx(0.5037, abs=1e-3)
    assert high == pytest.approx(0.7416, abs=1e-3)


def test_the_level_is_what_so_many_random_trials_end_at() -> None:
    level = random_level(plain(), 32)
    assert level == pytest.approx(0.5 ** (1 / 32), abs=0.01), "the median of the best of 32"
    assert random_level(plain(noise_S=NONE + 1.0), 32) < 0.8, "noise chooses the wrong one"


def test_the_command_goes_on_after_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done.jsonl"
    flags = [
        "--trials",
        "2",
        "--seeds",
        "2",
        "--worlds",
        "family: mixed",
        "--arms",
        "stock|this search",
        "--published",
        str(tmp_path),
        "--record",
        str(done),
    ]
    monkeypatch.setattr(search, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(sys, "argv", ["search", *flags])
    search.main()
    printed = capsys.readouterr().out
    assert "| family: mixed | - | - |" in printed
    assert "skipped" in printed
    whole = done.read_text()
    assert len(whole.splitlines()) == 4
    done.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"world": "fam')
    monkeypatch.setattr(sys, "argv", ["search", *flags, "--plot", str(tmp_path / "plot.svg")])
    search.main()
    again = [json.loads(line) for line in done.read_text().splitlines()]
    for row in again:
        row.pop("suggestion_s")
    assert again == [
        {key: value for key, value in json.loads(line).items() if key != "suggestion_s"} for line in whole.splitlines()
    ]
    assert (tmp_path / "plot.svg").read_text().count("<polyline") == 2


class InProcess:
    def __init__(self, processes: int) -> None: ...

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def map(self, function: Any, jobs: Any) -> Any:
        return map(function, jobs)
