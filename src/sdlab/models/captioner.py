"""Which model describes pictures: a name, a folder or a hub id becomes one Captioner, with the reason.

Importing this loads no model library; torch is asked for a card only where no model was named.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sdlab.dataset.cache import content_hashes
from sdlab.errors import SdlabError
from sdlab.models.bases import ALIASES, BUILTIN_CAPTIONER, BUILTINS, CAPTIONERS, builtin_folder, safe_name
from sdlab.models.files import component_weights, read_json
from sdlab.models.runs import about
from sdlab.options import did_you_mean

FAMILY = "blip"  # in the run.json of a captioner's training
CLASS = "BlipForConditionalGeneration"
STEMS = ("model", "pytorch_model")  # of files of weights, as transformers names them
TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SETTINGS_FILES = ("config.json", "generation_config.json", *PROCESSOR_FILES, *TOKENIZER_FILES)
CAPTIONER_FILES = (*SETTINGS_FILES, f"{STEMS[0]}.safetensors")  # of a captioner that we have trained
WAYS_ON = (
    f"Give {BUILTIN_CAPTIONER}, {', '.join(CAPTIONERS)}, or a folder with a BLIP model that writes captions"
)
# A caption less likely than this, word by word, is doubtful. mini-blip: 99 % of 192 drawn scenes were above 0.87, 95 %
# of 96 pictures with nothing clear in them below 0.65. The other is a guess at what suits BLIP's free sentences.
REVIEW_BELOW = {BUILTIN_CAPTIONER: 0.75}
REVIEW_BELOW_UNKNOWN = 0.35
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")


class Caption(NamedTuple):
    """What a model says of a picture, and how sure it is of its words: 0 to 1."""

    text: str
    confidence: float


@dataclass(frozen=True)
class Captioner:
    """A model that describes pictures, found; nothing of it is loaded yet."""

    name: str  # short: mini-blip, blip-base, the folder's or repository's name
    folder: Path
    why: str  # one line: what was chosen and why
    review_below: float  # the confidence under which a caption is doubtful
    allow_pickle: bool = False  # may its weights be a pickle, of which the tensors alone are read


def resolve_captioner(asked: str, *, allow_pickle: bool = False) -> Captioner:
    """The captioner meant by `asked`, or the default when it is empty: blip-base with a CUDA card, else mini-blip.

    Raises SdlabError, saying what would work, when nothing fits, the model does something else, a file of it
    is missing or damaged, or the hub is needed and cannot be reached.
    """
    word = asked.strip()
    if not word:
        return _default()
    return (
        _by_name(word)
        or _by_path(word, allow_pickle=allow_pickle)
        or _from_hub(word, allow_pickle=allow_pickle)
    )


def _default() -> Captioner:
    import torch

    if torch.cuda.is_available():
        return _alias(
            "blip-base", "the default captioner, as no --load-model was given and there is a CUDA card"
        )
    return _builtin("the built-in small captioner, as no --load-model was given and there is no CUDA card")


def _by_name(word: str) -> Captioner | None:
    """A name without slash or suffix; None for what may be a path or a hub id."""
    if re.search(r"[/\\]|^[.~]", word) or word.lower().endswith(_FILE_SUFFIXES):
        return None
    name = word.lower()
    if name == BUILTIN_CAPTIONER:
        return _builtin("the built-in captioner")
    if name in CAPTIONERS:
        return _alias(name, CAPTIONERS[name])
    if name in ALIASES or name in BUILTINS:
        raise SdlabError(
            "makes pictures and does not describe them", where=f"--load-model {word}", next_step=WAYS_ON
        )
    if Path(word).exists():
        return None
    near = did_you_mean(name, [BUILTIN_CAPTIONER, *CAPTIONERS])
    raise SdlabError(f"no captioner of that name{near}", where=word, next_step=WAYS_ON)


def _by_path(word: str, *, allow_pickle: bool) -> Captioner | None:
    """A folder that exists; None for what may be a hub id."""
    path = Path(word).expanduser()
    if path.is_dir():
        name = safe_name(path.resolve().name)
        return _found(name, path, f"{word}: a folder", REVIEW_BELOW_UNKNOWN, allow_pickle=allow_pickle)
    if path.exists():
        raise SdlabError(
            "is a file; a captioner is a folder with config.json, model.safetensors and its tokenizer",
            where=word,
            next_step=WAYS_ON,
        )
    looks_local = word.lower().endswith(_FILE_SUFFIXES) or word.startswith(("/", ".", "~")) or "\\" in word
    if looks_local or not _HUB_ID.fullmatch(word) or Path(path.parts[0]).is_dir():
        siblings = sorted(p.as_posix() for p in path.parent.glob("*")) if path.parent.is_dir() else []
        near = did_you_mean(path.as_posix(), siblings)
        raise SdlabError(f"there is no such folder{near}", where=word, next_step=WAYS_ON)
    return None


def _builtin(why: str) -> Captioner:
    folder = builtin_folder(BUILTIN_CAPTIONER)
    if not (folder / "config.json").is_file():
        raise SdlabError(
            "this installation lacks the built-in captioner",
            where=BUILTIN_CAPTIONER,
            next_step="Install sdlab again",
        )
    return _found(BUILTIN_CAPTIONER, folder, f"{BUILTIN_CAPTIONER}: {why}", REVIEW_BELOW[BUILTIN_CAPTIONER])


def _alias(name: str, why: str) -> Captioner:
    from sdlab.models.hub import captioner_snapshot

    # The weights of these two were published as a pickle first; their tensors are read, nothing in it is run.
    folder, how = captioner_snapshot(
        CAPTIONERS[name], asked=f"{name} ({CAPTIONERS[name]})", allow_pickle=True
    )
    return _found(name, folder, f"{name}: {why}, {how}", REVIEW_BELOW_UNKNOWN, allow_pickle=True)


def _from_hub(word: str, *, allow_pickle: bool) -> Captioner:
    from sdlab.models.hub import captioner_snapshot

    folder, how = captioner_snapshot(word, asked=word, allow_pickle=allow_pickle)
    name = safe_name(word.partition("@")[0].rpartition("/")[2])
    why = f"{word}: from the Hugging Face hub, {how}"
    return _found(name, folder, why, REVIEW_BELOW_UNKNOWN, allow_pickle=allow_pickle)


def _found(
    name: str, folder: Path, why: str, review_below: float, *, allow_pickle: bool = False
) -> Captioner:
    _check_kind(folder)
    for names in (PROCESSOR_FILES, TOKENIZER_FILES[:2]):
        if not any((folder / file).is_file() for file in names):
            raise SdlabError(
                f"there is no {' or '.join(names)} in it", where=str(folder), next_step="Copy the model again"
            )
    component_weights(folder, STEMS, allow_pickle=allow_pickle)  # raises where a header is damaged
    return Captioner(name, folder, why, review_below, allow_pickle)


def _check_kind(folder: Path) -> None:
    """Raise the SdlabError that says what the folder is, unless it is a BLIP model that writes captions."""
    is_run, has_config = (folder / "run.json").is_file(), (folder / "config.json").is_file()
    if is_run and not has_config and about(folder).get("family") == FAMILY:
        raise SdlabError(
            "is a run without a result yet", where=str(folder),
            next_step=f"Go on with it: sdlab train-captioner --save-model {folder} --resume",
        )  # fmt: skip
    if (folder / "model_index.json").is_file() or (is_run and not has_config):
        raise SdlabError("makes pictures and does not describe them", where=str(folder), next_step=WAYS_ON)
    if not has_config:
        raise SdlabError(
            "is no captioner: there is no config.json in it", where=str(folder), next_step=WAYS_ON
        )
    what = other_than_captioner(read_json(folder / "config.json"))
    if what:
        raise SdlabError(f"is {what}, not a {CLASS}", where=str(folder), next_step=WAYS_ON)


def other_than_captioner(config: Mapping[str, Any]) -> str:
    """What a config.json says the model is, empty where that is a captioner."""
    kind, classes = config.get("model_type"), config.get("architectures") or [CLASS]
    if kind != "blip":
        return f"a model of the kind {str(kind)[:40]!r}"
    if not isinstance(classes, list) or CLASS not in classes:
        return f"a {str(classes[0] if isinstance(classes, list) else classes)[:60]}"
    return ""


def is_blip(folder: Path) -> bool:
    """Does the folder hold a BLIP model of any kind, by its config.json?"""
    try:
        return read_json(folder / "config.json").get("model_type") == "blip"
    except SdlabError:
        return False


def fingerprint_of(captioner: Captioner, cache: Path) -> str:
    """Hash of all that says what the model answers: configuration, tokenizer, preprocessor and weights.

    About a second for 1 GB; hashes of files that did not change since are remembered in the folder `cache`. Raises
    SdlabError where a file cannot be read.
    """
    folder = captioner.folder
    weights = sorted(folder.glob("model*.safetensors*")) or sorted(folder.glob("pytorch_model.*"))
    settings = [folder / name for name in ("config.json", *PROCESSOR_FILES, *TOKENIZER_FILES)]
    paths = [os.path.abspath(path) for path in (*settings, *weights) if path.exists()]
    hashes, faults = content_hashes(cache, paths, 0, lambda what, done, total: None)
    for path, reason in faults.items():
        raise SdlabError(f"cannot be read ({reason})", where=path)
    digest = hashlib.sha256(b"blip 1")
    for path in paths:
        digest.update(f"\0{os.path.basename(path)} {hashes[path]}".encode())
    return digest.hexdigest()
