"""``quantize``: a checkpoint folder whose T3 is quantized, written once and loaded in less memory ever after."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from . import options
from .loading import offline, why_unavailable, why_unreachable
from .options import ModelName, SizeName
from .screen import Screen


class SchemeName(str, Enum):
    """Schemes of ``runtime.device.quantized``, which imports torch; a test compares the two."""

    int8 = "int8"
    int4 = "int4"
    nf4 = "nf4"
    fp4 = "fp4"


class StrategyName(str, Enum):
    """Strategies of ``passes.quantization``, likewise."""

    conservative = "conservative"
    balanced = "balanced"
    aggressive = "aggressive"


class RoundingName(str, Enum):
    """Of int4."""

    nearest = "nearest"
    fitted = "fitted"


def quantize(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint folder, or a model's name: its weights from the hub.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to be made.")],
    model: Annotated[
        ModelName | None, typer.Option("--model", help="Upstream's model; by default as the files of SRC are called.")
    ] = None,
    scheme: Annotated[SchemeName, typer.Option("--scheme", help="8.1 bits a weight, or 4.5.")] = SchemeName.int8,
    strategy: Annotated[
        StrategyName, typer.Option("--strategy", help="Which matrices stay (see quantization.strategy).")
    ] = StrategyName.balanced,
    rounding: Annotated[RoundingName, typer.Option("--rounding", help="Of int4.")] = RoundingName.fitted,
    size: options.Size = SizeName.full,
) -> None:
    """Write a checkpoint folder whose T3 is quantized.

    turbo.load(..., folder=DST) and --checkpoint DST read it without ever holding the original weights. DST is made as a
    whole or not at all, and nothing is overwritten. It holds safetensors files and JSON, no pickle.
    """
    screen = options.screen_of(context)
    with screen.step("importing torch"), screen.quiet():
        from .. import api, synthetic
        from ..errors import ModelUnavailableError
        from ..runtime.loading.new_folder import check_destination

    check_destination(destination.absolute())
    family, folder = _source(source, model and model.value)
    with screen.step("importing chatterbox-tts"), screen.quiet():
        reason = why_unavailable(family)
    if reason:
        raise ModelUnavailableError(reason)
    network = nullcontext() if folder else _hub(screen, family)
    shrunk = synthetic.architecture("tiny") if size is SizeName.tiny else nullcontext()
    with _bar(screen) as progress, screen.quiet(bars=True), network, shrunk:
        api.quantize(
            family,
            destination,
            folder,
            scheme=scheme.value,
            strategy=strategy.value,
            rounding=rounding.value,
            progress=progress,
        )
    written = sum(path.stat().st_size for path in destination.iterdir())
    t3 = (destination / f"t3.{scheme.value}.safetensors").stat().st_size
    screen.print(
        f"{destination}: {family} with T3 in {scheme.value} ({strategy.value}), {t3 / 1e6:,.0f} MB; "
        f"{written / 1e6:,.0f} MB in all"
    )
    screen.print(
        f'load it with turbo.load("{family}", folder="{destination}"), or --model {family} --checkpoint {destination}'
    )


def _source(source: str, family: str | None) -> tuple[str, Path | None]:
    """The family, and the folder where it is one.

    Raises:
        ModelUnavailableError: it is no checkpoint, or one of several models.
    """
    from ..errors import ModelUnavailableError, brief
    from ..upstream.families import FAMILIES
    from ..upstream.loading import family_in

    speaking = [name for name in FAMILIES if name != "vc"]
    folder = Path(source)
    if not folder.is_dir():
        if source not in speaking:
            raise ModelUnavailableError(
                f"SRC is {brief(source)}: neither a folder nor a model that speaks.",
                "",
                f"Models are {', '.join(speaking)}. Download any other checkpoint, and pass its folder.",
            )
        if family and family != source:
            raise typer.BadParameter(f"SRC is {source}, and --model {family}.")
        return source, None
    return family_in(folder, family), folder


def _hub(screen: Screen, family: str) -> Any:
    """Around a download, or around taking the files from the cache.

    Raises:
        ModelUnavailableError: neither will do.
    """
    from ..errors import ModelUnavailableError
    from ..upstream.loading import is_cached

    cached, unreachable = is_cached(family), why_unreachable(family)
    if unreachable and not cached:
        raise ModelUnavailableError(
            f"There are no weights for {family}: none are cached, and {unreachable}.",
            "",
            "Connect to the hub once, or pass a checkpoint folder.",
        )
    if not cached:
        screen.note("downloading the weights …")
    return offline(bool(unreachable))


@contextmanager
def _bar(screen: Screen):
    """What ``api.quantize`` takes as ``progress``: a bar, or a line for each file where stderr is no terminal."""
    if not screen.err.is_terminal:
        said: set[str] = set()

        def line(name: str, done: int, total: int) -> None:
            if name not in said:
                said.add(name)
                screen.note(f"writing {name} …")

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen.err, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
