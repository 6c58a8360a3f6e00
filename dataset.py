"""What each data set is, its samples, their order, and the loaders.

    python prepare.py shapes && python train.py RECIPE=demo

A sample is a function of (seed, epoch, index), and the batch of a step a function of
(seed, step): whatever the number of workers, ranks or restarts.
"""
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

import settings

IGNORED = 255  # the label of pixels that are neither learned nor scored


def voc_palette(n: int = 256) -> list[int]:
    """Return the palette of the VOC masks: n colours of 3 bytes, flat.

    The bits of an index are dealt out in turn to red, green and blue, from the highest
    bit of each colour down.
    """
    palette = []
    for index in range(n):
        rgb = [0, 0, 0]
        for bit in range(8):
            rgb[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        palette += rgb
    return palette


def fill_palette(*colours: tuple[int, int, int]) -> list[int]:
    """Return a flat palette of 256 colours: the given ones, black, and grey for 255."""
    flat = [value for colour in colours for value in colour]
    return flat + [0] * (765 - len(flat)) + [128] * 3


# Facts: `root` is the default folder; the masks lie in the first of `labels` that
# exists; `train` and `val` are the default lists; `get` is the line that makes it.
DATASETS = {
    'voc': {
        'classes': ('background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle',
                    'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog', 'horse',
                    'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
                    'tvmonitor'),
        'palette': voc_palette(),
        'root': 'data/VOCdevkit/VOC2012',
        'labels': ('SegmentationClassAug', 'SegmentationClass'),
        'train': 'trainaug', 'val': 'val',
        'get': 'unpack VOCtrainval_11-May-2012.tar into data/ and take '
               'TRAIN_SPLIT=train (trainaug needs the masks of SBD in '
               'SegmentationClassAug and trainaug.txt), or draw a small set with '
               '`python prepare.py shapes` and say DATASET=shapes',
    },
    'shapes': {
        'classes': ('background', 'balloon', 'house', 'mushroom', 'parasol', 'pumpkin',
                    'star', 'tree', 'duck', 'goose'),
        'palette': fill_palette(
            (0, 0, 0), (230, 60, 50), (160, 110, 70), (190, 70, 200), (60, 150, 230),
            (250, 140, 20), (250, 220, 60), (40, 150, 70), (90, 230, 230),
            (240, 240, 240)),
        'root': 'data/shapes',
        'labels': ('SegmentationClass',),
        'train': 'train', 'val': 'val',
        'get': 'run `python prepare.py shapes`',
    },
}


def get_facts() -> dict:
    """Return the facts of the data set in settings.

    Raises:
        ValueError: for a name that DATASETS does not have.
    """
    if settings.DATASET not in DATASETS:
        raise ValueError(f'DATASET={settings.DATASET} is unknown: choose one of '
                         f'{", ".join(DATASETS)}')
    return DATASETS[settings.DATASET]


# -- files -----------------------------------------------------------------------------

class Folder:
    """The pictures and masks of one list of a data set in the VOC layout.

    JPEGImages/<id>.jpg, <labels>/<id>.png, ImageSets/Segmentation/<split>.txt.

    Args:
        root: folder of the data set.
        split: name of the list, without .txt.
        facts: an entry of DATASETS.

    Raises:
        FileNotFoundError, ValueError: in a sentence, where the folder, the list or a
            file of it is missing.
    """

    def __init__(self, root: str, split: str, facts: dict):
        self.n_classes, self.split = len(facts['classes']), split
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(
                f'there is no data in {root}: {facts["get"]}, or set DATA_ROOT to '
                'where it is; `sh demo.sh` tries everything without data')
        lists = folder / 'ImageSets' / 'Segmentation'
        file = lists / f'{split}.txt'
        if not file.is_file():
            found = ', '.join(sorted(p.stem for p in lists.glob('*.txt'))) or 'none'
            raise FileNotFoundError(
                f'there is no list {file}: set TRAIN_SPLIT and VAL_SPLIT to lists that '
                f'are there ({found}), or {facts["get"]}')
        self.ids = file.read_text().split()
        self.images = folder / 'JPEGImages'
        self.labels = next((folder / name for name in facts['labels']
                            if (folder / name).is_dir()), folder / facts['labels'][0])
        if not self.ids:
            raise ValueError(f'the list {file} is empty: {facts["get"]}')
        for where, suffix in ((self.images, '.jpg'), (self.labels, '.png')):
            there = {p.name for p in where.glob('*' + suffix)}
            lost = [i for i in self.ids if i + suffix not in there]
            if lost:
                raise FileNotFoundError(
                    f'{len(lost)} of the {len(self.ids)} entries of {file} have no '
                    f'file in {where}, the first is {lost[0]}{suffix}: complete the '
                    'data or take the lines out of the list')
        self.is_checked = bytearray(len(self.ids))  # masks whose values are known good

    def __len__(self) -> int:
        return len(self.ids)

    def read_image(self, index: int) -> np.ndarray:
        """Decode a picture.

        Returns:
            (h, w, 3) uint8.

        Raises:
            ValueError: in a sentence, for a file that cannot be decoded.
        """
        path = self.images / f'{self.ids[index]}.jpg'
        try:
            with Image.open(path) as picture:
                is_rgb = picture.mode == 'RGB'
                return np.asarray(picture if is_rgb else picture.convert('RGB'))
        except (OSError, SyntaxError) as error:  # SyntaxError: Pillow, of broken files
            raise ValueError(f'{path} cannot be decoded ({error}): get the file again '
                             'or take it out of the list') from None

    def read_label(self, index: int) -> np.ndarray:
        """Read a mask; the first time its values are checked.

        Returns:
            (h, w) uint8, 0 .. n_classes - 1 or 255.

        Raises:
            ValueError: in a sentence, for a mask that is RGB, damaged or has other
                values.
        """
        path = self.labels / f'{self.ids[index]}.png'
        try:
            with Image.open(path) as mask:
                mode, label = mask.mode, np.asarray(mask)
        except (OSError, SyntaxError) as error:
            raise ValueError(f'{path} cannot be decoded ({error}): get the file again '
                             'or take it out of the list') from None
        if mode not in ('P', 'L'):
            raise ValueError(f'{path} is of mode {mode}: a mask has one byte a pixel, '
                             'the class, as palette (P) or grey (L); convert it')
        if not self.is_checked[index]:
            wrong = label[(label >= self.n_classes) & (label != IGNORED)]
            if len(wrong):
                raise ValueError(
                    f'{path} has the value {wrong.min()} at '
                    f'{(wrong == wrong.min()).sum()} pixels: labels are 0 to '
                    f'{self.n_classes - 1}, or 255 for ignored; is DATASET the right '
                    'one?')
            self.is_checked[index] = 1
        return label

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return picture (h, w, 3) and mask (h, w), both bytes of the same size."""
        image, label = self.read_image(index), self.read_label(index)
        if image.shape[:2] != label.shape:
            raise ValueError(
                f'{self.ids[index]}: the image is {image.shape[1]}x{image.shape[0]}, '
                f'its mask {label.shape[1]}x{label.shape[0]}: they must be of one size')
        return image, label


def open_split(split: str) -> Folder:
    """Open a list of the data set in settings: 'train', 'val' are its usual ones."""
    facts = get_facts()
    chosen = {'train': settings.TRAIN_SPLIT, 'val': settings.VAL_SPLIT}[split]
    return Folder(settings.DATA_ROOT or facts['root'], chosen or facts[split], facts)


# -- training samples ------------------------------------------------------------------

class TrainSet(Dataset):
    """Batches of training samples: scaled, cropped, mirrored, padded bytes.

    Crop first, then resize only what is kept. The picture is interpolated linearly, the
    mask by the nearest pixel, on one grid: pixel centres lie at halves, so output pixel
    j of a window shows the window's place (j + 1/2) / scale in both.

    Paper: the padding is 0 after normalising. Here: it is the mean rounded to a byte,
    0.006 deviations from it at most, because images travel as bytes.

    Args:
        folder: pictures and masks.
        crop: side of a sample.
        scales: one is drawn for each sample.
        use_flip: mirror every other sample.
        mean: of the pixels in 0..1, fills the padding.
        seed: of the whole run.
    """

    def __init__(self, folder: Folder, crop: int, scales: tuple[float, ...],
                 use_flip: bool, mean: tuple[float, ...], seed: int):
        self.folder, self.crop, self.scales = folder, crop, scales
        self.use_flip, self.seed = use_flip, seed
        fill = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)
        self.blank = fill.repeat(crop, crop, 1)  # (crop, crop, 3), padding to copy

    def __len__(self) -> int:
        return len(self.folder)

    def draw(self, epoch: int, index: int, h: int, w: int
             ) -> tuple[float, int, int, int, int, bool]:
        """Draw how a sample is cut from its h x w picture.

        Returns:
            (scale, top, left, height, width, is_flipped): the window in the picture's
            own pixels.
        """
        draw = np.random.default_rng((self.seed, epoch, index))
        scale = max(self.scales[draw.integers(len(self.scales))], 1 / min(h, w))
        side = math.ceil(self.crop / scale)
        height, width = min(h, side), min(w, side)
        top = int(draw.integers(h - height + 1))
        left = int(draw.integers(w - width + 1))
        is_flipped = bool(draw.integers(2)) and self.use_flip
        return scale, top, left, height, width, is_flipped

    def cut(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return image (h, w, 3) and label (h, w) of a sample, bytes, at most crop."""
        image, label = self.folder.read(index)
        scale, top, left, h, w, is_flipped = self.draw(epoch, index, *label.shape)
        image = image[top:top + h, left:left + w]
        label = label[top:top + h, left:left + w]
        if is_flipped:
            image, label = image[:, ::-1], label[:, ::-1]
        image = torch.from_numpy(np.array(image))  # of its own, writable
        if scale != 1:
            # in this order of views torch sees channels last, and keeps to it
            image = F.interpolate(image[None].permute(0, 3, 1, 2), scale_factor=scale,
                                  mode='bilinear').permute(0, 2, 3, 1)[0]
            rows, cols = (((np.arange(min(n, self.crop)) + 0.5) / scale).astype(int)
                          for n in image.shape[:2])
            label = label.take(np.minimum(cols, w - 1), 1).take(
                np.minimum(rows, h - 1), 0)
        label = torch.from_numpy(np.array(label))
        return image[:self.crop, :self.crop], label[:self.crop, :self.crop]

    def __getitems__(self, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Make the samples of (epoch, index) places, written straight into a batch.

        Returns:
            images (b, 3, crop, crop) uint8, channels last in memory, and labels
            (b, crop, crop) uint8.
        """
        images = torch.empty(len(places), self.crop, self.crop, 3, dtype=torch.uint8)
        labels = torch.empty(len(places), self.crop, self.crop, dtype=torch.uint8)
        if get_worker_info() is not None:  # spares the copy to the main process
            images.share_memory_()
            labels.share_memory_()
        for i, place in enumerate(places):
            image, label = self.cut(*place)
            h, w = label.shape
            images[i, :h, :w], labels[i, :h, :w] = image, label
            images[i, h:], labels[i, h:] = self.blank[h:], IGNORED
            images[i, :h, w:], labels[i, :h, w:] = self.blank[:h, w:], IGNORED
        return images.permute(0, 3, 1, 2), labels


class StepSampler(Sampler):
    """Which samples each step of a run sees.

    Step s takes places s * batch .. (s + 1) * batch of an endless row of shuffled
    epochs. Of these, rank r of n takes its equal share.

    Args:
        n_samples: of the data set.
        batch: of the whole step, over all ranks.
        seed: of the whole run.
        first, last: the steps last > s >= first are handed out; 0 is a run's first.
        rank, world: this process, and how many there are.
    """

    def __init__(self, n_samples: int, batch: int, seed: int, first: int, last: int,
                 rank: int = 0, world: int = 1):
        self.n_samples, self.batch, self.seed = n_samples, batch, seed
        self.first, self.last, self.rank, self.world = first, last, rank, world
        self.epoch, self.order = -1, None

    def __len__(self) -> int:
        return max(self.last - self.first, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.places, range(self.first, self.last))

    def places(self, step: int) -> list[tuple[int, int]]:
        """Return the (epoch, index) of this rank's samples of a step."""
        share = self.batch // self.world
        start = step * self.batch + self.rank * share
        return [self.place(position) for position in range(start, start + share)]

    def place(self, position: int) -> tuple[int, int]:
        """Return the (epoch, index) at a position of the endless row."""
        epoch, offset = divmod(position, self.n_samples)
        if epoch != self.epoch:
            draw = np.random.default_rng((self.seed, epoch))
            self.epoch, self.order = epoch, draw.permutation(self.n_samples)
        return epoch, int(self.order[offset])


def as_it_is(batch):
    """Collate nothing: __getitems__ has made the batch."""
    return batch


def n_workers() -> int:
    """Return N_WORKERS, but no more than this process has cores."""
    has_affinity = hasattr(os, 'sched_getaffinity')
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(settings.N_WORKERS, cores)


def train_loader(folder: Folder, first: int, last: int, device_type: str,
                 rank: int = 0, world: int = 1) -> DataLoader:
    """Return the loader of the steps first .. last - 1, as settings say.

    Returns:
        A loader of (images (b, 3, c, c) uint8, labels (b, c, c) uint8), this rank's
        share; its batch_sampler tells the places of a step.
    """
    samples = TrainSet(folder, settings.CROP_SIZE, settings.SCALES, settings.USE_FLIP,
                       settings.MEAN, settings.SEED)
    sampler = StepSampler(len(folder), settings.BATCH_SIZE, settings.SEED, first, last,
                          rank, world)
    return DataLoader(samples, batch_sampler=sampler, collate_fn=as_it_is,
                      num_workers=n_workers(), pin_memory=device_type == 'cuda')


# -- evaluation samples ----------------------------------------------------------------

class EvalSet(Dataset):
    """Whole pictures: (image (3, h, w) uint8, label (h, w) uint8, name).

    Args:
        folder: pictures and masks.
    """

    def __init__(self, folder: Folder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, label = self.folder.read(index)
        image, label = (torch.from_numpy(np.array(x)) for x in (image, label))
        return image.permute(2, 0, 1), label, self.folder.ids[index]


def eval_loader(folder: Folder) -> DataLoader:
    """Return the loader of a list's whole pictures, one at a time, in order."""
    return DataLoader(EvalSet(folder), batch_size=None, num_workers=n_workers())


# -- pictures --------------------------------------------------------------------------

def colour(label: Tensor, palette: list[int]) -> Tensor:
    """Paint labels (h, w) in the colours of a palette: (h, w, 3) uint8.

    Ignored pixels (255) are the palette's last colour, near white in VOC's.
    """
    return torch.tensor(palette, dtype=torch.uint8).view(-1, 3)[label.long()]
