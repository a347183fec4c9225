"""Models of the Hugging Face hub: the local cache first, then (where allowed and reachable) a download."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.models.captioner import PROCESSOR_FILES, TOKENIZER_FILES
from sdlab.models.files import read_json
from sdlab.models.index import LAYOUTS

PATTERNS = (
    "model_index.json",
    "*/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*.json",
    "tokenizer/merges.txt",
    "tokenizer/*.jinja",
    "feature_extractor/preprocessor_config.json",
    "*/diffusion_pytorch_model.safetensors",
    "*/diffusion_pytorch_model-*-of-*.safetensors",
    "*/diffusion_pytorch_model.safetensors.index.json",
    "text_encoder/model.safetensors",
    "text_encoder/model-*-of-*.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/generation_config.json",
    "safety_checker/model.safetensors",
)  # safetensors only, and none of the fp16, EMA and single-file copies that lie beside them
CAPTIONER_PATTERNS = ("*.json", "vocab.txt", "model.safetensors", "model-*-of-*.safetensors")
PICKLED = "pytorch_model.bin"
TIMEOUT_S = 5
ABSENT = "not in the local cache of the Hugging Face hub"
WAYS_ON = (
    "What works without it: a local folder, a single file (.safetensors) "
    "or a built-in model (mini-sd, mini-flux2)"
)
CAPTIONER_WAYS_ON = "What works without it: a local folder with a BLIP model, or the built-in mini-blip"


def snapshot(repo: str, *, asked: str, without: str = "") -> tuple[Path, str]:
    """The local folder of ``org/name[@revision]``, and how it was found; SdlabError when it cannot be had.

    `asked` is what the user wrote, for messages. The weights of the part `without` are not needed.
    """
    fetch = _fetcher(repo, PATTERNS, ignore=[f"{without}/*.safetensors"] if without else None)
    folder = _cached(fetch, asked, WAYS_ON)
    if folder is not None and _complete(folder, without):
        return folder, "from the local cache"
    folder = _download(fetch, asked, WAYS_ON)
    if not (folder / "model_index.json").is_file():
        raise SdlabError("that hub model is no diffusers folder", where=asked, next_step=WAYS_ON)
    if not _complete(folder, without):
        raise SdlabError(
            "that hub model has no .safetensors weights in its parts", where=asked, next_step=WAYS_ON
        )
    return folder, "downloaded from the hub"


def captioner_snapshot(repo: str, *, asked: str, allow_pickle: bool) -> tuple[Path, str]:
    """As `snapshot`, for a model that describes pictures.

    Its pickle is fetched only where that is allowed and there is nothing else.
    """
    fetch = _fetcher(repo, CAPTIONER_PATTERNS)
    folder = _cached(fetch, asked, CAPTIONER_WAYS_ON)
    if folder is not None and _captioner_complete(folder, allow_pickle=allow_pickle):
        return folder, "from the local cache"
    folder = _download(fetch, asked, CAPTIONER_WAYS_ON)
    if allow_pickle and not _has_weights(folder):
        folder = _download(_fetcher(repo, (*CAPTIONER_PATTERNS, PICKLED)), asked, CAPTIONER_WAYS_ON)
    if not _captioner_complete(folder, allow_pickle=allow_pickle):
        more = "" if allow_pickle else " (--allow-pickle would take a pytorch_model.bin)"
        raise SdlabError(
            f"that hub model lacks config.json, preprocessor_config.json, its tokenizer or model.safetensors{more}",
            where=asked,
            next_step=CAPTIONER_WAYS_ON,
        )
    return folder, "downloaded from the hub"


def _captioner_complete(folder: Path, *, allow_pickle: bool) -> bool:
    """Is every file there that a captioner needs? A broken-off download leaves some out."""
    needed = (("config.json",), PROCESSOR_FILES, TOKENIZER_FILES[:2])
    is_there = all(any((folder / name).is_file() for name in names) for names in needed)
    return is_there and (_has_weights(folder) or (allow_pickle and (folder / PICKLED).is_file()))


def _fetcher(repo: str, patterns: tuple[str, ...], *, ignore: list[str] | None = None) -> Callable[..., str]:
    """A call that brings the files of ``org/name[@revision]`` that match, or with local_files_only finds them."""
    from huggingface_hub import snapshot_download

    repo_id, _, revision = repo.partition("@")
    return partial(
        snapshot_download,
        repo_id,
        revision=revision or None,
        allow_patterns=list(patterns),
        ignore_patterns=ignore,
        etag_timeout=TIMEOUT_S,
    )


def _cached(fetch: Callable[..., str], asked: str, ways_on: str) -> Path | None:
    """The folder in the local cache, complete or not. Raises SdlabError for what is no model name."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(fetch(local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as reason:
        raise SdlabError("is no model name", where=asked, next_step=ways_on) from reason


def _complete(folder: Path, without: str) -> bool:
    """Are all required parts of a snapshot there? A broken-off download leaves some out.

    True for a kind of model that we do not load: the one who opens it says so.
    """
    if not (folder / "model_index.json").is_file():
        return False
    layout = LAYOUTS.get(str(read_json(folder / "model_index.json").get("_class_name")))
    if layout is None:
        return True
    if not all((folder / part).is_dir() for part in layout.required):
        return False
    return all(_has_weights(folder / part) for part in layout.networks if part != without)


def _has_weights(folder: Path) -> bool:
    """Is there one file of weights, or every shard that the index names?"""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        places = read_json(index).get("weight_map")
        names = set(places.values()) if isinstance(places, dict) else {""}
        return all(isinstance(name, str) and (folder / name).is_file() for name in names)
    return any(folder.glob("*.safetensors"))


def _download(fetch: Callable[..., str], asked: str, ways_on: str) -> Path:
    """The folder, fetched. Raises SdlabError when the hub is not to be asked, or does not give it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        raise SdlabError(f"{ABSENT}, and HF_HUB_OFFLINE is set", where=asked, next_step=ways_on)
    try:
        _knock()
        return Path(fetch())
    except GatedRepoError as reason:
        next_step = "Do so on its page, then: hf auth login"
        raise SdlabError(
            "its owner asks you to accept a licence first", where=asked, next_step=next_step
        ) from reason
    except (RepositoryNotFoundError, RevisionNotFoundError) as reason:
        raise SdlabError("the hub has no such model or revision", where=asked, next_step=ways_on) from reason
    except (HfHubHTTPError, LocalEntryNotFoundError, _http_error(), ConnectionError, TimeoutError) as reason:
        raise SdlabError(
            f"{ABSENT}, and the hub cannot be reached", where=asked, next_step=ways_on
        ) from reason
    except (KeyError, ValueError) as reason:  # a login page of a hotel's network, for instance
        raise SdlabError(
            f"{ABSENT}, and the hub gave no proper answer", where=asked, next_step=ways_on
        ) from reason


def _knock() -> None:
    """Raise an HTTP error within seconds when the hub does not answer; its own client retries for minutes."""
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)


def _http_error() -> type[Exception]:
    """The HTTPError of the library that the hub's client uses: httpx, or httpx2 in later versions."""
    from huggingface_hub import get_session

    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    kind: type[Exception] = library.HTTPError
    return kind
