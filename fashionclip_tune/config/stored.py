"""Settings from a file that a run or a sweep has left, which may be anyone's.

What lets them reach out or run commands is never taken from there: it is the caller's, from a flag, ``--set`` or an argument.
"""

from collections.abc import Container, Mapping
from typing import Any

from fashionclip_tune.config.choices import BatchNorms
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.start_names import HUB_PREFIX
from fashionclip_tune.errors import UserError

_ALLOWS_REMOTE = "reading.allow_remote"
BATCH_NORM = "model.batch_norm"
EDITION_PATH = "training.edition"
UNSAID = {BATCH_NORM: BatchNorms.LEGACY.value, EDITION_PATH: 1}
"""What a stored configuration that does not speak of it was made with, where that is not the default of today."""


def stored_config(flat: Mapping[str, Any], *, allow_remote: bool, known_models: Container[str] = ()) -> ProjectConfig:
    """A whole configuration, as ``to_dict`` wrote it.

    Args:
        allow_remote: as the caller has it.
        known_models: places on the hub that nothing has to be fetched from.

    Raises:
        UserError: as ``with_stored``.
    """
    base = ProjectConfig().with_overrides({**UNSAID, _ALLOWS_REMOTE: allow_remote})
    return with_stored(base, flat, known_models=known_models)


def as_begun(config: ProjectConfig, stored: Mapping[str, Any]) -> ProjectConfig:
    """The caller's configuration for going on with what was begun with ``stored`` settings.

    Batch norms are ``fixed`` by default in what begins anew; another value is the caller's word. An edition is the older one.
    """
    stored = {**UNSAID, **stored}
    kept: dict[str, Any] = {EDITION_PATH: min(config.training.edition, int(stored[EDITION_PATH]))}
    if stored[BATCH_NORM] == BatchNorms.LEGACY.value and config.model.batch_norm is BatchNorms.FIXED:
        kept[BATCH_NORM] = BatchNorms.LEGACY
    return config.with_overrides(kept)


def with_stored(base: ProjectConfig, flat: Mapping[str, Any], *, known_models: Container[str] = ()) -> ProjectConfig:
    """The caller's configuration with settings from such a file.

    Args:
        known_models: architectures that the caller's own space names.

    Raises:
        UserError: they are no settings of this version, or name a model elsewhere (``hf-hub:``) and ``base`` allows no
            reaching out.
    """
    allowed = base.reading.allow_remote
    config = base.with_overrides({**flat, _ALLOWS_REMOTE: allowed})
    if not allowed and config.model_name.startswith(HUB_PREFIX) and config.model_name not in known_models:
        raise UserError(
            f"clip_model = {config.model_name!r} comes from a stored file and names a model elsewhere, which must be "
            f"asked for: --allow-remote ({_ALLOWS_REMOTE}=true)"
        )
    return config
