"""``export``: a model as a folder for OpenCLIP or transformers."""

import argparse
from pathlib import Path
from typing import Any

from fashionclip_tune.config.section import assignments
from fashionclip_tune.errors import UserError


def add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="a model as a folder for OpenCLIP or transformers",
        description="Writes a model with preprocessing and tokenizer as a folder that OpenCLIP loads, or transformers, and "
        "prints how. The embeddings are the model's own.",
    )
    parser.add_argument(
        "model",
        metavar="RUN|SWEEP|MODEL",
        help="the folder of a run, a checkpoint, a sweep (its best) or an OpenCLIP model, or the name of an architecture",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the new folder; what is there must be empty")
    parser.add_argument(
        "--transformers",
        action="store_true",
        help="as a CLIPModel or SiglipModel of transformers; refused where it has no architecture that computes the same",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a setting, such as model.pretrained=none: docs/settings.md",
    )
    parser.add_argument(
        "--allow-remote", action="store_true", default=None, help="follow a run to the place on the hub that it started from"
    )
    parser.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> None:
    folder = parsed.to.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {parsed.to} is not empty: name a folder that does not exist, or an empty one")

    from safetensors import SafetensorError

    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.files import new_folder
    from fashionclip_tune.models.named_model import named_model
    from fashionclip_tune.models.openclip import export_openclip
    from fashionclip_tune.models.transformers_export import write_transformers
    from fashionclip_tune.models.transformers_shapes import activation_notes

    given = {} if parsed.allow_remote is None else {"reading.allow_remote": True}
    loaded = named_model(parsed.model, ProjectConfig().with_overrides({**assignments(parsed.set), **given})).loaded
    notes = list[str]()
    try:
        with new_folder(folder) as unfinished:
            if parsed.transformers:
                weights = loaded.network.state_dict()
                notes = write_transformers(unfinished, loaded.model_config, weights, loaded.preprocessing, loaded.tokenizer)
            else:
                export_openclip(loaded, unfinished)
    except (OSError, SafetensorError) as error:  # no room, or no right to write there
        raise UserError(f"--to {parsed.to} cannot be written: {error}") from error
    if parsed.transformers:
        kind = "SiglipModel" if loaded.model_config["vision_cfg"].get("timm_model_name") else "CLIPModel"
        calls = [
            f"transformers.{kind}.from_pretrained({str(folder)!r})",
            f"transformers.AutoProcessor.from_pretrained({str(folder)!r})",
        ]
    else:
        name = f"local-dir:{folder}"
        calls = [f"open_clip.create_model_and_transforms({name!r})", f"open_clip.get_tokenizer({name!r})"]
        notes = activation_notes(loaded.model_config)
    for note in notes:
        print(f"note: {note}")
    print("load it by:")
    for call in calls:
        print(f"  {call}")
