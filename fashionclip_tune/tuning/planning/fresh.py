"""New settings of a space, with what a trial of them would start from."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.planning.space import SearchSpace, SpaceCheck, check_space
from fashionclip_tune.tuning.study.choice import FreshPoint
from fashionclip_tune.tuning.study.draws import draw_points
from fashionclip_tune.tuning.study.points import default_points

_NAMING = ("clip_model", "model.pretrained")


class FreshSettings:
    """Draws of a space as a search looks at them, hundreds at a time: no configuration is built of each.

    Args:
        fixed: by ``--set``.
        start_of: what trials start from, as they record it, by the settings that name it.
    """

    def __init__(self, space: SearchSpace, fixed: Mapping[str, Any], start_of: Callable[[dict[str, Any]], str]) -> None:
        self._space = space
        self._fixed = fixed
        self._start_of = start_of
        self._known: dict[tuple[Any, ...], str] = {}

    def __call__(self, seed: int, given: Sequence[Mapping[str, Any]], count: int) -> list[FreshPoint]:
        """The given settings completed by the space, then random ones; those that name no start are left out."""
        found = []
        for each in draw_points(self._space.draw, count, seed, given, skips_errors=True):
            with suppress(UserError):
                found.append(
                    FreshPoint(
                        each.params, each.distributions, self._start(each.settings), each.settings.get("training.batch_size")
                    )
                )
        return found

    def _start(self, drawn: Mapping[str, Any]) -> str:
        wanted = {**drawn, **self._fixed}
        named = tuple((path, wanted[path]) for path in _NAMING if path in wanted)
        if named not in self._known:
            self._known[named] = self._start_of(dict(named))
        return self._known[named]


def with_default_points(
    space: SearchSpace, check: SpaceCheck, build: Callable[[dict[str, Any]], ProjectConfig], seed: int
) -> tuple[SearchSpace, SpaceCheck]:
    """A space that names no points has one for each start, if that makes a configuration."""
    if space.points or check.num_points is not None:
        return space, check
    choices = check.choices() if check.model_parameter is not None else ()
    points = [point for point in default_points(space.draw, check.model_parameter, choices) if _is_valid(space, point, build)]
    space = space.with_points(points)
    return space, check_space(space, build, seed)


def _is_valid(space: SearchSpace, point: Mapping[str, Any], build: Callable[[dict[str, Any]], ProjectConfig]) -> bool:
    try:
        (drawn,) = draw_points(space.draw, 0, 0, [point])
        build(drawn.settings)
    except UserError:
        return False
    return True
