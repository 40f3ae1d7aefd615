"""Image augmentation as batch operations on the training device, from uint8.

The random numbers of a batch are drawn on the CPU for the whole effective batch before any of it is cut, so they depend
on (seed, step) only: not on the device, the micro-batch or the number of loader workers. Nothing is read back from the
device, so that the CPU stays ahead of it.

Shape legend: B photos, C = 3 colours, H x W pixels of the canvas, S side of the model's input, N operations a photo.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fashionclip_tune.training.device import onto
from fashionclip_tune.training.rand_augment import OPERATIONS_PER_PHOTO, change_colours, draw_operations, sampling_map

# At full strength; each is scaled down linearly with the strength.
_MIN_AREA, _MAX_LOG_ASPECT = 0.35, math.log(4 / 3)
_BRIGHTNESS = _CONTRAST = _SATURATION = 0.4
# Of RandAugment's ranges; torchvision's default is 0.3. With all of it, garments turn black or negative or leave the picture.
_MAGNITUDE = 0.5
_MAX_ERASED_AREA = 0.33
# At any strength.
_MIN_ERASED_AREA, _MAX_ERASED_LOG_ASPECT = 0.02, math.log(1 / 0.3)
# What is done or not has its full probability from a quarter of the strength on, and below it a linear share.
_FULL_PROBABILITY_STRENGTH = 0.25


@dataclass(frozen=True)
class AugmentationDraws:
    """The random choices for a batch, one row a photo, on the CPU. What is switched off is drawn as the identity."""

    crop_B4: Tensor  # centre x, centre y, half width, half height in [-1, 1] coordinates of the canvas
    mirror_B: Tensor  # -1 where mirrored, else 1
    colour_B3: Tensor  # factors of brightness, contrast, saturation
    operations_BN: Tensor  # of RandAugment
    magnitudes_BN: Tensor
    erased_B4: Tensor  # left, top, width, height as shares of the side; no width and height where nothing is erased
    fill_B3: Tensor  # the colour of what is erased

    def __getitem__(self, rows: slice) -> "AugmentationDraws":
        return AugmentationDraws(*(draws[rows] for draws in vars(self).values()))


def draw_augmentation(
    batch_size: int, strength: float, generator: torch.Generator, *, rand_augment: bool = False, erasing: bool = False
) -> AugmentationDraws:
    """Draws for ``batch_size`` photos.

    Args:
        batch_size: B, the effective batch.
        strength: of everything, in [0, 1]; 0 is the identity.
        generator: on the CPU.
        rand_augment: RandAugment takes the place of the colour jitter.
        erasing: a rectangle is erased in half of the photos. Neither switch changes what is drawn for the other parts.
    """
    probability = min(1.0, strength / _FULL_PROBABILITY_STRENGTH)
    uniform_B8 = torch.rand(batch_size, 8, generator=generator)
    area_B = 1 - uniform_B8[:, 0] * strength * (1 - _MIN_AREA)
    log_aspect_B = (2 * uniform_B8[:, 1] - 1) * strength * _MAX_LOG_ASPECT
    half_width_B = (area_B.sqrt() * (log_aspect_B / 2).exp()).clamp(max=1)
    half_height_B = (area_B.sqrt() * (-log_aspect_B / 2).exp()).clamp(max=1)
    centre_x_B = (2 * uniform_B8[:, 2] - 1) * (1 - half_width_B)
    centre_y_B = (2 * uniform_B8[:, 3] - 1) * (1 - half_height_B)
    jitter = 0.0 if rand_augment else strength
    ranges_3 = jitter * torch.tensor([_BRIGHTNESS, _CONTRAST, _SATURATION])
    erased_B4, fill_B3 = _draw_erasing(batch_size, strength, 0.5 * probability if erasing else 0.0, generator)
    operations_BN = torch.zeros(batch_size, OPERATIONS_PER_PHOTO, dtype=torch.long)
    magnitudes_BN = torch.zeros(batch_size, OPERATIONS_PER_PHOTO)
    if rand_augment:
        operations_BN, magnitudes_BN = draw_operations(batch_size, strength * _MAGNITUDE, probability, generator)
    return AugmentationDraws(
        crop_B4=torch.stack([centre_x_B, centre_y_B, half_width_B, half_height_B], dim=1),
        mirror_B=torch.where(uniform_B8[:, 4] < 0.5 * probability, -1.0, 1.0),
        colour_B3=1 + (2 * uniform_B8[:, 5:] - 1) * ranges_3,
        operations_BN=operations_BN,
        magnitudes_BN=magnitudes_BN,
        erased_B4=erased_B4,
        fill_B3=fill_B3,
    )


def _draw_erasing(batch_size: int, strength: float, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Zhong et al. 2020, "Random Erasing Data Augmentation", algorithm 1, with one random colour instead of one a pixel."""
    uniform_B8 = torch.rand(batch_size, 8, generator=generator)
    area_B = _MIN_ERASED_AREA + uniform_B8[:, 0] * strength * (_MAX_ERASED_AREA - _MIN_ERASED_AREA)
    # The paper draws again until the rectangle fits: this is the range of those that do.
    max_log_aspect_B = (-area_B.log()).clamp(max=_MAX_ERASED_LOG_ASPECT)
    log_aspect_B = (2 * uniform_B8[:, 1] - 1) * max_log_aspect_B
    size_B2 = area_B.sqrt()[:, None] * torch.stack([log_aspect_B / 2, -log_aspect_B / 2], dim=1).exp()
    size_B2 = torch.where(uniform_B8[:, 4:5] < probability, size_B2, 0.0)
    return torch.cat([uniform_B8[:, 2:4] * (1 - size_B2), size_B2], dim=1), uniform_B8[:, 5:].contiguous()


@torch.no_grad()
def augment(images_BCHW: Tensor, draws: AugmentationDraws, size: int) -> Tensor:
    """Crops, mirrors and colours a batch, with RandAugment and random erasing where drawn.

    Args:
        images_BCHW: uint8, or float in [0, 1], on any device. H and W may differ: a crop is a share of the canvas's
            width and of its height, so that the whole canvas becomes the square that a model which squashes photos sees.
        draws: one row a photo.
        size: S, the side of the result.

    Returns:
        [B, C, S, S] float in [0, 1].
    """
    if images_BCHW.dtype == torch.uint8:
        images_BCHW = images_BCHW.float() / 255
    result_BCSS = _crop(images_BCHW, draws, size)
    if (draws.colour_B3 != 1).any():
        result_BCSS = _jitter(result_BCSS, onto(result_BCSS.device, draws.colour_B3))
    result_BCSS = result_BCSS.clamp(0, 1)
    if draws.operations_BN.any():
        change_colours(result_BCSS, draws.operations_BN, draws.magnitudes_BN)
    if (draws.erased_B4[:, 2:] > 0).any():
        result_BCSS = _erase(result_BCSS, draws)
    return result_BCSS


def _crop(images_BCHW: Tensor, draws: AugmentationDraws, size: int) -> Tensor:
    theta_B23 = torch.zeros(len(images_BCHW), 2, 3)
    theta_B23[:, 0, 0] = draws.crop_B4[:, 2] * draws.mirror_B
    theta_B23[:, 1, 1] = draws.crop_B4[:, 3]
    theta_B23[:, :, 2] = draws.crop_B4[:, :2]
    theta_B23 = onto(images_BCHW.device, theta_B23 @ sampling_map(draws.operations_BN, draws.magnitudes_BN))
    grid = F.affine_grid(theta_B23, [len(images_BCHW), 3, size, size], align_corners=False)
    return F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jitter(images_BCHW: Tensor, colour_B3: Tensor) -> Tensor:
    brightness, contrast, saturation = colour_B3[:, :, None, None, None].unbind(dim=1)
    bright = images_BCHW * brightness
    grey = TF.rgb_to_grayscale(bright)
    contrasted = torch.lerp(grey.mean(dim=(2, 3), keepdim=True), bright, contrast)
    return torch.lerp(TF.rgb_to_grayscale(contrasted), contrasted, saturation)


def _erase(images_BCSS: Tensor, draws: AugmentationDraws) -> Tensor:
    """A pixel is erased if its centre is in the rectangle."""
    size, device = images_BCSS.shape[-1], images_BCSS.device
    centres_S = (torch.arange(size, device=device) + 0.5) / size
    start_B21, extent_B21 = onto(device, draws.erased_B4).view(-1, 2, 2, 1).unbind(dim=1)
    inside_B2S = (centres_S >= start_B21) & (centres_S < start_B21 + extent_B21)
    erased_BSS = inside_B2S[:, 1, :, None] & inside_B2S[:, 0, None, :]
    return torch.where(erased_BSS[:, None], onto(device, draws.fill_B3)[:, :, None, None], images_BCSS)
