"""The speech server with replicas on Ray Serve, as many as requests ask for.

Run: serve run examples.cluster_server:application (pip install "chatterbox-turbo[ray]"). It is asked as docs/serve.md
says.
"""

import chatterbox_turbo as turbo
from chatterbox_turbo import cluster
from chatterbox_turbo.server.limits import Limits

LIMITS = Limits(slots=4)


def load():
    """The model of one replica: here of random weights; ``turbo.load("turbo", "cuda")`` has real ones."""
    model = turbo.synthetic.build("turbo", "tiny", stop_after=50)
    return turbo.apply(model, {"preset": "fast", "decoding": {"progress": "off", "streams": LIMITS.slots}})


application = cluster.application(load, limits=LIMITS, replicas=(1, 2))
