"""From a recording to a voice, and keeping it.

Reading and resampling audio, measuring it as librosa does, and a cache by content. The encoders themselves are
upstream's modules and come in as callables.
"""
