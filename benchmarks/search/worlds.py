"""What a search is tried on: settings with true learning curves, each known by a few lines of numbers for one seed.

Random families have three starts of different cost, and curves that cross: which settings win at the end and how soon a
curve gets there are drawn apart (mixed, bad default), against each other (the best one starts late) or together (the best
one is ahead from the start). Nothing in them comes from the model that is judged.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from fashionclip_tune.models.architecture import forward_flops
from fashionclip_tune.spaces.openclip import POINTS
from fashionclip_tune.tuning.study.points import default_points

STAGES = 9
SHARES = np.arange(1, STAGES + 1) / STAGES
Params = Mapping[str, Any]
Space = Callable[[optuna.Trial], Any]


@dataclass(frozen=True)
class World:
    """Of one seed."""

    space: Space
    points: list[dict[str, Any]]
    """Good defaults, one or more for each start."""
    curves: Callable[[Sequence[Params]], np.ndarray]
    """[N, S] what settings are worth after each ninth of the budget."""
    noise_S: np.ndarray
    """Of an evaluation."""
    spread_S: np.ndarray
    """Of a trial: what its own random draws make of its settings, the same at all stages up to this factor."""
    start: Callable[[Params], str]
    stage_seconds: Callable[[Params], np.ndarray]
    """[S]"""
    cost_of_start: Mapping[str, float]
    """Seconds of a whole trial, as they are known before the first one."""

    def draw(self, generator: np.random.Generator, given: Params | None = None) -> "Drawn":
        drawn = Drawn(generator, given or {})
        self.space(drawn)
        return drawn


class Drawn:
    """In the place of an Optuna trial, for speed: the given params where the space allows them, else random ones."""

    def __init__(self, generator: np.random.Generator, given: Params) -> None:
        self._generator, self._given = generator, given
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        kind = _choice_of(tuple(choices))
        return self._keep(name, kind, lambda: choices[int(self._generator.integers(len(choices)))])

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        def between() -> float:
            share = self._generator.random()
            return float(low * (high / low) ** share if log else low + (high - low) * share)

        return self._keep(name, _float_of(low, high, log), between)

    def _keep(self, name: str, kind: BaseDistribution, drawn: Callable[[], Any]) -> Any:
        value = self._given[name] if name in self._given else drawn()
        self.params[name], self.distributions[name] = value, kind
        return value


@cache
def _choice_of(choices: tuple[Any, ...]) -> CategoricalDistribution:
    return CategoricalDistribution(choices)


@cache
def _float_of(low: float, high: float, log: bool) -> FloatDistribution:
    return FloatDistribution(low, high, log=log)


# Random families.

FAMILIES = ("mixed", "best one starts late", "best one ahead", "bad default")
_STARTS = {"small": 60.0, "medium": 100.0, "large": 160.0}
_BAD = np.log10(4)


def _family_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("start", list(_STARTS))
    trial.suggest_categorical("loss", ["contrastive", "sigmoid"])
    trial.suggest_float("rate", 1e-5, 1e-3, log=True)
    trial.suggest_float("decay", 0.0, 0.3)
    if trial.suggest_categorical("augment", [False, True]):
        trial.suggest_float("strength", 0.1, 1.0)


class _Family:
    """Numbers of one seed, and the curves that they make."""

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        generator = np.random.default_rng([seed, FAMILIES.index(kind)])
        shift = generator.choice([-_BAD, _BAD]) if kind == "bad default" else 0.0
        self._best_rate = {start: -4 + shift + 0.25 * generator.normal() for start in _STARTS}
        self._zero = {start: 0.15 + 0.03 * generator.normal() for start in _STARTS}
        self._base = {start: 0.6 + 0.02 * size + 0.05 * generator.normal() for size, start in enumerate(_STARTS)}
        self._loss = {(start, loss): 0.02 * generator.normal() for start in _STARTS for loss in ("contrastive", "sigmoid")}
        self._width = generator.uniform(0.6, 1.0)
        self._augmented, self._best_decay = 0.03 + 0.03 * generator.normal(), generator.uniform(0, 0.3)
        self._speed = {start: np.log(4) + 0.5 * generator.normal() for start in _STARTS}
        self._speed_of_rate = 0.5 + 0.5 * generator.normal()
        some = [Drawn(generator, {}) for _ in range(200)]
        for each in some:
            _family_space(each)
        ends = [self._end(each.params) for each in some]
        self._middle, self._spread = np.mean(ends), np.std(ends)

    def _off(self, params: Params) -> float:
        """Decades from the best rate."""
        return float(np.log10(params["rate"]) - self._best_rate[params["start"]])

    def _end(self, params: Params) -> float:
        strength = params.get("strength", 0.0)
        drop = 0.45 * (1 - np.exp(-((self._off(params) / self._width) ** 2)))
        gain = self._augmented * strength - 0.04 * strength**2 - 0.02 * ((params["decay"] - self._best_decay) / 0.3) ** 2
        return float(self._base[params["start"]] + self._loss[params["start"], params["loss"]] + gain - drop)

    def curves(self, points: Sequence[Params]) -> np.ndarray:
        return np.array([self._curve(point) for point in points])

    def _curve(self, params: Params) -> np.ndarray:
        end, start = self._end(params), params["start"]
        quality = float(np.clip((end - self._middle) / self._spread, -2, 2))
        speed = self._speed[start] + self._speed_of_rate * self._off(params) - 0.4 * params.get("strength", 0.0)
        if self._kind == "best one starts late":
            speed = np.log(4) - 0.7 * quality
        elif self._kind == "best one ahead":
            speed = np.log(4) + 0.7 * quality
        speed = np.exp(np.clip(speed, np.log(0.5), np.log(20)))
        gained_S = (1 - np.exp(-speed * SHARES)) / (1 - np.exp(-speed))
        return np.clip(self._zero[start] + (end - self._zero[start]) * gained_S, 0.0, 1.0)


def family(kind: str, seed: int) -> World:
    return World(
        space=_family_space,
        points=default_points(_family_space, "start", list(_STARTS)),
        curves=_Family(kind, seed).curves,
        noise_S=np.full(STAGES, 0.008),
        spread_S=0.006 * SHARES,
        start=lambda params: params["start"],
        stage_seconds=lambda params: np.full(STAGES, _STARTS[params["start"]] / STAGES),
        cost_of_start=_STARTS,
    )


# The published Fashion-Gen runs. Their curves are not part of this project.

PUBLISHED = Path(__file__).parents[3] / "shared" / "reference"
_FILES = {"seed_curves_original.csv": "original", "seed_curves_augmented.csv": "uniform"}


@cache
def published_runs(folder: Path) -> dict[tuple[str, str, str], dict[int, float]]:
    """Recall@10 by step of (model, loss, caption); empty where the files are not there."""
    runs: dict[tuple[str, str, str], dict[int, float]] = {}
    for name, caption in _FILES.items():
        if (folder / name).is_file():
            with open(folder / name, newline="") as file:
                for row in csv.DictReader(file):
                    key = row["model"], row["loss_function"].lower(), caption
                    runs.setdefault(key, {})[int(row["step"])] = float(row["recall@10_mean"])
    return runs


_MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")


def _published_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("clip_model", list(_MODELS))
    trial.suggest_categorical("loss_function", ["contrastive", "siglip"])
    trial.suggest_categorical("caption", ["original", "uniform"])
    trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True)


@cache
def _seconds_of_models() -> dict[str, float]:
    flops = {model: forward_flops(model) for model in _MODELS}
    return {model: 1000 * each / max(flops.values()) for model, each in flops.items()}


class _Published:
    """The five runs with other rates: a low one is later on its curve's way, a high one loses at the end.

    What a combination that was not run differs by from the nearest one is drawn for the seed, as are the best rates.
    """

    def __init__(self, runs: Mapping[tuple[str, str, str], Mapping[int, float]], seed: int) -> None:
        generator = np.random.default_rng([seed, 100])
        self._runs, self._end = runs, min(max(run) for run in runs.values())
        self._best_rate = {model: -5 + 0.3 * generator.normal() for model in _MODELS}
        self._loses = generator.uniform(0.05, 0.15)
        self._differs = {}
        for model in _MODELS:
            for loss in ("contrastive", "siglip"):
                for caption in ("original", "uniform"):
                    self._differs[model, loss, caption] = 0.0 if (model, loss, caption) in runs else 0.015 * generator.normal()

    def curves(self, points: Sequence[Params]) -> np.ndarray:
        return np.array([self._curve(point) for point in points])

    def _curve(self, params: Params) -> np.ndarray:
        key = params["clip_model"], params["loss_function"], params["caption"]
        run = self._runs[min(self._runs, key=lambda other: [mine != its for mine, its in zip(key, other, strict=True)])]
        off = float(np.log10(params["learning_rate"]) - self._best_rate[params["clip_model"]])
        steps = SHARES * self._end * 10 ** min(off, 0.3)
        smooth_S = np.interp(steps, list(run), list(run.values()))
        lost = self._loses * max(off, 0.0) ** 2 + 0.3 * self._loses * min(off, 0.0) ** 2
        return np.clip(smooth_S + self._differs[key] * SHARES - lost, 0.0, 1.0)


def published(folder: Path, seed: int) -> World:
    keys = ("clip_model", "loss_function", "caption", "learning_rate")
    seconds = _seconds_of_models()
    return World(
        space=_published_space,
        points=[{key: point[key] for key in keys} for point in POINTS],
        curves=_Published(published_runs(folder), seed).curves,
        noise_S=np.full(STAGES, 0.004),
        spread_S=0.003 * SHARES,
        start=lambda params: params["clip_model"],
        stage_seconds=lambda params: np.full(STAGES, seconds[params["clip_model"]] / STAGES),
        cost_of_start=seconds,
    )


def published_as_run(folder: Path) -> World:
    """The five runs themselves: ``points`` are all there is, and every example costs the same."""
    runs, end = published_runs(folder), min(max(run) for run in published_runs(folder).values())

    def curves(points: Sequence[Params]) -> np.ndarray:
        found = [runs[point["clip_model"], point["loss_function"], point["caption"]] for point in points]
        return np.array([np.interp(SHARES * end, list(run), list(run.values())) for run in found])

    none = np.zeros(STAGES)
    one = dict.fromkeys(_MODELS, 1.0)
    return replace(
        published(folder, 0),
        curves=curves,
        noise_S=none,
        spread_S=none,
        stage_seconds=lambda _: none + 1 / STAGES,
        cost_of_start=one,
    )
