"""RandAugment: each operation against torchvision's on single photos, and what is drawn how often."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from fashionclip_tune.training.augment import AugmentationDraws, augment, draw_augmentation
from fashionclip_tune.training.rand_augment import Operation, change_colours, draw_operations

GEOMETRIC = [operation for operation in Operation if Operation.SHEAR_X <= operation <= Operation.ROTATE]
ON_COLOURS = [operation for operation in Operation if operation > Operation.ROTATE]


def photos(num_photos: int = 3, side: int = 32) -> Tensor:
    """Smooth and with noise, dark and bright, so that thresholds, histograms and filters have something to do."""
    noise = torch.rand(num_photos, 3, side, side, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0.1, 1.0, side)
    return 0.5 * ramp[:, None] * ramp.flip(0) + 0.5 * noise


def all_at_once(operation: Operation, magnitudes: list[float]) -> tuple[Tensor, Tensor]:
    """For as many photos, the operation in the first of the two places."""
    operations = torch.tensor([[operation, Operation.IDENTITY]] * len(magnitudes))
    return operations, torch.tensor([[magnitude, 0.0] for magnitude in magnitudes])


def with_operations(operations_BN: Tensor, magnitudes_BN: Tensor) -> AugmentationDraws:
    nothing = draw_augmentation(len(operations_BN), 0.0, torch.Generator())
    return replace(nothing, operations_BN=operations_BN, magnitudes_BN=magnitudes_BN)


def reference(photo_CHW: Tensor, operation: Operation, magnitude: float) -> Tensor:
    """torchvision's ``RandAugment`` at this share of its range; shears about the centre, geometry bilinear."""
    side = photo_CHW.shape[-1]
    factor = 1 + 0.9 * magnitude
    shear = math.degrees(math.atan(0.3 * magnitude))
    shift = 150 / 331 * side * magnitude
    match operation:
        case Operation.SHEAR_X:
            return moved(photo_CHW, shear=[shear, 0.0])
        case Operation.SHEAR_Y:
            return moved(photo_CHW, shear=[0.0, shear])
        case Operation.TRANSLATE_X:
            return moved(photo_CHW, translate=[shift, 0.0])
        case Operation.TRANSLATE_Y:
            return moved(photo_CHW, translate=[0.0, shift])
        case Operation.ROTATE:
            return TF.rotate(photo_CHW, 30 * magnitude, InterpolationMode.BILINEAR)
        case Operation.BRIGHTNESS:
            return TF.adjust_brightness(photo_CHW, factor)
        case Operation.COLOR:
            return TF.adjust_saturation(photo_CHW, factor)
        case Operation.CONTRAST:
            return TF.adjust_contrast(photo_CHW, factor)
        case Operation.SHARPNESS:
            return TF.adjust_sharpness(photo_CHW, factor)
        case Operation.POSTERIZE:
            return TF.posterize(photo_CHW, round(8 - 4 * abs(magnitude)))
        case Operation.SOLARIZE:
            return TF.solarize(photo_CHW, 1 - abs(magnitude))
        case Operation.AUTO_CONTRAST:
            return TF.autocontrast(photo_CHW)
        case Operation.EQUALIZE:
            return TF.equalize(photo_CHW)
        case Operation.IDENTITY:
            return photo_CHW


def moved(photo_CHW: Tensor, *, translate: list[float] | None = None, shear: list[float] | None = None) -> Tensor:
    return TF.affine(
        photo_CHW,
        angle=0.0,
        translate=translate or [0.0, 0.0],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )


@pytest.mark.parametrize("operation", ON_COLOURS)
def test_colours_change_as_in_torchvision_each_photo_by_its_own_magnitude(operation: Operation) -> None:
    images, magnitudes = photos(5), [-0.9, -0.4, 0.125, 0.5, 1.0]
    result = images.clone()
    change_colours(result, *all_at_once(operation, magnitudes))
    expected = torch.stack([reference(*row) for row in zip(images, [operation] * 5, magnitudes, strict=True)])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert all(not torch.equal(one, before) for one, before in zip(result, images, strict=True))


@pytest.mark.parametrize("mirror", [1.0, -1.0])
@pytest.mark.parametrize("operation", GEOMETRIC)
def test_photos_move_as_in_torchvision_after_they_are_mirrored(operation: Operation, mirror: float) -> None:
    """Where torchvision's photo is not black: here the border goes on."""
    images, magnitudes = photos(4), [-1.0, -0.4, 0.3, 1.0]
    draws = replace(with_operations(*all_at_once(operation, magnitudes)), mirror_B=torch.full((4,), mirror))
    result = augment(images, draws, 32)
    mirrored = images if mirror > 0 else images.flip(3)
    for image, one, magnitude in zip(mirrored, result, magnitudes, strict=True):
        expected = reference(image, operation, magnitude)
        covered = reference(torch.ones_like(image), operation, magnitude) > 0.9999
        assert 0.5 < covered.double().mean() < 1
        torch.testing.assert_close(one[covered], expected[covered], rtol=0, atol=1e-4)
        assert one.min() >= image.min() - 1e-6  # nothing is black


def test_two_moves_are_done_in_their_order() -> None:
    # torchvision samples twice, which smooths a photo: compare one that is smooth already.
    image = TF.gaussian_blur(photos(1)[0], [9, 9], [3.0, 3.0])
    pair = [(Operation.ROTATE, 1.0), (Operation.TRANSLATE_X, 0.5)]
    for first, second in (pair, pair[::-1]):
        draws = with_operations(torch.tensor([[first[0], second[0]]]), torch.tensor([[first[1], second[1]]]))
        expected = reference(reference(image, *first), *second)
        covered = reference(reference(torch.ones_like(image), *first), *second) > 0.9999
        assert 0.5 < covered.double().mean() < 1
        torch.testing.assert_close(augment(image[None], draws, 32)[0][covered], expected[covered], rtol=0, atol=5e-3)


def test_two_changes_of_colours_are_done_in_their_order() -> None:
    images = photos(2)
    solarize, stretch = (Operation.SOLARIZE, 0.5), (Operation.AUTO_CONTRAST, 0.0)
    result = images.clone()
    operations = torch.tensor([[solarize[0], stretch[0]], [stretch[0], solarize[0]]])
    change_colours(result, operations, torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    forth = reference(reference(images[0], *solarize), *stretch)
    back = reference(reference(images[1], *stretch), *solarize)
    torch.testing.assert_close(result, torch.stack([forth, back]), rtol=0, atol=1e-6)


def test_photos_of_a_batch_get_what_each_would_get_alone() -> None:
    operations_BN, magnitudes_BN = draw_operations(40, 0.7, 0.9, torch.Generator().manual_seed(1))
    images = photos(40)
    together = images.clone()
    change_colours(together, operations_BN, magnitudes_BN)
    for row in range(40):
        alone = images[row : row + 1].clone()
        change_colours(alone, operations_BN[row : row + 1], magnitudes_BN[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_operations_are_equally_frequent_and_magnitudes_of_either_sign(share: float) -> None:
    operations_BN, magnitudes_BN = draw_operations(20_000, 0.3, share, torch.Generator().manual_seed(0))
    assert operations_BN.shape == magnitudes_BN.shape == (20_000, 2)
    for place in range(2):
        frequencies = torch.bincount(operations_BN[:, place], minlength=14) / 20_000
        expected = [1 - share * 13 / 14] + [share / 14] * 13
        assert frequencies.tolist() == pytest.approx(expected, abs=0.01)
    assert magnitudes_BN.unique().tolist() == pytest.approx([-0.3, 0.3])
    assert (magnitudes_BN > 0).double().mean() == pytest.approx(0.5, abs=0.01)
    # The two places are drawn independently.
    both = (operations_BN == Operation.ROTATE).all(dim=1).double().mean()
    assert both == pytest.approx((share / 14) ** 2, abs=0.003)


@pytest.mark.parametrize(("strength", "magnitude", "kept"), [(0.1, 0.05, 0.4), (0.25, 0.125, 1.0), (1.0, 0.5, 1.0)])
def test_the_strength_sets_the_magnitude_and_how_many_operations_are_left_out(
    strength: float, magnitude: float, kept: float
) -> None:
    draws = draw_augmentation(10_000, strength, torch.Generator().manual_seed(0), rand_augment=True)
    torch.testing.assert_close(draws.magnitudes_BN.abs(), torch.full((10_000, 2), magnitude))
    done = (draws.operations_BN != Operation.IDENTITY).double().mean()
    assert done == pytest.approx(kept * 13 / 14, abs=0.01)


def test_operations_are_those_of_torchvision() -> None:
    from torchvision.transforms.v2 import RandAugment

    theirs = {name.lower() for name in RandAugment._AUGMENTATION_SPACE}
    assert {operation.name.replace("_", "").lower() for operation in Operation} == theirs
