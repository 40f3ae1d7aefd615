"""Nobody else gets into a sweep's Ray; and a Ray that lets in anybody is warned of. Real Rays, real strangers."""

import json
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fashionclip_tune.errors import UnavailableError
from fashionclip_tune.tuning.backend import guarded_ray
from fashionclip_tune.tuning.backend.guarded_ray import asks_for_token

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.ray, pytest.mark.slow]
INTRUDER = """
import os, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=50)

@ray.remote(num_cpus=0)
def whoami():
    return os.getuid()

print("got in as", ray.get(whoami.remote()))
"""
_TOKEN_MODE = {"RAY_AUTH_MODE": "token"}
# Else Ray takes 127.0.0.1 for the machine's address in the network, where nothing listens.
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def without_auth(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | more


def environment_of(pid: int) -> dict[str, str]:
    content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(entry.partition("=")[::2] for entry in content.split("\0") if "=" in entry)


def descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [pid, *(each for child in children for each in descendants(child))]


def listening(pids: list[int]) -> list[tuple[str, int, str]]:
    """(address, port, process) of all TCP sockets of these processes."""
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [re.match(r'\S+\s+\d+\s+\d+\s+(\S+):(\d+)\s+\S+\s+users:\(\("([^"]+)",pid=(\d+)', line) for line in lines]
    return [(each[1], int(each[2]), each[3]) for each in found if each and int(each[4]) in pids]


class Sweep:
    """One that is running, as a user's shell started it, whose environment is for another, open Ray."""

    def __init__(self, garments: Path, folder: Path) -> None:
        self.home, self.temp = folder / "home", Path("/tmp") / f"fct-t{secrets.token_hex(3)}"
        self.home.mkdir()
        self.temp.mkdir()
        few = ("--set", "model.pretrained=none", "--set", "training.batch_size=16", "--max-concurrent", "1", "--name", "it")
        few = (*few, "--num-trials", "2", "--budget-examples", "14400000", "--grace-examples", "14400000")
        self.driver = subprocess.Popen(
            [*map(str, (sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", garments, "--results", folder, *few))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=without_auth(RAY_AUTH_MODE="disabled", HOME=str(self.home), RAY_TMPDIR=str(self.temp)),
        )
        self.folder = folder / "it"
        deadline = time.monotonic() + 240
        while not list(self.folder.glob("trials/*/evaluations/*")):
            assert self.driver.poll() is None, self.driver.stdout and self.driver.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        self.processes = descendants(self.driver.pid)
        environments = (environment_of(pid) for pid in self.processes[1:])
        self.token = next(found["RAY_AUTH_TOKEN"] for found in environments if "RAY_AUTH_TOKEN" in found)
        (gcs,) = (port for _, port, name in listening(self.processes) if name == "gcs_server")
        self.address = f"127.0.0.1:{gcs}"

    def end(self) -> str:
        self.driver.send_signal(signal.SIGINT)
        out, _ = self.driver.communicate(timeout=120)
        return str(out)


@pytest.fixture(scope="module")
def running(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    sweep = Sweep(garments, tmp_path_factory.mktemp("results"))
    yield sweep
    if sweep.driver.poll() is None:
        sweep.end()


def intruder(address: str, **auth: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", INTRUDER, address]
    return subprocess.run(
        command, env=without_auth(**_ON_LOOPBACK, **auth), capture_output=True, text=True, timeout=200, check=False
    )


def test_who_has_no_token_is_refused_and_who_has_it_is_let_in(running: Sweep) -> None:
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, {**_TOKEN_MODE, "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        done = intruder(running.address, **stranger)
        assert done.returncode != 0
        assert "got in" not in done.stdout
        assert "Failed to connect to Ray cluster" in done.stderr
    done = intruder(running.address, **_TOKEN_MODE, RAY_AUTH_TOKEN=running.token)
    assert f"got in as {os.getuid()}" in done.stdout, done.stderr


def answer(port: int, method: str, streams: bool = False) -> grpc.StatusCode:
    """To a stranger."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            if streams:
                list(channel.stream_stream(method)(iter([b""]), timeout=10, metadata=[("node_id", os.urandom(28).hex())]))
            else:
                channel.unary_unary(method)(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_every_port_is_on_the_loopback_interface_and_asks_for_the_token(running: Sweep) -> None:
    found = listening(descendants(running.driver.pid))
    assert {address for address, _, _ in found} <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}, found
    names = [name for _, _, name in found]
    assert names.count("raylet") == 2
    assert names.count("gcs_server") == 1
    refused = 0
    for _, port, name in found:
        if "RuntimeEnv" in name:
            continue
        calls = [
            *("/ray.rpc.NodeManagerService/RequestWorkerLease", "/ray.rpc.ObjectManagerService/Pull"),
            *("/ray.rpc.CoreWorkerService/PushTask", "/ray.rpc.InternalKVGcsService/InternalKVPut"),
        ]
        answers = [answer(port, call) for call in calls]
        answers += [answer(port, "/ray.rpc.ObjectManagerService/Push", streams=True)]
        answers += [answer(port, "/ray.rpc.syncer.RaySyncer/StartSync", streams=True)]
        assert set(answers) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}, (name, answers)
        refused += grpc.StatusCode.UNAUTHENTICATED in answers
    assert refused >= 5, "gcs_server, raylet twice, a worker, the driver"
    assert running.driver.poll() is None


def test_the_runtime_environments_port_asks_too(running: Sweep) -> None:
    """It would install and start what it is told, and speaks HTTP."""
    from urllib.error import HTTPError
    from urllib.request import urlopen

    (port,) = (port for _, port, name in listening(descendants(running.driver.pid)) if "RuntimeEnv" in name)
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"http://127.0.0.1:{port}/get_or_create_runtime_env", data=b"", timeout=10)


def test_the_token_is_in_no_file_and_on_no_command_line(running: Sweep) -> None:
    processes = descendants(running.driver.pid)
    assert len(processes) > 5
    for pid in processes:
        assert running.token not in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    assert not (running.home / ".ray").exists()
    for folder in (running.temp, running.folder, running.home):
        done = subprocess.run(["grep", "-rlF", running.token, folder], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, ""), f"the token is in {done.stdout}"
    assert any("raylet" in path.name for path in running.temp.rglob("*")), "Ray's logs and sockets are there"


def test_the_folder_of_rays_sockets_is_closed_to_other_users(running: Sweep) -> None:
    (closed,) = running.temp.glob("fct-*")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert list(closed.glob("ray/session_*/sockets/plasma_store"))
    if os.getuid() == 0:
        for intruding in (["ls", closed], ["test", "-e", closed / "ray"]):
            done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *intruding], check=False)
            assert done.returncode != 0


def test_at_its_end_a_sweep_leaves_nothing_of_its_ray(running: Sweep) -> None:
    out = running.end()
    assert f"go on with: {sys.executable} sweeps/run_sweep.py" in out
    assert "warning" not in out
    assert list(running.temp.iterdir()) == []


def test_one_process_has_one_guarded_ray_after_another_and_its_environment_back(tmp_path: Path) -> None:
    """Ray remembers mode and token of its first life; a user's own are for another cluster."""
    script = """
import os, ray
from fashionclip_tune.tuning.backend.guarded_ray import own_ray
tokens = []
for _ in range(2):
    with own_ray(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, logging_level=40):
        tokens.append(ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"]).remote()))
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_AUTH_TOKEN_PATH"] == "mine", dict(os.environ)
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert ray._private.ray_constants.ENABLE_RAY_CLUSTER
assert len(set(tokens)) == 2 and all(len(token) == 64 for token in tokens)
print("well")
"""
    environment = without_auth(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="mine", HOME=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["well"]), done.stderr
    assert not (tmp_path / ".ray").exists()


START = """
import json, sys, time, ray
context = ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
print(json.dumps(context.address_info["gcs_address"]), flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["disabled", "token"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Another's Ray: its mode, its address, and what its users have in their environment."""
    auth = {"RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(tmp_path)}
    auth |= _ON_LOOPBACK
    with subprocess.Popen(
        [sys.executable, "-c", START],
        env=without_auth(**auth),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as head:
        assert head.stdout is not None
        address: Any = json.loads(head.stdout.readline())
        yield request.param, address, auth
        head.communicate("")


def test_an_open_cluster_is_warned_of_in_one_line_and_a_guarded_one_is_not(
    cluster: tuple[str, str, dict[str, str]], garments: Path, tmp_path: Path
) -> None:
    """Its own mode holds. Who has a token in any case, as Ray writes it, is warned too: the cluster does not ask for it."""
    mode, address, auth = cluster
    assert asks_for_token(address) is (mode == "token")
    few = (
        "--set",
        "model.pretrained=none",
        "--set",
        "training.batch_size=16",
        "--samples-per-second",
        "100",
        "--device",
        "cpu",
    )
    command = [sys.executable, str(ROOT / "sweeps" / "run_sweep.py"), "--address", address, "--data", str(garments), *few]
    for its_mode in {mode, "token"}:
        done = subprocess.run(
            [*command, "--dry-run", "--results", str(tmp_path)],
            env=without_auth(**{**auth, "RAY_AUTH_MODE": its_mode}),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        warned = [line for line in done.stdout.splitlines() if line.startswith("warning:")]
        expected = f"warning:  the Ray cluster at {address} asks for no token: whoever reaches it runs code there as its user; "
        assert [line.startswith(expected) for line in warned] == ([True] if mode == "disabled" else [])


def test_a_ray_that_does_not_come_up_in_time_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Ray waits for its processes for 30 s, and then raises what has no type of its own."""

    def busy(**arguments: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because the GCS is overloaded.")

    before = dict(os.environ)
    monkeypatch.setattr(guarded_ray.ray, "init", busy)
    said = r"^Ray did not start here: The current node timed out during startup\. .*again$"
    with pytest.raises(UnavailableError, match=said), guarded_ray.own_ray():
        pytest.fail("it has not started")
    assert dict(os.environ) == before


def test_where_nobody_answers_it_is_not_known() -> None:
    assert asks_for_token("127.0.0.1:1") is None
