"""A user's image files as the JPEGs of a shard."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fashionclip_tune.prepare.photo_folder import PhotoFolder
from fashionclip_tune.prepare.photos import photo_as_jpeg


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def converted(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    return photo_as_jpeg(path.read_bytes())


def assert_colour(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int]) -> None:
    pixel = image.convert("RGB").getpixel(at)
    assert isinstance(pixel, tuple)
    assert all(abs(a - b) <= 8 for a, b in zip(pixel, colour, strict=True)), pixel


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (60, 80)), ("L", (60, 80)), ("RGB", (288, 400))], ids=["rgb", "grey", "largest"]
)
def test_small_jpegs_are_copied(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    data = encoded(Image.effect_noise(size, 40).convert(mode), quality=37)
    assert converted(tmp_path / "one.jpg", data) == data


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 40))
    result = Image.open(io.BytesIO(converted(tmp_path / "one.png", encoded(image, "PNG"))))
    assert (result.format, result.mode, result.size) == ("JPEG", "RGB", (40, 40))
    assert_colour(result, (5, 20), (255, 0, 0))
    assert_colour(result, (35, 20), (255, 255, 255))


def test_palette_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 20, 40))
    data = encoded(image, "PNG", transparency=0)
    result = Image.open(io.BytesIO(converted(tmp_path / "one.png", data)))
    assert_colour(result, (5, 20), (0, 0, 255))
    assert_colour(result, (35, 20), (255, 255, 255))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (40, 40), (250, 120, 10)).convert("CMYK"), quality=95)
    result = Image.open(io.BytesIO(converted(tmp_path / "one.jpg", data)))
    assert result.mode == "RGB"
    assert_colour(result, (20, 20), (250, 120, 10))


def test_16_bit_grey_is_not_cut_off(tmp_path: Path) -> None:
    data = encoded(Image.new("I;16", (40, 40), 100 * 256), "PNG")
    assert_colour(Image.open(io.BytesIO(converted(tmp_path / "one.png", data))), (20, 20), (100, 100, 100))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), "white")
    image.paste((255, 0, 0), (0, 0, 20, 40))  # red on the left of the file, to be turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    result = Image.open(io.BytesIO(converted(tmp_path / "one.jpg", encoded(image, quality=95, exif=exif))))
    assert result.size == (40, 60)
    assert 0x0112 not in result.getexif()
    assert_colour(result, (20, 5), (255, 0, 0))
    assert_colour(result, (20, 50), (255, 255, 255))


def test_large_and_progressive_jpegs_are_encoded_anew(tmp_path: Path) -> None:
    image = Image.new("RGB", (1500, 3000), (10, 200, 30))
    result = Image.open(io.BytesIO(converted(tmp_path / "one.jpg", encoded(image, progressive=True))))
    assert result.size == (288, 576)
    assert "progressive" not in result.info
    assert_colour(result, (100, 100), (10, 200, 30))


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"])
def test_what_is_not_a_photo_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(OSError, match="cannot identify image file"):
        converted(tmp_path / "one.jpg", data)


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="truncated"):
        converted(tmp_path / "one.jpg", encoded(Image.effect_noise((90, 90), 90))[:-2000])


def test_photos_are_found_with_and_without_suffix(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b.webp", "c"):
        (tmp_path / name).touch()
    folder = PhotoFolder(tmp_path)
    wanted = {"a.jpg": "a.jpg", "a": "a.jpg", "sub/b": "sub/b.webp", "c": "c"}
    assert {name: [found.path for found in folder.find(name)] for name in wanted} == {
        name: [tmp_path / file] for name, file in wanted.items()
    }
    assert [found.problem for found in folder.find("")] == ["row names no image"]
    assert [found.path for found in folder.find("sub")] == [tmp_path / "sub/b.webp"]
    for missing in ("d", "a.png", "x" * 3000):
        assert [found.problem for found in folder.find(missing)] == ["image missing"]
