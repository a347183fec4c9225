"""Whatever holds networks is read into the same pieces: folders, parts, shards, single files in every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlab.errors import SdlabError
from sdlab.models import bases, ldm, pieces, sniff
from sdlab.models.files import head_bytes
from sdlab.models.opening import open_family
from sdlab.models.parts import Part, build_module, expected
from sdlab.models.pieces import read_pieces
from sdlab.models.resolve import resolve
from tests import factories
from tests.models.helpers import (
    TEXT,
    UNET,
    VAE,
    bfl_file,
    bfl_vae_file,
    copied,
    edit_json,
    edit_tensors,
    single_file,
)

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
WHOLE = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}


@pytest.fixture(autouse=True)
def tiny_is_known(
    tiny_sd_folder: Path, tiny_sd2_folder: Path, tiny_klein_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny models' shapes count among those we know, as those of the built-in ones do."""
    known = {**bases.known_configs(), "tiny": tiny_sd_folder, "tiny-2": tiny_sd2_folder}
    monkeypatch.setattr(sniff, "known_configs", lambda: known)
    monkeypatch.setattr(bases, "known_configs", lambda: known)
    shapes = {**bases.known_flux2(), "tiny-flux2": (2, 2, 2, 48)}
    monkeypatch.setattr(sniff, "known_flux2", lambda: shapes)
    folders = {**bases.known_flux2_configs(), "tiny-flux2": tiny_klein_folder}
    for module in (sniff, pieces):
        monkeypatch.setattr(module, "known_flux2_configs", lambda: folders)


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.tiny_sd(tmp_path_factory.mktemp("tiny") / "tiny-inpaint", channels=9)


def stored_in(folder: Path, part: str) -> dict[str, torch.Tensor]:
    file = WHOLE.get(part, f"{part}/diffusion_pytorch_model.safetensors")
    return {n.removeprefix("text_model."): t for n, t in load_file(folder / file).items()}


def same(part: Part, wanted: dict[str, torch.Tensor]) -> bool:
    read = {n: s.read() for n, s in part.weights.items() if n != "bn.num_batches_tracked"}
    wanted = {n: t for n, t in wanted.items() if n != "bn.num_batches_tracked"}
    return read.keys() == wanted.keys() and all(torch.equal(read[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("inpainting", [False, True])
def test_a_folder_and_its_single_file_are_the_same_pieces(
    tmp_path: Path, kind: str, inpainting: bool
) -> None:
    folder = factories.tiny_sd(tmp_path / "model", second=kind == "sd2", channels=9 if inpainting else 4)
    path = single_file(folder, tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    one, two = read_pieces(folder), read_pieces(path)
    assert (one.layout, two.layout) == ("folder", "file")
    for found in (one, two):
        assert (found.family, found.kind, found.is_inpainting) == ("sd", kind, inpainting)
        assert found.base == {"sd1": "tiny", "sd2": "tiny-2"}[kind]
        assert (
            set(found.networks) == set(WHOLE) and found.tokenizer is not None and found.scheduler is not None
        )
        assert all(same(found.networks[part], stored_in(folder, part)) for part in WHOLE)
        assert found.scheduler.get("prediction_type", "epsilon") == "epsilon"
    assert two.metadata["modelspec.prediction_type"] == "epsilon" and one.metadata == {}
    for part in ("unet", "vae"):
        a, b = (found.networks[part].config for found in (one, two))
        assert a["in_channels"] == b["in_channels"]


def test_drawing_and_training_refuse_an_inpainting_model_by_name(
    inpainting_folder: Path, tmp_path: Path
) -> None:
    path = single_file(inpainting_folder, tmp_path / "m.safetensors")
    for asked in (path, inpainting_folder):
        with pytest.raises(SdlabError, match=r"is an inpainting model.*only sdlab convert takes this one"):
            open_family(resolve(str(asked), training=True))


def test_a_checkpoint_without_a_part_gives_the_others(tiny_sd_folder: Path, tmp_path: Path) -> None:
    for prefix, parts in ((ldm.VAE, {"unet", "text_encoder"}), (ldm.CLIP, {"unet", "vae"})):
        path = single_file(tiny_sd_folder, tmp_path / "m.safetensors")
        edit_tensors(path, lambda t, p=prefix: [t.pop(n) for n in list(t) if n.startswith(p)])
        found = read_pieces(path)
        assert set(found.networks) == parts and found.scheduler is not None
        assert (found.tokenizer is None) == ("text_encoder" not in parts)


def test_a_vae_from_elsewhere_makes_a_checkpoint_without_one_whole(tiny_sd: Any, tmp_path: Path) -> None:
    folder, other = tiny_sd("model"), tiny_sd("other", seed=1)
    path = single_file(folder, tmp_path / "m.safetensors")
    edit_tensors(path, lambda t: [t.pop(n) for n in list(t) if n.startswith(ldm.VAE)])
    model = resolve(str(path), training=False)
    with pytest.raises(SdlabError, match=r"holds no VAE. Give one with --vae FILE"):
        open_family(model)
    family: Any = open_family(model, vae=str(other / VAE))
    assert same(family.parts.vae, stored_in(other, "vae"))


def test_what_is_no_part_of_the_model_is_told(tiny_sd_folder: Path, tmp_path: Path) -> None:
    path = single_file(tiny_sd_folder, tmp_path / "m.safetensors")
    more = ["alphas_cumprod", "model_ema.decay", ldm.VAE + "loss.logvar", ldm.CLIP + "logit_scale"]
    edit_tensors(path, lambda t: t.update({name: torch.zeros(1) for name in more}))
    assert read_pieces(path).left_out == tuple(sorted(more))


def averages(table: dict[str, torch.Tensor], *, only: bool) -> None:
    """Give a checkpoint moving averages of its UNet, each number one more, as the original trainer writes them."""
    for name in [n for n in table if n.startswith(ldm.UNET)]:
        table[ldm.ema_name(name.removeprefix(ldm.UNET))] = (table.pop(name) if only else table[name]) + 1
    table |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_moving_averages_are_taken_when_asked_for_or_when_there_is_nothing_else(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    both, only = (single_file(tiny_sd_folder, tmp_path / f"{n}.safetensors") for n in ("both", "only"))
    edit_tensors(both, lambda t: averages(t, only=False))
    edit_tensors(only, lambda t: averages(t, only=True))
    own = stored_in(tiny_sd_folder, "unet")
    averaged = {n: t + 1 for n, t in own.items()}
    assert same(read_pieces(both).networks["unet"], own)
    assert same(read_pieces(both, ema=True).networks["unet"], averaged)
    assert same(read_pieces(only).networks["unet"], averaged)
    assert same(read_pieces(only, ema=True).networks["unet"], averaged)
    assert "moving averages" in read_pieces(only).notes[0] and read_pieces(both).notes == ()
    model = resolve(str(only), training=True)
    assert "moving averages" in model.why
    family: Any = open_family(model)
    assert same(family.parts.unet, averaged)


def test_moving_averages_that_are_not_there_are_one_line(tiny_sd_folder: Path, tmp_path: Path) -> None:
    path = single_file(tiny_sd_folder, tmp_path / "m.safetensors")
    for asked in (path, tiny_sd_folder, tiny_sd_folder / VAE):
        with pytest.raises(SdlabError, match="EMA"):
            read_pieces(asked, ema=True)
    edit_tensors(path, lambda t: averages(t, only=True))
    edit_tensors(path, lambda t: t.pop(ldm.ema_name("out.2.bias")))
    with pytest.raises(SdlabError, match=r"'conv_out\.bias' of the unet is missing"):
        read_pieces(path)
    edit_tensors(path, lambda t: t.update({"model_ema.diffusion_modelout2more": torch.zeros(1)}))
    with pytest.raises(SdlabError, match=r"out2more.*no place"):
        read_pieces(path)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("naming", ["original", "diffusers", "old diffusers"])
def test_a_vae_alone_in_every_naming(tiny_sd_folder: Path, tmp_path: Path, prefix: str, naming: str) -> None:
    config = json.loads((tiny_sd_folder / "vae/config.json").read_text())
    wanted = stored_in(tiny_sd_folder, "vae")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def renamed(name: str) -> str:
        if naming == "original":
            return ldm.vae_name(name, config)
        for new, word in old.items() if naming == "old diffusers" else ():
            name = name.replace(new, word)
        return name

    table = {prefix + renamed(n): t for n, t in wanted.items()}
    table = {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in table.items()}
    path = tmp_path / "vae.safetensors"
    save_file({n: t.contiguous() for n, t in table.items()}, path)
    found = read_pieces(path)
    assert (found.family, found.base, list(found.networks), found.scheduler) == ("sd", "tiny", ["vae"], None)
    assert same(found.networks["vae"], wanted) and found.left_out == ()


def test_unets_alone_and_the_folders_of_parts(
    tiny_sd_folder: Path, tiny_klein_folder: Path, tmp_path: Path
) -> None:
    for part in WHOLE:
        found = read_pieces(tiny_sd_folder / part)
        assert (found.layout, list(found.networks), found.kind) == ("part", [part], "sd1")
        assert same(found.networks[part], stored_in(tiny_sd_folder, part)) and found.scheduler is None
    assert read_pieces(tiny_sd_folder / "unet").base == "tiny"
    assert read_pieces(tiny_sd_folder / "vae").base == "tiny-sd"
    alone = read_pieces(tiny_sd_folder / UNET)
    assert (alone.layout, alone.base, list(alone.networks), alone.scheduler) == (
        "file",
        "tiny",
        ["unet"],
        None,
    )
    for part in ("transformer", "vae", "text_encoder"):
        found = read_pieces(tiny_klein_folder / part)
        assert (found.layout, list(found.networks), found.kind) == ("part", [part], "flux2-klein")
    other = copied(tiny_sd_folder / "unet", tmp_path / "unet")
    edit_json(other / "config.json", _class_name="ControlNetModel")
    with pytest.raises(SdlabError, match="is a ControlNetModel, which is no part"):
        read_pieces(other)


def shards(table: dict[str, torch.Tensor], folder: Path, stem: str) -> Path:
    """The tensors in three files with an index, as large models come."""
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number in range(3):
        name = f"{stem}-{number + 1:05}-of-00003.safetensors"
        share = {n: t.contiguous() for i, (n, t) in enumerate(sorted(table.items())) if i % 3 == number}
        save_file(share, folder / name)
        places |= dict.fromkeys(share, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_shards_with_an_index_are_one_model(
    tiny_sd_folder: Path, tiny_klein_folder: Path, tmp_path: Path
) -> None:
    whole = single_file(tiny_sd_folder, tmp_path / "m.safetensors")
    folder = shards(load_file(whole), tmp_path / "sharded", "my-model")
    for asked in (folder, folder / "my-model.safetensors.index.json"):
        found = read_pieces(asked)
        assert set(found.networks) == set(WHOLE) and found.base == "tiny"
        assert all(same(found.networks[part], stored_in(tiny_sd_folder, part)) for part in WHOLE)
    part = shards(
        stored_in(tiny_klein_folder, "transformer"), tmp_path / "transformer", "diffusion_pytorch_model"
    )
    assert read_pieces(part).base == "tiny-flux2"
    shutil.copyfile(tiny_klein_folder / "transformer/config.json", part / "config.json")
    found = read_pieces(part)
    assert found.layout == "part" and same(
        found.networks["transformer"], stored_in(tiny_klein_folder, "transformer")
    )
    (folder / "my-model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SdlabError, match="00002-of-00003"):
        read_pieces(folder)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux2_files_and_folders_are_the_same_pieces(
    tiny_klein_folder: Path, tmp_path: Path, prefix: str
) -> None:
    wanted = stored_in(tiny_klein_folder, "transformer")
    whole = read_pieces(tiny_klein_folder)
    assert (whole.family, whole.kind, whole.is_distilled) == ("flux2", "flux2-klein", False)
    assert set(whole.networks) == {"transformer", "vae", "text_encoder"} and whole.tokenizer is not None
    path = bfl_file(tiny_klein_folder, tmp_path / "t.safetensors", prefix=prefix)
    for asked in (path, tiny_klein_folder / TRANSFORMER):
        found = read_pieces(asked)
        assert (found.family, found.kind, found.base) == ("flux2", "flux2-klein", "tiny-flux2")
        assert found.is_distilled is None and found.scheduler is None and found.left_out == ()
        assert same(found.networks["transformer"], wanted)
    vae = bfl_vae_file(tiny_klein_folder, tmp_path / "v.safetensors")
    for asked in (vae, tiny_klein_folder / VAE):
        found = read_pieces(asked)
        assert (found.family, found.base, list(found.networks)) == ("flux2", "tiny-flux2", ["vae"])
        assert same(found.networks["vae"], stored_in(tiny_klein_folder, "vae"))


def without(table: dict[str, torch.Tensor], *names: str) -> None:
    for name in names:
        del table[name]


UNET_ROOT, RESBLOCKS = ldm.UNET, ldm.OPENCLIP + "transformer.resblocks."
FAULTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "sd2: one fused tensor gone": (
        "sd2",
        lambda t: without(t, RESBLOCKS + "1.attn.in_proj_weight"),
        r"'encoder\.layers\.1\.self_attn\.k_proj\.weight' and 2 more of the text_encoder is missing",
    ),
    "sd2: a fused tensor of another height": (
        "sd2",
        lambda t: t.update({RESBLOCKS + "1.attn.in_proj_bias": torch.zeros(145)}),
        r"in_proj_bias' has the shape \[145\], configured is \[48\]",
    ),
    "sd2: two more layers": (
        "sd2",
        lambda t: t.update({RESBLOCKS + "3.ln_1.bias": torch.zeros(48)}),
        r"resblocks\.3\.ln_1\.bias' has no place in the text_encoder",
    ),
    "inpainting: a tensor too many": (
        "inpainting",
        lambda t: t.update({UNET_ROOT + "middle_block.3.x": torch.zeros(1)}),
        "has no place in the unet",
    ),
    "inpainting: another shape": (
        "inpainting",
        lambda t: t.update({UNET_ROOT + "out.2.weight": torch.zeros(9, 32, 3, 3)}),
        r"out\.2\.weight' has the shape \[9, 32, 3, 3\], configured is \[4, 32, 3, 3\]",
    ),
    "vae: one gone": (
        "vae",
        lambda t: without(t, "decoder.conv_out.bias"),
        r"'decoder\.conv_out\.bias' of the vae",
    ),
    "vae: one too many": (
        "vae",
        lambda t: t.update({"decoder.x": torch.zeros(1)}),
        "'decoder.x' has no place",
    ),
    "flux2 vae: one gone": (
        "flux2 vae",
        lambda t: without(t, "bn.running_var"),
        r"'bn\.running_var' of the vae",
    ),
    "flux2 vae: one too many": (
        "flux2 vae",
        lambda t: t.update({"bn.x": torch.zeros(1)}),
        "'bn.x' has no place",
    ),
    "flux2 vae: no whole numbers": (
        "flux2 vae",
        lambda t: t.update({"encoder.conv_in.bias": torch.zeros(8, dtype=torch.int8)}),
        "unusual type",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_missing_unknown_and_misshapen_tensors_are_one_line(
    tiny_sd_folder: Path,
    tiny_sd2_folder: Path,
    inpainting_folder: Path,
    tiny_klein_folder: Path,
    tmp_path: Path,
    name: str,
) -> None:
    kind, change, said = FAULTS[name]
    path = tmp_path / "m.safetensors"
    if kind == "vae":
        shutil.copyfile(tiny_sd_folder / VAE, path)
    elif kind == "flux2 vae":
        bfl_vae_file(tiny_klein_folder, path)
    else:
        single_file(tiny_sd2_folder if kind == "sd2" else inpainting_folder, path)
    edit_tensors(path, change)
    with pytest.raises(SdlabError, match=said) as raised:
        read_pieces(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_folders_that_hold_no_model_are_one_line(tmp_path: Path, tiny_sd_folder: Path) -> None:
    with pytest.raises(SdlabError, match="holds no model"):
        read_pieces(tmp_path)
    single_file(tiny_sd_folder, tmp_path / "m.safetensors")
    with pytest.raises(SdlabError, match=r"Did you mean .*m\.safetensors"):
        read_pieces(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(SdlabError, match="2 indexes of shards"):
        read_pieces(tmp_path)
    with pytest.raises(SdlabError, match="cannot be read"):
        read_pieces(tmp_path / "none.safetensors")


def hollow(base: str, path: Path, **changed: Any) -> Path:
    """A single file with all tensors of a model we know at their true size; its numbers are holes in the file."""
    folder, rows = bases.CONFIGS / base, dict[str, tuple[str, tuple[int, ...], int]]()
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    for part, class_name in classes.items():
        config = json.loads((folder / part / "config.json").read_text()) | (changed if part == "unet" else {})
        for name, shape in expected(build_module(class_name, config, folder)).items():
            place = ldm.place_of(part, name, config)
            whole = (shape[0] * 3, *shape[1:]) if place.third is not None else shape
            rows[place.name] = ("F16", whole, 2 * torch.Size(whole).numel())
    head = head_bytes(((n, *row) for n, row in sorted(rows.items())), {})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(nbytes for _, _, nbytes in rows.values()))
    return path


@pytest.mark.parametrize(("base", "kind"), [("sd15", "sd1"), ("sd21", "sd2")])
@pytest.mark.parametrize("channels", [4, 9])
def test_models_of_the_true_size_are_told_by_their_shapes(
    tmp_path: Path, base: str, kind: str, channels: int
) -> None:
    path = hollow(base, tmp_path / "m.safetensors", in_channels=channels)
    found = read_pieces(path)
    assert (found.base, found.kind, found.is_inpainting) == (base, kind, channels == 9)
    assert found.scheduler is not None and found.scheduler.get("prediction_type", "epsilon") == "epsilon"
    assert found.networks["unet"].config["sample_size"] == 64
    if channels == 4:
        model = resolve(str(path), training=True)
        assert model.base == base and ("--prediction-type v_prediction" in model.why) == (kind == "sd2")


def test_the_prediction_type_asked_for_is_not_contradicted(tmp_path: Path, tiny_sd_folder: Path) -> None:
    path = hollow("sd21", tmp_path / "m.safetensors")
    found = read_pieces(path, prediction_type="v_prediction")
    assert found.notes == ("v-prediction as --prediction-type says",)
    assert found.scheduler is not None and found.scheduler["prediction_type"] == "v_prediction"
    assert found.networks["unet"].config["sample_size"] == 96
    for kind in ("v_prediction", "epsilon"):
        folder = read_pieces(tiny_sd_folder, prediction_type=kind)
        assert folder.scheduler is not None and folder.scheduler["prediction_type"] == kind
        assert folder.notes[0].endswith("as --prediction-type says")


def test_a_prediction_type_is_refused_where_no_schedule_takes_it(
    tiny_sd_folder: Path, tiny_klein_folder: Path
) -> None:
    for path in (tiny_sd_folder / UNET, tiny_sd_folder / "vae", tiny_klein_folder):
        with pytest.raises(SdlabError, match=r"no noise schedule.*Leave out --prediction-type"):
            read_pieces(path, prediction_type="epsilon")


def test_all_shipped_configurations_together_are_small() -> None:
    assert sum(p.stat().st_size for p in bases.CONFIGS.rglob("*") if p.is_file()) <= 4 << 20
    counted = {base: 0 for base in bases.FLUX2_SHAPES}
    for base in counted:
        config = json.loads((bases.CONFIGS / base / "transformer/config.json").read_text())
        module = build_module("Flux2Transformer2DModel", config, bases.CONFIGS)
        counted[base] = sum(t.numel() for t in module.state_dict().values())
    assert counted == {
        "flux2-klein-base-4b": 3_875_544_576,
        "flux2-klein-base-9b": 9_078_581_248,
        "flux2-dev": 32_223_281_152,
    }
    for base in bases.DISTILLED:
        like = bases.CONFIGS / base.replace("klein", "klein-base")
        for part in ("transformer", "vae", "text_encoder"):
            assert (bases.CONFIGS / base / part / "config.json").read_bytes() == (
                like / part / "config.json"
            ).read_bytes()
        assert json.loads((bases.CONFIGS / base / "model_index.json").read_text())["is_distilled"] is True
