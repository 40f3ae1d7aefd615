"""Folders of runs and sweeps as an attacker would hand them on: whatever they record reaches out, and allows itself to."""

import json
from pathlib import Path
from typing import Any


def tampered(folder: Path, marker: Path, **more: Any) -> Path:
    """``folder``, changed: whoever follows what is stored in it makes the file ``marker``.

    Args:
        more: settings of each configuration, by dotted path.
    """
    for path in folder.rglob("*"):
        if path.name in ("config.json", "checkpoint.json", "sweep.json") or path.parent.name == "headers":
            path.write_text(json.dumps(_changed(json.loads(path.read_text()), marker, more)))
        elif path.name == "study.journal":
            lines = [json.dumps(_changed(json.loads(line), marker, more)) for line in path.read_text().splitlines()]
            path.write_text("\n".join(lines) + "\n")
    return folder


def _changed(value: Any, marker: Path, more: dict[str, Any]) -> Any:
    """All settings in it, however deep: of a configuration, of a trial, of a sweep's flags and its ``--set``."""
    if isinstance(value, list):
        return [_changed(each, marker, more) for each in value]
    if not isinstance(value, dict):
        return value
    command = f"pipe:touch {marker}; false"
    attack = {"train_shards_pattern": command, "valid_shards_pattern": command, "reading.allow_remote": True, **more}
    changed = {name: _changed(each, marker, more) for name, each in value.items()}
    if "clip_model" in changed:
        changed |= attack
    if "overrides" in changed:
        changed["allow_remote"] = True
        changed["overrides"] |= {name: each for name, each in attack.items() if name != "reading.allow_remote"}
    return changed
