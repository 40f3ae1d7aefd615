"""How a machine is divided, on cards that are made up; and that Ray keeps to it, with logical GPUs."""

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UnavailableError, UserError
from fashionclip_tune.machine.hardware import Machine
from fashionclip_tune.models.architecture import with_default_freeze
from fashionclip_tune.profiling.memory import CONTEXT_BYTES
from fashionclip_tune.tuning.backend import worker as gpu_share
from fashionclip_tune.tuning.backend.worker import claim_gpu_share
from fashionclip_tune.tuning.planning import allocation
from fashionclip_tune.tuning.planning.allocation import Allotment, allot, find_site
from fashionclip_tune.tuning.planning.gpu_memory import GB, Card, GpuMemory, plan_host_memory
from fashionclip_tune.tuning.planning.settings import SweepSettings
from tests.support.networks import lite

B32, B16, SIGLIP2 = (ProjectConfig(clip_model=name, device="cuda") for name in ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256"))
T4 = Card("T4", int(15.8 * GB))
SHARED = {"max_concurrent": 2}
ROOMY = Machine(cores=2, memory_bytes=64 * GB, shared_memory_bytes=4 * GB)
NOTEBOOK = Machine(cores=2, memory_bytes=int(12.7 * GB), shared_memory_bytes=4 * GB)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@cache
def gpu_memory(card: Card, packing: float | None) -> GpuMemory:
    """Estimates take a second: they are made once for each card."""
    return GpuMemory(card, packing=lambda config: packing)


def divided(machine: Machine = ROOMY, card: Card = T4, packing: float | None = None, **flags: object) -> Allotment:
    gpu = gpu_memory(card, packing)
    wanted = {"num_trials": 12, "max_concurrent": None, "gpus_per_trial": None, **flags}
    configs = [with_default_freeze(config, card.memory_bytes, {}) for config in (B32, B16, SIGLIP2)]
    return allot(configs, device="cuda", machine=machine, gpu=gpu, **wanted)


def test_small_trials_share_a_t4_and_large_ones_have_it_alone() -> None:
    allotment = divided()
    assert [allotment.at_a_time(config) for config in (B32, B16)] == [2, 1]
    small, large = allotment.share_of(B32), allotment.share_of(B16)
    assert (small.gpus, large.gpus) == (0.5, 1.0)
    assert (small.cpus, large.cpus) == (1.0, 2.0)
    assert small.gpu_memory_bytes == T4.memory_bytes // 2
    assert small.gpu_needed_bytes is not None
    assert CONTEXT_BYTES < small.gpu_needed_bytes <= T4.memory_bytes // 2
    # Loader processes: as many as there are cores for each.
    assert [allotment.fitted(config).training.num_workers for config in (B32, B16)] == [1, 2]


def test_packing_that_was_measured_to_gain_little_is_not_done() -> None:
    assert divided(packing=0.09).at_a_time(B32) == 1
    assert divided(packing=0.11).at_a_time(B32) == 2


def test_what_two_gain_is_measured_once_for_each_model_of_which_two_fit() -> None:
    asked = list[tuple[str, int | None]]()

    def measure(config: ProjectConfig) -> float:
        asked.append((config.model_name, config.training.micro_batch_size))
        return 0.02

    other = B32.with_overrides({"training.batch_size": 32})
    gpu = GpuMemory(T4, packing=lambda config: None)
    for _ in range(2):
        gpu.learn_gains([B32, other, B16], measure)
    assert asked == [("ViT-B-32", 64)]
    assert [gpu.side_by_side(config) for config in (B32, other, B16)] == [1, 1, 1]
    assert [gpu.packing_gain(config) for config in (B32, other, B16)] == [0.02, 0.02, None]
    # What is known of one configuration holds for the model, and nothing is measured; neither is it in a dry run.
    known = GpuMemory(T4, packing=lambda config: 0.3 if config is other else None)
    known.learn_gains([B32, other], measure)
    look = GpuMemory(T4, packing=lambda config: None)
    look.learn_gains([B32, other])
    assert (known.packing_gain(B32), look.packing_gain(B32), look.side_by_side(B32)) == (0.3, None, 2)
    assert len(asked) == 1


@pytest.mark.parametrize(("flags", "dry_run", "measures"), [({}, False, True), ({}, True, False), (SHARED, False, False)])
def test_a_sweep_measures_what_two_gain_unless_a_flag_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, flags: Mapping[str, Any], dry_run: bool, measures: bool
) -> None:
    """And what a flag says is not cut to one by what was measured before."""
    monkeypatch.setattr(allocation, "find_card", lambda *_, **__: T4)
    monkeypatch.setattr(allocation, "choose_device", lambda _: torch.device("cuda"))
    asked = list[str]()
    monkeypatch.setattr(allocation, "measured_packing_gain", lambda config: asked.append(config.model_name) or 0.05)
    monkeypatch.setattr(allocation, "packing_gain", lambda config: None if measures else 0.05)
    settings = SweepSettings(device="cuda", **flags)
    site = find_site(settings, None, dry_run=dry_run, machine=ROOMY)
    assert site.divide([B32], settings, 12).at_a_time(B32) == (2 if flags else 1)
    assert asked == (["ViT-B-32"] if measures else [])
    finished = find_site(settings, None, dry_run=False, machine=ROOMY, begun={"state": "FINISHED"})
    assert finished.measure_gain is None


def test_the_token_embedding_is_frozen_on_a_small_card_unless_someone_speaks_of_it() -> None:
    """In sweeps of the first edition: since then only the rows that occur are trained, which no card minds."""
    small, large = T4.memory_bytes, 24 * GB
    first, b32 = (config.with_overrides({"training.edition": 1}) for config in (SIGLIP2, B32))
    assert with_default_freeze(first, small, {}).freeze.token_embedding
    assert not with_default_freeze(first, small, {"freeze.token_embedding": False}).freeze.token_embedding
    assert not with_default_freeze(first, large, {}).freeze.token_embedding
    assert not with_default_freeze(b32, small, {}).freeze.token_embedding
    assert not with_default_freeze(SIGLIP2, small, {}).freeze.token_embedding


def test_rows_that_do_not_occur_take_nothing_of_a_card() -> None:
    """Of SigLIP2's table, 256,000 rows of 3,072 bytes: with gradients and moments four times that, now 12,000 rows of it."""
    gpu, more = GpuMemory(T4), GpuMemory(T4)
    gpu.clip_rows, more.clip_rows = 6_000, 12_000
    config = SIGLIP2.with_overrides({"training.micro_batch_size": 16})
    first = config.with_overrides({"training.edition": 1})
    saved = gpu.need(first).memory_bytes - gpu.need(config).memory_bytes
    assert saved >= 4 * (256_000 - 12_000) * 3_072 - 2**21  # and the places of all
    assert more.need(config).memory_bytes - gpu.need(config).memory_bytes >= 4 * 12_000 * 3_072
    assert more.need(first) == gpu.need(first)


def test_a_micro_batch_is_halved_until_it_fits_and_what_never_does_is_refused() -> None:
    gpu = GpuMemory(Card("small", 8 * GB))
    need = gpu.need(B16)
    assert need.micro_batch_size == 32
    assert need.memory_bytes <= 8 * GB < gpu.need(B16.with_overrides({"training.micro_batch_size": 64})).memory_bytes * 2
    assert divided(card=Card("small", 9 * GB)).fitted(B16).training.micro_batch_size == 32
    with pytest.raises(UserError, match=r"ViT-B-16 needs .* GB of GPU memory for one photo at a time, the card has 2"):
        GpuMemory(Card("tiny", 2 * GB)).need(B16)


def test_a_batch_whose_statistics_are_updated_is_not_halved_but_refused(tmp_path: Path) -> None:
    fixed = ProjectConfig(clip_model=lite(tmp_path, "test_efficientnet"))
    updating = fixed.with_overrides({"model.batch_norm": "update"})
    whole = GpuMemory(T4).need(updating)
    assert whole.micro_batch_size == 64
    small = Card("small", whole.memory_bytes - 1)
    assert GpuMemory(small).need(fixed).micro_batch_size < 64
    with pytest.raises(UserError, match=r"for the 64 photos of a batch, the card has 0\.\d: set model\.batch_norm=fixed"):
        GpuMemory(small).need(updating)


def test_a_share_that_a_flag_gives_sizes_the_micro_batch_and_refuses_what_it_does_not_hold() -> None:
    half, whole = GpuMemory(T4, 0.5), GpuMemory(T4)
    assert half.need(B16).micro_batch_size < whole.need(B16).micro_batch_size == 64
    assert half.need(B16).memory_bytes <= T4.memory_bytes // 2
    allotment = allot([B16], device="cuda", machine=ROOMY, gpu=half, num_trials=12, max_concurrent=None, gpus_per_trial=0.5)
    assert allotment.at_a_time(B16) == 2
    assert allotment.fitted(B16).training.micro_batch_size == half.need(B16).micro_batch_size
    needs = (
        r"SigLIP2-256 needs .* GB .* one photo at a time, --gpus-per-trial 0.25 allows 4.0 of the card's 15.8: give a larger"
    )
    with pytest.raises(UserError, match=needs):
        GpuMemory(T4, 0.25).need(SIGLIP2.with_overrides({"freeze.token_embedding": True, "training.micro_batch_size": 1}))


def loading(num_workers: int, side: int, batch_size: int = 64) -> float:
    """A fork server, and each process that it starts with two batches that wait and one that it makes."""
    return 0.4e9 + num_workers * (0.1e9 + 3 * batch_size * 3 * (2 * side) ** 2)


def test_host_memory_follows_batches_and_counts_what_loader_processes_are_forked_from() -> None:
    def worker_bytes(*configs: ProjectConfig, cores: float = 2) -> int:
        return plan_host_memory(configs, cores=cores).worker_bytes

    large, none = (B32.with_overrides({"training.batch_size": 1024, "training.num_workers": count}) for count in (2, 0))
    assert worker_bytes(B32) == loading(2, side=224)
    assert worker_bytes(B32, cores=1) == loading(1, side=224)
    assert worker_bytes(large) == worker_bytes(large, SIGLIP2, B32) == loading(2, side=224, batch_size=1024)
    assert worker_bytes(none) == 0


def test_host_memory_is_that_of_what_really_runs_side_by_side() -> None:
    """On a notebook box (2 cores, 12.7 GB) at most 10 GB are planned for: two processes that only ever hold a ViT-B-32, or one
    that has held both of the others."""
    allotment = divided(NOTEBOOK)
    small, large = allotment.groups[2], allotment.groups[1]
    assert (small.models, small.count) == (("ViT-B-32",), 2)
    assert (large.models, large.count) == (("ViT-B-16", "ViT-B-16-SigLIP2-256"), 1)
    for_all = 10**9 + 400 * 10**6 + 256 * 2**20
    a_process, b32, b16, siglip2 = 2.2e9, 4 * 151.3e6, 4 * 149.6e6, 4 * 375.2e6
    assert small.host_bytes == pytest.approx(for_all + 2 * (a_process + loading(1, side=224) + 2 * b32), rel=1e-3)
    assert large.host_bytes == pytest.approx(for_all + a_process + loading(2, side=256) + b16 + 2 * siglip2, rel=1e-3)
    assert allotment.host_bytes == max(small.host_bytes, large.host_bytes) < 10 * GB
    assert allotment.cuts == ()


def test_host_memory_cuts_what_runs_side_by_side() -> None:
    allotment = divided(Machine(2, int(11.3 * GB), GB))
    assert allotment.slots.count == 1
    assert allotment.at_a_time(B32) == 1
    assert allotment.share_of(B32).gpus == 1.0
    assert "ViT-B-32: 2 trials side by side to 1: they would take 9." in allotment.cuts[0]
    # All have the card alone then, so that one process may have kept the weights of all three.
    (host_bytes,) = {each.host_bytes for each in allotment.groups.values()}
    b32, b16, siglip2 = 4 * 151.3e6, 4 * 149.6e6, 4 * 375.2e6
    expected = 1.4e9 + 256 * 2**20 + 2.2e9 + loading(2, side=256) + b32 + b16 + 2 * siglip2
    assert host_bytes == pytest.approx(expected, rel=1e-3)
    assert divided(max_concurrent=1).host_bytes == host_bytes
    with pytest.raises(UserError, match="GB of host memory, this machine has 3"):
        divided(Machine(2, 3 * GB, GB))


def test_two_cards_have_as_many_trials_each_and_stay_empty_where_the_host_has_no_room() -> None:
    cards = Card("T4", T4.memory_bytes, 2)
    assert [divided(card=cards).at_a_time(config) for config in (B32, B16)] == [4, 2]
    # Room for three of the small ones: one a card, so that Ray's shares add up to no more.
    three = divided(Machine(4, int(21.5 * GB), GB), card=cards)
    assert three.groups[2].count == 2
    assert three.share_of(B32).gpus == 1.0
    # Room for one of the large ones only: then no two trials run at all, whichever they are.
    one = divided(Machine(4, 13 * GB, GB), card=cards)
    assert (one.slots.count, one.groups[1].count) == (1, 1)


def test_flags_are_cut_to_what_exists() -> None:
    allotment = divided(max_concurrent=5)
    assert allotment.slots.count == 2
    assert "--max-concurrent 5 to 2" in allotment.cuts[0]
    assert divided(gpus_per_trial=1.0).slots.count == 1
    no_shared_memory = divided(Machine(2, 64 * GB, 64 * 2**20))
    assert no_shared_memory.fitted(B16).training.num_workers == 0
    assert "/dev/shm" in " ".join(no_shared_memory.cuts)


class FakeCuda:
    """A card of 16 GB whose memory others give back as time passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_gb: list[int]) -> None:
        self.fraction, self._free, self.waits = 0.0, free_gb, 0
        cuda = SimpleNamespace(
            current_device=lambda: 0,
            get_device_properties=lambda device: SimpleNamespace(total_memory=16 * GB),
            set_per_process_memory_fraction=lambda fraction: setattr(self, "fraction", fraction),
            mem_get_info=lambda: (self._free[min(self.waits, len(free_gb) - 1)] * GB, 16 * GB),
            memory_reserved=lambda: 0,
        )
        monkeypatch.setattr(gpu_share, "torch", SimpleNamespace(cuda=cuda))

    def sleep(self, seconds: float) -> None:
        self.waits += 1


def test_a_trial_caps_itself_waits_for_memory_and_fails_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCuda(monkeypatch, free_gb=[1, 1, 9])
    claim_gpu_share(8 * GB, 6 * GB, sleep=card.sleep)
    assert card.fraction == pytest.approx((8 * GB - CONTEXT_BYTES) / (16 * GB))
    assert card.waits == 2
    stuck = FakeCuda(monkeypatch, free_gb=[1])
    with pytest.raises(UnavailableError, match=r"0\.9 GiB free after 10 s.*another program"):
        claim_gpu_share(8 * GB, 6 * GB, wait_s=10, sleep=stuck.sleep)
    assert stuck.waits == 5


def test_a_trial_waits_for_a_card_that_has_no_room_for_a_context_either(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCuda(monkeypatch, free_gb=[9])
    answer = gpu_share.torch.cuda.mem_get_info

    def mem_get_info() -> tuple[int, int]:
        if card.waits < 2:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        return answer()

    monkeypatch.setattr(gpu_share.torch.cuda, "mem_get_info", mem_get_info)
    claim_gpu_share(8 * GB, 6 * GB, sleep=card.sleep)
    assert card.waits == 2


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_runs_small_trials_together_and_a_large_one_alone(tmp_path: Path) -> None:
    from ray import cloudpickle

    from fashionclip_tune.tuning.backend.hooks import SweepJob
    from fashionclip_tune.tuning.backend.runner import run_trials
    from fashionclip_tune.tuning.schedulers import NO_STOPPING
    from fashionclip_tune.tuning.study.search import StoppingSearch
    from fashionclip_tune.tuning.study.study import SweepStudy
    from tests.support import toys

    cloudpickle.register_pickle_by_value(toys)
    names = ["ViT-B-32", "ViT-B-32", "ViT-B-16", "ViT-B-32", "ViT-B-32"]
    allotment = divided()

    def space(trial: Any) -> Any:
        rate = trial.suggest_float("learning_rate", 1e-5, 1e-2)
        return {"clip_model": names[trial.number], "loss_function": "contrastive", "training.learning_rate": rate}

    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=2)
    assert run_trials(
        study,
        StoppingSearch(study, NO_STOPPING, len(names)),
        SweepJob(
            space=space,
            build=B32.with_overrides,
            sweep_dir=tmp_path,
            slots=allotment.slots,
            share_of=allotment.share_of,
        ),
        trainable=toys.takes_two_seconds,
    )
    spans = [tuple(map(float, path.read_text().split())) for path in sorted(tmp_path.glob("trials/*/span"))]
    assert len(spans) == len(names)

    def overlap(one: int, other: int) -> bool:
        return spans[one][0] < spans[other][1] and spans[other][0] < spans[one][1]

    assert not any(overlap(2, other) for other in (0, 1, 3, 4))
    assert overlap(0, 1) or overlap(3, 4)
    assert time.time() > spans[2][1]
