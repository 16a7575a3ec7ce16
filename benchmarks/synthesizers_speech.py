"""Speech to try training on where there are no recordings: synthesizers say the sentences of docs/ in many voices.

    pip install espeakng-loader
    python benchmarks/synthesizers_speech.py FOLDER [MINUTES]

eSpeak NG, a formant synthesizer at 22.05 kHz; and, where the command flite is there (Debian's package), in half of the
files Flite's voices, made from recordings of four people at 16 kHz. It shows that curves fall, not what a vocoder for
people's voices can do.
"""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

SYNCHRONOUS, UTF8, RATE, PITCH, RANGE = 2, 1, 1, 3, 4  # of speak_lib.h
VOICES = [f"{language}+{variant}" for language in ("en-us", "en-gb", "de", "fr", "es", "it")
          for variant in ("m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f3", "f4", "f5")]  # fmt: skip
FLITE = ("awb", "kal16", "rms", "slt")


def sentences() -> list[str]:
    """Of this project's documents, without tables and code."""
    found = []
    for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md")):
        text = re.sub(
            r"```.*?```|^[|#].*?$|[`*_\[\]]|\(\S+\)", " ", path.read_text(encoding="utf-8"), flags=re.S | re.M
        )
        found += [part for part in re.split(r"(?<=[.:;!?])\s+", " ".join(text.split())) if 40 < len(part) < 160]
    return found


def main() -> None:
    import espeakng_loader

    folder, minutes = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    folder.mkdir(parents=True, exist_ok=True)
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    own = library.espeak_Initialize(SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples, count, events):
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(hear)
    draw, texts, seconds, number = random.Random(0), sentences(), 0.0, 0
    flite = shutil.which("flite")
    while seconds < 60 * minutes:
        if flite and number % 2:
            seconds, number = seconds + said_by_flite(flite, folder, number, draw, texts), number + 1
            continue
        voice, text = draw.choice(VOICES), draw.choice(texts).encode()
        library.espeak_SetVoiceByName(voice.encode())
        library.espeak_SetParameter(RATE, draw.randint(130, 210), 0)
        library.espeak_SetParameter(PITCH, draw.randint(25, 75), 0)
        library.espeak_SetParameter(RANGE, draw.randint(30, 80), 0)
        pieces.clear()
        library.espeak_Synth(text, len(text) + 1, 0, 1, 0, UTF8, None, None)
        if pieces:
            wave = np.concatenate(pieces)
            soundfile.write(folder / f"{number:05d}-{voice}.flac", wave, own, subtype="PCM_16")
            seconds, number = seconds + len(wave) / own, number + 1
    voices = len(VOICES) + len(FLITE) * bool(flite)
    print(f"{number} recordings, {seconds / 60:.0f} minutes, {voices} voices in {folder}")


def said_by_flite(flite: str, folder: Path, number: int, draw: random.Random, texts: list[str]) -> float:
    """Seconds of one more recording."""
    voice, wave = draw.choice(FLITE), folder / f"{number:05d}.wav"
    stretch = f"duration_stretch={draw.uniform(0.85, 1.2):.2f}"
    text = draw.choice(texts)
    subprocess.run([flite, "-voice", voice, "--setf", stretch, "-t", text, "-o", str(wave)], check=True)
    samples, rate = soundfile.read(wave, dtype="int16")
    wave.unlink()
    soundfile.write(folder / f"{number:05d}-{voice}.flac", samples, rate, subtype="PCM_16")
    return len(samples) / rate


if __name__ == "__main__":
    main()
