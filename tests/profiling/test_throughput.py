"""The gain of two at a time, from measurements that are made up; and one real process on the CPU."""

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import OutOfMemoryError, UserError
from fashionclip_tune.profiling import probe
from fashionclip_tune.profiling import throughput as pace
from fashionclip_tune.profiling.throughput import known_pace, measure_pace, measured_packing_gain, packing_gain, time_steps


def test_the_gain_is_what_two_finish_more_of_and_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ProjectConfig
) -> None:
    monkeypatch.setattr(pace, "probe_identity", lambda config: f"card-{config.training.batch_size}")
    assert known_pace(tiny_config) is None
    assert packing_gain(tiny_config) is None
    found = measure_pace(tiny_config, lambda config, count: {1: [100.0], 2: [60.0, 58.0]}[count])
    assert (found.alone, found.side_by_side) == (100, 118)
    assert packing_gain(tiny_config) == pytest.approx(0.18)

    def does_not_fit(config: ProjectConfig, count: int) -> list[float]:
        if count == 2:
            raise OutOfMemoryError("no")
        return [100.0]

    assert measure_pace(tiny_config, does_not_fit).packing_gain is None


def test_a_process_times_its_steps_and_reports_its_failure(tiny_config: ProjectConfig) -> None:
    results: queue.Queue[Any] = queue.Queue()
    time_steps(tiny_config.to_dict(), 1, threading.Barrier(1), results)
    assert results.get_nowait() > 10
    broken = {**tiny_config.to_dict(), "clip_model": "ViT-Z"}
    time_steps(broken, 1, threading.Barrier(1), results)
    assert results.get_nowait().startswith("UserError: clip_model = 'ViT-Z'")


def test_for_a_plan_what_does_not_fit_gains_nothing_and_what_fails_is_said(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ProjectConfig, logged: list[str]
) -> None:
    monkeypatch.setattr(pace, "probe_identity", lambda config: "a card")

    def answers(alone: object, together: object) -> None:
        def run(config: ProjectConfig, count: int) -> list[float]:
            answer = alone if count == 1 else together
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(pace, "run_side_by_side", run)

    answers(UserError("the pace was not measured: a process ended with status -9"), [])
    assert measured_packing_gain(tiny_config) is None
    assert packing_gain(tiny_config) is None
    assert "ended with status -9; how many trials of tiny-clip share the card follows from their memory" in logged[-1]
    answers([100.0], OutOfMemoryError("no"))
    assert (measured_packing_gain(tiny_config), packing_gain(tiny_config)) == (0.0, 0.0)
    answers([100.0], [70.0, 71.0])
    assert measured_packing_gain(tiny_config) == pytest.approx(0.41)
    assert packing_gain(tiny_config) == pytest.approx(0.41)
    assert sum("measuring tiny-clip on this card" in line for line in logged) == 3


class Full:
    """In the place of a process: what it would put into the queue when it has ended."""

    def __init__(self, answers: list[str]) -> None:
        self.Barrier, self.Queue, self._answers = threading.Barrier, queue.Queue, answers

    def Process(self, args: tuple[Any, ...], **_: Any) -> SimpleNamespace:
        nothing = {"join": lambda timeout: None, "kill": lambda: None, "exitcode": None if self._answers else -9}
        return SimpleNamespace(start=lambda: self._answers and args[-2].put(self._answers.pop(0)), **nothing)


def test_a_process_for_which_the_card_is_full_says_so_whatever_torch_calls_it(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ProjectConfig
) -> None:
    def full(config: ProjectConfig) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(pace, "load_random_model", full)
    results: queue.Queue[Any] = queue.Queue()
    time_steps(tiny_config.to_dict(), 1, threading.Barrier(1), results)
    said = results.get_nowait()
    assert said.startswith("OutOfMemoryError: CUDA error")
    # The other one, which waited for it in vain, may be the first to answer.
    monkeypatch.setattr(pace.multiprocessing, "get_context", lambda _: Full(["BrokenBarrierError: ", said]))
    with pytest.raises(OutOfMemoryError, match="the pace was not measured: OutOfMemoryError: CUDA error"):
        pace.run_side_by_side(tiny_config, 2)
    monkeypatch.setattr(pace.multiprocessing, "get_context", lambda _: Full(["BrokenBarrierError: ", "KeyError: 'a'"]))
    with pytest.raises(UserError, match="the pace was not measured"):
        pace.run_side_by_side(tiny_config, 2)
    monkeypatch.setattr(pace, "_LOOK_S", 0.01)
    monkeypatch.setattr(pace.multiprocessing, "get_context", lambda _: Full([]))
    with pytest.raises(UserError, match="the pace was not measured: a process ended with status -9"):
        pace.run_side_by_side(tiny_config, 2)


def test_trials_that_differ_in_rates_only_share_a_measured_peak(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ProjectConfig, cache_of_the_tests: Path
) -> None:
    assert probe.known_peak(tiny_config) is None
    card = SimpleNamespace(name="T4", total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(probe, "cuda_of_driver", lambda: 12040)
    config = tiny_config.with_overrides({"device": "cuda", "training.micro_batch_size": 8})
    identity = probe.probe_identity(config)
    (cache_of_the_tests / "probes").mkdir(exist_ok=True)
    (cache_of_the_tests / "probes" / f"{identity}.json").write_text('{"16": null, "8": 12345}')
    assert probe.known_peak(config.with_overrides({"training.learning_rate": 1e-6})) == 12345
    assert probe.known_peak(config.with_overrides({"training.micro_batch_size": None})) > 2**60
    assert probe.known_peak(config.with_overrides({"training.micro_batch_size": 4})) is None
    assert probe.known_peak(config.with_overrides({"freeze.image_tower": True})) is None
    monkeypatch.setattr(probe, "cuda_of_driver", lambda: 13000)
    assert probe.known_peak(config) is None
