"""The server of ``server/`` on Ray Serve: replicas with a model each, as many as the requests in flight ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidRequestError
from ..runtime.arguments import count
from ..server.limits import Limits
from .ray_itself import imported


def application(
    load: Callable[[], Any],
    *,
    limits: Limits | None = None,
    folder: Path | None = None,
    key: str | None = None,
    replicas: tuple[int, int] = (1, 8),
    cpus: float = 1.0,
    gpus: float = 0.0,
    autoscaling: Mapping[str, Any] | None = None,
) -> Any:
    """What ``ray.serve.run`` takes, and ``serve run`` where it is a name of a module.

    Each replica is a ``SpeechServer``. There come to be as many as have half of ``limits.slots`` requests in flight
    each: a replica takes long to start, and who waits for a slot waits for the end of somebody's speech
    (docs/cluster_model.md). Where every replica has ``limits.slots`` and ``limits.queue``, a proxy of Ray keeps
    ``limits.queue`` more, and answers others 503.

    Args:
        load: gives the optimized model, with ``decoding.streams`` of ``limits.slots``, and with a memory budget as many
            ``budget_slots``, or the replica ends; pickled, called once a replica.
        folder: of voices, under one path on every machine. Voices are uploaded to the replica that has the request, and
            the others know them with their next request.
        key: what clients must send.
        replicas: the fewest and the most.
        cpus, gpus: that a replica holds.
        autoscaling: more of Ray's ``AutoscalingConfig``, such as ``upscale_delay_s``.

    Raises:
        InvalidRequestError: an argument is out of range.
        TurboError: Ray Serve is not installed.
    """
    serve = imported("serve").serve
    limits = limits or Limits()
    fewest, most = (count("replicas", number, 0) for number in replicas)
    if not fewest <= most or most < 1:
        raise InvalidRequestError(f"replicas is {replicas}: the fewest, and as many or more, 1 at least.")

    def build() -> Any:
        from ..runtime.cpu.threads import apart
        from ..server.app import SpeechServer

        return SpeechServer(apart(load), folder, limits, key).app

    replica = serve.deployment(
        name="speech",
        max_ongoing_requests=limits.slots + limits.queue,
        max_queued_requests=limits.queue,  # or Ray's proxies would keep any number, and nobody be refused
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        autoscaling_config={
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": max(1, limits.slots // 2),
            **(autoscaling or {}),
        },
        graceful_shutdown_timeout_s=limits.draining,
    )
    return replica(serve.ingress(build)()).bind()
