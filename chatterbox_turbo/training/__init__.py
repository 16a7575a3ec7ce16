"""Training a vocoder: recordings or a model's own speech, losses, the loop, what it keeps on disk to go on.

It computes with the networks of ``runtime`` and upstream's mel spectrogram, is measured by ``measure``, and writes only
into the folder that it is given. It knows nothing of the command, and no model that speaks is changed by it.
"""
