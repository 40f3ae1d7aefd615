"""RandAugment for a batch: each photo draws its own operations, all of one magnitude.

Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space", algorithm 1, with the
operations and ranges of torchvision's ``RandAugment``. Unlike there:

- The geometric operations of a photo are one map of coordinates, merged into that of its crop: pixels are sampled once,
  bilinearly, before any colour changes. What moves in from outside of the crop is the photo, and beyond the photo its
  border goes on, instead of black. Shears leave the centre in place, not the upper left corner.
- Operations may be left out, each with the same probability: half of them have no small magnitude.

Shape legend: B photos, R photos with the same operation, N operations a photo, C = 3 colours, H x W pixels.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fashionclip_tune.training.device import onto

OPERATIONS_PER_PHOTO = 2  # the paper's choice on ImageNet, and torchvision's

# At a magnitude of 1.
_SHEAR, _TRANSLATION, _DEGREES = 0.3, 150 / 331, 30.0
_FACTOR = 0.9
_POSTERIZED_BITS = 4


class Operation(IntEnum):
    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13


def draw_operations(batch_size: int, magnitude: float, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Operations and magnitudes for a batch.

    Args:
        batch_size: B.
        magnitude: in [0, 1], the share of each operation's range.
        share: of the operations that are not left out.
        generator: on the CPU.

    Returns:
        [B, N] operations, and [B, N] magnitudes of either sign.
    """
    shape = (batch_size, OPERATIONS_PER_PHOTO)
    operations_BN = torch.randint(len(Operation), shape, generator=generator)
    kept_BN = torch.rand(shape, generator=generator) < share
    signs_BN = 1.0 - 2 * torch.randint(2, shape, generator=generator)
    return operations_BN * kept_BN, signs_BN * magnitude


def sampling_map(operations_BN: Tensor, magnitudes_BN: Tensor) -> Tensor:
    """[B, 3, 3]: from where in the original photo each place of the result takes its pixel.

    Homogeneous coordinates (x, y, 1), of which x and y are in [-1, 1]. The map leads back: through the last operation first.
    """

    def level(operation: Operation, full: float) -> Tensor:
        return (operations_BN == operation) * full * magnitudes_BN

    angle_BN = level(Operation.ROTATE, math.radians(_DEGREES))
    maps_BN33 = torch.eye(3).repeat(*operations_BN.shape, 1, 1)
    maps_BN33[..., 0, 0] = maps_BN33[..., 1, 1] = angle_BN.cos()
    maps_BN33[..., 0, 1] = level(Operation.SHEAR_X, _SHEAR) - angle_BN.sin()
    maps_BN33[..., 1, 0] = level(Operation.SHEAR_Y, _SHEAR) + angle_BN.sin()
    maps_BN33[..., 0, 2] = level(Operation.TRANSLATE_X, -2 * _TRANSLATION)
    maps_BN33[..., 1, 2] = level(Operation.TRANSLATE_Y, -2 * _TRANSLATION)
    return reduce(torch.matmul, maps_BN33.unbind(dim=1))


def change_colours(images_BCHW: Tensor, operations_BN: Tensor, magnitudes_BN: Tensor) -> None:
    """Does the operations on colours, in place.

    Operations and magnitudes are on the CPU: which photos share an operation is known without asking the device.
    """
    # Photos in the order of their operations, so that those with the same one are a slice.
    photos_NB = operations_BN.T.argsort(dim=1, stable=True)
    magnitudes_NB = onto(images_BCHW.device, magnitudes_BN.T.gather(1, photos_NB))
    photos_NB = onto(images_BCHW.device, photos_NB)
    for operation_B, photos_B, magnitudes_B in zip(operations_BN.unbind(1), photos_NB, magnitudes_NB, strict=True):
        counts = operation_B.bincount(minlength=len(Operation)).tolist()
        for operation, rows_R, magnitudes_R in zip(Operation, photos_B.split(counts), magnitudes_B.split(counts), strict=True):
            if len(rows_R) and operation in _COLOUR_CHANGES:
                change = _COLOUR_CHANGES[operation]
                images_BCHW[rows_R] = change(images_BCHW[rows_R], magnitudes_R[:, None, None, None])


def _brightness(images_RCHW: Tensor, magnitudes_R111: Tensor) -> Tensor:
    return (images_RCHW * _factor(magnitudes_R111)).clamp(0, 1)


def _color(images_RCHW: Tensor, magnitudes_R111: Tensor) -> Tensor:
    return torch.lerp(TF.rgb_to_grayscale(images_RCHW), images_RCHW, _factor(magnitudes_R111)).clamp(0, 1)


def _contrast(images_RCHW: Tensor, magnitudes_R111: Tensor) -> Tensor:
    grey_R111 = TF.rgb_to_grayscale(images_RCHW).mean(dim=(2, 3), keepdim=True)
    return torch.lerp(grey_R111, images_RCHW, _factor(magnitudes_R111)).clamp(0, 1)


def _sharpness(images_RCHW: Tensor, magnitudes_R111: Tensor) -> Tensor:
    # Pillow's smoothing filter: a centre of 5 among 1s, and the border left as it is.
    smooth_RCHW = images_RCHW.clone()
    inner_RCHW = smooth_RCHW[:, :, 1:-1, 1:-1]
    inner_RCHW.copy_((9 * F.avg_pool2d(images_RCHW, 3, stride=1) + 4 * inner_RCHW) / 13)
    return torch.lerp(smooth_RCHW, images_RCHW, _factor(magnitudes_R111)).clamp(0, 1)


def _posterize(images_RCHW: Tensor, magnitudes_R111: Tensor) -> Tensor:
    levels_R111 = 2 ** (8 - _POSTERIZED_BITS * magnitudes_R111.abs()).round()
    return (images_RCHW * levels_R111).floor().minimum(levels_R111 - 1) / levels_R111


def _solarize(images_RCHW: Tensor, magnitudes_R111: Tensor) -> Tensor:
    return torch.where(images_RCHW >= 1 - magnitudes_R111.abs(), 1 - images_RCHW, images_RCHW)


def _auto_contrast(images_RCHW: Tensor, _: Tensor) -> Tensor:
    stretched_RCHW: Tensor = TF.autocontrast(images_RCHW)
    return stretched_RCHW


def _equalize(images_RCHW: Tensor, _: Tensor) -> Tensor:
    equalized_RCHW: Tensor = TF.equalize(images_RCHW)
    return equalized_RCHW


def _factor(magnitudes_R111: Tensor) -> Tensor:
    return 1 + _FACTOR * magnitudes_R111


_COLOUR_CHANGES: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.BRIGHTNESS: _brightness,
    Operation.COLOR: _color,
    Operation.CONTRAST: _contrast,
    Operation.SHARPNESS: _sharpness,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.AUTO_CONTRAST: _auto_contrast,
    Operation.EQUALIZE: _equalize,
}
