"""``sdlab train-vae`` as a user runs it, on tiny autoencoders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from sdlab.dataset.batches import PixelSource
from sdlab.errors import SdlabError, Stopped
from sdlab.keyed import key
from sdlab.models.bases import builtin_folder
from sdlab.training import loop
from tests.program import sdlab, start

TINY = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}
TINY_FLUX2 = {**TINY, "_class_name": "AutoencoderKLFlux2", "latent_channels": 4}
SAMPLES = Path(__file__).parents[2] / "images"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def draw(root: Path, sizes: list[tuple[int, int]], *, name: str = "{:02d}.png") -> Path:
    """Pictures of a few coloured shapes, (height, width) each."""
    root.mkdir(parents=True, exist_ok=True)
    for index, (height, width) in enumerate(sizes):
        colours = [tuple(key("colour", index, i, c) % 256 for c in range(3)) for i in range(3)]
        image = Image.new("RGB", (width, height), colours[0])
        pencil = ImageDraw.Draw(image)
        pencil.ellipse((width // 5, height // 5, width // 2, height // 2), fill=colours[1])
        pencil.rectangle((width // 2, height // 2, width - 4, height - 6), fill=colours[2])
        image.save(root / name.format(index))
    return root


@pytest.fixture
def images(tmp_path) -> Path:
    return draw(tmp_path / "images", [(32, 32), (32, 32), (40, 24), (24, 40), (36, 33), (64, 64)])


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def options(images: Path, run: Path) -> list[object]:
    return [
        "--images", images, "--save-model", run, "--image-size", 32, "--batch", 2, "--steps", 6, "--lr", "2e-3",
        "--warmup", 0, "--save-every", 2, "--device", "cpu", "--preview-every", 3,
    ]  # fmt: skip


@pytest.fixture
def train(images, tiny, tmp_path):
    def run(name: str, *args: object, start_from: tuple[object, ...] = ("--init", tiny)) -> int:
        return sdlab("train-vae", *options(images, tmp_path / "tuned" / name), *start_from, *args)

    return run


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def digests(run: Path) -> dict[str, str]:
    """sha256 of what a run's seed determines: the last checkpoint's tensors, the VAE, the log and the previews."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    files = [*sorted(newest.glob("*.safetensors")), *sorted((run / "vae").iterdir()), run / "log.jsonl"]
    files += sorted((run / "samples").iterdir())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def opened(run: Path):
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    kind = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLFlux2": AutoencoderKLFlux2}
    name = json.loads((run / "vae" / "config.json").read_text())["_class_name"]
    return kind[name].from_pretrained(run / "vae").eval()


def pixels_of(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    values = torch.tensor(list(image.tobytes()), dtype=torch.float32)
    return (values.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1)[None]


def stopping_at(monkeypatch, step: int) -> None:
    """A signal arrives while that step is under way."""
    calls = iter(range(1, 100))
    monkeypatch.setattr(loop, "_agreed", lambda *_: signal.SIGTERM if next(calls) == step else 0)


def test_a_run_from_nothing_leaves_a_vae_and_its_whole_story(train, images, tmp_path, capsys):
    before = {p: p.read_bytes() for p in images.iterdir()}
    assert train("a") == 0
    run = tmp_path / "tuned" / "a"
    assert {p: p.read_bytes() for p in images.iterdir()} == before
    names = {p.name for p in run.iterdir()}
    assert names == {"vae", "run.json", "dataset.json", "log.jsonl", "loss.png", "samples", "checkpoints"}
    assert sorted(p.name for p in (run / "vae").iterdir()) == ["config.json", WEIGHTS]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"step-{step:06d}.png" for step in (0, 3, 6)
    ]
    record, log = record_of(run), log_of(run)
    assert record["state"] == "finished" and record["command"] == "train-vae"
    assert [("val_psnr" in line, "val_ssim" in line) for line in log] == [
        (n in (3, 6),) * 2 for n in range(1, 7)
    ]
    assert record["quality"] == {name: log[-1][name] for name in ("val_psnr", "val_ssim")}
    assert record["quality_before"]["val_psnr"] > 0
    assert len(record["dataset"]["held_out"]) == 1 and record["dataset"]["pictures"] == 5
    assert "sdlab train-sd --init small --vae" in capsys.readouterr().err.splitlines()[-1]


def test_the_numbers_are_of_the_saved_vae_on_pictures_that_were_not_trained_on(train, tmp_path, monkeypatch):
    from sdlab.models.vae_loss import psnr, ssim

    seen, load = set(), PixelSource.__call__

    def watched(self, entries, draws):
        seen.update(entry.path for entry in entries)
        return load(self, entries, draws)

    monkeypatch.setattr(PixelSource, "__call__", watched)
    images = draw(tmp_path / "square", [(32, 32)] * 6)
    assert train("a", "--images", images, "--held-out", 0.4, "--epoch", 3) == 0
    run = tmp_path / "tuned" / "a"
    held = record_of(run)["dataset"]["held_out"]
    assert len(held) == 2 and {Path(path).name for path in seen} == {p.name for p in images.iterdir()} - set(
        held
    )
    vae = opened(run)
    with torch.no_grad():
        pairs = [(x, vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1))
                 for x in (pixels_of(images / name) for name in held)]  # fmt: skip
    last = log_of(run)[-1]
    assert last["val_psnr"] == pytest.approx(
        sum(float(psnr(made, true)) for true, made in pairs) / 2, abs=1e-3
    )
    assert last["val_ssim"] == pytest.approx(
        sum(float(ssim(made, true)) for true, made in pairs) / 2, abs=1e-4
    )


def test_the_scaling_factor_gives_latents_of_trained_pictures_a_spread_of_one(train, tmp_path):
    images = draw(tmp_path / "square", [(32, 32)] * 4)
    assert train("a", "--images", images, "--held-out", 0) == 0
    vae = opened(tmp_path / "tuned" / "a")
    with torch.no_grad():
        latents = torch.cat([vae.encode(pixels_of(p)).latent_dist.mode() for p in sorted(images.iterdir())])
    assert float((latents * vae.config.scaling_factor).std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_flux2_gets_the_statistics_of_its_packed_channels(train, tmp_path, capsys):
    config = tmp_path / "flux2.json"
    config.write_text(json.dumps(TINY_FLUX2))
    assert train("a", start_from=("--init", config)) == 0
    run = tmp_path / "tuned" / "a"
    vae, said = opened(run), record_of(run)["statistics"]
    assert torch.allclose(vae.bn.running_mean, torch.tensor(said["mean"])) and len(said["mean"]) == 16
    assert torch.allclose(vae.bn.running_var, torch.tensor(said["variance"]))
    assert "train-transformer --init small --vae" in capsys.readouterr().err.splitlines()[-1]


def test_training_the_decoder_alone_raises_psnr_and_leaves_encode_as_it_was(train, tmp_path, capsys):
    start_from = ("--load-model", "mini-sd", "--decoder-only", "--ema")
    args = (
        "--images",
        SAMPLES,
        "--image-size",
        64,
        "--batch",
        4,
        "--steps",
        16,
        "--lr",
        "2e-4",
        "--warmup",
        4,
    )
    assert train("a", *args, "--preview-every", 0, "--held-out", 0.3, start_from=start_from) == 0
    run = tmp_path / "tuned" / "a"
    record = record_of(run)
    assert record["quality"]["val_psnr"] > record["quality_before"]["val_psnr"]
    assert record["statistics"] is None
    mine, theirs = load_file(run / "vae" / WEIGHTS), load_file(builtin_folder("mini-sd") / "vae" / WEIGHTS)
    for name, tensor in theirs.items():
        if name.startswith(("encoder.", "quant_conv.")):
            assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    assert any(not torch.equal(mine[name].float(), theirs[name].float()) for name in theirs)
    configs = [json.loads((p / "vae" / "config.json").read_text()) for p in (run, builtin_folder("mini-sd"))]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]
    err = capsys.readouterr().err
    assert "no longer fit" not in err
    assert "sdlab generate --load-model mini-sd --vae" in err.splitlines()[-1]


def test_the_whole_vae_of_a_model_is_trained_with_a_warning(train, tiny_sd_folder, tmp_path, capsys):
    assert train("a", "--image-size", 64, start_from=("--load-model", tiny_sd_folder)) == 0
    err = capsys.readouterr().err
    assert err.count("no longer fit this VAE") == 1 and "--decoder-only" in err
    mine = load_file(tmp_path / "tuned" / "a" / "vae" / WEIGHTS)
    theirs = load_file(tiny_sd_folder / "vae" / WEIGHTS)
    assert any(not torch.equal(mine[n], theirs[n]) for n in theirs if n.startswith("encoder."))


def test_a_run_goes_on_where_another_ended(train, tmp_path, capsys):
    assert train("a") == 0
    for name in ("vae", ""):
        start_from = ("--vae", tmp_path / "tuned" / "a" / name, "--decoder-only")
        assert train(f"b{name}", start_from=start_from) == 0
    first, second = (load_file(tmp_path / "tuned" / n / "vae" / WEIGHTS) for n in ("a", "b"))
    assert all(torch.equal(first[n], second[n]) for n in first if n.startswith("encoder."))
    assert record_of(tmp_path / "tuned" / "b")["base"] == "a"


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--ema", "--disc-start", 2, "--latent-noise", 0.1, "--crop", 16, "--flip"],
        ["--dtype", "bf16", "--no-ema"],
    ],
    ids=["plain", "discriminator", "bf16"],
)
def test_a_run_that_was_stopped_and_resumed_gives_the_same_bits(train, tmp_path, monkeypatch, extra):
    assert train("straight", *extra) == 0
    for step in (1, 3):
        stopping_at(monkeypatch, step)
        args = ("--resume",) if step > 1 else extra
        assert train("a", *args) == 143
        monkeypatch.undo()
    assert record_of(tmp_path / "tuned" / "a")["state"] == "stopped"
    assert sdlab("train-vae", "--save-model", tmp_path / "tuned" / "a", "--resume") == 0
    assert digests(tmp_path / "tuned" / "a") == digests(tmp_path / "tuned" / "straight")


def test_a_signal_in_the_middle_saves_and_resume_is_exact(train, images, tiny, tmp_path):
    extra = ["--preview-every", 0]
    assert train("straight", *extra) == 0
    run = tmp_path / "tuned" / "stopped"
    process = start("train-vae", *options(images, run), "--init", tiny, *extra)
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_bytes().splitlines())):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err
    assert sdlab("train-vae", "--save-model", run, "--resume") == 0
    assert digests(run) == digests(tmp_path / "tuned" / "straight")


@pytest.mark.parametrize("looking", ["validate", "preview"])
def test_a_signal_while_it_measures_or_draws_loses_no_step(train, tmp_path, monkeypatch, looking, capsys):
    from sdlab.training import vae

    extra = ["--save-every", 0]
    assert train("straight", *extra) == 0
    look = getattr(vae._Look, looking)

    def signalled(self, step):
        if step == 3:
            self.session.stop.signum = signal.SIGTERM
        return look(self, step)

    monkeypatch.setattr(vae._Look, looking, signalled)
    assert train("a", *extra) == 143
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    run = tmp_path / "tuned" / "a"
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert saved == ["step-000003" if looking == "validate" else "step-000004"]
    monkeypatch.undo()
    assert train("a", "--resume") == 0
    mine, theirs = digests(run), digests(tmp_path / "tuned" / "straight")
    assert mine == {name: theirs[name] for name in mine} and len(theirs) - len(mine) == (
        looking == "validate"
    )


def test_a_signal_while_the_latents_are_measured_leaves_the_last_checkpoint(
    train, tmp_path, monkeypatch, capsys
):
    from sdlab.training import vae

    measure = vae._Look.measure

    def signalled(self, module, items):
        self.session.stop.signum = signal.SIGTERM
        return measure(self, module, items)

    monkeypatch.setattr(vae._Look, "measure", signalled)
    assert train("a") == 143
    assert "stopped while the latents were measured" in capsys.readouterr().err.splitlines()[-1]
    run = tmp_path / "tuned" / "a"
    assert record_of(run)["state"] == "stopped" and not (run / "vae").exists()
    monkeypatch.undo()
    assert train("a", "--resume") == 0
    assert (run / "vae" / WEIGHTS).is_file()


def test_a_copy_of_a_held_out_picture_is_not_trained_on(train, images, tmp_path, monkeypatch):
    for path in sorted(images.iterdir()):
        shutil.copy(path, images / f"copy-{path.name}")
    seen, load = set(), PixelSource.__call__

    def watched(self, entries, draws):
        seen.update(Path(entry.path).read_bytes() for entry in entries)
        return load(self, entries, draws)

    monkeypatch.setattr(PixelSource, "__call__", watched)
    assert train("a", "--held-out", 0.3) == 0
    held = record_of(tmp_path / "tuned" / "a")["dataset"]["held_out"]
    assert len(held) == 4 and not seen & {(images / name).read_bytes() for name in held}


def test_one_picture_is_enough_and_a_note_says_what_is_measured(train, tmp_path, capsys):
    one = draw(tmp_path / "one", [(50, 40)])
    assert train("a", "--images", one) == 0
    assert "no picture is held out" in capsys.readouterr().err
    assert log_of(tmp_path / "tuned" / "a")[-1]["val_psnr"] > 0
    assert record_of(tmp_path / "tuned" / "a")["dataset"]["held_out"] == []


def test_captions_are_neither_needed_nor_read(train, images, tmp_path):
    assert train("a", "--cache-dir", tmp_path / "one") == 0
    for path in sorted(images.glob("*.png")):
        path.with_suffix(".cap").write_bytes(b"\xff\x00 no text at all")
        path.with_suffix(".txt").write_text("a caption")
    assert train("b") == 0
    assert digests(tmp_path / "tuned" / "a") == digests(tmp_path / "tuned" / "b")


def test_pictures_that_do_not_open_are_named_before_the_first_step(train, images, tmp_path, capsys):
    whole = (images / "05.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("no picture")
    assert train("a") == 0
    err = capsys.readouterr().err
    assert err.index("cut.png") < err.index("step 1/6") and "text.png" in err
    refused = record_of(tmp_path / "tuned" / "a")["dataset"]["refused"]
    assert sorted(entry["path"] for entry in refused) == ["cut.png", "text.png"]
    assert train("b") == 0
    assert "pictures opened: 1/1" in capsys.readouterr().err  # the others are known to open


def test_a_picture_that_goes_bad_during_the_run_is_named(train, images, monkeypatch, capsys):
    from sdlab.training import vae

    look = vae.look_through

    def looked(items, session):
        found = look(items, session)
        for path in images.iterdir():
            path.write_bytes(b"")
        return found

    monkeypatch.setattr(vae, "look_through", looked)
    assert train("a", "--preview-every", 0) == 2
    assert "cannot be used any more" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--decoder-only"], "no encoder to keep"),
        (["--load-model", "mini-sd"], "--init starts from nothing"),
        (["--vae", "x.safetensors"], "--init starts from nothing"),
        (["--crop", 33], "33 is not a multiple of 2"),
        (["--crop", 64], "up to --image-size 32"),
        (["--image-size", 31], "31"),
        (["--init", "smal"], "small"),
        (["--images", "/nonexistent"], "/nonexistent"),
        (["--resume", "--overwrite"], "Give one of the two"),
        (["--resume"], "no run to resume"),
        (["--background", "nocolour"], "nocolour"),
        (["--l1", 0, "--l2", 0, "--perceptual", 0], "l1"),
        (["--kl-wait", 1], "did you mean '--kl-weight'"),
    ],
)
def test_wrong_settings_end_in_one_line_and_exit_2(train, tmp_path, args, said, capsys):
    assert train("a", *args) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "tuned" / "a").exists()


def test_a_folder_that_holds_a_run_is_refused_or_replaced(train, tmp_path, capsys):
    assert train("a") == 0
    assert train("a") == 2
    assert "--overwrite" in capsys.readouterr().err.splitlines()[-1]
    assert train("a", "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().err
    assert train("a", "--overwrite", "--steps", 2) == 0
    run = tmp_path / "tuned" / "a"
    assert record_of(run)["step"] == 2 and len(list((run / "checkpoints").iterdir())) == 1


def test_a_stop_before_overwrite_has_replaced_anything_leaves_the_old_run_finished(
    train, tmp_path, monkeypatch
):
    from sdlab.training import vae

    assert train("a") == 0
    run = tmp_path / "tuned" / "a"
    before, look = digests(run) | {"record": record_of(run)}, vae.look_through

    def signalled(items, session):
        session.stop.signum = signal.SIGINT
        raise Stopped(session.stop.signum, "stopped while it read")

    monkeypatch.setattr(vae, "look_through", signalled)
    assert train("a", "--overwrite", "--steps", 2) == 130
    assert digests(run) | {"record": record_of(run)} == before
    assert train("b") == 130
    assert record_of(tmp_path / "tuned" / "b")["state"] == "stopped"
    monkeypatch.setattr(vae, "look_through", look)
    assert train("a", "--overwrite", "--steps", 2) == 0


@pytest.mark.parametrize("other", ["train-captioner", "train-sd", "train-flux2", "train-transformer"])
def test_a_run_of_another_command_is_not_resumed(train, tmp_path, monkeypatch, other, capsys):
    run = tmp_path / "tuned" / "a"
    stopping_at(monkeypatch, 2)
    assert train("a") == 143
    monkeypatch.undo()
    for state in ("stopped", "finished"):
        (run / "run.json").write_text(json.dumps({**record_of(run), "state": state}))
        before = (run / "run.json").read_bytes()
        capsys.readouterr()
        assert sdlab(other, "--save-model", run, "--resume") == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and f"is a run of train-vae, not of {other}" in err[0]
        assert err[0].endswith(f"sdlab train-vae --save-model {run} --resume")
        assert (run / "run.json").read_bytes() == before


def test_a_single_latent_is_refused_before_the_first_step(train, tmp_path, capsys):
    config = tmp_path / "flux2.json"
    config.write_text(json.dumps(TINY_FLUX2))
    one = draw(tmp_path / "one", [(16, 16)])
    assert train("a", "--images", one, "--image-size", 16, start_from=("--init", config)) == 0
    deep = {**TINY_FLUX2, "block_out_channels": [8] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
    config.write_text(json.dumps(deep))
    capsys.readouterr()
    assert train("b", "--images", one, "--image-size", 16, start_from=("--init", config)) == 2
    err = capsys.readouterr().err
    assert "a single latent, which has no spread" in err.splitlines()[-1] and "step 0" not in err
    assert not (tmp_path / "tuned" / "b").exists()


def test_latents_that_do_not_vary_keep_the_old_factor_and_lose_no_training(
    train, tmp_path, monkeypatch, capsys
):
    from sdlab.models.vae import Autoencoder, Moments

    def flat(self, moments):
        assert isinstance(moments, Moments)
        raise SdlabError("the latents of 5 pictures do not vary", where="x")

    monkeypatch.setattr(Autoencoder, "_statistics", flat)
    assert train("a") == 0
    err = capsys.readouterr().err
    assert "do not vary; the VAE keeps the statistics that it started with" in err
    run = tmp_path / "tuned" / "a"
    assert record_of(run)["statistics"] is None
    assert opened(run).config.scaling_factor == pytest.approx(0.18215)


def test_a_picture_that_is_gone_when_latents_are_measured_is_an_error(train, tmp_path, monkeypatch, capsys):
    from sdlab.training import vae

    measure = vae._Look.measure

    def gone(self, module, items):
        Path(items[-1].sample.path).write_bytes(b"")
        return measure(self, module, items)

    monkeypatch.setattr(vae._Look, "measure", gone)
    assert train("a") == 2
    assert "cannot be used any more" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("starts", "num"), [(5, 0), (6, 1)])
def test_a_discriminator_that_never_starts_is_told(train, starts, num, capsys):
    assert train("a", "--disc-start", starts) == 0
    assert capsys.readouterr().err.count(f"--disc-start {starts} is not reached in 6 steps") == num


def test_a_run_never_replaces_what_it_starts_from_nor_lies_in_its_dataset(
    train, images, tmp_path, monkeypatch, capsys
):
    assert train("a") == 0
    run = tmp_path / "tuned" / "a"
    before = (run / "vae" / WEIGHTS).read_bytes()
    assert train("a", "--overwrite", start_from=("--vae", run)) == 2
    assert "would be replaced" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.chdir(tmp_path)
    assert train("a", "--overwrite", start_from=("--vae", "a")) == 2  # by its name in tuned/
    assert "would be replaced" in capsys.readouterr().err.splitlines()[-1]
    model = ("--load-model", "mini-sd", "--vae", "a")
    assert train("a", "--overwrite", start_from=model) == 2
    assert "would be replaced" in capsys.readouterr().err.splitlines()[-1]
    assert (run / "vae" / WEIGHTS).read_bytes() == before
    assert train("b", "--save-model", images / "run") == 2
    assert "nothing is ever written into a dataset" in capsys.readouterr().err.splitlines()[-1]


def test_a_changed_setting_or_picture_is_refused_with_the_difference(train, images, monkeypatch, capsys):
    stopping_at(monkeypatch, 2)
    assert train("a") == 143
    monkeypatch.undo()
    assert train("a", "--resume", "--l2", 1) == 2
    assert "--l2: the run has 0.0, now 1.0" in capsys.readouterr().err.splitlines()[-1]
    Image.new("RGB", (32, 32), "white").save(images / "00.png")
    assert train("a", "--resume") == 2
    assert "1 changed: 00.png" in capsys.readouterr().err.splitlines()[-1]


def test_too_little_disk_is_said_before_the_first_step(train, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert train("a") == 4
    assert "GB of disk" in capsys.readouterr().err.splitlines()[-1]


def test_a_vae_is_no_model_to_draw_with(train, tmp_path, capsys):
    from sdlab.models.resolve import newest_run

    assert train("a") == 0
    run = tmp_path / "tuned" / "a"
    assert newest_run(tmp_path / "tuned") is None
    for path in (run, run / "checkpoints" / "step-000006"):
        assert sdlab("generate", "--load-model", path, "--prompt", "x") == 2
        assert f"--vae {run}" in capsys.readouterr().err.splitlines()[-1]


def test_other_commands_take_the_run_as_their_vae(train, tiny_sd_folder, tmp_path, images, monkeypatch):
    args = ("--image-size", 64, "--decoder-only", "--steps", 1)
    assert train("a", *args, start_from=("--load-model", tiny_sd_folder)) == 0
    run, out = tmp_path / "tuned" / "a", tmp_path / "out"
    common = ("--load-model", tiny_sd_folder, "--vae", run, "--device", "cpu", "--steps", 1)
    assert sdlab("generate", *common, "--prompt", "x", "--output", out) == 0
    monkeypatch.setattr("sdlab.commands.train_sd.PREVIEW_STEPS", 1)
    assert (
        sdlab("train-sd", *common, "--images", images, "--image-size", 64, "--save-model", tmp_path / "sd")
        == 0
    )
    saved = (tmp_path / "sd" / "vae" / WEIGHTS).read_bytes()
    assert saved == (run / "vae" / WEIGHTS).read_bytes()
