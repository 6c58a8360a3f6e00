"""The files of a data set, its samples, their order, and the loaders.

    python prepare.py shapes && python train.py RECIPE=demo

A sample is a function of (seed, epoch, index), and the batch of a step a function of
(seed, step): whatever the number of workers, ranks or restarts. What data sets there
are stands in recipes.py.
"""
import hashlib
import io
import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from tqdm import tqdm

import settings
from recipes import DATASETS

IGNORED = 255  # the label of pixels that are neither learned nor scored
GET_AGAIN = 'get the file again or take it out of the list'


def get_facts() -> dict:
    """Return the facts of the data set in settings: see DATASETS in recipes.py.

    Those of DATASET=folder, a user's own pictures, are in dataset.json of its root.

    Raises:
        ValueError, FileNotFoundError: in a sentence, for a name that DATASETS does not
            have, or a folder that prepare.py has not seen.
    """
    if settings.DATASET not in DATASETS:
        raise ValueError(f'DATASET={settings.DATASET} is unknown: choose one of '
                         f'{", ".join(DATASETS)}')
    facts = DATASETS[settings.DATASET]
    if facts['classes']:
        return facts
    file = Path(settings.DATA_ROOT or facts['root']) / 'dataset.json'
    try:
        found = json.loads(file.read_text())
        n, value_map = len(found['classes']), found['map']
        value_map = {int(k): int(v) for k, v in value_map.items()}
        if not (n and len(found.get('palette', facts['palette'])) == 768
                and {*value_map} <= {*range(256)}
                and {*value_map.values()} <= {*range(n), IGNORED}):
            raise ValueError('classes, palette and map do not go together')
    except FileNotFoundError:
        raise FileNotFoundError(
            f'there is no {file}: {facts["get"]} to make it from your pictures and '
            'masks, or set DATA_ROOT to the folder that it is in') from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f'{file} cannot be read ({error}): write it again with '
                         '`python prepare.py folder`') from None
    return {**facts, **found, 'map': value_map}


# -- files -----------------------------------------------------------------------------

class Folder:
    """The pictures and masks of one list of a data set.

    ImageSets/Segmentation/<split>.txt holds an entry a line: what stands for {} in the
    facts' `images` and `masks`, or one such for each of the two with a tab between.

    Args:
        root: folder of the data set.
        split: name of the list, without .txt.
        facts: of the data set, see DATASETS in recipes.py.
        is_complete: raise where a file of the list is missing.
        needs_masks: raise too where no mask is there; otherwise `has_masks` tells.

    Raises:
        FileNotFoundError, ValueError: in a sentence, where the folder, the list or a
            file of it is missing.
    """

    def __init__(self, root: str, split: str, facts: dict, is_complete: bool = True,
                 needs_masks: bool = True):
        self.n_classes, self.split = len(facts['classes']), split
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(
                f'there is no data in {root}: {facts["get"]}, or set DATA_ROOT to '
                'where it is; `sh demo.sh` tries everything without data')
        lists = folder / 'ImageSets' / 'Segmentation'
        self.file = lists / f'{split}.txt'
        if not self.file.is_file():
            found = ', '.join(sorted(p.stem for p in lists.glob('*.txt'))) or 'none'
            raise FileNotFoundError(
                f'there is no list {self.file}: set TRAIN_SPLIT and VAL_SPLIT to lists '
                f'that are there ({found}), or {facts["get"]}')
        lines = [line.strip() for line in self.file.read_text().splitlines()]
        entries = [line.split('\t') for line in lines if line]
        if not entries:
            raise ValueError(f'the list {self.file} is empty: {facts["get"]}')
        masks = next((mask for mask in facts['masks']
                      if (folder / mask.split('{}')[0]).is_dir()), facts['masks'][0])
        self.root, self.masks = folder, masks.split('{}')[0].rstrip('/')
        self.ids = [e[0] if len(e) == 1 else os.path.splitext(e[0])[0] for e in entries]
        self.images = [str(folder / facts['images'].replace('{}', e[0]))
                       for e in entries]
        self.labels = [str(folder / masks.replace('{}', e[-1])) for e in entries]
        self.n_raw = max(facts['map'], default=-1) + 1  # values that `map` may turn up
        table = {**dict(enumerate(range(256))), **facts['map']}
        self.table = bytes(table.values()) if facts['map'] else None
        self.is_checked = bytearray(len(self.ids))  # masks whose values are known good
        self.pack = None
        lost = self.find_missing() if is_complete else []
        self.has_masks = needs_masks or not set(lost).issuperset(self.labels)
        lost = lost if self.has_masks else sorted({*lost} - {*self.labels})
        if lost:
            raise FileNotFoundError(
                f'{len(lost)} of the {2 * len(self)} files of {self.file} are missing, '
                f'the first is {lost[0]}: complete the data or take the lines out of '
                'the list')

    def __len__(self) -> int:
        return len(self.ids)

    def find_missing(self) -> list[str]:
        """Return the files of the list that are not there; each folder is read once."""
        there, lost = {}, []
        for path in (*self.images, *self.labels):
            where, name = os.path.split(path)
            if where not in there:
                there[where] = set(os.listdir(where)) if os.path.isdir(where) else ()
            if name not in there[where]:
                lost.append(path)
        return lost

    def open(self, paths: list[str], index: int) -> str | io.BytesIO:
        """Return what Pillow opens: the path of a file, or its bytes in the cache."""
        if self.pack is None:
            return paths[index]
        return io.BytesIO(self.pack[index + (len(self) if paths is self.labels else 0)])

    def read_image(self, index: int) -> np.ndarray:
        """Decode a picture.

        Returns:
            (h, w, 3) uint8.

        Raises:
            ValueError: in a sentence, for a file that cannot be decoded.
        """
        try:
            with Image.open(self.open(self.images, index)) as picture:
                return as_rgb(picture)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f'{self.images[index]} cannot be decoded ({error}): '
                             f'{GET_AGAIN}') from None

    def read_values(self, index: int) -> np.ndarray:
        """Read a mask as it is in the file: (h, w) uint8.

        Raises:
            ValueError: in a sentence, for a mask that is damaged or not of one byte a
                pixel.
        """
        try:
            with Image.open(self.open(self.labels, index)) as mask:
                mode, values = mask.mode, np.asarray(mask)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f'{self.labels[index]} cannot be decoded ({error}): '
                             f'{GET_AGAIN}') from None
        if mode not in ('P', 'L'):
            raise ValueError(f'{self.labels[index]} is of mode {mode}: a mask has one '
                             'byte a pixel, the class, as palette (P) or grey (L); '
                             'convert it')
        return values

    def read_label(self, index: int) -> np.ndarray:
        """Read a mask; the first time its values are checked.

        Returns:
            (h, w) uint8, 0 .. n_classes - 1 or 255.

        Raises:
            ValueError: in a sentence, for a mask that is RGB, damaged or has other
                values.
        """
        label = self.read_values(index)
        if self.table is not None:
            mapped = label.tobytes().translate(self.table)
            label = np.frombuffer(mapped, np.uint8).reshape(label.shape)
        if not self.is_checked[index]:
            wrong = label[(label >= self.n_classes) & (label != IGNORED)]
            if len(wrong):
                raise ValueError(
                    f'{self.labels[index]} has the value {wrong.min()} at '
                    f'{(wrong == wrong.min()).sum()} pixels: labels are 0 to '
                    f'{max(self.n_classes, self.n_raw) - 1}, or 255 for ignored; is '
                    'DATASET the right one?')
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


def as_rgb(picture: Image.Image) -> np.ndarray:
    """Decode a picture of any mode to (h, w, 3) uint8, as its pixels are stored.

    What is transparent lies on white. Of 16-bit grey the high byte is kept; whole
    numbers of 32 bits that need more than 16 are scaled by the largest, floating-point
    ones from the smallest to the largest that is finite. Of several pages or frames it
    is the one that is open, at first the first.
    """
    mode = picture.mode
    if mode[0] in 'IF':  # grey of more than 8 bits
        grey = np.asarray(picture)
        if mode == 'F':
            values = grey[np.isfinite(grey)].astype(float)
            low, high = (values.min(), values.max()) if len(values) else (0, 0)
            values = np.nan_to_num((grey - low) / (high - low or 1), nan=0)
            grey = np.rint(values.clip(0, 1) * 255)
        elif grey.max(initial=0) > 65535:
            grey = np.rint(grey.clip(0) * (255 / grey.max()))
        else:
            grey = grey.clip(0) >> 8
        return np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
    if mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or (
            mode == 'P' and 'transparency' in picture.info):
        picture = (picture.convert('LA') if mode == 'La' else picture).convert('RGBA')
        white = Image.new('RGBA', picture.size, 'white')
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture if picture.mode == 'RGB' else picture.convert('RGB'))


def open_split(split: str, is_complete: bool = True, needs_masks: bool = True
               ) -> Folder:
    """Open a list of the data set in settings: 'train', 'val' are its usual ones."""
    facts = get_facts()
    chosen = {'train': settings.TRAIN_SPLIT, 'val': settings.VAL_SPLIT}[split]
    return Folder(settings.DATA_ROOT or facts['root'], chosen or facts[split], facts,
                  is_complete, needs_masks)


def n_to_evaluate(folder: Folder) -> int:
    """Return how many pictures of a list EVAL_IMAGES lets be evaluated."""
    return min(settings.EVAL_IMAGES or len(folder), len(folder))


class Pack:
    """Many files in one: an uncompressed zip that all loader processes read from.

    Pictures stay encoded. The zip is written once and used again as long as the files
    in it have not changed; the system keeps one copy of it in memory for all processes.

    Args:
        paths: of the files.
        file: the zip, on a fast disk or in memory (/dev/shm/NAME on Linux).

    Raises:
        OSError: in a sentence, where there is no room for it.
        ValueError: where `file` is there and is no such zip.
    """
    MARK = 'EMANet cache '

    def __init__(self, paths: list[str], file: str):
        stats = [os.stat(path) for path in paths]
        marks = [(path, s.st_size, s.st_mtime_ns)
                 for path, s in zip(paths, stats, strict=True)]
        digest = hashlib.sha256(json.dumps(marks).encode()).hexdigest()
        self.comment = f'{self.MARK}{digest}'.encode()
        self.path, self.file, self.process = file, -1, 0
        size = sum(s.st_size for s in stats)
        print(f'cache: {len(paths)} files, {size / 1e9:.2f} GB, in {file}', flush=True)
        if not self.is_written():
            self.write(paths, size)
        with zipfile.ZipFile(file) as packed:  # 30 bytes and the name go before a file
            self.table = np.array([(i.header_offset + 30 + len(i.filename), i.file_size,
                                    i.CRC) for i in packed.infolist()], np.int64)

    def __getitem__(self, index: int) -> bytes:
        if self.process != os.getpid():  # each process has a handle of its own
            self.file, self.process = os.open(self.path, os.O_RDONLY), os.getpid()
            end = os.fstat(self.file).st_size - len(self.comment)
            if os.pread(self.file, len(self.comment), end) != self.comment:
                raise ValueError(f'CACHE={self.path} was written again by another run: '
                                 'give each list of pictures a cache of its own')
        start, size, crc = self.table[index].tolist()
        content = os.pread(self.file, size, start)
        if zlib.crc32(content) != crc:
            raise ValueError(f'the cache {self.path} is damaged: remove it, it is '
                             'written again')
        return content

    def __getstate__(self) -> dict:
        return {**vars(self), 'file': -1, 'process': 0}

    def is_written(self) -> bool:
        """Tell whether the zip is there and of these very files."""
        if not os.path.exists(self.path):
            return False
        try:
            with zipfile.ZipFile(self.path) as found:
                comment = found.comment
        except (zipfile.BadZipFile, OSError):
            comment = b''
        if not comment.startswith(self.MARK.encode()):
            raise ValueError(f'CACHE={self.path} is there and is no cache of this '
                             'project: give another name')
        return comment == self.comment

    def write(self, paths: list[str], size: int) -> None:
        """Write the zip under a temporary name and rename it."""
        where = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(where):
            raise FileNotFoundError(f'CACHE={self.path}: there is no folder {where}; '
                                    'make it, or give a file elsewhere')
        free = shutil.disk_usage(where).free
        if free < size:
            raise OSError(f'CACHE={self.path} takes {size / 1e9:.2f} GB, but '
                          f'{free / 1e9:.2f} GB are free in {where}: give a file '
                          'elsewhere, or leave CACHE empty')
        temporary = Path(f'{self.path}.{os.getpid()}.tmp')
        try:
            with zipfile.ZipFile(temporary, 'w') as target:
                for i, path in enumerate(tqdm(paths, 'caching', unit='file',
                                              leave=False, disable=None)):
                    target.writestr(str(i), Path(path).read_bytes())
                target.comment = self.comment
            os.replace(temporary, self.path)
        except OSError as error:
            raise OSError(f'CACHE={self.path} cannot be written ({error}): give a file '
                          'elsewhere, or leave CACHE empty') from error
        finally:
            temporary.unlink(missing_ok=True)


# -- training samples ------------------------------------------------------------------

def crop_size() -> tuple[int, int]:
    """Return (h, w) of a training crop, as settings say."""
    return settings.CROP_SIZE, settings.CROP_WIDTH or settings.CROP_SIZE


class TrainSet(Dataset):
    """Batches of training samples: scaled, cropped, mirrored, padded bytes.

    Crop first, then resize only what is kept. The picture is interpolated linearly, the
    mask by the nearest pixel, on one grid: pixel centres lie at halves, so output pixel
    j of a window shows the window's place (j + 1/2) / scale in both.

    Paper: the padding is 0 after normalising. Here: it is the mean rounded to a byte,
    0.006 deviations from it at most, because images travel as bytes.

    Args:
        folder: pictures and masks.
        crop: (h, w) of a sample.
        scales: one is drawn for each sample.
        use_flip: mirror every other sample.
        mean: of the pixels in 0..1, fills the padding.
        seed: of the whole run.
    """

    def __init__(self, folder: Folder, crop: tuple[int, int],
                 scales: tuple[float, ...], use_flip: bool, mean: tuple[float, ...],
                 seed: int):
        self.folder, self.crop, self.scales = folder, crop, scales
        self.use_flip, self.seed = use_flip, seed
        fill = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)
        self.blank = fill.repeat(*crop, 1)  # (h, w, 3), padding to copy

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
        height, width = (min(n, math.ceil(crop / scale))
                         for n, crop in zip((h, w), self.crop, strict=True))
        top = int(draw.integers(h - height + 1))
        left = int(draw.integers(w - width + 1))
        is_flipped = bool(draw.integers(2)) and self.use_flip
        return scale, top, left, height, width, is_flipped

    def cut(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return image (h, w, 3) and label (h, w) of a sample, bytes, at most crop."""
        image, label = self.folder.read(index)
        scale, top, left, h, w, is_flipped = self.draw(epoch, index, *label.shape)
        label = label[top:top + h, left:left + w]
        # in this order of views torch sees channels last, and keeps to it
        image = torch.from_numpy(np.array(image[top:top + h, left:left + w]))
        image = image[None].permute(0, 3, 1, 2)
        if is_flipped:
            image, label = image.flip(3), label[:, ::-1]
        if scale != 1:
            image = F.interpolate(image, scale_factor=scale, mode='bilinear')
            rows, cols = (((np.arange(min(n, crop)) + 0.5) / scale).astype(int)
                          for n, crop in zip(image.shape[2:], self.crop, strict=True))
            label = label[:, np.minimum(cols, w - 1)][np.minimum(rows, h - 1)]
        image = image.permute(0, 2, 3, 1)[0]
        label = torch.from_numpy(np.array(label))
        h, w = self.crop
        return image[:h, :w], label[:h, :w]

    def __getitems__(self, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Make the samples of (epoch, index) places, written straight into a batch.

        Returns:
            images (b, 3, h, w) uint8, channels last in memory, and labels (b, h, w)
            uint8.
        """
        images = torch.empty(len(places), *self.crop, 3, dtype=torch.uint8)
        labels = torch.empty(len(places), *self.crop, dtype=torch.uint8)
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

    def places(self, step: int, is_whole: bool = False) -> list[tuple[int, int]]:
        """Return the (epoch, index) of this rank's samples of a step, or of all."""
        share = self.batch if is_whole else self.batch // self.world
        start = step * self.batch + (0 if is_whole else self.rank * share)
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


def n_cores() -> int:
    """Return how many cores this process may use."""
    has_affinity = hasattr(os, 'sched_getaffinity')
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def n_workers() -> int:
    """Return N_WORKERS, but no more than this process's share of the cores."""
    n_processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # torchrun sets it
    return min(settings.N_WORKERS, max(n_cores() // n_processes, 1))


def stand_apart(worker: int) -> None:
    """Put a loader process into a group of its own.

    A signal to the group of the run, Ctrl-C or a scheduler's SIGTERM, would end it at
    once, and the run with it before the step is saved.
    """
    if hasattr(os, 'setpgid'):  # not on Windows
        os.setpgid(0, 0)


def train_loader(folder: Folder, first: int, last: int, device_type: str,
                 rank: int = 0, world: int = 1) -> DataLoader:
    """Return the loader of the steps first .. last - 1, as settings say.

    Returns:
        A loader of (images (b, 3, h, w) uint8, labels (b, h, w) uint8), this rank's
        share; its batch_sampler tells the places of a step.
    """
    samples = TrainSet(folder, crop_size(), settings.SCALES, settings.USE_FLIP,
                       settings.MEAN, settings.SEED)
    sampler = StepSampler(len(folder), settings.BATCH_SIZE, settings.SEED, first, last,
                          rank, world)
    return DataLoader(samples, batch_sampler=sampler, collate_fn=as_it_is,
                      num_workers=n_workers(), pin_memory=device_type == 'cuda',
                      worker_init_fn=stand_apart)


# -- evaluation samples ----------------------------------------------------------------

class EvalSet(Dataset):
    """Whole pictures: (index, image (3, h, w) uint8, label (h, w) uint8).

    The labels of a list without masks are ignored everywhere.

    Args:
        folder: pictures and masks.
    """

    def __init__(self, folder: Folder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        if self.folder.has_masks:
            image, label = self.folder.read(index)
        else:
            image = self.folder.read_image(index)
            label = np.full(image.shape[:2], IGNORED, np.uint8)
        image, label = (torch.from_numpy(np.array(x)) for x in (image, label))
        return index, image.permute(2, 0, 1), label


def as_lists(samples: list[tuple]) -> tuple[tuple, ...]:
    """Collate samples of different sizes: a tuple of indices, one of images ..."""
    return tuple(zip(*samples, strict=True))


def batch_by_size(folder: Folder, n_images: int, batch: int,
                  grid: int) -> list[list[int]]:
    """Put the first pictures of a list into batches of like size.

    Args:
        folder: of the pictures; only their headers are read.
        n_images: how many.
        batch: pictures of a batch, at most.
        grid: sides that need as many steps of so many pixels are alike.

    Returns:
        Indices of each batch, in the order of its first one.
    """
    if batch == 1:
        return [[i] for i in range(n_images)]
    groups = {}
    for i in range(n_images):
        try:
            with Image.open(folder.open(folder.images, i)) as picture:
                size = tuple(-(-(n - 1) // grid) for n in picture.size)
        except (OSError, SyntaxError, Image.DecompressionBombError):
            size = i  # reading it will tell what is wrong
        groups.setdefault(size, []).append(i)
    return sorted(group[i:i + batch] for group in groups.values()
                  for i in range(0, len(group), batch))


def eval_loader(folder: Folder, n_images: int, device_type: str = 'cpu', rank: int = 0,
                world: int = 1) -> DataLoader:
    """Return the loader of the first whole pictures of a list, in batches of like size.

    Of several ranks each has its share of the batches.

    Returns:
        A loader of (indices, images, labels), tuples as long as the batch: see EvalSet.
    """
    grid = settings.EVAL_STRIDE or settings.STRIDE
    batches = batch_by_size(folder, n_images, settings.EVAL_BATCH, grid)
    return DataLoader(EvalSet(folder), batch_sampler=batches[rank::world],
                      collate_fn=as_lists, num_workers=n_workers(),
                      pin_memory=device_type == 'cuda', worker_init_fn=stand_apart)
