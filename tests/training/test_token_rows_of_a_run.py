"""A run trains the rows that its captions have: what it keeps, what it gives back, and what it refuses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index, run_shards
from fashionclip_tune.data.tokens import occurring_tokens
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.dataset import evaluation_set
from fashionclip_tune.evaluation.evaluate import evaluate
from fashionclip_tune.models import openclip as model_module
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.storage.checkpoint import newest_checkpoint, newest_weights
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.callbacks import TrainResult
from fashionclip_tune.training.remote_state import RemoteState
from fashionclip_tune.training.train import train

TABLE = "token_embedding.weight"


@pytest.fixture(scope="module")
def run(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectConfig, TrainResult]:
    """Do not change it."""
    config = ProjectConfig(clip_model="tiny-clip", dataset_root=garments, device="cpu").with_overrides(
        {
            "model.pretrained": None,
            "training.batch_size": 16,
            "training.num_workers": 0,
            "training.learning_rate": 1e-3,
            "training.max_steps": 4,
            "training.checkpoint_interval": 2,
            "training.checkpoint_minutes": 0,
            "hardware.threads": 1,
        }
    )
    return config, train(config, tmp_path_factory.mktemp("rows") / "run")


def rows_of(config: ProjectConfig) -> Tensor:
    return occurring_tokens(cached_index(run_shards(config).train), load_model(config).tokenizer)


def test_only_rows_that_occur_move_and_only_they_are_kept(run: tuple[ProjectConfig, TrainResult], tmp_path: Path) -> None:
    config, result = run
    before, rows_U = load_model(config).network.state_dict()[TABLE], rows_of(config)
    kept = load_file(result.checkpoint / "model.safetensors")
    assert TABLE not in kept
    assert kept["token_embedding._extra_state"].tolist()[4:] == rows_U.tolist()
    after = read_weights(result.checkpoint / "model.safetensors")[TABLE]
    assert (after != before).any(dim=1).nonzero().flatten().tolist() == rows_U.tolist()
    checkpoint, _ = newest_checkpoint(result.out_dir)
    assert checkpoint is not None
    state = checkpoint.training_state()["optimizer"]["state"].values()
    assert max(tensor.numel() for each in state for tensor in each.values()) < before.numel()
    # Beside the checkpoints, once, what no step changes.
    (file,) = (result.checkpoint.parent / "token_table").glob("*.safetensors")
    assert torch.equal(load_file(file)[TABLE], before)
    # On the durable side not even that.
    drive = RemoteFolder(tmp_path)
    durable = RemoteState(drive, "a", config)
    durable.put_state(result.checkpoint)
    durable.put_weights(result.checkpoint)
    weights = [load_file(path) for path in sorted(tmp_path.rglob("*.safetensors"))]
    shapes = [tensor.shape for each in weights for tensor in each.values()]
    assert len(weights) == 2
    assert all(len(before) not in shape for shape in shapes)
    half = durable.fetch_weights(4)
    assert half is not None
    assert torch.equal(half[TABLE][rows_U], after[rows_U].half().float())
    others_V = torch.ones(len(before), dtype=torch.bool).index_fill(0, rows_U, False)
    assert torch.equal(half[TABLE][others_V], before[others_V])


def test_a_fetched_run_has_all_that_it_had(run: tuple[ProjectConfig, TrainResult], tmp_path: Path) -> None:
    config, result = run
    durable = RemoteState(RemoteFolder(tmp_path / "drive"), "a", config)
    durable.put_state(result.checkpoint)
    assert durable.fetch_state(tmp_path / "run")
    fetched, here = newest_weights(tmp_path / "run"), newest_weights(result.out_dir)
    assert fetched is not None
    assert here is not None
    ours, theirs = read_weights(fetched), read_weights(here)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_whoever_names_the_run_has_the_whole_model(
    run: tuple[ProjectConfig, TrainResult], garments: Path, tmp_path: Path
) -> None:
    """Its evaluation is the run's own, and so is that of OpenCLIP's model from an export."""
    config, result = run
    loaded = named_model(str(result.out_dir), config.with_overrides({"model.pretrained": "default"})).loaded
    plan = plan_precision(config)
    photos = evaluation_set(run_shards(config).valid, loaded.preprocessing)
    measured = evaluate(loaded, photos, batch_size=64, plan=plan, max_bad_share=0.01).metrics
    assert {name: measured[name] for name in ("recall_at_10", "recall_at_5", "recall_at_1")} == {
        name: result.metrics[name] for name in ("recall_at_10", "recall_at_5", "recall_at_1")
    }
    export_openclip(loaded, tmp_path)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    expected = read_weights(result.checkpoint / "model.safetensors")
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.filterwarnings("ignore:1 photo has a gap")
def test_a_run_starts_from_another_ones_winner_with_other_captions(
    run: tuple[ProjectConfig, TrainResult], many_captions: Path, tmp_path: Path
) -> None:
    config, result = run
    more = replace(config, dataset_root=many_captions).with_overrides({"model.pretrained": str(result.out_dir)})
    assert not torch.equal(rows_of(more), rows_of(config))
    second = train(more.with_overrides({"training.max_steps": 2}), tmp_path / "second")
    before, after = (read_weights(each.checkpoint / "model.safetensors")[TABLE] for each in (result, second))
    assert (after != before).any(dim=1).nonzero().flatten().tolist() == rows_of(more).tolist()
    with pytest.raises(UserError, match="is of another run: its data or its first weights have changed"):
        train(replace(config, dataset_root=many_captions), tmp_path / "other", resume_from=result.out_dir)


def test_a_run_whose_tokenizer_has_changed_is_not_resumed(
    run: tuple[ProjectConfig, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data and first weights are the same; its rows are not, and would be taken for others in silence."""
    config, result = run
    shutil.copytree(result.out_dir, tmp_path / "run")
    make: Callable[..., Any] = model_module._tokenizer

    def shifted(*arguments: Any) -> Any:
        tokenizer = make(*arguments)
        return lambda texts: (tokenizer(texts) + 1).clamp(max=49_407)

    monkeypatch.setattr(model_module, "_tokenizer", shifted)
    model_module._load_cached.cache_clear()
    try:
        with pytest.raises(UserError, match="have other rows of the token table than this run would train"):
            train(config.with_overrides({"training.num_workers": 2}), tmp_path / "run", resume_from=tmp_path / "run")
    finally:
        model_module._load_cached.cache_clear()


def test_what_began_in_the_first_edition_goes_on_with_its_whole_table(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    first = tiny_config.with_overrides({"training.edition": 1})
    whole = train(first, tmp_path / "whole")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(first, tmp_path / "run", on_eval=stop)
    resumed = train(tiny_config, tmp_path / "run", resume_from=tmp_path / "run")
    ours, theirs = (load_file(each.checkpoint / "model.safetensors") for each in (resumed, whole))
    assert TABLE in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "run" / "checkpoints" / "token_table").exists()
