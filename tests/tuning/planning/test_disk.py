import shutil
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index, run_shards
from fashionclip_tune.errors import StorageError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.start_facts import facts_of_starts
from fashionclip_tune.storage.checkpoint import checkpoint_steps
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.train import run_training, train
from fashionclip_tune.tuning.persistence.export import export_whole
from fashionclip_tune.tuning.planning.dataset import rows_of_captions
from fashionclip_tune.tuning.planning.disk import DiskPlan, ModelBytes, decoded_bytes, plan_disk, room_within

GB = 10**9


def config(model: str, **freeze: bool) -> ProjectConfig:
    return ProjectConfig(clip_model=model).with_overrides({f"freeze.{name}": value for name, value in freeze.items()})


def test_bytes_of_the_three_models_by_hand() -> None:
    """Parameters: 151.3 M and 149.6 M, of which 25.3 M are their token tables; SigLIP2 375.2 M, of which 196.6 M are.

    Of the tables 6,000 rows are trained, and 12,000 of SigLIP2's, which has a tokenizer of its own.
    """
    models = plan_disk([config("ViT-B-32"), config("ViT-B-16"), config("ViT-B-16-SigLIP2-256")], 30, 6_000).models
    small, large = models["ViT-B-32"], models["ViT-B-16-SigLIP2-256"]
    assert small.trained == pytest.approx(4 * (151.3e6 - 25.3e6 + 3.1e6), rel=1e-3)
    assert small.weights == pytest.approx(small.trained, rel=2e-3)  # and its masks, and which rows they are
    assert small.state == pytest.approx(1.549e9, rel=1e-3)
    assert small.tables == 4 * 49_408 * 512
    assert large.weights == pytest.approx(4 * (375.2e6 - 196.6e6 + 9.2e6), rel=2e-3)
    assert large.trained == pytest.approx(4 * (375.2e6 - 196.6e6 + 9.2e6), rel=1e-3)
    assert large.tables == 4 * 256_000 * 768
    assert large.durable_weights == pytest.approx(2 * (375.2e6 - 196.6e6 + 9.2e6), rel=1e-3)
    # Rows that are frozen stay in each state.
    frozen = plan_disk([config("ViT-B-16-SigLIP2-256", token_embedding=True)], 30, 6_000).models["ViT-B-16-SigLIP2-256"]
    assert frozen == large


def test_what_began_in_the_first_edition_has_its_whole_table_in_each_state() -> None:
    first = config("ViT-B-16-SigLIP2-256", token_embedding=True).with_overrides({"training.edition": 1})
    large = plan_disk([first], 30).models["ViT-B-16-SigLIP2-256"]
    assert large.weights == pytest.approx(4 * 375.2e6, rel=1e-3)
    assert large.trained == pytest.approx(4 * (375.2e6 - 196.6e6), rel=1e-3)
    assert large.tables == 0


def test_of_an_architecture_the_configuration_that_trains_most_counts() -> None:
    plan = plan_disk([config("tiny-clip", text_tower=True), config("tiny-clip"), config("tiny-clip", image_tower=True)], 1)
    assert plan.models["tiny-clip"] == plan_disk([config("tiny-clip")], 1).models["tiny-clip"]


def test_an_average_of_the_weights_is_kept_beside_those_that_are_trained() -> None:
    averaged = config("tiny-clip").with_overrides({"optimizer.ema_decay": 0.99})
    plain, more = (plan_disk([each], 1).models["tiny-clip"] for each in (config("tiny-clip"), averaged))
    assert more.durable_state - plain.durable_state == more.state - plain.state == plain.trained
    assert plan_disk([config("tiny-clip"), averaged, config("tiny-clip")], 1).models["tiny-clip"] == more


@pytest.fixture
def evening() -> DiskPlan:
    """The three models, 30 trials."""
    return plan_disk([config("ViT-B-32"), config("ViT-B-16"), config("ViT-B-16-SigLIP2-256")], 30, 6_000)


B32, B16, SIGLIP2 = 129.1e6, 127.4e6, 187.8e6  # trained parameters: see above
KEPT = 3 * 2 * (B32 + B16 + SIGLIP2) + 30e6


def test_an_evening_with_the_three_models_takes_less_than_8_gb_of_a_drive(evening: Any) -> None:
    """One trial at a time, as on a notebook's 12.7 GB of host memory."""
    running = (2 * 3 * 4 + 2) * SIGLIP2  # the next state beside the last one, and weights
    assert evening.durable_bytes(dict.fromkeys(evening.models, 1)) == pytest.approx(running + KEPT, rel=1e-3)
    assert evening.durable_bytes(dict.fromkeys(evening.models, 1)) < 8 * GB


@pytest.mark.parametrize("count", [2, 3])
def test_side_by_side_only_one_trial_at_a_time_has_its_state_twice(evening: Any, count: Any) -> None:
    """Several of ViT-B-32 share a card that SigLIP2 has alone; whose next state is the largest is not known."""
    at_a_time = {**dict.fromkeys(evening.models, 1), "ViT-B-32": count}
    assert evening.durable_bytes(at_a_time) == pytest.approx(count * 14 * B32 + 12 * SIGLIP2 + KEPT, rel=1e-3)


def test_as_many_of_each_model_count_as_run_side_by_side() -> None:
    """Two of the small one, 3 GB of state each, or one of the large one with 4: three checkpoints of each are there at most."""
    bytes_of = plan()
    always = 3 * (GB + 2 * GB) + 2 * 2 * GB + 10 * 10**6  # weights of the best three of each, the winner twice, figures
    assert bytes_of.local_bytes({"a": 1, "b": 1}) == 3 * 4 * GB + always
    assert bytes_of.local_bytes({"a": 2, "b": 1}) == 2 * 3 * 3 * GB + always
    assert bytes_of.local_bytes({"a": 2, "b": 2}) == 2 * 3 * 4 * GB + always


def test_what_no_step_changes_is_there_once_a_run() -> None:
    """And once in each of the best three, and in the winner, which is there twice until it is whole."""
    bytes_of = DiskPlan({"a": ModelBytes(GB, GB, tables=5 * GB)}, num_trials=0)
    assert bytes_of.local_bytes({"a": 2}) == 2 * (3 * 3 * GB + 5 * GB) + 3 * 6 * GB + 2 * 6 * GB
    assert bytes_of.durable_bytes({"a": 1}) == 3 * GB // 2 + max(3.5 * GB + 3 * GB, GB // 2 + 6 * GB)


def test_where_little_is_trained_the_winner_is_the_most() -> None:
    """Two trials of a model of 1 GB of which a hundredth is trained end, and it is written in fp32."""
    plan = DiskPlan({"a": ModelBytes(GB, GB // 100)}, num_trials=1)
    assert plan.durable_bytes({"a": 2}) == (3 + 2) * GB // 200 + GB + 10**6


def plan() -> DiskPlan:
    return DiskPlan({"a": ModelBytes(GB, GB), "b": ModelBytes(2 * GB, GB)}, num_trials=10)


def test_a_checkpoint_over_the_budget_is_not_begun_and_an_older_one_goes_first(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fashionclip_tune.storage.folder.time.sleep", lambda seconds: None)
    sweep_dir = tmp_path / "sweep"
    (sweep_dir / "best").mkdir(parents=True)
    (sweep_dir / "best" / "weights").write_bytes(b"x" * 5_000_000)
    run_dir = sweep_dir / "trials" / "0001-a"
    config = tiny_config.with_overrides({"freeze.text_tower": True})
    bytes_of = plan_disk([config], 1, rows_of_captions(config, cached_index(run_shards(config).train))).models["tiny-clip"]
    num_bytes, always = bytes_of.state, 5_000_000 + bytes_of.tables

    room_for = room_within(always + int(2.5 * num_bytes), sweep_dir, run_dir)
    run_training(config, run_dir, RunCallbacks(reserve_space=room_for))
    assert checkpoint_steps(run_dir) == [8, 10]
    shutil.rmtree(run_dir)

    room_for = room_within(always + int(1.5 * num_bytes), sweep_dir, run_dir)
    with pytest.raises(StorageError, match=r"trials/0001-a/checkpoints/next, which takes .* larger --disk-budget-gb"):
        run_training(config, run_dir, RunCallbacks(reserve_space=room_for))
    assert checkpoint_steps(run_dir) == [2]
    result = train(config, run_dir, resume_from=run_dir)
    assert [row["step"] for row in result.history] == [0, 2, 4, 6, 8, 10]


def test_a_winner_over_the_budget_takes_the_place_of_the_one_before_or_is_refused(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fashionclip_tune.storage.folder.time.sleep", lambda seconds: None)
    loaded, folder = load_model(tiny_config), RemoteFolder(tmp_path)
    export_whole(loaded, tmp_path / "best")
    num_bytes = sum(folder.sizes().values())
    monkeypatch.setattr("fashionclip_tune.tuning.persistence.export.export_openclip", lambda loaded, to: to.mkdir(parents=True))
    folder.keep_below(2 * num_bytes)
    export_whole(loaded, tmp_path / "refit" / "best", folder)
    assert sum(folder.sizes().values()) == num_bytes, "the one at another place is not touched"
    folder.keep_below(int(1.5 * num_bytes))
    export_whole(loaded, tmp_path / "best", folder)
    assert folder.sizes() == {}
    folder.keep_below(num_bytes // 2)
    with pytest.raises(StorageError, match="larger --disk-budget-gb"):
        export_whole(loaded, tmp_path / "best", folder)


def test_decoded_photos_count_once_for_each_way_in_which_they_are_prepared() -> None:
    """ViT-B-32 and ViT-B-16 share theirs."""
    models = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256", "ViT-B-16-SigLIP/webli")
    starts = facts_of_starts({model: ProjectConfig(clip_model=model) for model in models})
    of_one = {size: 3 * size**2 + 8 for size in (224, 256)}
    assert [decoded_bytes([starts[model]], 7_000, 20) for model in models] == [
        7_000 * of_one[size] for size in (224, 224, 256, 224)
    ]
    assert decoded_bytes([starts[model] for model in models[:3]], 7_000, 20) == 7_000 * (of_one[224] + of_one[256])
    assert decoded_bytes(starts.values(), 7_000, 20) == 7_000 * (2 * of_one[224] + of_one[256])
    assert decoded_bytes(starts.values(), 7_000, 1.5) == 0.75 * GB
