"""Networks that nobody has trained yet: a known size or a user's config.json, and weights drawn from a seed.

Each layer draws from a generator named by (seed, part, layer) on the CPU, so neither the machine nor the order in
which a library builds its layers changes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdlab.errors import SdlabError
from sdlab.keyed import key
from sdlab.models.bases import CONFIGS, safe_name
from sdlab.models.files import Stored, read_json
from sdlab.models.parts import Part, bounded, build_module
from sdlab.models.trial import refuse_too_large, refuse_unusable
from sdlab.options import did_you_mean

if TYPE_CHECKING:
    from torch import nn

Net = TypeVar("Net", bound="nn.Module")

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "transformer": ("Flux2Transformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderKLFlux2"),
    "captioner": ("BlipForConditionalGeneration",),
}  # by part; the first is meant where a config.json names none
_OF_MODELS = {
    ("unet", "sd"): CONFIGS / "sd15" / "unet" / "config.json",
    ("vae", "sd"): CONFIGS / "sd15" / "vae" / "config.json",
    ("vae", "flux2"): CONFIGS / "flux2-klein-base-4b" / "vae" / "config.json",
}  # sizes that are a released model's
_NEAR = 0.1  # what is left of a layer's random weights where training starts near a known function


def known_sizes(name: str) -> tuple[str, ...]:
    """The words that `--init` knows for a part (one of CLASSES), sorted."""
    own = [path.stem for path in (CONFIGS / "init" / name).glob("*.json")]
    return tuple(sorted([*own, *(size for part, size in _OF_MODELS if part == name)]))


def fresh_name(init: str) -> str:
    """A short name for what `--init` asks for, fit for a folder: the size, or the name of the config.json's file."""
    path = Path(init)
    return safe_name(path.parent.name if path.name == "config.json" and path.parent.name else path.stem)


def fresh_config(name: str, init: str) -> tuple[dict[str, Any], Path]:
    """The configuration that `--init` asks for, and its file. Raises SdlabError where there is none of that part."""
    asked = init.strip()
    if asked in known_sizes(name):
        path = _OF_MODELS.get((name, asked), CONFIGS / "init" / name / f"{asked}.json")
    else:
        path = Path(asked).expanduser()
        path = path / "config.json" if (path / "config.json").is_file() else path
    if not path.is_file():
        near = did_you_mean(asked, list(known_sizes(name)))
        raise SdlabError(
            f"'{asked}' is no size that we know, and no config.json{near}",
            where="--init",
            next_step=f"Give {', '.join(known_sizes(name))} or the path of a {name}'s config.json",
        )
    config = read_json(path)
    found = str(config.get("_class_name", CLASSES[name][0]))
    if found not in CLASSES[name]:
        wanted = " or ".join(CLASSES[name])
        raise SdlabError(f"it describes the class {found[:60]}, not {wanted}", where=str(path))
    bounded({k: v for k, v in config.items() if not k.startswith("_")}, path)
    if name != "captioner":  # whose dropout is never taken over; released ones have 0.1
        _no_dropout(config, path)
    return config, path


def _no_dropout(config: Mapping[str, Any], path: Path) -> None:
    """Raises SdlabError for dropout: it draws from torch's own generator, and no run of it could be resumed exactly."""
    for entry, value in config.items():
        if isinstance(value, Mapping):
            _no_dropout(value, path)
        elif "dropout" in entry and value not in (0, None):
            raise SdlabError(
                f"{entry} is {str(value)[:20]}; sdlab trains without dropout",
                where=str(path),
                next_step="Write 0, or leave it out",
            )


def fresh_part(name: str, init: str, *, seed: int, adapt: Mapping[str, Any]) -> Part:
    """An untrained unet, transformer or vae whose weights, float32 in memory, are a function of the seed.

    `adapt` is what the model's other parts dictate (channels of the latents, width of the prompt): a known size and a
    config.json that leaves it open take it over. Raises SdlabError for a config.json that says otherwise, or that
    describes no network of this kind.
    """
    config, path = fresh_config(name, init)
    if init.strip() not in known_sizes(name):
        _agree(config, adapt, path)
    class_name = str(config.get("_class_name", CLASSES[name][0]))
    config = {**config, **adapt}
    trial: Any = build_module(class_name, config, path)  # without memory first: it refuses what is no network
    refuse_too_large(trial, path)
    refuse_unusable(trial, class_name, path)
    config = {
        key: value for key, value in trial.config.items() if not key.startswith("_")
    }  # with what it left out
    module = drawn(lambda: build_module(class_name, config, path, device="cpu"), _reset, seed=seed, name=name)
    if name == "vae":
        _as_pyramid(module)
    if name == "transformer":
        _near_nothing(module)
    weights = {tensor: Stored.of(tensor, value, path) for tensor, value in module.state_dict().items()}
    return Part(name, class_name, config, weights, path)


def _agree(config: Mapping[str, Any], adapt: Mapping[str, Any], path: Path) -> None:
    others = {entry: wanted for entry, wanted in adapt.items() if config.get(entry, wanted) != wanted}
    if others:
        said = ", ".join(
            f"{entry} is {config[entry]} and must be {wanted}" for entry, wanted in others.items()
        )
        raise SdlabError(
            f"it does not fit the VAE and text encoder it is to work with: {said}",
            where=str(path),
            next_step="Change that, leave it out, or give other parts with --vae, --text-encoder",
        )


def drawn(make: Callable[[], Net], start: Callable[[nn.Module], None], *, seed: int, name: str) -> Net:
    """What `make` builds on the CPU, with `start` called for each layer that draws weights of its own.

    In there torch's generator is one of (seed, name, layer), so a layer's weights depend on no other layer; a layer
    that shares a weight with an earlier one leaves both as they are. No card is seeded, and the generator is put back.
    """
    import torch

    draws = torch.default_generator  # the CPU's alone; torch.manual_seed would seed the cards
    started = set[torch.nn.Parameter]()
    with torch.random.fork_rng(devices=[]):
        draws.manual_seed(key(seed, "init", name))
        module = make()
        for place, layer in module.named_modules():
            own = set(layer.parameters(recurse=False))
            if not own & started:
                draws.manual_seed(key(seed, "init", name, place))
                start(layer)
            started |= own
    return module


def _reset(layer: nn.Module) -> None:
    """Starts a layer as its library does; nothing where it has no start of its own."""
    if callable(reset := getattr(layer, "reset_parameters", None)):
        reset()


def _as_pyramid(vae: nn.Module) -> None:
    """Makes residual blocks nearly identities, and convolutions between sizes nearly averages and copies.

    Colours pass from the first step on then; with a library's start a few thousand steps go into learning that.
    """
    import torch
    from diffusers.models.resnet import ResnetBlock2D

    with torch.no_grad():
        for place, layer in vae.named_modules():
            if isinstance(layer, ResnetBlock2D):
                layer.conv2.weight.mul_(_NEAR)
            between = place.endswith("conv_shortcut") or ".upsamplers." in place or ".downsamplers." in place
            if between and isinstance(layer, torch.nn.Conv2d):
                _near_copy(layer)


def _near_copy(layer: Any) -> None:
    """Every output channel is nearly one input channel: of a stride of 2 the mean of its 2 x 2 pixels."""
    side = layer.kernel_size[0]
    taps = slice(0, 2) if layer.stride[0] == 2 else slice(side // 2, side // 2 + 1)
    layer.weight.mul_(_NEAR)
    for channel in range(layer.out_channels):
        kernel = layer.weight[channel, channel % layer.in_channels, taps, taps]
        kernel.add_(1 / kernel.numel())


def _near_nothing(transformer: nn.Module) -> None:
    """Starts a transformer with no output, and with blocks that the noise level hardly changes."""
    import torch

    with torch.no_grad():
        for place, weight in transformer.named_parameters():
            if place.startswith("proj_out."):
                weight.zero_()
            elif "modulation" in place:
                weight.mul_(_NEAR)
