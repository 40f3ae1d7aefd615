"""The recorded tables as worlds, under several families of surrogates, so that none of them decides alone.

"gp" is smooth, as the model of a searcher is; "halves" is a random half of the curves, under extremely randomised trees for
even seeds and a kernel ridge with a kernel that has kinks for odd ones, and its trials differ by random draws of their own;
"nearest" is the recorded curve that is nearest to what was asked for.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from benchmarks.search.search_table import Surrogate, read_table
from benchmarks.search.worlds import Drawn, Params, World
from fashionclip_tune.tuning.planning.space import load_space
from fashionclip_tune.tuning.study.points import default_points

_TINY, _MODELS = "tiny", ("tiny-clip", "tiny-sig")
_ONE_START = str(Path(__file__).with_name("start_space.py"))
TABLES = {"synthetic": _TINY, "fpi60": _TINY, "start": _ONE_START}
"""Recorded tables and their spaces; "start" is of one start that was really pretrained, on fpi60."""
SURROGATES = ("gp", "halves", "nearest")


@cache
def _draw(table: str) -> Callable[[optuna.Trial], dict[str, Any]]:
    return load_space(TABLES[table]).draw


@cache
def _surrogate(name: str) -> Surrogate:
    distributions = {}
    generator = np.random.default_rng(0)
    for _ in range(20):
        drawn = Drawn(generator, {})
        _draw(name)(drawn)
        distributions.update(drawn.distributions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a parameter without influence: its length scale ends at its bound
        return Surrogate(read_table(Path(__file__).with_name(f"search_curves_{name}.csv")), distributions)


def table_world(name: str, surrogate: str, seed: int) -> World:
    """``name`` and ``surrogate`` of ``TABLES`` and ``SURROGATES``."""
    fitted = _surrogate(name)
    table, noise_S = fitted.table, fitted.noise_S[1:]
    curves = {"gp": lambda points: fitted.curves(points)[:, 1:], "nearest": _nearest(fitted), "halves": _half(fitted, seed)}
    # The zero-shot stage's seconds are the first stage's.
    seconds_NS = np.diff(table.device_s_NS[:, 1:], axis=1, prepend=0.0)

    has_models = TABLES[name] == _TINY

    def kind(params: Params) -> tuple[Any, ...]:
        """Settings of one kind take equally long."""
        return (params["clip_model"], params["augment_images"]) if has_models else (params["loss_function"],)

    def start(params: Params) -> str:
        return params["clip_model"] if has_models else ""

    @cache
    def stage_seconds(wanted: tuple[Any, ...]) -> np.ndarray:
        return seconds_NS[[kind(each) == wanted for each in table.parameters]].mean(axis=0)

    cost = {each: table.device_s_NS[[start(known) == each for known in table.parameters], -1].mean() for each in starts(name)}
    return World(
        space=_draw(name),
        points=default_points(_draw(name), "clip_model", _MODELS) if has_models else default_points(_draw(name)),
        curves=curves[surrogate],
        noise_S=noise_S,
        spread_S=noise_S * (surrogate == "halves"),
        start=start,
        stage_seconds=lambda params: stage_seconds(kind(params)),
        cost_of_start={each: float(seconds) for each, seconds in cost.items()},
    )


def starts(table: str) -> tuple[str, ...]:
    return _MODELS if TABLES[table] == _TINY else ("",)


def _nearest(fitted: Surrogate) -> Callable[[Sequence[Params]], np.ndarray]:
    known_NF = fitted.features(fitted.table.parameters)

    def curves(points: Sequence[Params]) -> np.ndarray:
        distance = np.abs(fitted.features(points)[:, None] - known_NF[None]).sum(axis=2)
        return fitted.table.recall_NS[distance.argmin(axis=1), 1:]

    return curves


def _half(fitted: Surrogate, seed: int) -> Callable[[Sequence[Params]], np.ndarray]:
    """Fitted when it is asked first."""

    @cache
    def model() -> Any:
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.kernel_ridge import KernelRidge

        kept = np.random.default_rng([seed, 7]).permutation(len(fitted.table.parameters))[: len(fitted.table.parameters) // 2]
        features, recall_NS = fitted.features(fitted.table.parameters)[kept], fitted.table.recall_NS[kept, 1:]
        if seed % 2:
            mean_S = recall_NS.mean(axis=0)
            ridge = KernelRidge(alpha=0.02, kernel="laplacian", gamma=0.7).fit(features, recall_NS - mean_S)
            return lambda points: ridge.predict(points) + mean_S
        return ExtraTreesRegressor(100, min_samples_leaf=1, random_state=seed).fit(features, recall_NS).predict

    return lambda points: np.clip(model()(fitted.features(points)), 0.0, 1.0)
