"""How a photo becomes a model's input: OpenCLIP's evaluation transform, and the training path's way to the same picture."""

import math
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
# A photo of 1 x 30,000 pixels, its short side resized to 256, has 2 billion: above this many only what is kept is resized.
# At 256 it takes a long side of 256 times the short one; no photo of a garment is so.
_MAX_RESIZED_PIXELS = 1 << 24
_FILTER_REACH = 2  # source pixels to each side that bicubic looks at, times the scale where it shrinks


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
            if self.size * self._resized_long_side(image) > _MAX_RESIZED_PIXELS:
                return self._centre(TF.pil_to_tensor(self._resize_centre(image)), self.size)
            size = [self.size]
        resized = TF.resize(image, size, interpolation=self._mode, antialias=True)
        return self._centre(TF.pil_to_tensor(resized), self.size)

    def _resized_long_side(self, image: Image.Image) -> int:
        """Pixels, rounded down as torchvision does, where the short side is resized to ``size``."""
        return int(self.size * max(image.size) / min(image.size))

    def _resize_centre(self, image: Image.Image) -> Image.Image:
        """The centre of the resized photo without the rest, which has gigabytes where one side is thousands of times the other.

        The same source pixels with the same weights as for the whole: on noise all but one value in a thousand are equal,
        and none is more than 2 of 255 away, since Pillow rounds a box to single precision.
        """
        long_side, resized_side = max(image.size), self._resized_long_side(image)
        scale = long_side / resized_side
        first = round((resized_side - self.size) / 2)  # as torchvision's centre crop
        start, end = first * scale, (first + self.size) * scale
        reach = math.ceil(_FILTER_REACH * max(1.0, scale)) + 1
        cut, cut_end = max(0, math.floor(start) - reach), min(long_side, math.ceil(end) + reach)
        across, down = (0.0, float(image.width)), (0.0, float(image.height))
        if image.width > image.height:
            part, across = image.crop((cut, 0, cut_end, image.height)), (start - cut, end - cut)
        else:
            part, down = image.crop((0, cut, image.width, cut_end)), (start - cut, end - cut)
        # In two passes, each rounded to whole values: Pillow goes across first where it enlarges.
        part = part.resize((self.size, part.height), self._pillow_mode, (across[0], 0, across[1], part.height))
        return part.resize((self.size, self.size), self._pillow_mode, (0, down[0], self.size, down[1]))

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
        return (images_BCHW - mean_C11) / std_C11

    @property
    def _mode(self) -> v2.InterpolationMode:
        return v2.InterpolationMode.BILINEAR if self.interpolation == "bilinear" else v2.InterpolationMode.BICUBIC

    @property
    def _pillow_mode(self) -> Image.Resampling:
        return Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC

    @staticmethod
    def _centre(image_CHW: Tensor, side: int) -> Tensor:
        cropped_CHW: Tensor = TF.center_crop(image_CHW, [side, side])
        return cropped_CHW


@lru_cache(maxsize=8)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: a GPU waits for each number that comes from Python."""
    return torch.tensor(mean, device=device)[:, None, None], torch.tensor(std, device=device)[:, None, None]
