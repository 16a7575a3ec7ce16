"""Speech over HTTP: OpenAI's speech endpoint, for one model in one process.

    app.py         routes;  request.py: what may be asked for;  refusals.py: what is answered instead of speech
    worker.py      the one thread that speaks: requests in flight share T3's batch, others wait or are refused
    answers.py     blocks of samples to bodies of responses;  audio.py: to bytes of a format
    recordings.py  an upload, looked at before a model sees it;  voices.py: voices by name, in memory and in a folder
    gate.py        before every route: key, sizes, where a request comes from;  measures.py: what Prometheus reads
    running.py     socket, signals, clients that stop reading
    page/          the page in the browser, served from memory

Nothing here opens a path that a request names. Needs the extra ``serve``.
"""
