"""How a photo becomes a model's input: OpenCLIP's evaluation transform, and the training path's way to the same picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF


class Tokenizer(Protocol):
    def __call__(self, texts: Sequence[str]) -> Tensor: ...


# A canvas much larger than the input costs more to move than it is worth; up to twice, bilinear crops do not alias.
_CANVAS_FACTOR, _CANVAS_LIMIT = 1.25, 2
# A photo of 1 x 30,000 pixels, its short side resized to 256, has 2 billion: above this many only its middle is resized, so
# many times as long as its short side. At 256 it takes a long side of 256 times the short one; no photo of a garment is so.
_MAX_RESIZED_PIXELS, _MIDDLE = 1 << 24, 4


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes a model's input; the fields of OpenCLIP's ``preprocess_cfg``."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: str
    interpolation: str

    def resize(self, image: Image.Image) -> Tensor:
        """[3, size, size] uint8: OpenCLIP's evaluation transform up to its conversion to floats."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        size = [self.size, self.size]
        if self.resize_mode == "shortest":
            size, short_side = [self.size], min(image.size)
            if self.size**2 * max(image.size) > _MAX_RESIZED_PIXELS * short_side:
                image = TF.center_crop(image, [min(side, _MIDDLE * short_side) for side in (image.height, image.width)])
        resized = TF.resize(image, size, interpolation=self._mode, antialias=True)
        return self._centre(TF.pil_to_tensor(resized), self.size)

    def canvas(self, pixel_sizes_N2: npt.NDArray[np.int64]) -> tuple[int, int]:
        """Height and width in which a worker hands photos on, uint8, before the device resizes or crops them.

        Where most photos have the same shape (after the centre crop, where this model has one) and are not much larger
        than the input, it is theirs: the worker resizes none of them. Else a little larger than the input, so that
        random crops stay sharp.

        Args:
            pixel_sizes_N2: width and height of the training photos; 0 where it is not known.
        """
        shapes_N2 = pixel_sizes_N2[:, ::-1]  # height, width
        if self.resize_mode == "shortest":
            shapes_N2 = np.repeat(shapes_N2.min(axis=1, keepdims=True), 2, axis=1)
        distinct, counts = np.unique(shapes_N2, axis=0, return_counts=True)
        height, width = (int(side) for side in distinct[counts.argmax()])
        natural = min(height, width) > 0 and max(height, width) <= _CANVAS_LIMIT * self.size
        if natural and 2 * counts.max() > len(pixel_sizes_N2):
            return height, width
        side = round(_CANVAS_FACTOR * self.size)
        return side, side

    def resize_to_canvas(self, image_CHW: Tensor, canvas: tuple[int, int]) -> Tensor:
        """[3, *canvas] uint8 from a decoded photo: cropped to the centre where this model does that, resized if need be."""
        if self.resize_mode == "shortest":
            image_CHW = self._centre(image_CHW, min(image_CHW.shape[1:]))
        return self._resized(image_CHW, canvas)

    def resize_canvas(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, size, size] uint8, on any device: photos on their canvas to the model's input."""
        return self._resized(images_BCHW, (self.size, self.size))

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if images.shape[-2:] == size:
            return images
        resized: Tensor = TF.resize(images, list(size), interpolation=self._mode, antialias=True)
        return resized

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Floats in [0, 1] to the model's input."""
        mean_C11, std_C11 = _statistics(self.mean, self.std, images_BCHW.device)
        return (images_BCHW - mean_C11).div_(std_C11)  # of one new tensor: where there are two, memory is what takes time

    @property
    def _mode(self) -> v2.InterpolationMode:
        return v2.InterpolationMode.BILINEAR if self.interpolation == "bilinear" else v2.InterpolationMode.BICUBIC

    @staticmethod
    def _centre(image_CHW: Tensor, side: int) -> Tensor:
        cropped_CHW: Tensor = TF.center_crop(image_CHW, [side, side])
        return cropped_CHW


@lru_cache(maxsize=8)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: a GPU waits for each number that comes from Python."""
    return torch.tensor(mean, device=device)[:, None, None], torch.tensor(std, device=device)[:, None, None]
