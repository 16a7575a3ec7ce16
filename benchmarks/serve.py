"""Audio a second that ``serve`` makes for one client and for several at once, whole answers and streams.

python benchmarks/serve.py [FAMILY] [PRESET] [TOKENS] [CLIENTS] [RUNS] [SIZE]

Random weights that stop after so many tokens; a real server and real clients in this process. One client and several
take turns, so that a machine that changes its speed does so for both. A request each, all seeds and texts different.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.config import resolve
from chatterbox_turbo.runtime.cpu.threads import apart
from chatterbox_turbo.server.app import SpeechServer
from chatterbox_turbo.server.limits import Limits
from chatterbox_turbo.server.running import Server, listen

# as many tokens as upstream's tokenizer makes of six seconds of speech: the synthetic one makes one of each letter
TEXT = "Captain {} was not asked."


def ask(url: str, number: int, stream: bool) -> tuple[float, float]:
    """Seconds of audio, and seconds until the first of it was there."""
    body = {"input": TEXT.format(number), "seed": number, "response_format": "pcm", "stream": stream}
    start, first, count = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=3_600, trust_env=False) as answer:
        answer.raise_for_status()
        for part in answer.iter_raw():
            first = first or time.perf_counter() - start
            count += len(part)
    return count / 2 / int(answer.headers["x-sample-rate"]), first


def together(url: str, clients: int, first: int, stream: bool) -> tuple[float, float]:
    """Audio seconds a second of so many clients, and the median of their first audio in seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        each = list(pool.map(lambda number: ask(url, number, stream), range(first, first + clients)))
    return sum(seconds for seconds, _ in each) / (time.perf_counter() - start), statistics.median(t for _, t in each)


def main(
    family: str = "turbo",
    preset: str = "fast",
    tokens: str = "150",
    clients: str = "8",
    runs: str = "3",
    size: str = "full",
) -> None:
    """Print medians of one client and of several, and their ratio."""
    many = int(clients)
    config = resolve({"preset": preset, "decoding": {"progress": "off", "streams": many}})
    model = apart(lambda: turbo.apply(synthetic.build(family, size, stop_after=int(tokens)), config))
    served = SpeechServer(model, None, Limits(slots=many))
    with listen("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = Server(served)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        try:
            for stream in (False, True):
                ask(url, 0, stream)  # warm
                found: dict[int, list[tuple[float, float]]] = {1: [], many: []}
                for run in range(int(runs)):
                    for count in found:
                        found[count].append(together(url, count, 100 * run + count, stream))
                rates = {count: statistics.median(rate for rate, _ in each) for count, each in found.items()}
                firsts = {count: statistics.median(first for _, first in each) for count, each in found.items()}
                for count, each in found.items():
                    span = f"{min(rate for rate, _ in each):.3f} to {max(rate for rate, _ in each):.3f}"
                    print(
                        f"{'streams' if stream else 'whole  '} {count} clients: {rates[count]:.3f} audio s a second "
                        f"({span}), first audio {firsts[count]:.2f} s",
                        flush=True,
                    )
                print(f"        ratio {rates[many] / rates[1]:.2f}", flush=True)
        finally:
            server.stop()
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
