"""Programs that are not ours: Chatterbox models optimized as they are loaded, without a line of code changed.

A process is concerned where ``CHATTERBOX_TURBO`` is set and one of two things runs ``startup.start`` as Python starts:
the folder ``on_path`` on PYTHONPATH, which ``chatterbox-turbo run`` puts there (``program``), or the ``.pth`` file that
``chatterbox-turbo enable`` puts into an environment (``site_file``). From there on it is the same: ``hooks`` waits for
upstream's modules and wraps the loaders of their classes, ``models`` is what the wrappers do, ``reports`` writes what
came of it, ``messages`` says what did not. Hooks are set when somebody looks for ``chatterbox``, no sooner.

This is the one place that patches classes, for the process that asked for it, and ``hooks.uninstall`` takes it back.
Nothing here imports torch, pydantic or upstream before the program has: most processes of an environment never do.
"""
