"""The `sdlab` program: registers the commands, and is the only place that turns errors into exit codes.

Importing this module pulls in no torch, diffusers, transformers, spacy, gradio or numpy: the command files
hold options only and import what works inside their function.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from sdlab import __version__, show
from sdlab.commands import (
    categorize,
    check,
    convert,
    crop,
    generate,
    img2img,
    samples,
    train_captioner,
    train_flux2,
    train_sd,
    train_transformer,
    train_vae,
)
from sdlab.errors import SdlabError
from sdlab.inference.config import GenerateConfig, Img2ImgConfig, SamplesConfig
from sdlab.options import add_command, did_you_mean, normalise

TRAIN, MAKE, MODELS, DATA = "Train", "Make pictures", "Models", "Datasets"

app = typer.Typer(
    name="sdlab",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": normalise},
)


def _print_version(asked: bool) -> None:
    if asked:
        show.out(f"sdlab {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn folders of pictures into your own image model, and get pictures back."""


add_command(app, "train-sd", train_sd.TrainSdConfig, train_sd.train_sd, panel=TRAIN)
add_command(app, "train-flux2", train_flux2.TrainFlux2Config, train_flux2.train_flux2, panel=TRAIN)
add_command(
    app,
    "train-transformer",
    train_transformer.TrainTransformerConfig,
    train_transformer.train_transformer,
    panel=TRAIN,
)
add_command(app, "train-vae", train_vae.TrainVaeConfig, train_vae.train_vae, panel=TRAIN)
add_command(
    app,
    "train-captioner",
    train_captioner.TrainCaptionerConfig,
    train_captioner.train_captioner,
    panel=TRAIN,
)
add_command(app, "generate", GenerateConfig, generate.generate, panel=MAKE)
add_command(app, "img2img", Img2ImgConfig, img2img.img2img, panel=MAKE)
add_command(app, "samples", SamplesConfig, samples.samples, panel=MAKE)
add_command(app, "convert", convert.ConvertConfig, convert.convert, panel=MODELS)
add_command(app, "check", check.CheckConfig, check.check, panel=DATA)
add_command(app, "categorize", categorize.CategorizeConfig, categorize.categorize, panel=DATA)
add_command(app, "crop", crop.CropConfig, crop.crop, panel=DATA)


def main(argv: list[str] | None = None) -> None:
    """Run the program and exit with the code of ../errors.py; one line on stderr says what went wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in args
    args = ["--verbose", *(a for a in args if a != "--verbose")] if verbose else args
    try:
        code = app(args, standalone_mode=False, prog_name="sdlab")
        if sys.stdout is not None:
            sys.stdout.flush()
    except SdlabError as reason:
        code = _told(str(reason), reason.exit_code, verbose)
    except TyperException as reason:
        code = _told(_usage(reason), reason.exit_code, verbose)
    except (Abort, KeyboardInterrupt):
        code = _told("stopped", 130, verbose)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError:
        code = _told("out of memory. Try a smaller --batch or --image-size", 4, verbose)
    except Exception as reason:  # noqa: BLE001  (the boundary of the program: everything else is a bug of ours)
        code = _unexpected(reason, verbose)
    sys.exit(code if isinstance(code, int) else 0)


def _told(text: str, code: int, verbose: bool) -> int:
    if verbose:
        show.note(traceback.format_exc())
    show.error(" ".join(text.split()))
    return code


def _usage(reason: TyperException) -> str:
    text = reason.format_message()
    wrong = getattr(reason, "option_name", None)
    if wrong:
        known = _known_flags(getattr(reason, "ctx", None))
        text = f"no such option: {wrong}{did_you_mean(normalise(wrong), known)}"
    return f"{text} (see sdlab --help)"


def _known_flags(context: typer.Context | None) -> list[str]:
    if context is None:
        return []
    return sorted(
        {o for p in context.command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    )


def _unexpected(reason: Exception, verbose: bool) -> int:
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return _told(
            f"{reason.filename or 'disk'}: no space left. Free some, then repeat the command", 4, verbose
        )
    if isinstance(reason, OSError) and reason.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.ENOENT,
        errno.ENAMETOOLONG,
    ):
        return _told(
            f"{reason.filename or 'a file'}: {reason.strerror}. Check the path and its permissions",
            2,
            verbose,
        )
    if "DefaultCPUAllocator" in str(reason):
        return _told("out of memory. Try a smaller --batch or --image-size", 4, verbose)
    on_apple = isinstance(reason, RuntimeError) and "MPS backend out of memory" in str(reason)
    if on_apple or type(reason).__name__ == "OutOfMemoryError":  # torch's, without importing torch here
        return _told(
            "out of GPU memory. Try a smaller --batch or --image-size; in training also --grad-checkpointing",
            4,
            verbose,
        )
    if type(reason).__module__.startswith(("torch._inductor", "torch._dynamo")):
        cause = " ".join(str(reason).split())[:200]
        return _told(f"torch.compile does not work here ({cause}). Leave out --compile", 2, verbose)
    hint = "" if verbose else " (--verbose shows the traceback)"
    return _told(f"this is a fault of sdlab: {type(reason).__name__}: {reason}{hint}", 1, verbose)
