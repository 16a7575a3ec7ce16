"""Modules without initial values, and tensors straight from the files of a checkpoint.

Which classes are built and which files are read is decided elsewhere (``upstream.rebinding``).
"""
