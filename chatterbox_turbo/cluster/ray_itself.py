"""Ray, where it is installed."""

from __future__ import annotations

import os
import socket
from typing import Any

from ..errors import TurboError, describe

PATIENCE = 10.0  # seconds that a cluster has to answer


def imported(part: str = "") -> Any:
    """The module ``ray``, with a part of it (``data``, ``serve``) imported.

    Raises:
        TurboError: it cannot be imported.
    """
    try:
        import ray

        if part == "data":
            import ray.data
        if part == "serve":
            import ray.serve
    except ImportError as error:
        name = ".".join(filter(None, ("ray", part)))
        raise TurboError(f"{name} cannot be imported: {error}.", "", "pip install 'chatterbox-turbo[ray]'.") from error
    return ray


def connect(ray: Any, **options: Any) -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start one here, where there is no connection yet.

    Args:
        options: of ``ray.init``.

    Raises:
        TurboError: nobody answers there (Ray itself says so after minutes), or it refuses.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise TurboError(
                f"No Ray answers at {address}: {error}.", "RAY_ADDRESS names it.", "Start it, or unset RAY_ADDRESS."
            ) from error
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TurboError(f"Ray cannot be reached: {describe(error)}.", "", "See RAY_ADDRESS.") from error


def may_grow(ray: Any) -> bool:
    """Whether the cluster may get more machines: one that somebody has named may, this machine alone does not."""
    return bool(os.environ.get("RAY_ADDRESS")) or len(ray.nodes()) > 1
