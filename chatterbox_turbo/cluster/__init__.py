"""Several machines on Ray: ``speak`` is a job that speaks lines into files, ``application`` the server with replicas.

Each process has one model that it loads once; what one process does is ``speech`` and ``server``, unchanged.
May not: know of the command, or import Ray before it is asked for (extra ``ray``).
"""

from .job import speak
from .serving import application

__all__ = ["application", "speak"]
