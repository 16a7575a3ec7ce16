"""All knowledge of names and shapes inside chatterbox-tts; nothing else imports or names its parts.

``families``: what an object is and where its parts are. ``patch_points``: what may be patched and the shape
that it must have. ``t3``: the token model as the token loop needs it. ``alignment``: the multilingual
analyzer. ``loading``: classes and checkpoint files. ``rebinding``: upstream's own loader over other names.
``class_names``: where the classes are, for who may not import torch yet.
"""
