"""The acoustic half: speech tokens to hidden states, noise to mel frames, mel frames to samples.

Each network is a function over a record of weights, for one utterance or several of different lengths. What surrounds
them in a request (prompt, noise, watermark) stays outside.
"""
