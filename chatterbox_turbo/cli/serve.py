"""``serve``: speech over HTTP."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import Wanted, load_model
from .options import ModelName
from .screen import Screen

if TYPE_CHECKING:
    from ..config import OptimizationConfig
    from ..server.limits import Limits

KEY = "CHATTERBOX_TURBO_API_KEY"
NEEDED = ("fastapi", "uvicorn", "h11", "prometheus_client", "python_multipart")
SLOTS = 8
OWN_MACHINE = ("127.0.0.1", "localhost", "::1")


def serve(
    context: typer.Context,
    model: options.Model = ModelName.english,
    checkpoint: options.Checkpoint = None,
    synthetic: options.Synthetic = False,
    size: options.SizeByWeights = None,
    stop_after: options.StopAfter = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    voice_folder: Annotated[
        Path | None,
        typer.Option("--voice-folder", file_okay=False, help="Voices by name; uploaded ones are kept there."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the key of clients.")
    ] = KEY,
    slots: Annotated[
        int | None,
        typer.Option(
            "--slots", min=1, max=256, help=f"Requests in flight, in one batch; {SLOTS}, with a budget fewer."
        ),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that wait; more are refused (429).")] = 32,
    max_text: Annotated[int, typer.Option("--max-text", min=1, help="Characters of a request.")] = 4096,
    max_upload: Annotated[int, typer.Option("--max-upload", min=1, help="Megabytes of a recording.")] = 20,
    max_recording: Annotated[float, typer.Option("--max-recording", min=1, help="Seconds of a recording.")] = 60.0,
    drain: Annotated[float, typer.Option("--drain", min=0.1, help="Seconds for what is in flight at the end.")] = 30.0,
) -> None:
    """Speak over HTTP: OpenAI's speech endpoint, one batch for all requests in flight."""
    screen = options.screen_of(context)
    options.check_speaks(model)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise typer.BadParameter(f"serve needs {', '.join(missing)}: pip install 'chatterbox-turbo[serve]'.")
    key = _key(api_key_env)
    if voice_folder is not None and not voice_folder.is_dir():
        raise typer.BadParameter(f"--voice-folder {voice_folder}: there is no such folder.")
    from ..server.limits import MB, Limits

    settings = options.configuration(screen, preset, config)
    with screen.step("importing torch"), screen.quiet():
        from ..runtime.cpu.threads import apart
        from ..server.running import Server, listen
    limits = Limits(
        slots=_slots(screen, slots, settings),
        queue=queue,
        text=max_text,
        upload=max_upload * MB,
        recording=max_recording,
        draining=drain,
    )
    size = options.size_for(size, checkpoint)
    wanted = Wanted(model.value, options.device_named(device), size, stop_after, synthetic, checkpoint, fallback=False)
    with listen(host, port) as listening:
        # the thread of ``server.worker`` is to be the only one that has computed
        served = apart(lambda: _served(screen, wanted, settings, limits, voice_folder, key))
        place = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        open_to_all = key is None and host not in OWN_MACHINE
        if open_to_all:
            screen.note(f"warning: everybody who reaches {place} may speak and upload: set {api_key_env} to a key.")
        screen.print(f"serving {model.value} at {place}" + ("" if key is None else ", with a key"))
        screen.out.file.flush()
        Server(served, verbose=screen.debug).run(sockets=[listening])
    screen.print("ended.")


def _served(
    screen: Screen,
    wanted: Wanted,
    settings: OptimizationConfig,
    limits: Limits,
    folder: Path | None,
    key: str | None,
) -> Any:
    from ..api import apply
    from ..server.app import SpeechServer

    loaded = load_model(screen, wanted)
    if loaded.kind == "synthetic":
        screen.note(f"model: {loaded.description}")
    decoding = settings.decoding.model_copy(update={"streams": limits.slots})
    with screen.step("optimizing"), screen.quiet():
        apply(loaded.model, settings.model_copy(update={"decoding": decoding}))
        loaded.model.turbo.stream("Is there a stream?").close()  # or the error that says why there is none
        return SpeechServer(loaded.model, folder, limits, key)


def _slots(screen: Screen, asked: int | None, settings: OptimizationConfig) -> int:
    """Requests in flight: with a memory budget no more than it holds for.

    Raises:
        typer.BadParameter: more were asked for.
    """
    from ..budget.measurement import slots_within
    from ..errors import InvalidRequestError

    try:
        most = slots_within(settings, asked) or SLOTS
    except InvalidRequestError as error:
        raise typer.BadParameter(f"--{error}") from None
    if asked is None and most < SLOTS:
        screen.note(f"--slots is {most}: the memory budget holds for no more at once (budget_slots).")
    return asked or min(SLOTS, most)


def _key(variable: str) -> str | None:
    """What clients have to send.

    Raises:
        typer.BadParameter: another variable than the usual one was named, and is not set; or it has no key in it.
    """
    key = os.environ.get(variable)
    if key is None and variable != KEY:
        raise typer.BadParameter(f"--api-key-env {variable}: there is no such environment variable.")
    if key is not None and (key != key.strip() or not key or not key.isascii()):
        raise typer.BadParameter(f"{variable}: a key is some ASCII characters, without spaces around it.")
    return key
