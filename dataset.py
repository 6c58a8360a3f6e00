"""The files of a data set: its lists, images and masks.

    data = open_split('val')
    image, label = data.read(0)     # (h, w, 3) and (h, w), both uint8

The data sets and their facts are in DATASETS of recipes.py; the crops, the order of the
samples and the loaders are in loader.py.
"""
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

import settings
from config import UserError
from recipes import DATASETS

IGNORED = 255  # the label of pixels that are neither learned nor scored
INVALID = 254  # stands for values of a mask that are no class
GET_AGAIN = 'get the file again or take it out of the list'
DECODE_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)


def get_dataset_info() -> dict:
    """Return the facts of the data set in settings: see DATASETS in recipes.py.

    For DATASET=folder, a user's own images, they are in dataset.json of its root.

    Raises:
        UserError: for an unknown data set, or a folder without dataset.json.
    """
    if settings.DATASET not in DATASETS:
        raise UserError(f'DATASET={settings.DATASET} is unknown: choose one of '
                        f'{", ".join(DATASETS)}')
    info = DATASETS[settings.DATASET]
    if info['classes']:
        return info
    file = Path(settings.DATA_ROOT or info['root']) / 'dataset.json'
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        value_map = {int(k): int(v) for k, v in content['map'].items()}
        n_classes = len(content['classes'])
        palette = content.get('palette', info['palette'])
        is_valid = (n_classes > 0 and len(palette) == 768
                    and set(value_map) <= set(range(256))
                    and set(value_map.values()) <= {*range(n_classes), IGNORED})
    except FileNotFoundError:
        raise UserError(
            f'there is no {file}: {info["get"]} to make it from your images and masks, '
            'or set DATA_ROOT to the folder that it is in') from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f'{file} cannot be read ({error}): write it again with '
                        '`python prepare.py folder`') from None
    if not is_valid:
        raise UserError(f'{file} has classes, palette and map that do not fit '
                        'together: write it again with `python prepare.py folder`')
    return {**info, **content, 'map': value_map}


class SegmentationDataset:
    """The images and masks of one split of a data set.

    ImageSets/Segmentation/<split>.txt holds an entry a line: the text that replaces {}
    in the `images` and `masks` of the data set, or one for each of the two with a tab
    between.

    Args:
        root: folder of the data set.
        split: name of the list, without .txt.
        info: facts of the data set, see DATASETS in recipes.py.
        is_complete: raise an error if a file of the list is missing.
        needs_masks: raise an error too if all masks are missing; otherwise `has_masks`
            is False then.

    Raises:
        UserError: if the folder, the list or a file of it is missing.
    """

    def __init__(self, root: str, split: str, info: dict, is_complete: bool = True,
                 needs_masks: bool = True):
        self.n_classes, self.split, self.root = len(info['classes']), split, Path(root)
        if not self.root.is_dir():
            raise UserError(
                f'there is no data in {root}: {info["get"]}, or set DATA_ROOT to where '
                'it is; `sh demo.sh` tries everything without data')
        entries = self._read_list(info)
        masks = next((mask for mask in info['masks']
                      if (self.root / mask.split('{}')[0]).is_dir()), info['masks'][0])
        self.masks = masks.split('{}')[0].rstrip('/')
        self.ids = [e[0] if len(e) == 1 else os.path.splitext(e[0])[0] for e in entries]
        self.images = [str(self.root / info['images'].replace('{}', e[0]))
                       for e in entries]
        self.labels = [str(self.root / masks.replace('{}', e[-1])) for e in entries]
        classes = {*range(self.n_classes), IGNORED}
        values = [info['map'].get(value, value) for value in range(256)]
        self.table = bytes(v if v in classes else INVALID for v in values)
        missing = self.find_missing() if is_complete else []
        self.has_masks = needs_masks or not set(missing).issuperset(self.labels)
        if not self.has_masks:
            missing = sorted(set(missing) - set(self.labels))
        if missing:
            raise UserError(
                f'{len(missing)} of the {2 * len(self)} files of {self.file} are '
                f'missing, the first is {missing[0]}: complete the data or take the '
                'lines out of the list')

    def _read_list(self, info: dict) -> list[list[str]]:
        """Return the entries of the list, each of one name or two."""
        lists = self.root / 'ImageSets' / 'Segmentation'
        self.file = lists / f'{self.split}.txt'
        if not self.file.is_file():
            names = ', '.join(sorted(p.stem for p in lists.glob('*.txt'))) or 'none'
            raise UserError(
                f'there is no list {self.file}: set TRAIN_SPLIT and VAL_SPLIT to lists '
                f'that are there ({names}), or {info["get"]}')
        lines = [line.strip() for line in self.file.read_text().splitlines()]
        entries = [line.split('\t') for line in lines if line]
        if not entries:
            raise UserError(f'the list {self.file} is empty: {info["get"]}')
        return entries

    def __len__(self) -> int:
        return len(self.ids)

    def find_missing(self) -> list[str]:
        """Return the files of the list that are not there; read each folder once."""
        names, missing = {}, []
        for path in (*self.images, *self.labels):
            folder, name = os.path.split(path)
            if folder not in names:
                is_folder = os.path.isdir(folder)
                names[folder] = set(os.listdir(folder)) if is_folder else set()
            if name not in names[folder]:
                missing.append(path)
        return missing

    def read_image(self, index: int) -> np.ndarray:
        """Decode an image: (h, w, 3) uint8.

        Raises:
            UserError: for a file that cannot be decoded.
        """
        try:
            with Image.open(self.images[index]) as image:
                return as_rgb(image)
        except DECODE_ERRORS as error:
            raise UserError(f'{self.images[index]} cannot be decoded ({error}): '
                            f'{GET_AGAIN}') from None

    def read_values(self, index: int) -> np.ndarray:
        """Read a mask as it is in the file: (h, w) uint8.

        Raises:
            UserError: for a mask that is damaged or has more than one byte a pixel.
        """
        try:
            with Image.open(self.labels[index]) as mask:
                mode, values = mask.mode, np.asarray(mask)
        except DECODE_ERRORS as error:
            raise UserError(f'{self.labels[index]} cannot be decoded ({error}): '
                            f'{GET_AGAIN}') from None
        if mode not in ('P', 'L'):
            raise UserError(f'{self.labels[index]} is of mode {mode}: a mask has one '
                            'byte a pixel, the class, as palette (P) or grey (L); '
                            'convert it')
        return values

    def read_label(self, index: int) -> np.ndarray:
        """Read a mask and map its values to classes.

        Returns:
            (h, w) uint8, 0 .. n_classes - 1 or 255.

        Raises:
            UserError: for a mask that is RGB, damaged or has other values.
        """
        values = self.read_values(index)
        mapped = values.tobytes().translate(self.table)
        label = np.frombuffer(mapped, np.uint8).reshape(values.shape)
        if INVALID in mapped:
            wrong = values[label == INVALID].min()
            last = max(v for v in range(255) if self.table[v] not in (INVALID, IGNORED))
            raise UserError(
                f'{self.labels[index]} has the value {wrong} at '
                f'{(values == wrong).sum()} pixels: labels are 0 to {last}, or 255 for '
                'ignored; is DATASET the right one?')
        return label

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image (h, w, 3) and mask (h, w), uint8 and of the same size."""
        image, label = self.read_image(index), self.read_label(index)
        if image.shape[:2] != label.shape:
            raise UserError(
                f'{self.ids[index]}: the image is {image.shape[1]}x{image.shape[0]}, '
                f'its mask {label.shape[1]}x{label.shape[0]}: they must be of one size')
        return image, label


def as_rgb(image: Image.Image) -> np.ndarray:
    """Decode an image of any mode to (h, w, 3) uint8, as its pixels are stored.

    Transparent pixels are laid on white. Of 16-bit grey the high byte is kept; 32-bit
    integers above 65535 are scaled by their largest; floating-point numbers are scaled
    from the smallest to the largest finite one. Of several frames it is the current.
    """
    if image.mode[0] in 'IF':  # grey of more than 8 bits
        grey = grey_to_bytes(np.asarray(image), image.mode == 'F')
        return np.repeat(grey[..., None], 3, 2)
    has_alpha = image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa')
    if has_alpha or (image.mode == 'P' and 'transparency' in image.info):
        if image.mode == 'La':
            image = image.convert('LA')
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))


def grey_to_bytes(grey: np.ndarray, is_float: bool) -> np.ndarray:
    """Scale grey values of more than 8 bits (h, w) to uint8: see as_rgb."""
    if is_float:
        finite = grey[np.isfinite(grey)].astype(float)
        low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
        shares = np.nan_to_num((grey - low) / (high - low or 1), nan=0)
        return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
    if grey.max(initial=0) > 65535:
        return np.rint(grey.clip(0) * (255 / grey.max())).astype(np.uint8)
    return (grey.clip(0) >> 8).astype(np.uint8)


def open_split(split: str, is_complete: bool = True, needs_masks: bool = True
               ) -> SegmentationDataset:
    """Open a split of the data set in settings.

    Args:
        split: 'train' or 'val', for TRAIN_SPLIT or VAL_SPLIT.
        is_complete, needs_masks: see SegmentationDataset.
    """
    info = get_dataset_info()
    name = settings.TRAIN_SPLIT if split == 'train' else settings.VAL_SPLIT
    return SegmentationDataset(settings.DATA_ROOT or info['root'], name or info[split],
                               info, is_complete, needs_masks)


def n_eval_images(data: SegmentationDataset) -> int:
    """Return how many images of a split are evaluated, at most EVAL_IMAGES."""
    return min(settings.EVAL_IMAGES or len(data), len(data))
