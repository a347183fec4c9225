"""LPIPS, how different two pictures look to people: Zhang et al. 2018, eq. 1. VGG-16 and weights of its channels.

Of what can be installed with pip, only stlpips-pytorch 0.0.2 (BSD 2-clause) holds the network as well as the weights;
lpips and torchmetrics hold the weights of the channels alone, and fetch the network from elsewhere. Its VGG-16 is the
shift-tolerant one of Ghildyal & Liu 2022: the maximum of two neighbours, then a blur that halves, where the plain one
has the maximum of four pixels that halves. The file is read as data, and nothing of the package is run or needed.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlab.errors import SdlabError
from sdlab.models.files import Stored, read_weights
from sdlab.models.vae_loss import unrounded

LEAST_PX = 24  # smaller pictures have no neighbours left before the last layers
SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG-16, between halvings
MEAN, SPREAD = (
    (-0.030, -0.088, -0.188),
    (0.458, 0.448, 0.450),
)  # of the pictures VGG was trained on, in [-1, 1]
TINY = 1e-10
INSTALL = 'pip install "sdlab[lpips]"'


class Lpips(nn.Module):
    """The distance; no weight of it is ever trained."""

    def __init__(self) -> None:
        super().__init__()
        self.slices, self.heads = nn.ModuleList(), nn.ParameterList()
        before = 3
        for widths in SLICES:
            convolutions = nn.ModuleList()
            for width in widths:
                convolutions.append(nn.Conv2d(before, width, 3, padding=1))
                before = width
            self.slices.append(convolutions)
            self.heads.append(nn.Parameter(torch.zeros(before)))
        self.requires_grad_(False).eval()

    def forward(self, made_B3HW: Tensor, true_B3HW: Tensor) -> Tensor:
        """The distance of each pair of pictures in [-1, 1], (B,) float32, from 0 up. The gradient is of the first."""
        with torch.no_grad(), unrounded(true_B3HW):
            wanted = self._features(true_B3HW.float())
        with unrounded(made_B3HW):
            found = self._features(made_B3HW.float())
        terms = []
        for one_BCHW, other_BCHW, weight_C in zip(found, wanted, self.heads, strict=True):
            square_BCHW = (one_BCHW - other_BCHW).square() * weight_C.float()[:, None, None]
            terms.append(square_BCHW.sum(dim=1).mean(dim=(1, 2)))
        return torch.stack(terms).sum(dim=0)

    def _features(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """What each slice sees, as vectors of length 1 at each place, float32."""
        found, seen = [], _scaled(pixels_B3HW)
        for index, convolutions in enumerate(self.slices):
            if index:
                seen = halved(seen)
            for convolution in convolutions:  # type: ignore[attr-defined]
                seen = F.relu(convolution(seen))
            values = seen.float()
            found.append(values * torch.rsqrt(values.square().sum(dim=1, keepdim=True) + TINY))
        return found


def _scaled(pixels_B3HW: Tensor) -> Tensor:
    mean, spread = (pixels_B3HW.new_tensor(row)[:, None, None] for row in (MEAN, SPREAD))
    return (pixels_B3HW - mean) / spread


def halved(values_BCHW: Tensor) -> Tensor:
    """The maximum of 2x2 neighbours, then weights 1 2 1 down and across at every second place (Zhang 2019)."""
    values_BCHW = F.max_pool2d(values_BCHW, 2, stride=1)
    weights = values_BCHW.new_tensor([1.0, 2.0, 1.0]) / 4
    num_channels = values_BCHW.shape[1]
    window = (weights[:, None] * weights).expand(num_channels, 1, 3, 3)
    return F.conv2d(F.pad(values_BCHW, (2, 2, 2, 2), mode="reflect"), window, stride=2, groups=num_channels)


def weights_file() -> Path:
    """The file with the weights. Raises SdlabError where the package that holds it is not installed."""
    found = find_spec("stlpips_pytorch")
    if found is None or not found.origin:
        raise SdlabError(
            "LPIPS needs the weights of the package stlpips-pytorch, which is not installed",
            where="--perceptual-net lpips",
            next_step=f"Type: {INSTALL}, or leave the option out",
        )
    return Path(found.origin).parent / "weights" / "vST0.0" / "vgg_shift_tolerant.pth"


def load_lpips(path: Path, device: torch.device) -> Lpips:
    """The distance with the weights of a file, float32. Raises SdlabError where the file does not hold them."""
    stored = read_weights(path, allow_pickle=True).tensors  # tensors only: no code of it is run
    net = Lpips()
    for (name, parameter), theirs in zip(net.named_parameters(), _their_names(), strict=True):
        assert name.startswith("heads") == theirs.startswith("lin"), (name, theirs)
        parameter.data.copy_(_fitting(stored, theirs, parameter, path))
    return net.to(device)


def _their_names() -> list[str]:
    """The file's names in the order of ours. Theirs count all layers of VGG-16, of which two stand for a halving."""
    names, at = [], 0
    for index, widths in enumerate(SLICES, start=1):
        at += 2 * (index > 1)
        for _ in widths:
            names += [f"net.slice{index}.{at}.{part}" for part in ("weight", "bias")]
            at += 2  # the convolution and what follows it
    return [*names, *(f"lin{index}.model.1.weight" for index in range(len(SLICES)))]


def _fitting(stored: Mapping[str, Stored], name: str, parameter: Tensor, path: Path) -> Tensor:
    found = stored.get(name)
    if found is None or parameter.numel() != math.prod(found.shape):
        raise SdlabError(
            f"holds no tensor {name} of {parameter.numel():,} numbers",
            where=str(path),
            next_step="The file is damaged; type: pip install --force-reinstall --no-deps stlpips-pytorch",
        )
    return found.read().reshape(parameter.shape)
