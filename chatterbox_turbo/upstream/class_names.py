"""Where upstream's classes are, by family. Imports nothing, so that a hook can be set before torch is there."""

CLASSES = {
    "english": ("chatterbox.tts", "ChatterboxTTS"),
    "multilingual": ("chatterbox.mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
    "nano": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
    "vc": ("chatterbox.vc", "ChatterboxVC"),
}
LOADERS = ("from_pretrained", "from_local")  # class methods that give a model
FOLDER = "ckpt_dir"  # parameter of from_local; both have "device"
