import shutil

import pytest

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import StorageError, UserError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.storage.checkpoint import checkpoint_steps
from fashionclip_tune.storage.folder import DurableFolder
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.train import run_training, train
from fashionclip_tune.tuning.persistence.export import export_whole
from fashionclip_tune.tuning.planning.disk import DiskBudget, DiskPlan, ModelBytes, plan_disk, room_within, used_bytes

GB = 10**9


def config(model: str, **freeze: bool) -> ProjectConfig:
    return ProjectConfig(clip_model=model).with_overrides({f"freeze.{name}": value for name, value in freeze.items()})


def test_bytes_of_the_three_models_by_hand():
    """Parameters: 151.3 M and 149.6 M; SigLIP2 375.2 M, of which 196.6 M are its token embedding."""
    plan = plan_disk([config("ViT-B-32"), config("ViT-B-16"), config("ViT-B-16-SigLIP2-256", token_embedding=True)], 30)
    small, large = plan.models["ViT-B-32"], plan.models["ViT-B-16-SigLIP2-256"]
    assert small.trained == pytest.approx(4 * 151.3e6, rel=1e-3)
    assert small.weights == pytest.approx(small.trained, rel=1e-4)  # and its masks
    assert small.state == pytest.approx(1.816e9, rel=1e-3)
    assert large.weights == pytest.approx(4 * 375.2e6, rel=1e-3)
    assert large.trained == pytest.approx(4 * (375.2e6 - 196.6e6), rel=1e-3)
    assert large.durable_weights == pytest.approx(2 * (375.2e6 - 196.6e6), rel=1e-3)


def test_of_an_architecture_the_configuration_that_trains_most_counts():
    plan = plan_disk([config("tiny-clip", text_tower=True), config("tiny-clip"), config("tiny-clip", image_tower=True)], 1)
    assert plan.models["tiny-clip"] == plan_disk([config("tiny-clip")], 1).models["tiny-clip"]


def test_an_average_of_the_weights_is_kept_beside_those_that_are_trained():
    averaged = config("tiny-clip").with_overrides({"optimizer.ema_decay": 0.99})
    plain, more = (plan_disk([each], 1).models["tiny-clip"] for each in (config("tiny-clip"), averaged))
    assert more.durable_state - plain.durable_state == more.state - plain.state == plain.trained
    assert plan_disk([config("tiny-clip"), averaged, config("tiny-clip")], 1).models["tiny-clip"] == more


@pytest.fixture
def evening() -> DiskPlan:
    """The three models, 30 trials, the token embedding frozen as on a notebook's card."""
    return plan_disk([config("ViT-B-32"), config("ViT-B-16"), config("ViT-B-16-SigLIP2-256", token_embedding=True)], 30)


KEPT = 3 * 2 * (151.3e6 + 149.6e6 + 178.6e6) + 30e6


def test_an_evening_with_the_three_models_takes_less_than_8_gb_of_a_drive(evening):
    """One trial at a time, as on a notebook's 12.7 GB of host memory."""
    running = 2 * 3 * 714.4e6 + 357.2e6  # the next state beside the last one, and weights
    assert evening.durable_bytes(evening.one_at_a_time) == pytest.approx(running + KEPT, rel=1e-3)
    assert evening.durable_bytes(evening.one_at_a_time) < 8 * GB


@pytest.mark.parametrize("count", [2, 3])
def test_side_by_side_only_one_trial_at_a_time_has_its_state_twice(evening, count):
    """Several of ViT-B-32 share a card that SigLIP2 has alone; whose next state is the largest is not known."""
    at_a_time = {**evening.one_at_a_time, "ViT-B-32": count}
    assert evening.durable_bytes(at_a_time) == pytest.approx(count * 3.5 * 605.2e6 + 3 * 714.4e6 + KEPT, rel=1e-3)


def test_as_many_of_each_model_count_as_run_side_by_side():
    """Two of the small one, 3 GB of state each, or one of the large one with 4: three checkpoints of each are there at most."""
    bytes_of = plan()
    always = 3 * (GB + 2 * GB) + 2 * 2 * GB + 10 * 10**6  # weights of the best three of each, the winner twice, figures
    assert bytes_of.local_bytes({"a": 1, "b": 1}) == 3 * 4 * GB + always
    assert bytes_of.local_bytes({"a": 2, "b": 1}) == 2 * 3 * 3 * GB + always
    assert bytes_of.local_bytes({"a": 2, "b": 2}) == 2 * 3 * 4 * GB + always


def test_where_little_is_trained_the_winner_is_the_most():
    """Two trials of a model of 1 GB of which a hundredth is trained end, and it is written in fp32."""
    plan = DiskPlan({"a": ModelBytes(GB, GB // 100)}, num_trials=1)
    assert plan.durable_bytes({"a": 2}) == (3 + 2) * GB // 200 + GB + 10**6
    assert budget(1.12, {0: 0.1}, of=plan, is_durable=True).has_room(7, "a", [(1, "a")], ended=())
    assert not budget(1.10, {0: 0.1}, of=plan, is_durable=True).has_room(7, "a", [(1, "a")], ended=())


def plan() -> DiskPlan:
    return DiskPlan({"a": ModelBytes(GB, GB), "b": ModelBytes(2 * GB, GB)}, num_trials=10)


class Folder:
    """Of which only sizes are asked: so many GB a trial, in weights that it keeps."""

    def __init__(self, used_by: dict[int, float]) -> None:
        self._sizes = {f"trials/{number:04d}-a/evaluations/0.json": int(GB * size) for number, size in used_by.items()}
        self.budget_bytes = 0

    def sizes(self) -> dict[str, int]:
        return self._sizes

    def keep_below(self, max_bytes: int) -> None:
        self.budget_bytes = max_bytes


def budget(gigabytes: float, used_by: dict[int, float], *, of: DiskPlan | None = None, is_durable: bool = False) -> DiskBudget:
    return DiskBudget(int(gigabytes * GB), of or plan(), Folder(used_by), is_durable=is_durable)


def test_a_trial_starts_beside_others_where_all_of_them_can_grow_to_their_most():
    assert budget(40, {0: 5, 1: 1}).has_room(7, "b", [(1, "a")], ended=[0])  # 5 + 9 + 12
    assert not budget(40, {0: 20, 1: 1}).has_room(7, "b", [(1, "a")], ended=[0])
    assert budget(40, {0: 5, 1: 1, 7: 9}).has_room(
        7, "b", [(1, "a")], ended=[0]
    )  # one that goes on: what it has is in its most
    assert budget(16, {0: 5.5, 1: 3}, is_durable=True).has_room(7, "a", [(1, "a")], ended=[0])  # 5.5 + 2 * 3.5 + 3
    assert not budget(16, {0: 6.5, 1: 3}, is_durable=True).has_room(7, "a", [(1, "a")], ended=[0])


def test_a_trial_that_would_be_alone_always_starts():
    """By the plan it fits. What is there beside it may be what an ended trial's process still holds: it goes then."""
    assert budget(30, {0: 40}).has_room(7, "a", [], ended=[0])


def test_of_ended_trials_counts_what_will_stay():
    run, state = "trials/0003-a", {"model.safetensors": 10, "training_state.pt": 20, "checkpoint.json": 1}
    sizes = {f"{run}/checkpoints/step_{step:08d}/{name}": size for step in (4, 8) for name, size in state.items()}
    sizes |= {f"{run}/state/step_00000008/{name}": size for name, size in state.items()}
    sizes |= {f"{run}/weights/step_00000008.safetensors": 5, f"{run}/config.json": 2, "best/open_clip_model.safetensors": 99}
    sizes |= {"study.journal": 3}
    assert used_bytes(sizes, growing=(), ended=()) == 2 * 31 + 31 + 5 + 2 + 3
    assert used_bytes(sizes, growing=(), ended=[3]) == 10 + 2 * 1 + 5 + 2 + 3
    assert used_bytes(sizes, growing=[3], ended=()) == 3


def test_a_budget_that_not_one_trial_fits_is_refused():
    with pytest.raises(UserError, match=r"--disk-budget-gb 5 is too little: one trial at a time takes up to 25\.0 GB"):
        budget(5, {})


def test_a_checkpoint_over_the_budget_is_not_begun_and_an_older_one_goes_first(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("fashionclip_tune.storage.folder.time.sleep", lambda seconds: None)
    sweep_dir = tmp_path / "sweep"
    (sweep_dir / "best").mkdir(parents=True)
    (sweep_dir / "best" / "weights").write_bytes(b"x" * 5_000_000)
    run_dir = sweep_dir / "trials" / "0001-a"
    config = tiny_config.with_overrides({"freeze.text_tower": True})
    num_bytes = plan_disk([config], 1).models["tiny-clip"].state

    room_for = room_within(5_000_000 + int(2.5 * num_bytes), sweep_dir, run_dir)
    run_training(config, run_dir, RunCallbacks(reserve_space=room_for))
    assert checkpoint_steps(run_dir) == [8, 10]
    shutil.rmtree(run_dir)

    room_for = room_within(5_000_000 + int(1.5 * num_bytes), sweep_dir, run_dir)
    with pytest.raises(StorageError, match=r"trials/0001-a/checkpoints/next, which takes .* larger --disk-budget-gb"):
        run_training(config, run_dir, RunCallbacks(reserve_space=room_for))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]
    result = train(config, run_dir, resume_from=run_dir)
    assert [row["step"] for row in result.history] == [0, 2, 4, 6, 8, 10]


def test_a_winner_over_the_budget_takes_the_place_of_the_one_before_or_is_refused(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("fashionclip_tune.storage.folder.time.sleep", lambda seconds: None)
    loaded, folder = load_model(tiny_config), DurableFolder(tmp_path)
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
