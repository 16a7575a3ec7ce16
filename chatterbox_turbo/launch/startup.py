"""What runs as Python starts. Everything here is paid for by each process in which ``CHATTERBOX_TURBO`` is set."""

from __future__ import annotations

import os
import sys

from .messages import refuse
from .settings import Settings, from_environment

PACKAGE = "chatterbox"  # upstream's
# GNU OpenMP reads them when torch is loaded. It keeps a pool of threads for each thread that has computed. Once those
# of all pools are more than the processors, they wait awake for a microsecond, and for ten where they are to wait
# actively; that would be minutes for a single pool, whose own three milliseconds the second variable leaves.
WAITING = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}


class Waiting:
    """A finder that finds nothing, and sets the hooks when somebody looks for upstream's package for the first time.

    wrapt alone takes longer to import than Python takes to start, and most processes never get here.
    """

    def __init__(self, settings: Settings):
        self.settings: Settings | None = settings

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Nothing, ever: the finders after this one look."""
        settings = self.settings
        if settings is None or name.partition(".")[0] != PACKAGE:
            return
        self.settings = None
        try:
            from .hooks import install
        except ImportError as error:  # wrapt, in an environment into which this was installed without dependencies
            refuse(f"Chatterbox models cannot be optimized: {error}.", settings.strict)
        else:
            install(settings)


def start() -> None:
    """Wait for upstream's package, where the environment asks for it; a second call does nothing."""
    settings = from_environment()
    if settings is not None and sys.platform == "linux" and not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)
    if settings is not None and not any(isinstance(finder, Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting(settings))
