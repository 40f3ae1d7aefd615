"""A sweep on a Ray cluster (two nodes on this machine), one of which is lost in the middle of a trial."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.backend.cluster import nodes_at
from fashionclip_tune.tuning.planning.slots import Node, Slots, plan_cluster_slots

ROOT = Path(__file__).parents[3]


def test_slots_of_a_cluster_fit_its_machines() -> None:
    def plan(nodes: Any, device: Any = "cuda", trials: Any = 99, concurrent: Any = None, share: Any = None) -> Any:
        return plan_cluster_slots(nodes, device=device, num_trials=trials, max_concurrent=concurrent, gpus_per_trial=share)

    head, big, small = Node(cpus=8, gpus=0), Node(cpus=16, gpus=4), Node(cpus=2, gpus=1)
    assert plan([head, big]) == Slots(4, 4.0, 1.0)
    assert plan([head, big, small]) == Slots(5, 2.0, 1.0)
    assert plan([small], share=0.25) == Slots(2, 1.0, 0.25)  # two cores feed two trials
    assert plan([big, small], concurrent=1).count == 1
    assert plan([head, small], device="cpu") == Slots(10, 1.0, 0.0)
    assert plan([head, small], device="cpu", trials=3).count == 3
    with pytest.raises(UserError, match=r"no machine for --device cuda: .*cpus=8"):
        plan([head])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_an_address_where_nobody_answers_is_said_at_once(address: Any) -> None:
    with pytest.raises(UserError, match=rf"--address {address}: no Ray cluster answers.*ray start --head"):
        nodes_at(address)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes with a core each, as processes of this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.second = cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_node_costs_its_trial_the_time_since_its_last_checkpoint(garments: Path, tmp_path: Path, cluster: Any) -> None:
    command = [sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", garments, "--results", tmp_path, "--name", "it"]
    settings = ("--set", "model.pretrained=none", "--set", "training.batch_size=16", "--budget-examples", "288")
    driver = subprocess.Popen(
        [*map(str, command), *settings, "--num-trials", "3", "--scheduler", "none", "--address", cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )
    deadline = time.monotonic() + 300
    stages = dict[Any, Any]()
    while not (len(stages) >= 2 and min(stages.values()) >= 3):
        stages = {path.name: len(list(path.glob("evaluations/*"))) for path in (tmp_path / "it" / "trials").glob("*")}
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < deadline, f"both nodes must work: {stages}"
        time.sleep(0.01)
    cluster.remove_node(cluster.second, allow_graceful=False)
    out, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, out
    content = json.loads((tmp_path / "it" / "sweep.json").read_text())
    assert [(row["trial_id"], row["state"]) for row in content["trials"]] == [(f"{n:04d}", "COMPLETE") for n in range(3)]
    for folder in (tmp_path / "it" / "trials").iterdir():
        steps = [json.loads(path.read_text())["step"] for path in sorted((folder / "evaluations").glob("*.json"))]
        assert steps == list(range(0, 19, 2)), "each stage once"
        assert not (folder / "warnings.log").exists(), "trained again from a checkpoint with the same figures"
