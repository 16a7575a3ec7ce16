"""What runs as Python starts. Everything here is paid for by each process in which ``CHATTERBOX_TURBO`` is set."""

from __future__ import annotations

from .messages import refuse
from .settings import from_environment


def start() -> None:
    """Wait for upstream's modules, where the environment asks for it; a second call does nothing."""
    settings = from_environment()
    if settings is None:
        return
    try:
        from .hooks import install
    except ImportError as error:  # wrapt, in an environment into which this was installed without dependencies
        refuse(f"Chatterbox models cannot be optimized: {error}.", settings.strict)
    else:
        install(settings)
