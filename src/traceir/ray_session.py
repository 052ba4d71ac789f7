"""A session of Ray for work that is spread over workers."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from traceir.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Share:
    """What each worker takes of its machine."""

    cpus: float = 1
    gpus: float = 0


ONE_CPU: Final = Share()


@contextmanager
def on_ray(workers: int, share: Share) -> Iterator[None]:
    """Connects to $RAY_ADDRESS, or starts Ray on this machine; a session that is there already is used and left alone.

    Raises InputError where Ray is missing, does not answer, or lacks the resources for a single worker.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("a cluster needs the package ray; pip install 'traceir[cluster]'") from error
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS", "")
        resources = {"num_cpus": max(os.cpu_count() or 1, math.ceil(workers * share.cpus)), "include_dashboard": False}
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdecimal():  # where nothing listens, Ray itself would go on trying for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(address or "local", configure_logging=False, log_to_driver=False, **({} if address else resources))
        except (OSError, RuntimeError, ValueError) as error:
            where = f"the cluster of $RAY_ADDRESS ({address})" if address else "this machine"
            raise InputError(f"Ray cannot be used on {where}: {error}; is it running, and of the same release?") from error
    try:
        resources = ray.cluster_resources()
        for name, wanted in (("CPU", share.cpus), ("GPU", share.gpus)):
            if wanted > resources.get(name, 0):
                raise InputError(
                    f"a worker wants {wanted:g} {name} and Ray has {resources.get(name, 0):g}; "
                    "start Ray's nodes with it, or ask for less with --device or --threads"
                )
        with _quiet():
            yield
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray's report of each run off the terminal, unless asked for; Ray's log files have it."""
    level = logging.INFO if log.isEnabledFor(logging.INFO) else logging.CRITICAL
    handlers = logging.getLogger("ray.data").handlers
    consoles = {handler: handler.level for handler in handlers if isinstance(handler, logging.StreamHandler)}
    for console in consoles:
        console.setLevel(level)
    try:
        yield
    finally:
        for console, before in consoles.items():
            console.setLevel(before)
