"""HDF5 tables as Fashion-Gen has them.

Such ``.h5`` files hold ``input_image`` [n, height, width, 3] uint8, and byte strings (latin-1) of shape [n, 1]
such as ``input_description``. Every data set of one value a row is a column, under its own name.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.tables.cells import Row, TableRows, as_text

IMAGES_DATASET = "input_image"


def read_hdf5(path: Path) -> TableRows:
    """Reads all columns; the photos stay in the file.

    Raises:
        UserError: the file is no HDF5 file, or has no photos.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            images = file.get(IMAGES_DATASET)
            if (
                not isinstance(images, h5py.Dataset)
                or len(images.shape) != 4
                or images.shape[3] != 3
                or images.dtype != "uint8"
            ):
                raise UserError(
                    f"table {path} has no data set {IMAGES_DATASET} of shape [n, height, width, 3] and type uint8, as "
                    f"Fashion-Gen's files have; it has {', '.join(file) or 'nothing'}"
                )
            shapes = ((len(images),), (len(images), 1))  # of one value a row
            texts = {
                name: [as_text(value) for value in data[()].reshape(-1).tolist()]
                for name, data in file.items()
                if isinstance(data, h5py.Dataset) and data.shape in shapes and data.dtype.kind in "SOiuf"
            }
            values = zip(*texts.values(), strict=True)
            rows = [Row(number, dict(zip(texts, row, strict=True))) for number, row in enumerate(values)]
            chunks = images.chunks
    except OSError as error:
        raise UserError(f"table {path} is not an HDF5 file that can be read ({error})") from error
    block = chunks[0] if chunks else 1
    return TableRows(tuple(texts), rows, photo_columns=(IMAGES_DATASET,), photos_of_block=block)


def pixels_in(path: Path, rows: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
    """[height, width, 3] of each of rows in ascending order; from the first to the last they are read at once.

    Raises:
        OSError: the file cannot be read there.
    """
    import h5py

    with h5py.File(path, "r") as file:
        pixels = file[IMAGES_DATASET][rows[0] : rows[-1] + 1]
    return [pixels[row - rows[0]] for row in rows]
