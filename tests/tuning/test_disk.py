import pytest

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.disk import DiskBudget, DiskPlan, ModelBytes, plan_disk

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
    used = {0: 0.1}

    def budget(gigabytes: float) -> DiskBudget:
        return DiskBudget(int(gigabytes * GB), plan, is_durable=True, used=lambda but: int(GB * sum(used.values())))

    assert budget(1.12).has_room(7, "a", [(1, "a")])
    assert not budget(1.10).has_room(7, "a", [(1, "a")])


def plan() -> DiskPlan:
    return DiskPlan({"a": ModelBytes(GB, GB), "b": ModelBytes(2 * GB, GB)}, num_trials=10)


def budget(gigabytes: float, used_by: dict[int, float], *, is_durable: bool = False) -> DiskBudget:
    def used(but: list[int]) -> int:
        return int(GB * sum(size for number, size in used_by.items() if number not in but))

    return DiskBudget(int(gigabytes * GB), plan(), is_durable=is_durable, used=used)


def test_a_trial_starts_where_it_and_the_running_ones_can_grow_to_their_most():
    assert budget(40, {0: 5}).has_room(7, "a", [])
    assert budget(40, {0: 5, 1: 1}).has_room(7, "b", [(1, "a")])  # 5 + 9 + 12
    assert not budget(40, {0: 20, 1: 1}).has_room(7, "b", [(1, "a")])
    assert budget(40, {0: 20}).has_room(7, "b", [])
    assert budget(40, {0: 20, 7: 9}).has_room(7, "b", [])  # one that goes on: its own are not added to what it may grow to
    assert budget(16, {0: 9}, is_durable=True).has_room(7, "a", [])  # 9 + 3.5 + 3
    assert not budget(16, {0: 10}, is_durable=True).has_room(7, "a", [])
    assert budget(16, {0: 5.5, 1: 3}, is_durable=True).has_room(7, "a", [(1, "a")])  # 5.5 + 2 * 3.5 + 3
    assert not budget(16, {0: 6.5, 1: 3}, is_durable=True).has_room(7, "a", [(1, "a")])


def test_a_budget_that_not_one_trial_fits_is_refused():
    with pytest.raises(UserError, match=r"--disk-budget-gb 5 is too little: one trial at a time takes up to 25\.0 GB"):
        budget(5, {})
