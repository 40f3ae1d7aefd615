"""Image augmentation as batch operations on the training device, from uint8.

The random numbers of a batch are drawn on the CPU for the whole effective batch before any of it is cut, so they depend
on (seed, step) only: not on the device, the micro-batch or the number of loader workers.

Shape legend: B photos, C = 3 colours, H x W pixels of the canvas, S side of the model's input.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# At full strength; each is scaled down linearly with the strength.
_MIN_AREA, _MAX_LOG_ASPECT = 0.35, math.log(4 / 3)
_BRIGHTNESS = _CONTRAST = _SATURATION = 0.4


@dataclass(frozen=True)
class AugmentationDraws:
    """The random choices for a batch: crop as centre and half size in [-1, 1] coordinates, mirror sign, colour factors."""

    crop_B4: Tensor  # centre x, centre y, half width, half height
    mirror_B: Tensor  # -1 where mirrored, else 1
    colour_B3: Tensor  # factors of brightness, contrast, saturation

    def __getitem__(self, rows: slice) -> "AugmentationDraws":
        return AugmentationDraws(self.crop_B4[rows], self.mirror_B[rows], self.colour_B3[rows])


def draw_augmentation(batch_size: int, strength: float, generator: torch.Generator) -> AugmentationDraws:
    """Draws for ``batch_size`` photos at ``strength`` in [0, 1] (0: the identity)."""
    uniform_B8 = torch.rand(batch_size, 8, generator=generator)
    area_B = 1 - uniform_B8[:, 0] * strength * (1 - _MIN_AREA)
    log_aspect_B = (2 * uniform_B8[:, 1] - 1) * strength * _MAX_LOG_ASPECT
    half_width_B = (area_B.sqrt() * (log_aspect_B / 2).exp()).clamp(max=1)
    half_height_B = (area_B.sqrt() * (-log_aspect_B / 2).exp()).clamp(max=1)
    centre_x_B = (2 * uniform_B8[:, 2] - 1) * (1 - half_width_B)
    centre_y_B = (2 * uniform_B8[:, 3] - 1) * (1 - half_height_B)
    mirror_B = torch.where(uniform_B8[:, 4] < 0.5 * min(1.0, 4 * strength), -1.0, 1.0)
    ranges_3 = strength * torch.tensor([_BRIGHTNESS, _CONTRAST, _SATURATION])
    return AugmentationDraws(
        crop_B4=torch.stack([centre_x_B, centre_y_B, half_width_B, half_height_B], dim=1),
        mirror_B=mirror_B,
        colour_B3=1 + (2 * uniform_B8[:, 5:] - 1) * ranges_3,
    )


def augment(images_BCHW: Tensor, draws: AugmentationDraws, size: int) -> Tensor:
    """Crops, mirrors and colours a batch.

    Args:
        images_BCHW: float in [0, 1] on any device.
        draws: one row a photo.
        size: S, the side of the result.

    Returns:
        [B, C, S, S] float in [0, 1].
    """
    crop_B4, mirror_B = draws.crop_B4.to(images_BCHW.device), draws.mirror_B.to(images_BCHW.device)
    theta_B23 = torch.zeros(len(images_BCHW), 2, 3, device=images_BCHW.device)
    theta_B23[:, 0, 0] = crop_B4[:, 2] * mirror_B
    theta_B23[:, 1, 1] = crop_B4[:, 3]
    theta_B23[:, :, 2] = crop_B4[:, :2]
    grid = F.affine_grid(theta_B23, [len(images_BCHW), 3, size, size], align_corners=False)
    cropped = F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)
    brightness, contrast, saturation = draws.colour_B3.to(cropped.device)[:, :, None, None, None].unbind(dim=1)
    bright = cropped * brightness
    grey = _luminance(bright)
    contrasted = torch.lerp(grey.mean(dim=(2, 3), keepdim=True), bright, contrast)
    return torch.lerp(_luminance(contrasted), contrasted, saturation).clamp(0, 1)


def _luminance(images_BCHW: Tensor) -> Tensor:
    weights_C11 = torch.tensor([0.299, 0.587, 0.114], device=images_BCHW.device)[:, None, None]
    return (images_BCHW * weights_C11).sum(dim=1, keepdim=True)
