"""Training crops, the order of the samples, and the loaders.

    loader = train_loader(open_split('train'), 0, settings.ITER_MAX, 'cuda')
    images, labels = next(iter(loader))     # (b, 3, h, w) and (b, h, w), both uint8

A sample is a function of (seed, epoch, index), and the batch of a step a function of
(seed, step): the number of workers, ranks or restarts does not change them.
"""
import math
import os
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

import settings
from dataset import DECODE_ERRORS, IGNORED, SegmentationDataset

T = TypeVar('T')


# -- training --------------------------------------------------------------------------

def crop_size() -> tuple[int, int]:
    """Return (h, w) of a training crop, as settings say."""
    return settings.CROP_SIZE, settings.CROP_WIDTH or settings.CROP_SIZE


class TrainSet(Dataset):
    """Batches of training samples: scaled, cropped, flipped, padded bytes.

    Crop first, then resize only the region that is kept. The image is interpolated
    linearly, the mask by the nearest pixel, on one grid: pixel centres lie at halves,
    so output pixel j of a window shows the window's position (j + 1/2) / scale in both.

    Paper: the padding is 0 after normalising. Here: it is the mean rounded to a byte,
    0.006 deviations from it at most, because images travel as bytes.

    Args:
        data: images and masks.
        crop_size: (h, w) of a sample.
        scales: one is drawn for each sample.
        use_flip: flip every other sample, left to right.
        mean: of the pixels in 0..1, fills the padding.
        seed: of the whole run.
    """

    def __init__(self, data: SegmentationDataset, crop_size: tuple[int, int],
                 scales: tuple[float, ...], use_flip: bool, mean: tuple[float, ...],
                 seed: int):
        self.data, self.crop_size, self.scales = data, crop_size, scales
        self.use_flip, self.seed = use_flip, seed
        fill = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)
        self.padding = fill.repeat(*crop_size, 1)                  # (h, w, 3)

    def __len__(self) -> int:
        return len(self.data)

    def draw_crop(self, epoch: int, index: int, h: int, w: int
                  ) -> tuple[float, int, int, int, int, bool]:
        """Draw the scale, the window and the flip of a sample of an h x w image.

        Returns:
            (scale, top, left, height, width, is_flipped): the window in the image's
            own pixels.
        """
        rng = np.random.default_rng((self.seed, epoch, index))
        scale = max(self.scales[rng.integers(len(self.scales))], 1 / min(h, w))
        height, width = (min(n, math.ceil(crop / scale))
                         for n, crop in zip((h, w), self.crop_size, strict=True))
        top = int(rng.integers(h - height + 1))
        left = int(rng.integers(w - width + 1))
        is_flipped = bool(rng.integers(2)) and self.use_flip
        return scale, top, left, height, width, is_flipped

    def crop(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return image (h, w, 3) and label (h, w) of a sample, uint8, not padded."""
        image, label = self.data.read(index)
        scale, top, left, h, w, is_flipped = self.draw_crop(epoch, index, *label.shape)
        label = label[top:top + h, left:left + w]
        # through these views torch sees channels last, and keeps that memory order
        image = torch.from_numpy(np.array(image[top:top + h, left:left + w]))
        image = image[None].permute(0, 3, 1, 2)                    # (1, 3, h, w)
        if is_flipped:
            image, label = image.flip(3), label[:, ::-1]
        if scale != 1:
            image = F.interpolate(image, scale_factor=scale, mode='bilinear')
            rows, cols = (((np.arange(min(n, crop)) + 0.5) / scale).astype(int)
                          for n, crop in zip(image.shape[2:], self.crop_size,
                                             strict=True))
            label = label[:, np.minimum(cols, w - 1)][np.minimum(rows, h - 1)]
        image = image.permute(0, 2, 3, 1)[0]                       # (h, w, 3)
        label = torch.from_numpy(np.array(label))
        h, w = self.crop_size
        return image[:h, :w], label[:h, :w]

    def __getitems__(self, indices: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Make the samples of some (epoch, index) pairs, written into one batch.

        Returns:
            images (b, 3, h, w) uint8, channels last in memory, and labels (b, h, w)
            uint8.
        """
        images = torch.empty(len(indices), *self.crop_size, 3, dtype=torch.uint8)
        labels = torch.empty(len(indices), *self.crop_size, dtype=torch.uint8)
        if get_worker_info() is not None:  # saves a copy in the main process
            images.share_memory_()
            labels.share_memory_()
        for i, (epoch, index) in enumerate(indices):
            image, label = self.crop(epoch, index)
            h, w = label.shape
            images[i, :h, :w], labels[i, :h, :w] = image, label
            images[i, h:], labels[i, h:] = self.padding[h:], IGNORED
            images[i, :h, w:], labels[i, :h, w:] = self.padding[:h, w:], IGNORED
        return images.permute(0, 3, 1, 2), labels


class StepSampler(Sampler):
    """The samples of each step of a run.

    Step s uses samples [s * batch_size, (s + 1) * batch_size) of the concatenated
    shuffled epochs. Of these, each rank takes its equal share.

    Args:
        n_samples: of the data set.
        batch_size: of the whole step, over all ranks.
        seed: of the whole run.
        first, last: the steps last > s >= first are sampled; a run's first is 0.
        rank, world_size: this process, and how many there are.
    """

    def __init__(self, n_samples: int, batch_size: int, seed: int, first: int,
                 last: int, rank: int = 0, world_size: int = 1):
        self.n_samples, self.batch_size, self.seed = n_samples, batch_size, seed
        self.first, self.last = first, last
        self.rank, self.world_size = rank, world_size
        self.epoch, self.order = -1, None

    def __len__(self) -> int:
        return max(self.last - self.first, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.sample_indices, range(self.first, self.last))

    def sample_indices(self, step: int, is_whole: bool = False
                       ) -> list[tuple[int, int]]:
        """Return the (epoch, index) pairs of this rank's samples of a step, or of all.
        """
        start, share = step * self.batch_size, self.batch_size
        if not is_whole:
            share = self.batch_size // self.world_size
            start += self.rank * share
        return [self.sample_index(i) for i in range(start, start + share)]

    def sample_index(self, position: int) -> tuple[int, int]:
        """Return the (epoch, index) at a position of the concatenated epochs."""
        epoch, offset = divmod(position, self.n_samples)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.epoch, self.order = epoch, rng.permutation(self.n_samples)
        return epoch, int(self.order[offset])


def identity_collate(batch: T) -> T:
    """Return a batch that __getitems__ has already made."""
    return batch


def train_loader(data: SegmentationDataset, first: int, last: int, device_type: str,
                 rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return the loader of the steps first .. last - 1, as settings say.

    Returns:
        A loader of (images (b, 3, h, w) uint8, labels (b, h, w) uint8), this rank's
        share; its batch_sampler is a StepSampler.
    """
    samples = TrainSet(data, crop_size(), settings.SCALES, settings.USE_FLIP,
                       settings.MEAN, settings.SEED)
    sampler = StepSampler(len(data), settings.BATCH_SIZE, settings.SEED, first, last,
                          rank, world_size)
    return DataLoader(samples, batch_sampler=sampler, collate_fn=identity_collate,
                      num_workers=n_workers(), pin_memory=device_type == 'cuda',
                      worker_init_fn=detach_worker)


# -- loader processes ------------------------------------------------------------------

def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_workers() -> int:
    """Return N_WORKERS, but no more than this process's share of the cores."""
    n_processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # torchrun sets it
    return min(settings.N_WORKERS, max(n_cores() // n_processes, 1))


def detach_worker(worker: int) -> None:
    """Put a loader process into a process group of its own.

    Otherwise a signal to the group of the run, Ctrl-C or a scheduler's SIGTERM, would
    end the loader before the run has saved its step.
    """
    if hasattr(os, 'setpgid'):  # not on Windows
        os.setpgid(0, 0)


# -- evaluation ------------------------------------------------------------------------

class EvalSet(Dataset):
    """Whole images: (index, image (3, h, w) uint8, label (h, w) uint8).

    Without masks all labels are ignored ones.

    Args:
        data: images and masks.
    """

    def __init__(self, data: SegmentationDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        if self.data.has_masks:
            image, label = self.data.read(index)
        else:
            image = self.data.read_image(index)
            label = np.full(image.shape[:2], IGNORED, np.uint8)
        image, label = (torch.from_numpy(np.array(x)) for x in (image, label))
        return index, image.permute(2, 0, 1), label


def collate_lists(samples: list[tuple]) -> tuple[tuple, ...]:
    """Collate samples of different sizes: a tuple of indices, one of images ..."""
    return tuple(zip(*samples, strict=True))


def batch_by_size(data: SegmentationDataset, n_images: int, batch_size: int,
                  stride: int) -> list[list[int]]:
    """Put the first images of a split into batches of similar size.

    Args:
        data: the split; only the headers of the files are read.
        n_images: how many.
        batch_size: images of a batch, at most.
        stride: images are similar if they need as many steps of so many pixels.

    Returns:
        Indices of each batch, in the order of its first one.
    """
    if batch_size == 1:
        return [[i] for i in range(n_images)]
    groups = {}
    for i in range(n_images):
        try:
            with Image.open(data.images[i]) as image:
                size = tuple(math.ceil((n - 1) / stride) for n in image.size)
        except DECODE_ERRORS:
            size = i  # reading it later raises the error
        groups.setdefault(size, []).append(i)
    return sorted(group[i:i + batch_size] for group in groups.values()
                  for i in range(0, len(group), batch_size))


def eval_loader(data: SegmentationDataset, n_images: int, device_type: str = 'cpu',
                rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return the loader of the first whole images of a split, batched by size.

    Each rank has its share of the batches.

    Returns:
        A loader of (indices, images, labels), tuples as long as the batch: see EvalSet.
    """
    stride = settings.EVAL_STRIDE or settings.STRIDE
    batches = batch_by_size(data, n_images, settings.EVAL_BATCH, stride)
    return DataLoader(EvalSet(data), batch_sampler=batches[rank::world_size],
                      collate_fn=collate_lists, num_workers=n_workers(),
                      pin_memory=device_type == 'cuda', worker_init_fn=detach_worker)
