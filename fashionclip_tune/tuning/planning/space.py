"""Search spaces: Python files with a define-by-run function, checked against the configuration before anything starts."""

import hashlib
import importlib.util
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.start_names import LOCAL_PREFIX, architecture_of
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import check_model_options
from fashionclip_tune.tuning.study.draws import DrawnPoint, Space, draw_points

SPACES_DIR = Path(__file__).parents[2] / "spaces"
_CHECKED_POINTS = 100
_MOST_VALUES = 1000  # of an integer parameter that are looked at


@dataclass(frozen=True)
class SearchSpace:
    """``draw(trial)`` maps an Optuna trial to settings by dotted path; ``base`` holds for all trials, ``points`` come first."""

    name: str
    file: Path
    draw: Space
    base: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...]

    def with_points(self, points: Sequence[Mapping[str, Any]]) -> "SearchSpace":
        return replace(self, points=tuple(points))

    @property
    def text(self) -> str:
        return self.file.read_text()

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(self.file.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class SpaceCheck:
    """What random draws of a space held: a config for each start among them, and the batch sizes."""

    config_of_model: dict[str, ProjectConfig]
    batch_sizes: tuple[int, ...]
    """All that were drawn, and all others that a parameter allows whose value was the batch size whenever it was drawn."""
    losses: tuple[str, ...]
    parameters: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    """What was drawn."""
    distributions: Mapping[str, BaseDistribution]
    model_parameter: str | None
    """The categorical parameter that decides what is started from, in every draw; None: there is no such parameter."""
    start_of_choice: Mapping[Any, str]
    """What each of its values starts from, as ``clip_model`` names it."""
    configs: tuple[ProjectConfig, ...]
    """Of all draws, as often as they were drawn."""
    num_points: int | None
    """How many different points the space has, where nothing else was drawn; None: it has more to it."""

    def choices(self) -> tuple[Any, ...]:
        """Values of that parameter in the order in which the space names them; without one, the starts in no order."""
        if self.model_parameter is None:
            return tuple(self.config_of_model)
        named: Any = self.distributions[self.model_parameter]
        return tuple(choice for choice in named.choices if choice in self.start_of_choice)

    def check_start(self, config: ProjectConfig) -> None:
        """Raises UserError for a start that the plan knows nothing of, or whose name is another's, too."""
        name, pretrained = config.model_name, config.model.pretrained
        if config.should_load_checkpoint:
            raise UserError(
                "should_load_checkpoint is not for sweeps, whose starts are told apart by clip_model: say there what "
                f"checkpoint_path says, {LOCAL_PREFIX}{config.checkpoint_path}, or ARCHITECTURE=FILE of a weights file"
            )
        if (known := self.config_of_model.get(name)) is None:
            raise UserError(
                f"{name} was drawn, of which the plan knows nothing: add a point that draws it to POINTS of the space"
            )
        if known.model.pretrained != pretrained:
            raise UserError(
                f"{name} is drawn with model.pretrained = {known.model.pretrained} and {pretrained}: starts of a sweep are "
                "told apart by clip_model alone. Write clip_model = ARCHITECTURE/TAG, ARCHITECTURE=FILE or a folder; random "
                "weights want a sweep of their own (--set model.pretrained=none)"
            )


def load_space(name_or_file: str) -> SearchSpace:
    """A space of ``fashionclip_tune/spaces/`` by name, or any Python file.

    Raises:
        UserError: no such space, or a file that cannot be run or lacks a ``space`` function.
    """
    file = Path(name_or_file) if name_or_file.endswith(".py") else SPACES_DIR / f"{name_or_file}.py"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in SPACES_DIR.glob("*.py")))
        raise UserError(f"--space {name_or_file!r}: no such space; allowed: {names}, or a Python file")
    spec = importlib.util.spec_from_file_location(f"search_space_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"--space {file} cannot be run: {_where(error, file)}") from error
    draw = getattr(module, "space", None)
    if not callable(draw):
        raise UserError(f"--space {file} has no function space(trial) that returns settings by dotted path")
    base, points = getattr(module, "BASE", {}), getattr(module, "POINTS", ())
    if not isinstance(base, dict) or not isinstance(points, list | tuple) or not all(isinstance(p, dict) for p in points):
        raise UserError(f"--space {file}: BASE is a dict of settings by dotted path, POINTS a list of dicts by parameter name")
    return SearchSpace(file.stem, file.absolute(), _with_plain_values(draw), base, tuple(points))


def _with_plain_values(draw: Callable[[optuna.trial.Trial], Any]) -> Callable[[optuna.trial.Trial], Any]:
    """NumPy's scalars are the numbers that they are, and paths their text: so they are stored."""

    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else str(value) if isinstance(value, PurePath) else value

    def drawn(trial: optuna.trial.Trial) -> Any:
        settings = draw(trial)
        return {name: plain(value) for name, value in settings.items()} if isinstance(settings, dict) else settings

    return drawn


def check_space(space: SearchSpace, build: Callable[[dict[str, Any]], ProjectConfig], seed: int) -> SpaceCheck:
    """Draws the space's own points, 100 random ones and choices that are not among them; builds the configuration of each.

    Raises:
        UserError: names the space, what it drew and what is wrong with it.
    """
    config_of_model: dict[str, ProjectConfig] = {}
    losses = set()
    distributions: dict[str, BaseDistribution] = {}
    configs = []
    try:
        drawn = list(draw_points(space.draw, _CHECKED_POINTS, seed, space.points))
        drawn += draw_points(space.draw, 0, seed, _not_drawn(drawn))
    except Exception as error:
        raise UserError(f"space {space.file} fails when it is drawn from: {_where(error, space.file)}") from error
    for point, wanted in zip_longest(drawn, space.points):
        _check_point(space, point, wanted or {})
        try:
            config = build(point.settings)
            check_model_options(config)
        except UserError as error:
            raise UserError(f"space {space.file} drew {point.settings}, which is no valid configuration: {error}") from error
        configs.append(config)
        config_of_model.setdefault(config.model_name, config)
        losses.add(config.loss_function.value)
        distributions |= point.distributions
    parameter, start_of_choice = _deciding(drawn, [config.model_name for config in configs])
    return SpaceCheck(
        config_of_model,
        _batch_sizes(drawn, configs, distributions),
        tuple(sorted(losses)),
        parameters=tuple(_described(name, distribution) for name, distribution in distributions.items()),
        settings=tuple(point.settings for point in drawn),
        distributions=distributions,
        model_parameter=parameter,
        start_of_choice=start_of_choice,
        configs=tuple(configs),
        num_points=_num_points(drawn, len(space.points)),
    )


def _not_drawn(drawn: Sequence[DrawnPoint]) -> list[dict[str, Any]]:
    """Points with the choices that chance left out."""
    choices = {
        name: kind.choices
        for point in drawn
        for name, kind in point.distributions.items()
        if isinstance(kind, CategoricalDistribution)
    }
    return [
        {name: choice}
        for name, those in choices.items()
        for choice in those
        if all(point.params.get(name, ...) != choice for point in drawn)
    ]


def _num_points(drawn: Sequence[DrawnPoint], num_given: int) -> int | None:
    """``drawn``: the given points first."""
    points = list[dict[str, Any]]()
    for each in drawn[:num_given]:
        if each.params not in points:
            points.append(each.params)
    return len(points) if all(each.params in points for each in drawn) else None


def _deciding(drawn: Sequence[DrawnPoint], starts: Sequence[str]) -> tuple[str | None, dict[Any, str]]:
    """The categorical parameter that decides what is started from, and what each of its values starts from first.

    One with one start for each of its values, and one value for each start; else one that names the architectures alone.
    """
    pairs_of: dict[str, dict[tuple[Any, str], None]] = {}
    for name, kind in drawn[0].distributions.items():
        if isinstance(kind, CategoricalDistribution) and all(name in point.params for point in drawn):
            pairs_of[name] = {(point.params[name], start): None for point, start in zip(drawn, starts, strict=True)}
    for name, pairs in pairs_of.items():
        values, named = {value for value, _ in pairs}, {start for _, start in pairs}
        if len(values) == len(named) == len(pairs):
            return name, dict(list(pairs))
    for name, pairs in pairs_of.items():
        if all(value == architecture_of(start) for value, start in pairs):
            return name, {value: start for value, start in reversed(pairs)}
    return None, {}


def _batch_sizes(
    drawn: Sequence[DrawnPoint], configs: Sequence[ProjectConfig], distributions: Mapping[str, BaseDistribution]
) -> tuple[int, ...]:
    """Of the draws, and those that a branch of the space that is rarely taken may bring yet."""
    of_draws = [config.training.batch_size for config in configs]
    sizes = set(of_draws)
    for name, distribution in distributions.items():
        known = [(point, size) for point, size in zip(drawn, of_draws, strict=True) if name in point.params]
        if all("training.batch_size" in point.settings and point.params[name] == size for point, size in known):
            sizes.update(value for value in _values(distribution) if value >= 1)
    return tuple(sorted(sizes))


def _values(distribution: BaseDistribution) -> Sequence[int]:
    if isinstance(distribution, CategoricalDistribution):
        return [choice for choice in distribution.choices if isinstance(choice, int)]
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)[:_MOST_VALUES]
    return ()


def _check_point(space: SearchSpace, point: DrawnPoint, wanted: Mapping[str, Any]) -> None:
    if not isinstance(point.settings, dict):
        raise UserError(f"space {space.file}: space(trial) returned {type(point.settings).__name__}, a dict is expected")
    for name, drawn in point.distributions.items():
        for choice in drawn.choices if isinstance(drawn, CategoricalDistribution) else ():
            if choice is not None and type(choice) not in (bool, int, float, str):
                raise UserError(
                    f"space {space.file}: parameter {name} has a choice that cannot be stored, {choice!r} "
                    f"({type(choice).__name__}): allowed are None, True, False, numbers and texts (of NumPy's: .tolist())"
                )
    for name, value in point.settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"space {space.file}: {name} = {value!r} cannot be stored ({error}): give numbers, texts, or lists of them"
            ) from error
    for name, value in wanted.items():
        if (distribution := point.distributions.get(name)) is None:
            names = ", ".join(point.distributions)
            raise UserError(f"space {space.file}: the point {dict(wanted)} sets {name!r}, which is not drawn: {names} are")
        try:
            create_trial(params={name: value}, distributions={name: distribution}, value=0.0)
        except ValueError:
            allowed = _described(name, distribution)
            said = f"space {space.file}: the point {dict(wanted)} has {name} = {value!r}, allowed is {allowed}"
            raise UserError(said) from None


def _described(name: str, distribution: BaseDistribution) -> str:
    """``learning_rate 0.0001..0.01 log``, ``clip_model tiny-clip|tiny-sig``."""
    if isinstance(distribution, CategoricalDistribution):
        return f"{name} {'|'.join(map(str, distribution.choices))}"
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return f"{name} {distribution.low:g}..{distribution.high:g}{' log' if distribution.log else ''}"
    return name


def _where(error: Exception, file: Path) -> str:
    """The error, and the last line of the user's own file on the way to it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).absolute() == file.absolute()]
    frame = (own or frames)[-1]
    advice = "; one name may not have other choices at another draw: give each set of choices a name of its own"
    said = f"{type(error).__name__}: {error}{advice if 'dynamic value space' in str(error) else ''}"
    return f"{said} (line {frame.lineno} of {Path(frame.filename).name}: {frame.line})"
