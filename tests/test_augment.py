"""Augmentation against slow interpolation, torchvision's colour operations and hand-made draws."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fashionclip_tune.augment import AugmentationDraws, augment, draw_augmentation

WHOLE = (0.0, 0.0, 1.0, 1.0)


def photos(batch_size: int = 4, height: int = 20, width: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def draws_of(
    batch_size: int,
    crop: tuple[float, float, float, float] = WHOLE,
    mirror: float = 1.0,
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> AugmentationDraws:
    return AugmentationDraws(
        crop_B4=torch.tensor(crop).repeat(batch_size, 1),
        mirror_B=torch.full((batch_size,), mirror),
        colour_B3=torch.tensor(colour).repeat(batch_size, 1),
    )


def drawn(batch_size: int, strength: float, seed: int = 0) -> AugmentationDraws:
    return draw_augmentation(batch_size, strength, torch.Generator().manual_seed(seed))


def slow_crop(photo_CHW: Tensor, crop: tuple[float, float, float, float], mirror: float, size: int) -> np.ndarray:
    """Bilinear interpolation pixel by pixel; the photo spans [-1, 1], a pixel's value stands at its centre."""
    photo = photo_CHW.double().numpy()
    _, height, width = photo.shape
    centre_x, centre_y, half_width, half_height = crop
    result = np.zeros((3, size, size))
    for row in range(size):
        for column in range(size):
            across, down = (column + 0.5) / size * 2 - 1, (row + 0.5) / size * 2 - 1
            x = min(max((centre_x + half_width * mirror * across + 1) / 2 * width - 0.5, 0), width - 1)
            y = min(max((centre_y + half_height * down + 1) / 2 * height - 0.5, 0), height - 1)
            left, top = math.floor(x), math.floor(y)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            upper = photo[:, top, left] * (left + 1 - x) + photo[:, top, right] * (x - left)
            lower = photo[:, bottom, left] * (left + 1 - x) + photo[:, bottom, right] * (x - left)
            result[:, row, column] = upper * (top + 1 - y) + lower * (y - top)
    return result


def test_strength_0_is_the_identity() -> None:
    images = photos(8, 32, 32)
    torch.testing.assert_close(augment(images, drawn(8, 0.0), 32), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mirror", [1.0, -1.0])
@pytest.mark.parametrize("crop", [WHOLE, (0.2, -0.1, 0.7, 0.55), (-0.35, 0.4, 0.65, 0.6), (0.0, 0.0, 1.0, 0.5)])
def test_a_crop_is_bilinear_interpolation_written_out_pixel_by_pixel(
    crop: tuple[float, float, float, float], mirror: float
) -> None:
    images = photos(2, 25, 20)
    result = augment(images, draws_of(2, crop, mirror), 16)
    assert result.shape == (2, 3, 16, 16)
    for image, cropped in zip(images, result, strict=True):
        np.testing.assert_allclose(cropped.numpy(), slow_crop(image, crop, mirror, 16), atol=1e-5)


def test_a_crop_on_the_grid_of_pixels_is_a_slice() -> None:
    images = photos(3, 40, 40)
    left, top, side = 3, 5, 32
    crop = ((2 * left + side) / 40 - 1, (2 * top + side) / 40 - 1, side / 40, side / 40)
    torch.testing.assert_close(
        augment(images, draws_of(3, crop), side), images[:, :, top : top + side, left : left + side], rtol=0, atol=1e-5
    )


def test_a_mirrored_photo_is_flipped_left_to_right() -> None:
    images = photos(3, 24, 24)
    torch.testing.assert_close(augment(images, draws_of(3, mirror=-1.0), 24), images.flip(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation"])
def test_colours_change_as_in_torchvision(which: str, factor: float) -> None:
    images = 0.35 + 0.3 * photos(3)  # nothing is clipped
    position = ["brightness", "contrast", "saturation"].index(which)
    colour = [1.0, 1.0, 1.0]
    colour[position] = factor
    expected = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation][position](images, factor)
    result = augment(images, draws_of(3, colour=(colour[0], colour[1], colour[2])), 20)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-4)  # torchvision's luminance weights have four digits


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0])
def test_crops_lie_inside_the_photo_and_have_the_promised_area_and_aspect(strength: float) -> None:
    draws = drawn(5_000, strength)
    x, y, half_width, half_height = draws.crop_B4.double().unbind(dim=1)
    assert (x.abs() + half_width).max() <= 1 + 1e-6
    assert (y.abs() + half_height).max() <= 1 + 1e-6
    assert (half_width * half_height).min() >= (1 - 0.65 * strength) * 0.999 * (3 / 4) ** (strength / 2)
    assert (half_width / half_height).log().abs().max() <= math.log(4 / 3) * strength + 1e-5
    assert (draws.colour_B3 - 1).abs().max() <= 0.4 * strength + 1e-6
    # All of the range is used, evenly to both sides.
    assert (draws.colour_B3 - 1).abs().max() > 0.39 * strength
    assert abs(x.mean()) < 0.02
    assert abs(draws.colour_B3.mean() - 1) < 0.02


@pytest.mark.parametrize(("strength", "share"), [(0.1, 0.2), (0.25, 0.5), (1.0, 0.5)])
def test_at_most_half_of_the_photos_are_mirrored(strength: float, share: float) -> None:
    mirror_B = drawn(10_000, strength).mirror_B
    assert set(mirror_B.tolist()) == {-1.0, 1.0}
    assert (mirror_B < 0).float().mean() == pytest.approx(share, abs=0.02)


def test_values_stay_between_0_and_1() -> None:
    extremes = torch.cat([photos(64), torch.zeros(32, 3, 20, 20), torch.ones(32, 3, 20, 20), photos(64).round()])
    for seed in range(3):
        result = augment(extremes, drawn(len(extremes), 1.0, seed), 16)
        assert result.min() >= 0
        assert result.max() <= 1
        assert result.isfinite().all()


def test_draws_depend_on_the_generator_only() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drawn(16, 0.5, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = drawn(16, 0.5, seed=7), drawn(16, 0.5, seed=8)
    for name in ("crop_B4", "mirror_B", "colour_B3"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.crop_B4[:8], first.crop_B4[8:])


@pytest.mark.parametrize("cut", [slice(0, 1), slice(3, 8), slice(8, 16)])
def test_a_part_of_the_batch_is_augmented_as_within_the_whole(cut: slice) -> None:
    images, draws = photos(16, 40, 40), drawn(16, 1.0)
    torch.testing.assert_close(augment(images[cut], draws[cut], 32), augment(images, draws, 32)[cut], rtol=0, atol=1e-6)


def test_a_photo_is_not_changed_by_its_neighbours_nor_in_place() -> None:
    images, draws = photos(4), drawn(4, 1.0)
    before = images.clone()
    result = augment(images, draws, 16)
    assert torch.equal(images, before)
    images[1:] = 0
    torch.testing.assert_close(augment(images, draws, 16)[0], result[0], rtol=0, atol=1e-6)
