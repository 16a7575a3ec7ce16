"""What memory is kept, given back and counted, on whatever device: one policy, one meter.

Mechanisms of a single kind of device live in ``device`` and ``cpu``.
"""
