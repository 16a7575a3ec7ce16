"""The hot path: torch and the tensors it is given. Knows nothing of passes, configuration or upstream."""
