"""What is said about speed, sound and memory, measured: ``bench``, ``verify`` and ``demo`` print it.

Everything here runs upstream and this package side by side in one process, on a model that it is given. It knows the
public verbs; it writes nothing to a model but through them, and no file.
"""
