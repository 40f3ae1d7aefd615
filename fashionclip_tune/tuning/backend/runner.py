"""Runs a study's trials on Ray: one of our own on this machine, or a cluster that is there."""

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import ray
from ray import tune
from ray.train._internal.session import get_session
from ray.tune import PlacementGroupFactory, Trainable
from ray.tune.trainable import wrap_function

from fashionclip_tune.machine.child_processes import end_with_us
from fashionclip_tune.tuning.backend.guarded_ray import environment, own_ray
from fashionclip_tune.tuning.backend.hooks import Announcer, StudyScheduler, StudySearcher, SweepJob
from fashionclip_tune.tuning.backend.stop_signal import StopSignal
from fashionclip_tune.tuning.backend.worker import run_trial
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.planning.time_budget import TimeBudget
from fashionclip_tune.tuning.study.search import Search
from fashionclip_tune.tuning.study.study import SweepStudy
from fashionclip_tune.tuning.trial import TrialPlan

# Ray waits this long for a stopped trial's cleanup before it reuses the actor; with its 2 s, a cleanup of 4 s hung the
# whole sweep. A checkpoint of a large model on a slow disk takes a minute.
_CLEANUP_TIMEOUT_S = 600
_OBJECT_STORE_BYTES = 256 * 2**20
_HEAD, _RAYLET = "gcs_server", "raylet"  # names of Ray's two processes that are started by this one
_LOOKS_AFTER_RAY_EVERY_S = 0.5
EXIT_WITHOUT_RAY = 130
"""The status of a sweep whose Ray was killed: interrupted, like one that was asked to end."""


def run_trials(
    study: SweepStudy,
    search: Search,
    job: SweepJob,
    *,
    on_event: Callable[[], None] = lambda: None,
    stop: StopSignal | None = None,
    address: str | None = None,
    trainable: Callable[[dict[str, Any]], None] = run_trial,
    go_on: str = "go on with --resume",
) -> bool:
    """Continues what is unfinished, then does what the search decides until that is over; False if it was ended early.

    Args:
        on_event: called after each event of a trial.
        address: of a running cluster; None: a Ray of our own.
        trainable: what a worker runs.
        go_on: how, in words, where Ray is killed.
    """
    if search.is_over():
        return True
    if job.time_budget is not None and not job.time_budget.may_start():
        return False  # Ray would be started for nothing
    stop = stop or StopSignal()
    with (
        _connected(job.slots, address, go_on, stop),
        stop.listening(),
        _ending_in_time(job.time_budget, stop),
        tempfile.TemporaryDirectory(prefix="fashionclip-tune-") as snapshots,
        ExitStack() as connected,
    ):
        if stop.received:  # while Ray started
            return False
        connected.enter_context(stop.connected())
        tuner = tune.Tuner(
            tune.with_resources(_patient(trainable), _resources),
            tune_config=tune.TuneConfig(
                metric=job.metric,
                mode="max",
                search_alg=StudySearcher(study, search, job, stop),
                scheduler=StudyScheduler(study, search, stop),
                num_samples=-1,  # until the searcher says that it is over
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                reuse_actors=True,  # a short trial does not pay a start-up, and finds the weights in memory
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=snapshots,  # of no use: the journal and the trials' folders are what a sweep resumes from
                verbose=0,
                callbacks=[Announcer(on_event), stop],
            ),
        )
        tuner.fit()
    return search.is_over()


def _patient(trainable: Callable[[dict[str, Any]], None]) -> type[Trainable]:
    """The function as Ray wraps it, but waiting for the function's cleanup when its actor is stopped.

    Ray waits before it reuses an actor, but not when it ends one: the last trial of a sweep would lose the checkpoint
    that it is writing. (At the very end Ray itself kills what takes longer than ten seconds.)
    """
    wrapped: Any = wrap_function(trainable)

    class Patient(wrapped):
        def cleanup(self) -> None:
            session = get_session()
            if session is not None:
                session.finish(timeout=_CLEANUP_TIMEOUT_S)
            super().cleanup()

    return Patient


def _resources(ray_config: dict[str, Any]) -> PlacementGroupFactory:
    """What Ray sets aside for a trial: its own share."""
    share = TrialPlan.from_ray(ray_config).share
    amounts = {"CPU": share.cpus, "GPU": share.gpus}
    return PlacementGroupFactory([{name: amount for name, amount in amounts.items() if amount}])


@contextmanager
def _ending_in_time(time_budget: TimeBudget | None, stop: StopSignal) -> Iterator[None]:
    """At the end of the time trials are told to stop as by SIGTERM: at their next step, with a checkpoint."""
    if time_budget is None:
        yield
        return

    def end() -> None:
        time_budget.is_over = stop.received = True

    timer = threading.Timer(time_budget.left_s(), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _ended_with_ray(go_on: str) -> Iterator[None]:
    """Ends this process, saying how to go on, when the Ray that it started is killed under it.

    That is what preemption does where it tells all processes at once. Ray's own client would wait a minute for them to come
    back, within calls that nothing else interrupts, and then end this process without a word.
    """
    over, started = threading.Event(), _started_by_us(_HEAD, _RAYLET)

    def watch() -> None:
        while not over.wait(_LOOKS_AFTER_RAY_EVERY_S):
            if dead := {name for name, process in started.items() if not _is_alive(process)}:
                print(
                    f"Ray's own processes have ended ({', '.join(sorted(dead))}): killed, or out of memory. What is recorded "
                    f"is kept, and trials go on from their last checkpoints: {go_on}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_WITHOUT_RAY)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except (ray.exceptions.RayError, tune.TuneError):  # of a call that was under way, before the processes are seen to be gone
        time.sleep(4 * _LOOKS_AFTER_RAY_EVERY_S)  # the watcher goes on
        raise
    finally:
        over.set()
        watcher.join()


def _end_agents_with_us() -> None:
    """All that Ray started ends within seconds of a driver that is killed, but for the two agents below its raylet.

    They would try for a minute to tell the head, which is dead too.
    """
    for raylet in _started_by_us(_RAYLET).values():
        for child in raylet.children():
            end_with_us(child.pid)


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keeps ``ray.init`` from replacing it, for good: Ray's raises SystemExit, which its own start may swallow.

    From another thread Ray would not replace it, but a second sweep of the process then waits for ever.
    """
    name, utils = "set_sigterm_handler", ray._private.utils
    rays = getattr(utils, name)
    setattr(utils, name, lambda handler: None)
    try:
        yield
    finally:
        setattr(utils, name, rays)


def _started_by_us(*names: str) -> dict[str, psutil.Process]:
    """Ray's processes of these names below this one, by name."""
    return {name: child for child in psutil.Process().children() if (name := child.name()) in names and _is_alive(child)}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _connected(slots: Slots, address: str | None, go_on: str, stop: StopSignal) -> Iterator[None]:
    """A Ray of our own, or the one at ``address``, unless this process is connected to one."""
    settings = {
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": str(_CLEANUP_TIMEOUT_S),
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would wait ten seconds for a trial in the middle of a stage, then kill it
        # Its snapshots are of no use here, and one that is written while the one before it is copied fails with a traceback.
        "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run writes its own events, under a readable name
        # With a searcher that Ray does not know it starts one process at a time, and each imports torch for seconds.
        "TUNE_MAX_PENDING_TRIALS_PG": str(slots.count),
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    here: dict[str, Any] = {
        # Logical: what exists has been divided among the trials already, and Ray is not to make one wait for ever.
        "num_cpus": max(1, round(slots.count * slots.cpus_per_trial)),
        "num_gpus": slots.num_gpus,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    if address is None:
        # Tune takes a worker that this monitor has ended for a mistake of its own and ends the whole sweep; one that the
        # system ends for want of memory is retried like any dead process.
        settings["RAY_memory_monitor_refresh_ms"] = "0"
    with ExitStack() as stack:
        stack.enter_context(environment(settings))
        if not ray.is_initialized():
            with stop.listening(), _own_sigterm_handler():
                if address is None:
                    stack.enter_context(own_ray(**here, **common))  # its processes inherit the environment
                else:
                    ray.init(address=address, runtime_env={"env_vars": settings}, **common)
                    stack.callback(ray.shutdown)
            if address is None:
                _end_agents_with_us()
                stack.enter_context(_ended_with_ray(go_on))
        yield
