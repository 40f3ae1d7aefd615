"""What a sweep is planned for: a machine, a space and data that go together."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.stored import as_begun
from fashionclip_tune.data.dataset import run_shards
from fashionclip_tune.data.index import ShardIndex
from fashionclip_tune.models.architecture import with_default_freeze
from fashionclip_tune.models.named_model import settled
from fashionclip_tune.tuning.planning.allocation import Site
from fashionclip_tune.tuning.planning.dataset import data_location, load_data, rows_of_captions
from fashionclip_tune.tuning.planning.fresh import with_default_points
from fashionclip_tune.tuning.planning.settings import CheckedFlags, SweepSettings, base_config, refuse_shared
from fashionclip_tune.tuning.planning.space import SearchSpace, SpaceCheck, check_space, load_space
from fashionclip_tune.tuning.schedulers import FREEZE_THAW

_log = logging.getLogger(__name__)
_PROTOCOL = "evaluation.protocol"


@dataclass(frozen=True)
class Found:
    """What there is: a machine, a space and data that go together."""

    site: Site
    space: SearchSpace
    base: ProjectConfig
    num_shards: int
    train: ShardIndex
    valid: ShardIndex
    check: SpaceCheck
    settles_names: bool


def find(settings: SweepSettings, flags: CheckedFlags, site: Site, begun: Mapping[str, Any] | None) -> Found:
    """Raises UserError where they do not."""
    space = load_space(settings.space or ("tiny" if site.device == "cpu" else "openclip"))
    base = base_config(settings, space, site.device, flags.seed, data_location(settings.data))
    base = base if begun is None else as_begun(base, begun.get("base_config", {}))
    settles_names = begun is None or "starts" in begun
    shards = run_shards(base)
    base = _with_protocol(base, settings, space, shards.protocol, begun)
    train, valid = load_data(base, shards)
    if site.gpu is not None:
        site.gpu.clip_rows = rows_of_captions(base, train)

    def build(drawn: dict[str, Any]) -> ProjectConfig:
        refuse_shared(drawn, f"space {space.file}")
        given = {**space.base, **drawn, **settings.overrides}
        card_bytes = site.gpu.card.memory_bytes if site.gpu is not None else None
        config = base.with_overrides({**drawn, **settings.overrides})
        return with_default_freeze(settled(config) if settles_names else config, card_bytes, given)

    check = check_space(space, build, flags.seed)
    if flags.scheduler == FREEZE_THAW:
        space, check = with_default_points(space, check, build, flags.seed)
    for config in check.configs if settles_names else ():
        check.check_start(config)
    return Found(site, space, base, len(shards.train) + len(shards.valid), train, valid, check, settles_names)


def _with_protocol(
    base: ProjectConfig,
    settings: SweepSettings,
    space: SearchSpace,
    of_data: str | None,
    begun: Mapping[str, Any] | None,
) -> ProjectConfig:
    """Measured is as it was begun; else as the user or the space says; else as the data want, but for the published runs."""
    if _PROTOCOL in {**space.base, **settings.overrides} or space.name == "published":
        return base
    if begun is not None:
        return base.with_overrides({_PROTOCOL: begun.get("base_config", {}).get(_PROTOCOL, base.evaluation.protocol)})
    if of_data is None or of_data == base.evaluation.protocol.value:
        return base
    _log.info(
        f"measured by the protocol {of_data}, as the data set's dataset.json says: most products have several photos; "
        f"another: --set {_PROTOCOL}=instance"
    )
    return base.with_overrides({_PROTOCOL: of_data})
