"""Starts a Ray that lets nobody else in, and warns of a cluster that lets in everybody.

Whoever reaches a Ray runs code as its user. Ours listens on this machine's loopback interface only and asks for a token,
which is in the environment of the driver and of Ray's processes and nowhere else; its folder is closed to other users.
"""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import _raylet
from ray._private import ray_constants

from fashionclip_tune.errors import UnavailableError

_log = logging.getLogger(__name__)

_TOKEN_BYTES = 32
_ANSWERS_WITHIN_S = 10.0
# Any call will do that needs no arguments: an open Ray answers it, a guarded one asks for a token.
_A_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
# Ray's sockets lie up to 83 characters below it, and the path of a socket has 107 at most, on macOS 103.
_LONGEST_PARENT = 20


@contextmanager
def environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables, or removes those that are None, and puts back what was there."""
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def own_ray(**arguments: Any) -> Iterator[None]:
    """A Ray of our own, as ``ray.init(address="local", **arguments)`` starts it, that lets nobody else in.

    The user's own ``RAY_AUTH_MODE`` and token are for other Rays: they count again afterwards.

    Raises:
        UnavailableError: its processes did not come up in time.
    """
    guard = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(_TOKEN_BYTES),  # comes before the others that a user may have
        "RAY_AUTH_TOKEN_PATH": None,
        # Of a Ray that has no other machines, which so listens on the loopback interface; the default on other systems.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }
    constant = "ENABLE_RAY_CLUSTER"
    before = getattr(ray_constants, constant)
    try:
        with environment(guard), _closed_folder() as folder:
            _read_again()
            setattr(ray_constants, constant, False)
            _start(address="local", _temp_dir=str(folder), **arguments)
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        setattr(ray_constants, constant, before)
        _read_again()


def _start(**arguments: Any) -> None:
    try:
        ray.init(**arguments)
    except Exception as error:
        if type(error) is not Exception:  # Ray has no type of its own for its processes that did not come up in time
            raise
        raise UnavailableError(
            f"Ray did not start here: {str(error).partition('.')[0]}. The machine may be too busy: give the command again"
        ) from error


def _read_again() -> None:
    """Ray keeps what it has read of the environment when it was imported, or in an earlier life in this process."""
    core: Any = _raylet
    core.Config.initialize("")  # first: a thread of an earlier Ray must not find token mode without a token
    core.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _closed_folder() -> Iterator[Path]:
    """For Ray's sockets and logs, which it opens to all users: a folder below one that only its owner may enter.

    It goes when Ray has ended; where Ray was killed, its logs stay.
    """
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    closed = tempfile.mkdtemp(prefix="fct-", dir=parent if len(parent) <= _LONGEST_PARENT else "/tmp")
    try:
        yield Path(closed) / "ray"
    finally:
        shutil.rmtree(closed, ignore_errors=True)  # a process that is ending may still write


def warn_of_open(name: str) -> None:
    """Logs a warning where a Ray that this process is connected to lets in whoever reaches it. ``name``: for that line."""
    if ray.is_initialized() and asks_for_token(ray.get_runtime_context().gcs_address) is False:
        _log.warning(
            f"warning:  {name} asks for no token: whoever reaches it runs code there as its user; "
            "start it with RAY_AUTH_MODE=token (docs/machines.md)"
        )


def asks_for_token(gcs_address: str) -> bool | None:
    """Whether a Ray refuses a stranger; None: it does not answer strangers at all, or not in a way that is known."""
    with grpc.insecure_channel(gcs_address) as channel:
        try:
            channel.unary_unary(_A_CALL)(b"", timeout=_ANSWERS_WITHIN_S)
        except grpc.RpcError as error:
            return True if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
    return False
