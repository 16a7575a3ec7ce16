"""Run by Python as a server of benchmarks/servers.py starts: upstream's sizes, and seeds from outside.

Its folder is on PYTHONPATH, after the launcher's where that is used. Nothing happens in other processes that inherit
the path. A server with no seed in its requests is seeded through a socket: a line with a number, answered when set.
"""

import os
import sys


def _seed_when_asked(descriptor):
    import random
    import socket

    import numpy
    import torch

    with socket.socket(fileno=descriptor) as asked:
        while line := asked.recv(32):
            random.seed(int(line))
            numpy.random.seed(int(line))
            torch.manual_seed(int(line))  # of the process: worker threads draw from the same generator
            asked.sendall(b"set")


if "SERVERS_PROGRAM" in os.environ and sys.orig_argv[1:2] == [os.environ["SERVERS_PROGRAM"]]:
    import threading

    from chatterbox_turbo import synthetic

    _sizes = synthetic.architecture(os.environ["SERVERS_SIZE"])
    _sizes.__enter__()  # until the process ends
    threading.Thread(target=_seed_when_asked, args=(int(os.environ["SERVERS_SOCKET"]),), daemon=True).start()
