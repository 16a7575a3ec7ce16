"""The token model: the loop over tokens, what computes a step, the cache, sampling, alignment.

Weights come in as records (``weights``), requests as tensors, tokens leave one by one. What a family's modules are
called, and what its users may ask for, is not known here.
"""
