"""The server as a deployment of Ray Serve: the same answers, and as many replicas as requests ask for."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from cluster_tools import ray_here, serve
from serve_tools import LONG, SPEECH, TEXT, asked, pcm, wait

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.cluster import application
from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.server.app import SpeechServer
from chatterbox_turbo.server.limits import Limits
from chatterbox_turbo.speech.files import as_16_bit
from chatterbox_turbo.speech.stream import joined

SLOTS = 2


def model():
    settings = {"decoding": {"progress": "off", "kernel": "torch", "streams": SLOTS}}
    return turbo.apply(synthetic.build("turbo", "tiny", stop_after=40), settings)


@pytest.fixture(scope="module")
def client():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quick = {"upscale_delay_s": 0.5, "downscale_delay_s": 2.0, "metrics_interval_s": 0.2, "look_back_period_s": 1.0}
    limits = Limits(slots=SLOTS, queue=6)
    served = application(model, limits=limits, key="secret", replicas=(1, 2), cpus=0.5, autoscaling=quick)
    key, url = {"Authorization": "Bearer secret"}, f"http://127.0.0.1:{port}"
    with ray_here():
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(served)
        with httpx.Client(base_url=url, timeout=200, trust_env=False, headers=key) as one:
            yield one
        serve.shutdown()


def replicas() -> int:
    (state,) = (one.deployments["speech"] for one in serve.status().applications.values())
    return state.replica_states.get("RUNNING", 0)


def test_a_replica_answers_as_the_server_does(client):
    spoken = joined(list(model().turbo.stream(TEXT, seed=3)))[0].numpy()
    expected = as_16_bit(spoken)
    assert client.get("/health/ready").json() == {"ready": True}
    live = client.post(SPEECH, json=asked(stream=True))
    assert live.headers["content-type"] == "audio/pcm"
    heard = pcm(live.content)  # by a process with another number of threads
    assert len(heard) == len(expected) and np.abs(heard - expected).max() < 33, "1e-3 of full scale"
    whole = client.post(SPEECH, json=asked())
    assert len(pcm(whole.content)) == len(expected) and "x-seed" in whole.headers
    assert client.post(SPEECH, json=asked(temperature=-1)).status_code == 400
    assert client.post(SPEECH, json=asked(), headers={"Authorization": "Bearer other"}).status_code == 401
    with client.stream("POST", SPEECH, json=asked(LONG, stream=True)) as answer:
        next(blocks := answer.iter_raw())
        assert b"chatterbox_turbo_in_flight_requests 1.0" in client.get("/metrics").content
        blocks.close()
    wait(
        lambda: b"chatterbox_turbo_in_flight_requests 0.0" in client.get("/metrics").content
    )  # who leaves is taken out of the batch


@pytest.mark.exhaustive
def test_replicas_come_and_go_with_the_requests(client):
    assert replicas() == 1
    with ThreadPoolExecutor(6) as pool:  # two less than one replica takes: one that has just left may still be counted
        answers = [pool.submit(client.post, SPEECH, json=asked(LONG)) for _ in range(6)]
        wait(lambda: replicas() == 2, 100)
        assert {one.result().status_code for one in answers} == {200}
    wait(lambda: replicas() == 1, 100)
    assert client.post(SPEECH, json=asked()).status_code == 200


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidRequestError, match=r"replicas is \(3, 2\)"):
        application(model, replicas=(3, 2))
    with pytest.raises(InvalidRequestError, match="replicas is -1, but must be 0 or more"):
        application(model, replicas=(-1, 2))


def test_a_replica_has_no_more_in_flight_than_its_budget_was_planned_for():
    speaker = turbo.apply(model(), {"memory_budget": "8GB", "budget_slots": 2, "decoding": {"progress": "off"}})
    with pytest.raises(InvalidRequestError, match=r"slots is 3, but the budget was planned for 2 at once"):
        SpeechServer(speaker, limits=Limits(slots=3))
    SpeechServer(speaker, limits=Limits(slots=2)).worker.close()
