"""A network that tells pictures from reconstructions, patch by patch, and what it is trained by.

B batch, H W height and width, h w places that are judged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sdlab.keyed import keyed

NUM_HALVINGS = 3
SPREAD = 0.02  # of the weights at the start, as in pix2pix
DELTA, MOST = 1e-6, 1e4  # of the adaptive weight


class PatchDiscriminator(nn.Module):
    """Convolutions that say of every patch of 54 pixels how real it looks: Isola et al. 2017, section 3.2.2.

    As in Esser et al. 2021, but with group norm for batch norm: the batch's other pictures would be part of each
    picture's loss otherwise, and a short batch or another number of processes would train something else. The last
    two convolutions are of 3 pixels, not 4, so that a picture of 8 pixels has a patch.
    """

    def __init__(self, width: int, *, seed: int) -> None:
        """`width`, a multiple of 8, channels after the first convolution; the start is a function of `seed`."""
        super().__init__()
        assert width > 0 and width % 8 == 0, width
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, NUM_HALVINGS + 1):
            before, after = width * 2 ** (i - 1), width * 2**i
            halves = i < NUM_HALVINGS
            layers += [
                nn.Conv2d(
                    before, after, 4 if halves else 3, stride=2 if halves else 1, padding=1, bias=False
                ),
                nn.GroupNorm(after // 16, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(after, 1, 3, padding=1))
        self._start(seed)

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, SPREAD, generator=keyed(seed, "discriminator", name))
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """How real each patch looks, (B, 1, h, w): above 1 surely real, below -1 surely made."""
        dtype = next(self.parameters()).dtype
        scores: Tensor = self.layers(pixels_B3HW.to(dtype))
        return scores


def hinge(disc: nn.Module, made_B3HW: Tensor, true_B3HW: Tensor) -> Tensor:
    """What the discriminator is trained by, (B,): Lim & Ye 2017, as in Esser et al. 2021.

    The mean over patches of (max(0, 1 - D(true)) + max(0, 1 + D(made))) / 2. No gradient goes into `made`.
    """
    real, fake = disc(true_B3HW).float(), disc(made_B3HW.detach()).float()
    return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2, 3))


def unconvincing(disc: nn.Module, made_B3HW: Tensor) -> Tensor:
    """What the autoencoder is trained by, (B,): the mean of -D(made). No gradient goes into the discriminator."""
    fixed: dict[str, Any] = {name: p.detach() for name, p in disc.named_parameters()}
    scores: Tensor = functional_call(disc, fixed, (made_B3HW,))
    return -scores.float().mean(dim=(1, 2, 3))


def balance(reconstruction_B: Tensor, adversarial_B: Tensor, made_B3HW: Tensor) -> Tensor:
    """The factor that gives the adversarial term a gradient as long as the reconstruction's, (B,), a constant.

    Esser et al. 2021, eq. 7: |gradient of the reconstruction term| / (|gradient of the adversarial one| + 1e-6). Theirs
    are gradients of the decoder's last layer, one number a batch; here they are those of each picture's own pixels, so
    that a sample's loss does not depend on its batch. `made_B3HW` is a leaf that both terms were computed of.
    """
    wanted = (torch.autograd.grad(term_B.sum(), made_B3HW)[0] for term_B in (reconstruction_B, adversarial_B))
    of_reconstruction, of_adversary = (gradient.float().flatten(1).norm(dim=1) for gradient in wanted)
    factor_B: Tensor = (of_reconstruction / (of_adversary + DELTA)).clamp(max=MOST)
    return factor_B
