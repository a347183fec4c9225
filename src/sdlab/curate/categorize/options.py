"""The options of `sdlab categorize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sdlab.options import opt

DO, KEEP, LOOK, MACHINE = "What to do", "Folders and captions", "How it looks at pictures", "Machine"
MAX_DEPTH = 8


@dataclass(frozen=True)
class CategorizeConfig:
    """Options of `sdlab categorize`; those that training has too mean the same there."""

    images: Annotated[Path, opt("Folder of pictures, with folders in it or without.", argument=True)] = Path(
        "images"
    )
    organize: Annotated[
        bool, opt("Sort the pictures into folders that are prompts.", flag="--organize", group=DO)
    ] = False
    caption: Annotated[
        bool, opt("Write each caption to a .cap file beside its picture.", flag="--caption", group=DO)
    ] = False
    dry_run: Annotated[
        bool,
        opt("Print what would be done. Only the cache of captions is written.", flag="--dry-run", group=DO),
    ] = False
    undo: Annotated[Path | None, opt("Take back the last run in this folder, finished or not.", group=DO)] = (
        None
    )
    review: Annotated[
        bool,
        opt(
            "Pictures with a doubtful caption go to _review/; without --organize they get no .cap.",
            flag="--review",
            group=DO,
        ),
    ] = False
    sheet: Annotated[
        bool, opt("Write a contact sheet for each folder, to __sheets/.", flag="--sheet", group=DO)
    ] = False
    json: Annotated[bool, opt("The report as one JSON document on stdout.", flag="--json", group=DO)] = False
    captions: Annotated[
        Literal["keep", "append", "replace"],
        opt("What a picture's own caption (.cap, else .txt) is to the new one.", group=KEEP),
    ] = "keep"
    min_count: Annotated[
        int, opt("Pictures a keyword needs to become a folder.", min=1, max=1_000_000, group=KEEP)
    ] = 2
    depth: Annotated[int, opt("Folders below each other, at most.", min=1, max=MAX_DEPTH, group=KEEP)] = 2
    output_dir: Annotated[
        Path | None,
        opt("Where the folders go (default: beside IMAGES, with __ in front of its name).", group=KEEP),
    ] = None
    mode: Annotated[
        Literal["copy", "hardlink", "move"],
        opt("How pictures get there. Captions are copied rather than linked.", group=KEEP),
    ] = "copy"
    filler: Annotated[
        Path | None, opt("File of words that are no keywords, in place of the built-in list.", group=KEEP)
    ] = None
    print_filler: Annotated[
        bool,
        opt("Print the built-in list, to start one of your own, and end.", flag="--print-filler", group=KEEP),
    ] = False
    txt: Annotated[bool, opt("Also read captions from .txt files.", group=KEEP)] = True
    load_model: Annotated[
        str,
        opt(
            "Captioner: mini-blip, blip-base, blip-large, a folder or a hub id (default: blip-base with a CUDA "
            "card, mini-blip without).",
            group=LOOK,
        ),
    ] = ""
    review_below: Annotated[
        float | None,
        opt("Confidence under which a caption is doubtful (default: the model's).", min=0, max=1, group=LOOK),
    ] = None
    spacy_model: Annotated[
        str | None, opt("spaCy pipeline: a package or a folder (default: en_core_web_sm).", group=LOOK)
    ] = None
    background: Annotated[str, opt("Colour put behind transparent pictures.", group=LOOK)] = "white"
    max_pixels: Annotated[int, opt("Refuse larger pictures unread.", min=1, group=LOOK)] = 64_000_000
    cache_dir: Annotated[
        Path | None,
        opt("Where captions are kept (default: .sdlab-cache beside the output).", group=MACHINE),
    ] = None
    batch: Annotated[int, opt("Pictures the model looks at together.", min=1, max=1024, group=MACHINE)] = 32
    num_workers: Annotated[int, opt("Threads that read pictures.", min=0, max=64, group=MACHINE)] = 2
    device: Annotated[str, opt("auto, cpu, cuda or cuda:1.", group=MACHINE)] = "auto"
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        opt("Number type of the model (default: bf16 with CUDA, else fp32).", group=MACHINE),
    ] = "auto"
    allow_pickle: Annotated[
        bool, opt("Load .bin files (weights only).", flag="--allow-pickle", group=MACHINE)
    ] = False
