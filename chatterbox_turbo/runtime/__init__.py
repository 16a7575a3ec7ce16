"""The hot path: torch and tensors.

One room for each half of the model (``t3``, ``s3gen``), one for reference voices, and below them what they share:
``layers``, ``device``, ``cpu``, ``loading``. Nothing here knows a pass, a configuration, or a name of upstream's.
"""
