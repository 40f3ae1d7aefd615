"""What a Ray cluster has, asked before a sweep is planned for it."""

import logging
import socket

import ray

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.backend.guarded_ray import warn_of_open
from fashionclip_tune.tuning.planning.slots import Node

_CONNECT_TIMEOUT_S = 10


def nodes_at(address: str | None) -> list[Node] | None:
    """The machines of the cluster at an address; None: a sweep on this machine. Logs a warning of an open one.

    Raises:
        UserError: nothing answers there.
    """
    if address is None:
        warn_of_open("the Ray that this process is connected to")
        return None
    try:
        host, separator, port = address.rpartition("/")[2].rpartition(":")
        if separator:  # Ray itself would wait for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--address {address}: no Ray cluster answers ({reason}); start one with: ray start --head") from error
    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        warn_of_open(f"the Ray cluster at {address}")
    finally:
        ray.shutdown()
    return [Node(int(found.get("CPU", 0)), int(found.get("GPU", 0))) for found in resources if found.get("CPU", 0) >= 1]
