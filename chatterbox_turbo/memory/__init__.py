"""``model.turbo.memory()``: what a model has in memory, as data, as a table, and as a picture over time."""

from .usage import Usage, holdings, usage, weights

__all__ = ["Usage", "holdings", "usage", "weights"]
