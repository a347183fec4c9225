"""A picture made again from the picture alone, and changed by one thing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlab import cli
from sdlab.errors import SdlabError
from sdlab.inference import load
from sdlab.inference.batch import Batch
from sdlab.inference.identity import Hasher
from sdlab.inference.record import metadata
from sdlab.inference.record.container import encoded, found_in
from sdlab.inference.record.recipe import check_fits
from sdlab.inference.spec import FORMATS, Format, Shot, Spec
from sdlab.keyed import keyed
from tests.inference.record import readers


@dataclass(frozen=True)
class Ran:
    code: int
    paths: list[Path]
    err: str


IN_TURN = """
import json, sys
from sdlab import cli
for command in json.loads(sys.argv[1]):
    try:
        cli.main(command)
    except SystemExit as ended:
        if ended.code:
            raise
"""
HOW = ("--image-size", 64, "--steps", 2, "--seed", 5, "--device", "cpu", "--no-prefix")


@pytest.fixture
def sdlab(
    tmp_path: Path,
    tiny_sd_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Ran]:
    """The program in tmp_path, where models/tiny and the LoRAs loras/pen, loras/ink and embeddings/neg lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_sd_folder, "models/tiny")
    for name in ("pen", "ink"):
        write_lora(Path("loras", f"{name}.safetensors"))
    Path("embeddings").mkdir()
    save_file({"emb_params": torch.randn(2, 32, generator=keyed("neg"))}, "embeddings/neg.safetensors")

    def run(*args: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        told = capsys.readouterr()
        return Ran(int(ended.value.code or 0), [Path(line) for line in told.out.splitlines()], told.err)

    return run


def write_lora(path: Path) -> None:
    from safetensors import safe_open

    tensors = {}
    with safe_open("models/tiny/unet/diffusion_pytorch_model.safetensors", "pt") as unet:
        for name in (n for n in unet.keys() if n.endswith("attn2.to_q.weight")):
            rows, columns = unet.get_slice(name).get_shape()
            for half, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
                key = f"unet.{name.removesuffix('weight')}{half}.weight"
                tensors[key] = torch.randn(shape, generator=keyed(path.stem, key))
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)


def made(sdlab: Callable[..., Ran], *args: object, prompt: str = "red star") -> Path:
    ran = sdlab("generate", "--load-model", "models/tiny", "--prompt", prompt, *HOW, *args)
    assert ran.code == 0, ran.err
    [path] = ran.paths[-1:]
    return path


def again(sdlab: Callable[..., Ran], path: Path, *args: object, command: str = "generate") -> Path:
    ran = sdlab(command, "--from", path, "--output", "again", *args)
    assert ran.code == 0, ran.err
    [new] = ran.paths
    return new


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_lora_of_the_prompt_and_textual_inversion_are_found_again(sdlab: Callable[..., Ran]) -> None:
    prompt = "red (star:1.3) <lora:pen:0.8> by neg"
    path = made(sdlab, "--lora-dir", "loras", "--embedding", "embeddings", "--lora", "loras/ink.safetensors:0.5",
                "--clip-skip", 2, "--hires", 1.5, prompt=prompt)  # fmt: skip
    about = metadata.read(path)
    assert [(one["name"], one["weight"], one["tag"]) for one in about["loras"]] == [
        ("ink", 0.5, False),
        ("pen", 0.8, True),
    ]
    assert [one["name"] for one in about["embeddings"]] == ["neg"] and about["hires"]["width"] == 96
    new = again(sdlab, path)
    assert new.read_bytes() == path.read_bytes()
    for found in readers.all_of(new).values():
        assert found.prompt.split() == "red (star:1.3) by neg".split()
        assert found.lora_weights == {"ink": "0.5", "pen": "0.8"}
        assert found.lora_hashes == {one["name"]: one["autov3"][:12] for one in about["loras"]}
    without = again(sdlab, path, "--set", "prompt=red (star:1.3)", "--set", "lora=")
    assert metadata.read(without)["loras"] == [] and metadata.read(without)["embeddings"] == []
    assert pixels(without) != pixels(path)


def test_one_byte_changed_is_refused_by_name(sdlab: Callable[..., Ran]) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save("start.png")
    Image.linear_gradient("L").resize((64, 64)).save("mask.png")
    ran = sdlab("img2img", "--load-model", "models/tiny", "--init-image", "start.png", "--mask", "mask.png", *HOW,
                "--prompt", "red <lora:pen:0.5> neg", "--lora-dir", "loras", "--lora", "loras/ink.safetensors",
                "--embedding", "embeddings")  # fmt: skip
    assert ran.code == 0, ran.err
    [path] = ran.paths
    assert again(sdlab, path).read_bytes() == path.read_bytes()
    shutil.rmtree("again")
    unet = "models/tiny/unet/diffusion_pytorch_model.safetensors"
    loras = ("loras/pen.safetensors", "loras/ink.safetensors")
    for file in map(Path, (unet, *loras, "embeddings/neg.safetensors", "mask.png", "start.png")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        refused = sdlab("generate", "--from", path, "--output", "again")
        assert refused.code == 2 and f"{file} has changed (sha256 was" in refused.err
        assert refused.err.count("has changed") == 1 and not list(Path("again").glob("*.*"))
        file.write_bytes(whole)


def test_what_moved_is_found_where_the_user_says(sdlab: Callable[..., Ran]) -> None:
    path = made(sdlab, "--lora-dir", "loras", "--embedding", "embeddings", prompt="red <lora:pen:0.8> neg")
    os.rename("loras", "elsewhere")
    os.rename("embeddings", "words")
    refused = sdlab("generate", "--from", path)
    assert (
        refused.code == 2
        and "pen" in refused.err
        and "embeddings/neg.safetensors is no longer" in refused.err
    )
    new = again(sdlab, path, "--lora-dir", "elsewhere", "--embedding", "words")
    assert pixels(new) == pixels(path)


def test_textual_inversion_may_be_new_in_a_changed_text(sdlab: Callable[..., Ran]) -> None:
    save_file(
        {"emb_params": torch.randn(1, 32, generator=keyed("inkwash"))}, "embeddings/inkwash.safetensors"
    )
    path = made(sdlab, prompt="red inkwash")
    beside: tuple[object, ...] = ("--embedding", "embeddings")
    changes = ("--set", "prompt=by neg", "--set", "negative=neg")
    new, plain = again(sdlab, path, *changes, *beside), again(sdlab, path, *changes)
    assert pixels(new) == pixels(made(sdlab, "--negative", "neg", *beside, prompt="by neg")) != pixels(plain)
    assert [one["name"] for one in metadata.read(new)["embeddings"]] == ["neg"]
    assert metadata.read(plain)["embeddings"] == []
    untouched = again(sdlab, path, "--set", "negative=bad", *beside)  # in the prompt it was plain text
    assert metadata.read(untouched)["embeddings"] == []


def test_version_that_an_older_recipe_does_not_tell_is_not_warned_of(sdlab: Callable[..., Ran]) -> None:
    path = made(sdlab)
    about = metadata.read(path)
    assert {"peft", "tokenizers", "numpy"} <= about["versions"].keys()
    for versions, warned in (({}, False), ({"numpy": "1.0"}, True)):
        versions = {"sdlab": about["versions"]["sdlab"], **versions}
        with Image.open(path) as image:
            path.write_bytes(encoded(image, {**about, "versions": versions}, Format()))
        ran = sdlab("generate", "--from", path, "--output", "again")
        assert ran.code == 0 and ("warning" in ran.err) is warned
        assert ("numpy version was 1.0" in ran.err) is warned


def test_recipe_too_long_for_its_file_is_known_before_the_picture(tiny_sd_folder: Path) -> None:
    asked = load.Asked(load_model=str(tiny_sd_folder))
    opened = load.open_chosen(load.choose(asked, tuned=Path("tuned"), hasher=Hasher(None)))
    loaded = load.load(opened, load.Running(device="cpu"), prompts=["a"])
    for typed, fits in (("red star", True), ("x" * 40_000, False)):
        shots = [Shot(i, text, "", "", 5 + i) for i, text in enumerate(("a", typed))]
        for name in FORMATS:
            batch = Batch(shots, Spec(2, 1.0, 64, 64), Path(), lambda shot: iter(()), format=Format(name))
            if fits or name != "jpeg":
                check_fits(batch, loaded=loaded, exact=False)
                continue
            with pytest.raises(SdlabError, match="64 KB"):
                check_fits(batch, loaded=loaded, exact=False)


def test_other_formats_hold_the_recipe_too(sdlab: Callable[..., Ran]) -> None:
    for form in ("jpeg", "webp"):
        path = made(sdlab, "--format", form, "--quality", 80)
        assert path.suffix == Format(form).suffix and metadata.read(path)["quality"] == 80
        new = again(sdlab, path)
        assert new.suffix == path.suffix and new.read_bytes() == path.read_bytes()
    as_png = again(sdlab, path, "--set", "format=png")
    assert pixels(made(sdlab)) == pixels(as_png) and as_png.suffix == ".png"
    assert found_in(as_png).parameters == found_in(path).parameters


def test_a_changed_picture_is_the_one_made_so_at_first(sdlab: Callable[..., Ran]) -> None:
    path = made(sdlab)
    cases: list[tuple[list[object], list[object], str]] = [
        (["--set", "prompt=blue <lora:pen:0.8>", "--lora-dir", "loras", "--set", "steps=3"],
         ["--steps", 3, "--lora-dir", "loras"], "blue <lora:pen:0.8>"),
        (["--set", "scheduler=euler_a", "--set", "seed=9", "--set", "negative=bad", "--set", "hires=1.3"],
         ["--scheduler", "Euler a", "--seed", 9, "--negative", "bad", "--hires", 1.3], "red star"),
        (["--set", "lora=loras/ink.safetensors:0.5", "--set", "width=72"],
         ["--lora", "loras/ink.safetensors:0.5", "--width", 72], "red star"),
    ]  # fmt: skip
    for changes, asked, prompt in cases:
        new, first = again(sdlab, path, *changes), made(sdlab, *asked, prompt=prompt)
        assert pixels(new) == pixels(first) != pixels(path)
        ours, theirs = metadata.read(new), metadata.read(first)
        assert {n for n in ours if ours[n] != theirs[n]} <= {"index"}


def test_another_model_may_be_set_and_is_not_held_against_the_old_one(sdlab: Callable[..., Ran]) -> None:
    path = made(sdlab, "--lora", "loras/pen.safetensors")
    shutil.copytree("models/tiny", "models/other")
    weights = Path("models/other/unet/diffusion_pytorch_model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1:] = b"\x3f"
    weights.write_bytes(data)
    assert sdlab("generate", "--from", path, "--load-model", "models/other").code == 2
    new = again(sdlab, path, "--set", "load_model=models/other")
    assert metadata.read(new)["model"]["name"] == "other"
    swapped = again(sdlab, path, "--set", "unet=models/other", "--set", "vae=models/other")
    assert {metadata.read(swapped)[part]["name"] for part in ("unet", "vae")} == {"other"}
    assert pixels(again(sdlab, swapped, "--set", "unet=", "--set", "vae=")) == pixels(path)
    Path("loras/pen.safetensors").write_bytes(b"")
    refused = sdlab("generate", "--from", path, "--set", "load_model=models/other")
    assert refused.code == 2 and "pen.safetensors" in refused.err  # what was not set is checked as ever
    both = sdlab(
        "generate", "--from", path, "--load-model", "models/tiny", "--set", "load_model=models/other"
    )
    assert both.code == 2 and "--set load_model takes another" in both.err


def test_a_whole_batch_is_made_again_for_one_picture(sdlab: Callable[..., Ran]) -> None:
    path = made(sdlab, "--prompt", "blue fish", "--num", 2, "--batch", 3)
    assert metadata.read(path)["index"] == 3
    path = path.with_name(path.name.replace("_0003", "_0001"))
    assert len(metadata.read(path)["batch"]) == 3
    new = again(sdlab, path)
    assert new.read_bytes() == path.read_bytes() and new.name.endswith("_0001.png")
    more = metadata.read(again(sdlab, path, "--set", "steps=3"))
    assert len(more["batch"]) == 3 and more["batch_position"] == 1
    alone = metadata.read(again(sdlab, path, "--set", "seed=6"))
    assert alone["batch"] == [] and alone["seed"] == 6 and alone["index"] == 1


def test_a_recipe_of_anywhere_is_not_obeyed_by_the_terminal(
    sdlab: Callable[..., Ran], tmp_path: Path
) -> None:
    path = made(sdlab)
    about = metadata.read(path)
    about["model"] = {**about["model"], "asked": "\x1b[2Jgone\n"}
    with Image.open(path) as image:
        path.write_bytes(encoded(image, about, Format()))
    ran = sdlab("generate", "--from", path)
    assert ran.code == 2 and "\x1b" not in ran.err and "?[2Jgone? is no longer there" in ran.err


@pytest.mark.slow
def test_six_pictures_are_the_same_in_fresh_processes(sdlab: Callable[..., Ran]) -> None:
    def fresh(*commands: tuple[object, ...]) -> list[Path]:
        """What the commands print, one after another in one process."""
        typed = json.dumps([[str(arg) for arg in command] for command in commands])
        told = subprocess.run([sys.executable, "-c", IN_TURN, typed], capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        return [Path(line) for line in told.stdout.splitlines()]

    names = ("euler a", "dpm++ 2m karras", "ddim")
    texts = ("red star", "red (star:1.3) [fish] <lora:pen:0.8>")
    lines = [f"{text} --scheduler {name}" for name in names for text in texts]
    Path("prompts.txt").write_text("\n".join(lines))
    model: tuple[object, ...] = ("--load-model", "models/tiny", "--lora-dir", "loras")
    paths = fresh(("generate", *model, "--prompt-file", "prompts.txt", *HOW))
    assert len({pixels(path) for path in paths}) == 6
    remade = fresh(*(("generate", "--from", path, "--output", "again") for path in reversed(paths)))
    for path, new in zip(paths, reversed(remade), strict=True):
        assert pixels(new) == pixels(path) and new.read_bytes() == path.read_bytes()
