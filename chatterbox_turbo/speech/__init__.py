"""Utterances and voices as users have them, over the stages that passes have put in place.

What lives here calls ``generate`` and the engines of a model that is optimized already. It computes nothing itself
(that is ``runtime``), and knows no name inside upstream (that is ``upstream``).
"""
