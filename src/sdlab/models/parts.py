"""The networks of a model: what their configuration says, which tensors they have, and how they are loaded.

The libraries leave a missing tensor empty (diffusers) or make it up at random (transformers), and only log
it. So every part is first built without memory from its configuration, and the names and shapes of all
tensors are compared with that before a byte of a weight is read. Loading then copies each tensor into memory
of its own: tensors mapped from a file may be aligned differently, and give other last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.models.files import FLOATS, Stored
from sdlab.models.tables import known_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

LIMITS = {  # far above any real model; a configuration can ask for a year of building otherwise
    "sample_size": 8192,
    "image_size": 8192,
    "layers_per_block": 16,
    "transformer_layers_per_block": 64,
    "block_out_channels": 8192,
    "num_hidden_layers": 64,
    "num_attention_heads": 256,
    "attention_head_dim": 1024,
    "hidden_size": 16384,
    "intermediate_size": 65536,
    "cross_attention_dim": 16384,
    "max_position_embeddings": 1 << 20,
    "num_layers": 64,
    "num_single_layers": 128,
    "num_key_value_heads": 256,
    "head_dim": 1024,
    "joint_attention_dim": 65536,
    "timestep_guidance_channels": 4096,
    "rope_theta": 1 << 40,
    "in_channels": 256,
    "out_channels": 256,
    "latent_channels": 256,
}
MAX_NUMBER = 1 << 20
MAX_LAYERS = 3000  # the UNet of Stable Diffusion has 708, the text encoder of FLUX.2 dev some 500
MAX_LIST = 64

CLIP_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)  # no other key is passed on: some make transformers fetch code
CLIP_VISION_KEYS = (*CLIP_TEXT_KEYS, "image_size", "patch_size", "num_channels")


@dataclass(frozen=True)
class Part:
    """One network: its class, its configuration, and its tensors under the names the class uses."""

    name: str  # its folder in a pipeline: unet, transformer, vae, text_encoder, safety_checker
    class_name: str
    config: dict[str, Any]
    weights: Mapping[str, Stored]
    where: Path  # folder or file, for messages


def bounded(config: Mapping[str, Any], where: Path) -> None:
    """Raise SdlabError when a configuration holds a number or list that no model has."""
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_LIST:
            raise SdlabError(f"{key} has {len(values)} entries", where=str(where))
        for number in values:
            if isinstance(number, Mapping):
                bounded(number, where)
            elif isinstance(number, list) and any(isinstance(n, list) for n in number):
                raise SdlabError(f"{key} is nested too deeply", where=str(where))
            elif isinstance(number, list):
                bounded({key: number}, where)
            elif isinstance(number, (int, float)) and not isinstance(number, bool):
                _bounded_number(key, number, where)


def _bounded_number(key: str, number: float, where: Path) -> None:
    limit = LIMITS.get(key, MAX_NUMBER)
    if not math.isfinite(number) or abs(number) > limit:
        raise SdlabError(f"{key} is {number}, more than the {limit} we allow", where=str(where))
    if key in LIMITS and number < 1:
        raise SdlabError(f"{key} is {number}, less than 1", where=str(where))


def build(part: Part) -> nn.Module:
    """The module on the meta device: shapes, no memory. Raises SdlabError when it cannot be built."""
    return build_module(part.class_name, part.config, part.where)


def build_module(
    class_name: str, config: Mapping[str, Any], where: Path, *, device: str = "meta"
) -> nn.Module:
    """The module `config` describes, on the meta device, or with its library's start values on another."""
    import torch
    from huggingface_hub.errors import StrictDataclassError  # of transformers' configurations

    from sdlab.models.quiet import hush

    bounded(config, where)
    hush()
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        with torch.device(device), _of_bounded_size(where):
            return _BUILDERS[class_name](plain)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as reason:
        said = " ".join(str(reason).split())[:160]
        raise SdlabError(
            f"its configuration does not describe a {class_name} ({said})", where=str(where)
        ) from reason


@contextmanager
def _of_bounded_size(where: Path) -> Iterator[None]:
    """Raises SdlabError when more layers are built in here than any model has: small numbers multiply to days."""
    from torch.nn.modules.module import register_module_module_registration_hook

    num_layers = 0

    def count(*_: object) -> None:
        nonlocal num_layers
        num_layers += 1
        if num_layers > MAX_LAYERS:
            raise SdlabError(f"describes more than {MAX_LAYERS:,} layers", where=str(where))

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _unet(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)  # type: ignore[no-any-return]


def _vae(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)  # type: ignore[no-any-return]


def _clip_text(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**_only(config, CLIP_TEXT_KEYS)))  # type: ignore[no-any-return]


def _safety_checker(config: dict[str, Any]) -> nn.Module:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = _only(config.get("vision_config") or {}, CLIP_VISION_KEYS)
    settings = CLIPConfig(vision_config=vision, **_only(config, ("projection_dim",)))
    return StableDiffusionSafetyChecker(settings)  # type: ignore[no-any-return]


def _transformer(config: dict[str, Any]) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    axes = config.get(
        "axes_dims_rope", (32, 32, 32, 32)
    )  # no tensor depends on them, so nothing else would tell
    if not isinstance(axes, (list, tuple)) or not all(type(n) is int and n > 0 and n % 2 == 0 for n in axes):
        raise ValueError(f"axes_dims_rope is {axes}")
    if len(axes) != 4 or sum(axes) != config.get("attention_head_dim", 128):
        raise ValueError(f"axes_dims_rope is {axes}, not four that add up to attention_head_dim")
    return Flux2Transformer2DModel.from_config(config)  # type: ignore[no-any-return]


def _flux2_vae(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2.from_config(config)  # type: ignore[no-any-return]


def _qwen3(config: dict[str, Any]) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**config, attn_implementation="sdpa"))  # type: ignore[no-any-return]


def _mistral(config: dict[str, Any]) -> nn.Module:
    from transformers import MistralConfig, MistralModel

    return MistralModel(MistralConfig(**config, attn_implementation="sdpa"))  # type: ignore[no-any-return]


def _only(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {k: config[k] for k in keys if k in config}


_BUILDERS = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "CLIPTextModel": _clip_text,
    "StableDiffusionSafetyChecker": _safety_checker,
    "Flux2Transformer2DModel": _transformer,
    "AutoencoderKLFlux2": _flux2_vae,
    "Qwen3Model": _qwen3,
    "MistralModel": _mistral,
}


def expected(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor the module needs from a file."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def expected_of(part: Part) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of the network that the part's configuration describes.

    Models that we know are looked up, which needs no model library; others are built without memory.
    """
    known = known_tensors(part.class_name, part.config)
    return expected(build(part)) if known is None else known


def check_tensors(part: Part, build_as: Callable[[Part], nn.Module] | None = None) -> None:
    """Compare a part's tensors with its configuration. Raises SdlabError naming the first that differs.

    `build_as` builds networks of other classes than those of this file.
    """
    wanted = expected_of(part) if build_as is None else expected(build_as(part))
    _check_names(part, wanted)
    for name, shape in wanted.items():
        stored = part.weights[name]
        if stored.shape != shape:
            raise SdlabError(
                f"tensor {stored.name!r} has the shape {list(stored.shape)}, configured is {list(shape)}",
                where=str(stored.path),
                next_step="Weights and configuration are of different models",
            )
        if stored.dtype not in (("I64",) if name.endswith(_COUNTS) else FLOATS):
            raise SdlabError(
                f"tensor {stored.name!r} is stored as {stored.dtype}; sdlab reads F32, F16 and BF16",
                where=str(stored.path),
            )


_COUNTS = ("num_batches_tracked", "position_ids")  # tensors that hold whole numbers


def _check_names(part: Part, wanted: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in part.weights]
    extra = sorted(name for name in part.weights if name not in wanted)
    if missing and len(missing) == len(wanted):
        raise SdlabError(
            f"holds none of the {len(wanted)} tensors of a {part.class_name}"
            + (f" (but {part.weights[extra[0]].name!r})" if extra else ""),
            where=str(part.where),
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SdlabError(
            f"tensor {missing[0]!r}{more} of the {part.name} is missing",
            where=str(part.where),
            next_step="The file is incomplete or of another model; download it again",
        )
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise SdlabError(
            f"tensor {part.weights[extra[0]].name!r}{more} has no place in the {part.name} as configured",
            where=str(part.where),
            next_step="Weights and configuration are of different models",
        )


def load(
    part: Part,
    device: torch.device,
    dtype: torch.dtype,
    build_as: Callable[[Part], nn.Module] | None = None,
) -> nn.Module:
    """The module in eval mode, every tensor freshly allocated on `device` in `dtype`.

    Raises SdlabError, naming the tensor, for missing or misshapen tensors, values that are not finite (or do
    not fit `dtype`), and weights of nothing but zeros.
    """
    check_tensors(part, build_as)
    module = (build_as or build)(part)
    state, matrices, empty = {}, 0, 0
    for name in module.state_dict():
        stored = part.weights[name]
        tensor = stored.read()
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        largest = _largest(tensor, cast, stored)
        if tensor.ndim > 1:
            matrices += 1
            empty += largest == 0
        state[name] = cast.to(device)
    if matrices and 2 * empty > matrices:
        raise SdlabError(
            f"{empty} of the {matrices} weights of the {part.name} hold nothing but zeros",
            where=str(part.where),
            next_step="The file is damaged; download it again",
        )
    module.load_state_dict(state, strict=True, assign=True)
    _fill_position_ids(module, device)
    _fill_frequencies(module, device)
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, f"{part.name}: {left} stayed without memory"
    return module.eval()


def _largest(tensor: torch.Tensor, cast: torch.Tensor, stored: Stored) -> float:
    """The largest magnitude in `cast`. Raises SdlabError when a value of it, or of `tensor` before, is not finite."""
    largest = _magnitude(cast)
    if math.isfinite(largest):
        return largest
    if math.isfinite(_magnitude(tensor)):
        what = f"tensor {stored.name!r} holds values too large for {str(cast.dtype).removeprefix('torch.')}"
        raise SdlabError(what, where=str(stored.path), next_step="Use --dtype bf16 or --dtype fp32")
    raise SdlabError(
        f"tensor {stored.name!r} holds values that are not finite (NaN or infinity)",
        where=str(stored.path),
        next_step="The model is damaged; take another copy or an earlier checkpoint",
    )


def _magnitude(tensor: torch.Tensor) -> float:
    if tensor.numel() == 0:
        return 0.0
    low, high = tensor.aminmax()  # 30 times faster than isfinite().all(); a NaN anywhere comes out as NaN
    return max(abs(low.item()), abs(high.item())) if low == low else math.nan


def _fill_position_ids(module: nn.Module, device: torch.device) -> None:
    """CLIP counts its positions in a buffer that is not saved: 0, 1, 2 ... (1, L)."""
    import torch

    for owner in module.modules():
        held = owner._buffers.get("position_ids")
        if held is not None and held.is_meta:
            owner._buffers["position_ids"] = torch.arange(held.shape[-1], device=device).expand(1, -1)


def _fill_frequencies(module: nn.Module, device: torch.device) -> None:
    """Language models keep the frequencies of their rotary positions in buffers that are not saved."""
    for owner in module.modules():
        held = [name for name, buffer in owner._buffers.items() if buffer is not None and buffer.is_meta]
        if held and "inv_freq" in held:
            fresh: Any = type(owner)(config=owner.config)
            for name in held:
                owner._buffers[name] = getattr(fresh, name).to(device)
