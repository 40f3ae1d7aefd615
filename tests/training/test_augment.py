"""Crop, mirror, colour jitter and erasing against slow interpolation, torchvision and hand-made draws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fashionclip_tune.training import augment as augmenting
from fashionclip_tune.training import rand_augment as rand_augmenting
from fashionclip_tune.training.augment import AugmentationDraws, augment, draw_augmentation

WHOLE = (0.0, 0.0, 1.0, 1.0)


def photos(batch_size: int = 4, height: int = 20, width: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def draws_of(
    batch_size: int,
    crop: tuple[float, float, float, float] = WHOLE,
    mirror: float = 1.0,
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> AugmentationDraws:
    return replace(
        drawn(batch_size, 0.0),
        crop_B4=torch.tensor(crop).repeat(batch_size, 1),
        mirror_B=torch.full((batch_size,), mirror),
        colour_B3=torch.tensor(colour).repeat(batch_size, 1),
    )


def drawn(batch_size: int, strength: float, seed: int = 0, *, everything: bool = False) -> AugmentationDraws:
    generator = torch.Generator().manual_seed(seed)
    return draw_augmentation(batch_size, strength, generator, rand_augment=everything, erasing=everything)


def slow_erasing(photo_CHW: Tensor, erased: Tensor, fill: Tensor) -> Tensor:
    """Pixel by pixel: the rectangle is half open, a pixel counts by its centre."""
    result = photo_CHW.clone()
    size = photo_CHW.shape[-1]
    left, top, width, height = erased.tolist()
    for row in range(size):
        for column in range(size):
            if left <= (column + 0.5) / size < left + width and top <= (row + 0.5) / size < top + height:
                result[:, row, column] = fill
    return result


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


@pytest.mark.parametrize("everything", [False, True])
def test_strength_0_is_the_identity(everything: bool) -> None:
    images = photos(8, 32, 32)
    result = augment(images, drawn(8, 0.0, everything=everything), 32)
    torch.testing.assert_close(result, images, rtol=0, atol=1e-5)


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
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize(("strength", "share"), [(0.1, 0.2), (0.25, 0.5), (1.0, 0.5)])
def test_rectangles_have_the_promised_frequency_area_and_aspect_and_lie_inside(strength: float, share: float) -> None:
    erased_B4 = drawn(10_000, strength, everything=True).erased_B4.double()
    left, top, width, height = erased_B4[erased_B4[:, 2] > 0].unbind(dim=1)
    assert len(width) / 10_000 == pytest.approx(share, abs=0.02)
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    # Zhong et al. 2020: 2 % to a third, with an aspect ratio of 0.3 to its inverse.
    area, largest = width * height, 0.02 + 0.31 * strength
    assert 0.0199 < area.min() < 0.021 < largest - 0.003 < area.max() < largest + 1e-6
    assert area.mean() == pytest.approx((0.02 + largest) / 2, abs=0.005)
    log_aspect = (width / height).log()
    assert log_aspect.mean() == pytest.approx(0, abs=0.05)
    assert 1.15 < log_aspect.abs().max() < math.log(1 / 0.3) + 1e-5


def test_a_rectangle_is_filled_with_its_colour_and_nothing_else_changes() -> None:
    images, draws = photos(64, 24, 24), drawn(64, 1.0, everything=True)
    erasing_only = replace(draws_of(64), erased_B4=draws.erased_B4, fill_B3=draws.fill_B3)
    whole, result = augment(images, draws_of(64), 24), augment(images, erasing_only, 24)
    expected = [slow_erasing(*parts) for parts in zip(whole, draws.erased_B4, draws.fill_B3, strict=True)]
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=0)
    changed_B = (result != whole).any(dim=1).double().mean(dim=(1, 2))
    areas_B = draws.erased_B4[:, 2].double() * draws.erased_B4[:, 3]
    torch.testing.assert_close(changed_B, areas_B, rtol=0, atol=2 / 24)  # a row and a column of pixels
    assert 0.3 < (changed_B > 0).double().mean() < 0.7
    assert draws.fill_B3.mean(dim=0).tolist() == pytest.approx([0.5] * 3, abs=0.15)


@pytest.mark.parametrize("canvas", [(30, 50), (50, 30)])
def test_a_canvas_that_is_not_square_is_squashed_whole(canvas: tuple[int, int]) -> None:
    flat = torch.linspace(0, 1, canvas[1]).expand(1, 3, *canvas)  # brighter to the right
    result = augment(flat, draws_of(1), 20)
    expected = ((torch.arange(20) + 0.5) / 20 * canvas[1] - 0.5) / (canvas[1] - 1)
    torch.testing.assert_close(result, expected.expand(1, 3, 20, 20), rtol=0, atol=1e-5)
    draws = drawn(8, 1.0, everything=True)
    images = photos(8, *canvas)
    assert augment(images, draws, 20).shape == (8, 3, 20, 20)
    for image, crop in zip(images, draws.crop_B4, strict=True):
        one = (float(crop[0]), float(crop[1]), float(crop[2]), float(crop[3]))
        np.testing.assert_allclose(augment(image[None], draws_of(1, one), 20)[0], slow_crop(image, one, 1.0, 20), atol=1e-5)


def test_uint8_is_taken_as_the_floats_that_it_stands_for() -> None:
    images = (photos(16, 40, 40) * 256).to(torch.uint8)
    draws = drawn(16, 1.0, everything=True)
    result = augment(images, draws, 32)
    assert result.dtype == torch.float32
    assert torch.equal(result, augment(images.float() / 255, draws, 32))


def test_nothing_is_read_back_from_the_device() -> None:
    """The meta device has shapes and no values: a result of it that a choice depended on would be an error."""
    images = torch.empty(64, 3, 40, 50, dtype=torch.uint8, device="meta")
    assert augment(images, drawn(64, 1.0, everything=True), 32).shape == (64, 3, 32, 32)


def test_no_gradients_are_kept() -> None:
    images = photos(16).requires_grad_()
    assert not augment(images, drawn(16, 1.0, everything=True), 16).requires_grad


@pytest.mark.parametrize("everything", [False, True])
def test_values_stay_between_0_and_1(everything: bool) -> None:
    extremes = torch.cat([photos(64), torch.zeros(32, 3, 20, 20), torch.ones(32, 3, 20, 20), photos(64).round()])
    for seed in range(3):
        result = augment(extremes, drawn(len(extremes), 1.0, seed, everything=everything), 16)
        assert result.min() >= 0
        assert result.max() <= 1
        assert result.isfinite().all()


def test_draws_depend_on_the_generator_only() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drawn(16, 0.5, seed=7, everything=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = drawn(16, 0.5, seed=7, everything=True), drawn(16, 0.5, seed=8, everything=True)
    for name, draws in vars(first).items():
        assert torch.equal(draws, getattr(again, name))
        # RandAugment takes the place of the colour jitter.
        assert torch.equal(draws, getattr(other, name)) == torch.equal(draws[:8], draws[8:]) == (name == "colour_B3")
    assert torch.equal(first.colour_B3, torch.ones(16, 3))


def test_a_part_that_is_switched_on_changes_no_draw_of_the_others() -> None:
    plain, full = drawn(16, 0.5), drawn(16, 0.5, everything=True)
    erasing = draw_augmentation(16, 0.5, torch.Generator().manual_seed(0), erasing=True)
    for name in ("crop_B4", "mirror_B", "colour_B3"):
        assert torch.equal(getattr(erasing, name), getattr(plain, name))
    for name in ("crop_B4", "mirror_B", "erased_B4", "fill_B3"):
        assert torch.equal(getattr(erasing, name), getattr(full, name))


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("cut", [slice(0, 1), slice(3, 8), slice(8, 16)])
def test_a_part_of_the_batch_is_augmented_as_within_the_whole(cut: slice, everything: bool) -> None:
    images, draws = photos(16, 40, 40), drawn(16, 1.0, everything=everything)
    assert torch.equal(augment(images[cut], draws[cut], 32), augment(images, draws, 32)[cut])


def test_a_photo_is_not_changed_by_its_neighbours_nor_in_place() -> None:
    images, draws = photos(4), drawn(4, 1.0, everything=True)
    before = images.clone()
    result = augment(images, draws, 16)
    assert torch.equal(images, before)
    images[1:] = 0
    assert torch.equal(augment(images, draws, 16)[0], result[0])


def test_what_goes_to_the_device_are_few_tensors_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap would be closed in memory that is not pinned, and the CPU would wait for the copy; for each operation, it did."""
    sent: list[torch.Tensor] = []
    for module in (augmenting, rand_augmenting):
        monkeypatch.setattr(module, "onto", lambda device, tensor: sent.append(tensor) or tensor)
    images = photos(64)
    augment(images[8:24], drawn(64, 1.0, everything=True)[8:24], 16)
    assert len(sent) == 5
    assert all(torch.empty_like(tensor).stride() == tensor.stride() for tensor in sent)
