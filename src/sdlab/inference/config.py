"""Options of the commands that make pictures. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sdlab.inference.spec import EMPHASES, FORMATS, MAX_SEED, OFFLOADS, Emphasis, Offload
from sdlab.options import opt

NUM_SEEDS = 4  # of `sdlab samples`, where no axis is given
WHAT, HOW, MODEL, FILES = "What to draw", "How", "Model and computer", "Files"


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `sdlab generate`."""

    prompt: Annotated[
        tuple[str, ...],
        opt('What to draw; repeat for more: --prompt "red star" --prompt "blue fish".', group=WHAT),
    ] = ()
    prompt_file: Annotated[
        Path | None,
        opt(
            "Prompts, one a line, # starts a comment, --seed 7 --steps 30 ... may follow; or .jsonl or .csv.",
            group=WHAT,
        ),
    ] = None
    wildcards: Annotated[
        Path | None, opt("Folder of text files: __name__ in a prompt is a line of name.txt.", group=WHAT)
    ] = None
    negative: Annotated[str, opt("What to keep out of the picture.", group=WHAT)] = ""
    prefix: Annotated[
        str | None,
        opt(
            'Put before every prompt as it is, so end it with ", ". Default: what suits the model.',
            group=WHAT,
        ),
    ] = None
    no_prefix: Annotated[
        bool, opt("Send prompts as typed, without a prefix.", flag="--no-prefix", group=WHAT)
    ] = False
    ref: Annotated[tuple[Path, ...], opt("Picture for FLUX.2 to look at; repeat for more.", group=WHAT)] = ()
    from_picture: Annotated[
        Path | None,
        opt("Make this picture again, bit for bit, from the recipe in it.", flag="--from", group=WHAT),
    ] = None
    change: Annotated[
        tuple[str, ...],
        opt("With --from: change one thing, as --set steps=30; repeat for more.", flag="--set", group=WHAT),
    ] = ()
    explain: Annotated[
        bool,
        opt("Show how the prompts are read, token by token, and make nothing.", flag="--explain", group=WHAT),
    ] = False
    num: Annotated[int, opt("Pictures of each prompt.", min=1, max=100_000, group=HOW)] = 1
    seed: Annotated[
        int | None,
        opt("Picture i uses seed + i. Default: a random one, printed.", min=0, max=MAX_SEED, group=HOW),
    ] = None
    steps: Annotated[
        int | None,
        opt("Denoising steps. Default: what suits the model (50; FLUX.2 15).", min=1, max=1000, group=HOW),
    ] = None
    guidance: Annotated[
        float | None,
        opt(
            "How closely to follow the prompt. Default: what suits the model (7; FLUX.2 4).",
            min=0,
            max=100,
            group=HOW,
        ),
    ] = None
    width: Annotated[
        int | None, opt("Pixels, a multiple of 8 (FLUX.2: 16).", min=32, max=4096, group=HOW)
    ] = None
    height: Annotated[
        int | None, opt("Pixels, a multiple of 8 (FLUX.2: 16).", min=32, max=4096, group=HOW)
    ] = None
    image_size: Annotated[
        int | None,
        opt(
            "Width and height at once. Default: the model's own (SD 1.5: 512, FLUX.2: 1024).",
            min=32,
            max=4096,
            group=HOW,
        ),
    ] = None
    scheduler: Annotated[
        str,
        opt('ddim, "euler a", "dpm++ 2m karras", unipc, lcm ... Default: the model\'s own.', group=HOW),
    ] = ""
    clip_skip: Annotated[
        int,
        opt(
            "Which layer of CLIP is read, 1 the last, 2 the one before (not FLUX.2).",
            min=1,
            max=12,
            group=HOW,
        ),
    ] = 1
    emphasis: Annotated[
        Emphasis,
        opt(
            "What (x:1.2) and [x] mean in a prompt: as in A1111, in ComfyUI, or nothing.",
            choices=EMPHASES,
            group=HOW,
        ),
    ] = "a1111"
    hires: Annotated[
        float,
        opt("Enlarge the finished picture by this factor and go over it again.", min=1, max=8, group=HOW),
    ] = 1.0
    hires_steps: Annotated[
        int | None, opt("Steps of that second pass. Default: as --steps.", min=1, max=1000, group=HOW)
    ] = None
    hires_strength: Annotated[
        float, opt("How much that second pass changes, 0 to 1.", min=0, max=1, group=HOW)
    ] = 0.5
    batch: Annotated[
        int, opt("Pictures made at once: more need more memory.", min=1, max=1024, group=HOW)
    ] = 1
    exact: Annotated[
        bool, opt("Make pictures one at a time: the same bits for any --batch.", flag="--exact", group=HOW)
    ] = False
    load_model: Annotated[
        str,
        opt(
            "Alias, run in tuned/, folder, .safetensors file or hub id. Default: your newest run.",
            group=MODEL,
        ),
    ] = ""
    unet: Annotated[
        str,
        opt(
            "Take the UNet or transformer from this file or folder instead.",
            old=("--transformer",),
            group=MODEL,
        ),
    ] = ""
    vae: Annotated[str, opt("Take the VAE from this file or folder instead.", group=MODEL)] = ""
    lora: Annotated[
        tuple[str, ...],
        opt("LoRA to add, FILE or FILE:weight; repeat for more.", group=MODEL),
    ] = ()
    lora_dir: Annotated[
        tuple[Path, ...],
        opt(
            "Folder where <lora:name:0.8> finds name.safetensors; repeat for more. Runs in tuned/ are found too.",
            group=MODEL,
        ),
    ] = ()
    embedding: Annotated[
        tuple[Path, ...],
        opt("Textual inversion, a file or a folder of them; its name in a prompt uses it.", group=MODEL),
    ] = ()
    device: Annotated[str, opt("auto, cpu, cuda, cuda:1 or mps.", group=MODEL)] = "auto"
    dtype: Annotated[str, opt("Number type: auto, fp32, bf16 or fp16.", group=MODEL)] = "auto"
    compile: Annotated[
        bool, opt("Compile the denoiser: slow to start, then faster.", flag="--compile", group=MODEL)
    ] = False
    offload: Annotated[
        Offload,
        opt(
            "Keep on the card only the part that works (model), or only its layers (layers).",
            choices=OFFLOADS,
            group=MODEL,
        ),
    ] = "none"
    vae_tiling: Annotated[
        bool,
        opt(
            "Decode in tiles: less memory, faint seams. Pictures are always decoded one at a time.",
            flag="--vae-tiling",
            group=MODEL,
        ),
    ] = False
    allow_pickle: Annotated[
        bool, opt("Read tensors from .ckpt and .bin files too.", flag="--allow-pickle", group=MODEL)
    ] = False
    output: Annotated[Path, opt("Folder for the pictures, made if missing.", group=FILES)] = Path("output")
    format: Annotated[str, opt("File type of the pictures.", choices=FORMATS, group=FILES)] = "png"
    quality: Annotated[
        int, opt("Of JPEG and WebP; 100 is WebP without loss.", min=1, max=100, group=FILES)
    ] = 95
    restart: Annotated[
        bool,
        opt(
            "Begin anew instead of going on with the same job where it was stopped.",
            flag="--restart",
            group=FILES,
        ),
    ] = False
    grid: Annotated[bool, opt("Also write one sheet with all pictures.", flag="--grid", group=FILES)] = False


@dataclass(frozen=True)
class Img2ImgConfig(GenerateConfig):
    """Options of `sdlab img2img`: those of generate, and what to start from."""

    guidance: Annotated[
        float | None,
        opt(
            "How closely to follow the prompt. Default: what suits the model (5; FLUX.2 4).",
            min=0,
            max=100,
            group=HOW,
        ),
    ] = None
    width: Annotated[
        int | None,
        opt(
            "Pixels, a multiple of 8 (FLUX.2: 16). Default: the picture's, see below.",
            min=32,
            max=4096,
            group=HOW,
        ),
    ] = None
    image_size: Annotated[
        int | None,
        opt("Keep the picture's shape, with the area of a square of this side.", min=32, max=4096, group=HOW),
    ] = None
    init_image: Annotated[
        Path | None, opt("Picture to change, or a folder of them.", old=("--input",), group=WHAT)
    ] = None
    strength: Annotated[
        float | None,
        opt(
            "Start from the noised picture; near 0 little changes, at 1 everything. Default 0.8; "
            "FLUX.2 looks at the picture instead.",
            min=0,
            max=1,
            group=HOW,
        ),
    ] = None
    mask: Annotated[
        Path | None,
        opt("Make only the white parts of this picture anew, black ones stay (inpainting).", group=WHAT),
    ] = None
    mask_blur: Annotated[int, opt("Soften the mask's edge by so many pixels.", min=0, max=64, group=HOW)] = 4
    background: Annotated[str, opt("Colour put behind transparent pictures.", group=HOW)] = "white"
    max_pixels: Annotated[int, opt("Refuse larger pictures.", min=1, group=HOW)] = 64_000_000
    start: Annotated[int, opt("Begin at this picture of the folder, from 0.", min=0, group=FILES)] = 0
    limit: Annotated[int | None, opt("Take this many pictures of the folder.", min=1, group=FILES)] = None


@dataclass(frozen=True)
class SamplesConfig(GenerateConfig):
    """Options of `sdlab samples`: those of generate, and what the sheets show."""

    axes: Annotated[
        tuple[str, ...],
        opt("More axes, as --grid takes them: y:checkpoint=tuned/a,tuned/b.", argument=True),
    ] = ()
    grid: Annotated[
        tuple[str, ...],
        opt(
            "Columns, as x:guidance=4,7,10; y: for rows, z: for a sheet each. Any option of generate, also "
            'model=, lora=, seed=1..4 and prompt="a, b",c. Left out: rows are prompts, columns seeds.',
            group=WHAT,
        ),
    ] = ()  # type: ignore[assignment]  # the same word as generate's, and more behind it
    num: Annotated[
        int,
        opt("Seeds: seed, seed + 1, ... Default: 4; with --grid 1.", min=1, max=100_000, group=HOW),
    ] = NUM_SEEDS
    seed: Annotated[
        int | None,
        opt(
            "The first seed, the same for all prompts. Default: a random one.", min=0, max=MAX_SEED, group=HOW
        ),
    ] = None
    cell: Annotated[
        int | None,
        opt(
            "Longer side of a picture on the sheet, in pixels. Default: as it is. The pictures' own files stay whole.",
            min=16,
            max=4096,
            group=FILES,
        ),
    ] = None
    redraw: Annotated[
        Path | None,
        opt("Draw the sheets of this samples_... folder again, with no model.", group=FILES),
    ] = None
