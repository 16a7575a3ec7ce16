"""What is particular to processors: numba kernels, oneDNN, threads, and the host's memory.

Kernels take NumPy arrays and plain numbers; the steps and networks that call them live in ``t3`` and ``s3gen``.
Modules that import numba are imported by their users when they are needed.
"""
