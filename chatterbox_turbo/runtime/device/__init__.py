"""What is particular to accelerators, or differs between devices: graphs, compilation, number formats, timing.

Nothing here knows what is computed: functions, tensors and keys come in. A CPU walks the same lines.
"""
