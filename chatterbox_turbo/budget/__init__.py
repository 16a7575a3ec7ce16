"""Memory that a model will need, and a budget that is kept: estimates, what to try, what was chosen and why.

Reads models, configurations and plans; changes nothing.
"""
