"""Ray, where it is installed."""

from __future__ import annotations

from typing import Any

from ..errors import TurboError


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
