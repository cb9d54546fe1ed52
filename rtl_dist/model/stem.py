"""The stem that ResNets have for small images (He et al. 2016, arXiv 1512.03385, section 4.2): a
3 x 3 convolution of stride 1, in place of a 7 x 7 one of stride 2 and a max pooling."""

from __future__ import annotations

import torch
from torch import nn

from rtl_dist.core.errors import UserError

_USUAL, _SMALL = (7, 7), (3, 3)
_STRIDE = 4  # of the usual stem, its pooling included


def use_small_stem(trunk: nn.Module, name: str, *, pretrained: bool) -> None:
    """Gives a timm or torchvision ResNet the small stem; all other layers stay.

    Args:
        name: as a config has it, for an error.
        pretrained: the kernel comes of the one that was there (``small_kernel``), else it is new.

    Raises:
        UserError: the network does not begin as the usual ResNet does.
    """
    conv, pool = getattr(trunk, "conv1", None), getattr(trunk, "maxpool", None)
    is_usual = isinstance(conv, nn.Conv2d) and conv.kernel_size == _USUAL and pool is not None
    if not is_usual or not isinstance(conv, nn.Conv2d):
        raise UserError(
            f"model.small_stem: {name} does not begin with one 7 x 7 convolution and a max pooling,"
            " in place of which it would come; choose a ResNet that does, such as resnet18, or set"
            " it to false"
        )
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    if pretrained:
        small.weight.data.copy_(small_kernel(conv.weight.data))
    trunk.set_submodule("conv1", small)
    trunk.set_submodule("maxpool", nn.Identity())


def small_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """The 3 x 3 kernels that answer to an image as the given 7 x 7 ones do to the image enlarged 4
    times, bilinearly and on average over a pixel; 4 is the stride of the stem that they are from.

    kernel: (outputs, inputs, 7, 7) to (outputs, inputs, 3, 3), of the same sums, so that the
        BatchNorm that follows meets what it knows.
    """
    taps, offsets = torch.arange(7) - 3, torch.arange(_STRIDE)
    places = (offsets[:, None] + taps + 0.5) / _STRIDE - 0.5  # of each tap, in pixels of the image
    pixels = torch.tensor([-1.0, 0.0, 1.0])
    shares = (1 - (places.clamp(-1, 1)[..., None] - pixels).abs()).clamp(min=0).mean(0).to(kernel)
    return torch.einsum("oiyx,ya,xb->oiab", kernel, shares, shares)


def adapt_stem_kernel(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """Makes weights of the usual stem fit a trunk with the small one."""
    name = "conv1.weight"
    if name in state and name in own and state[name].ndim == own[name].ndim == 4:
        have, want = tuple(state[name].shape[2:]), tuple(own[name].shape[2:])
        if (have, want) == (_USUAL, _SMALL):
            state[name] = small_kernel(state[name])
