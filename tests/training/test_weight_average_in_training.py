"""``optimizer.ema_decay`` from end to end: the average is what counts, and the optimizer never sees it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import run_shards, storage_of
from fashionclip_tune.evaluation.dataset import evaluation_set
from fashionclip_tune.evaluation.evaluate import evaluate
from fashionclip_tune.models.openclip import load_model, load_weights
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.models.token_rows import use_token_rows
from fashionclip_tune.storage.checkpoint import newest_checkpoint, newest_weights
from fashionclip_tune.training.train import train

DECAY = 0.7
Weights = dict[str, torch.Tensor]


def stages(config: ProjectConfig, run: Path, **options: Any) -> tuple[list[Weights], list[dict[str, Any]], list[float]]:
    """Of each checkpoint that the run wrote: weights, training state, and the recall that was reported beside it."""
    weights, states, recalls = [], [], []

    def on_eval(row: dict[str, Any]) -> None:
        found, _ = newest_checkpoint(run)
        if found is not None:
            assert found.step == row["step"]
            weights.append(load_file(found.weights_file))
            states.append(found.training_state())
            recalls.append(row["recall_at_10"])

    train(config, run, on_eval=on_eval, **options)
    return weights, states, recalls


def moments(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for slot in state["optimizer"]["state"].values() for value in slot.values()]


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_the_average_is_evaluated_and_saved_and_the_optimizer_goes_on_with_the_raw_weights(
    tiny_config: ProjectConfig, tmp_path: Path, loss: str
) -> None:
    """Against a run without an average, whose weights are the raw ones, and the recursion over them in plain numbers.

    A sweep's ``best/`` is made from ``newest_weights``.
    """
    settings = {
        "loss_function": loss,
        "training.stage_examples": 16,
        "training.budget_examples": 64,
        "model.init_logit_bias": -3.0,
    }
    config = tiny_config.with_overrides(settings)
    raw, raw_states, raw_recalls = stages(config, tmp_path / "raw")
    averaged_config = config.with_overrides({"optimizer.ema_decay": DECAY})
    averaged, states, recalls = stages(averaged_config, tmp_path / "averaged")
    assert len(raw) == len(averaged) == 4

    start = load_model(config)
    use_token_rows(start.network, config, lambda: raw[0]["token_embedding._extra_state"][4:].long())
    expected = {name: parameter.detach().double() for name, parameter in start.network.named_parameters()}
    for after, weights, state, raw_state in zip(raw, averaged, states, raw_states, strict=True):
        expected = {name: DECAY * mean + (1 - DECAY) * after[name].double() for name, mean in expected.items()}
        for name, mean in expected.items():
            torch.testing.assert_close(weights[name].double(), mean, rtol=1e-5, atol=1e-6)
            assert torch.equal(state["raw_weights"][name], after[name]), name
        for ours, theirs in zip(moments(state), moments(raw_state), strict=True):
            assert torch.equal(ours, theirs)

    photos = evaluation_set(run_shards(config).valid, start.preprocessing, storage_of(config))
    for weights, recall in zip(averaged, recalls, strict=True):
        start.network.load_state_dict(weights)
        measured = evaluate(start, photos, batch_size=64, plan=plan_precision(config), max_bad_share=0.01)
        assert measured.metrics["recall_at_10"] == recall
    assert recalls != raw_recalls

    final = newest_weights(tmp_path / "averaged")
    assert final is not None
    load_weights(start.network, final)
    assert all(torch.equal(tensor, averaged[-1][name]) for name, tensor in start.network.state_dict().items())
