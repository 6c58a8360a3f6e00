"""Masks in their published formats, to one byte a pixel: the class, or 255 for void.

    from preparation.masks import read_sbd
    mask = read_sbd(Path('2008_000051.mat'))                  # (h, w) uint8

A user's own masks are read here too; folder.py reads their folders and lists.
"""
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dataset import IGNORED

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# The label of each of the 59 classes among the 459 of PASCAL Context.
CONTEXT_IDS = (
    2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416,
    427, 9, 18, 22, 33, 44, 46, 68, 80, 85, 104, 115, 144, 158, 159, 162, 187, 189, 220,
    232, 259, 260, 105, 296, 355, 295, 324, 326, 349, 354, 360, 366, 19, 415, 420, 424,
    440, 445, 454, 458)
NEVER_ANNOTATED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of COCO-Stuff's 182
VOC_FROM_COCO = {'airplane': 'aeroplane', 'motorcycle': 'motorbike', 'couch': 'sofa',
                 'dining table': 'diningtable', 'potted plant': 'pottedplant',
                 'tv': 'tvmonitor'}  # the names of the others are the same
MIN_PIXELS = 1000  # of the 20 classes, in a COCO image that is kept


# -- published data sets ---------------------------------------------------------------

def load_mat(file: Path, name: str) -> np.ndarray:
    """Return one variable of a MATLAB file."""
    from scipy.io import loadmat
    return loadmat(file, variable_names=[name])[name]


def read_sbd(file: Path) -> np.ndarray:
    """Return the mask (h, w) uint8 of an SBD cls/*.mat, 21 classes."""
    return load_mat(file, 'GTcls')[0, 0]['Segmentation'].astype(np.uint8)


def read_context(file: Path) -> np.ndarray:
    """Return the mask (h, w) uint8 of a PASCAL Context *.mat, 60 classes.

    Labels beyond the 59 are background, as in the paper's count of 60.
    """
    table = np.zeros(460, np.uint8)
    table[list(CONTEXT_IDS)] = np.arange(1, 60)
    return table[load_mat(file, 'LabelMap')]


def stuff_table() -> np.ndarray:
    """Return the class of each COCO-Stuff label 0..182; 255 for what is none."""
    table = np.full(183, IGNORED, np.uint8)
    ids = [i for i in range(1, 183) if i not in NEVER_ANNOTATED]
    table[ids] = np.arange(len(ids))
    return table


def read_stuff_mat(file: Path) -> np.ndarray:
    """Return the mask (h, w) uint8 of a COCO-Stuff 10K v1.1 *.mat, 171 classes."""
    return stuff_table()[load_mat(file, 'S')]


def read_stuff_png(file: Path) -> np.ndarray:
    """Return the mask (h, w) uint8 of a 164k pixel map, whose values are label - 1."""
    table = np.append(stuff_table()[1:], np.full(74, IGNORED, np.uint8))
    with Image.open(file) as picture:
        return table[np.asarray(picture)]


def draw_instances(coco: 'COCO', classes: dict[int, int], image_id: int
                   ) -> np.ndarray | None:
    """Draw the instances of a COCO image.

    Crowds are void where no instance is, and so are pixels that instances of two
    classes claim.

    Args:
        coco: an annotation file, read by pycocotools.
        classes: id of a category -> VOC class; other categories are background.
        image_id: the image.

    Returns:
        (h, w) uint8, VOC classes or 255; None with fewer than MIN_PIXELS of a class.
    """
    image = coco.imgs[image_id]
    label = np.zeros((image['height'], image['width']), np.uint8)
    for item in sorted(coco.imgToAnns[image_id], key=lambda item: item['iscrowd']):
        if item['category_id'] not in classes or not item['segmentation']:
            continue
        inside = coco.annToMask(item) > 0
        if item['iscrowd']:
            label[inside & (label == 0)] = IGNORED
        else:
            number = classes[item['category_id']]
            is_taken = inside & (label != 0) & (label != number)
            label[inside] = number
            label[is_taken] = IGNORED
    n_pixels = ((label > 0) & (label != IGNORED)).sum()
    return label if n_pixels >= MIN_PIXELS else None


# -- a user's own ----------------------------------------------------------------------

def read_coded_by_colour(table: dict[tuple, int], file: Path) -> np.ndarray:
    """Return the mask (h, w) uint8 of a picture whose colours are the classes.

    Args:
        table: (r, g, b) -> class.
        file: the picture.

    Raises:
        ValueError: for a colour that the table does not name.
    """
    with Image.open(file) as picture:
        rgb = np.asarray(picture.convert('RGB')).astype(np.uint32)
    codes = rgb @ np.array((1 << 16, 1 << 8, 1), np.uint32)        # (h, w)
    label, is_known = np.zeros(codes.shape, np.uint8), np.zeros(codes.shape, bool)
    for (r, g, b), number in table.items():
        is_colour = codes == (r << 16 | g << 8 | b)
        label[is_colour] = number
        is_known |= is_colour
    if not is_known.all():
        colour = ' '.join(str(value) for value in rgb[~is_known][0])
        raise ValueError(f'{(~is_known).sum()} pixels have colours that the table does '
                         f'not name, as {colour}; a line `r g b void` ignores them')
    return label


def read_coded_by_value(file: Path) -> np.ndarray:
    """Return the mask (h, w) uint8 of a picture whose values are the classes.

    Raises:
        ValueError: if the values are colours, or beyond a byte.
    """
    with Image.open(file) as picture:
        values = np.asarray(picture)
    if values.ndim == 3:  # grey in three channels, or with alpha
        colours = values[..., :3] if values.shape[2] > 2 else values[..., :1]
        if (colours != colours[..., :1]).any():
            raise ValueError('it is coded by colour: give the table, `r g b name` a '
                             'line, with --colours')
        values = values[..., 0]
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise ValueError(f'it has the value {values.max()}: 0 to 255 are expected')
    return values.astype(np.uint8)
