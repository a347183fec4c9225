"""`sdlab convert`: a model as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.options import opt


@dataclass(frozen=True)
class ConvertConfig:
    """Options of `sdlab convert`."""

    model_path: Annotated[
        str,
        opt(
            "Model: a run, folder, file, hub id or built-in (default: the newest run).", old=("--load-model",)
        ),
    ] = ""
    checkpoint_path: Annotated[
        Path | None, opt("File to write (default: NAME.safetensors beside the run).", old=("--output",))
    ] = None
    half: Annotated[bool, opt("Write 16-bit numbers: --dtype fp16.", flag="--half")] = False
    dtype: Annotated[
        str | None, opt("Number type (default: as it is).", choices=("fp16", "bf16", "fp32"))
    ] = None
    use_safetensors: Annotated[
        bool, opt("Write .safetensors; there is nothing else yet.", flag="--use-safetensors")
    ] = True
    vae: Annotated[bool, opt("Put the VAE in (Stable Diffusion).")] = True
    text_encoder: Annotated[bool, opt("Put the text encoder in (Stable Diffusion).")] = True
    allow_pickle: Annotated[bool, opt("Read .ckpt and .bin files (tensors only).", flag="--allow-pickle")] = (
        False
    )
    json: Annotated[bool, opt("The report as one JSON document on stdout.", flag="--json")] = False


def convert(config: ConvertConfig) -> None:
    """Write a model as one .safetensors file that A1111, ComfyUI and others open.

    Stable Diffusion becomes a checkpoint in the original layout, with its VAE and text encoder; of FLUX.2 the
    transformer is written in Black Forest Labs' layout. What is written is read back and compared with the model
    before the file gets its name. A file that is there is never replaced.
    """
    from dataclasses import asdict

    from sdlab import progress
    from sdlab.convert import convert as work
    from sdlab.models.quiet import hush
    from sdlab.models.resolve import resolve

    if config.half and config.dtype not in (None, "fp16"):
        raise SdlabError(f"--half and --dtype {config.dtype} contradict each other", next_step="Give one")
    dtype = "fp16" if config.half else config.dtype
    without = [name for name in ("vae", "text_encoder") if not getattr(config, name)]
    hush()
    model = resolve(config.model_path, training=False, allow_pickle=config.allow_pickle)
    show.note(model.why)
    path = work.target_for(model, config.checkpoint_path)
    outputs = work.outputs_of(model, dtype=dtype, without=without, allow_pickle=config.allow_pickle)
    is_there = path.exists()
    done = 0
    passes = 1 if is_there else 2  # written and read back
    total_mb = -(-passes * sum(output.nbytes for output in outputs) // 1_000_000)
    with progress.counted(total_mb, unit="MB") as advance:

        def add(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            advance(done / 1e6)

        do = work.found if is_there else work.convert
        made = do(model, path, outputs, dtype=dtype, advance=add)
    if is_there:
        show.note(f"{path}: made of this model already")
    written = made.written
    if config.json:
        show.out_json({"path": str(made.path), "layout": made.layout, "dtype": made.dtype, **asdict(written)})
        return
    show.out(f"{made.path}: {made.layout}, {made.dtype}")
    show.out(f"  {written.num_tensors} tensors, {written.num_bytes:,} bytes, read and equal to the model")
    show.out(f"  sha256 {written.sha256}  AutoV2 {written.sha256[:10]}  AutoV3 {written.data_sha256[:12]}")
