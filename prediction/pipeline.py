"""Predict pictures one after another, within a bound of memory.

    pipeline = Pipeline(predictor, results, n_pixels, bases=[])
    pipeline.run(pictures)      # reads and writes others while one is computed
"""
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import distributed
import drawing
import heads
import inference
from config import UserError
from prediction.pictures import (
    MAX_PIXELS,
    OVERVIEW,
    Picture,
    PictureError,
    read_picture,
)
from prediction.responsibilities import partition, responsibility_overview
from prediction.results import ResponsibilityMaps, ResultFolder

MARGIN = 128         # pixels around a block that are predicted with it
N_WAITING = 4        # pictures that wait to be computed or written, at most
N_OVERVIEW = 6       # pictures in the overview of responsibilities


def count_block_pixels(memory: float, nets: list[nn.Module], n_classes: int,
                       options: dict) -> int:
    """Return how many pixels can be predicted at a time within a bound of memory.

    Measured with ResNet-50 at stride 8 in float32 on two threads of a CPU with torch
    2.14: the process takes 0.94 GB with its weights, and for 21 classes at its peak 930
    bytes more a pixel for a whole picture, 1440 in blocks of several shapes. Earlier
    measurements gave 4 times as much for 171 classes. The formula gives 1704 and 5304.
    A large picture takes up to 10 bytes a pixel more.

    Args:
        memory: GB of 1e9 bytes.
        nets: the networks, all in memory together.
        n_classes: of the networks.
        options: of the Predictor.

    Raises:
        UserError: if not even the smallest block fits.
    """
    n_weights = sum(tensor.numel() for net in nets
                    for tensor in net.state_dict().values())
    work = max(1, *options['scales']) ** 2 * (2 if options['use_flip'] else 1)
    per_pixel = work * (1200 + 24 * n_classes)
    room = max(memory * 1e9 - 0.85e9 - 4 * n_weights, 0)
    n_pixels = room / per_pixel
    strides = [net.stride for net in nets for module in net.modules()
               if isinstance(module, heads.NonLocal)]
    if strides and not any(options['window']):
        # Half of the room is for two float32 matrices of all pairs of features.
        n_features = (room / 2 / 8) ** 0.5 / work
        n_pixels = min(n_pixels / 2, n_features * min(strides) ** 2)
    if not n_pixels >= (4 * MARGIN) ** 2:
        raise UserError(f'--memory {memory:g} GB is too little for {n_classes} classes '
                        'and these scales: give more, or fewer and smaller EVAL_SCALES')
    return int(min(n_pixels, MAX_PIXELS))


class Pipeline:
    """Predict pictures one after another while others are read and written.

    Args:
        predictor: of one variant.
        results: the folder of the results.
        n_pixels: that are predicted at a time, at most.
        bases: whose responsibilities are drawn; [] takes the most used ones.
    """

    def __init__(self, predictor: inference.Predictor, results: ResultFolder,
                 n_pixels: int, bases: list[int]):
        self.predictor, self.results = predictor, results
        self.n_pixels, self.bases = n_pixels, bases
        self.written = []          # names of results
        self.failures = []         # (path, message)
        self.overview_rows = []    # (image, maps, bases) of the first pictures

    def run(self, pictures: list[Picture]) -> None:
        """Predict and write pictures; those that fail are added to `failures`.

        Raises:
            UserError: if results cannot be written.
        """
        with ThreadPoolExecutor(4) as pool:
            writing = deque()
            self.bar = tqdm(self.read_ahead(pictures, pool), total=len(pictures),
                            unit='picture', disable=None)
            for picture, reading in self.bar:
                try:
                    image = reading.result()
                    is_large = image is None
                    if is_large:
                        image = read_picture(picture.path, MAX_PIXELS)
                    outputs = self.compute(picture, image)
                except (PictureError, OSError) as error:
                    self.failures.append((picture.path, str(error)))
                    continue
                writing.append(pool.submit(self.write, picture, image, outputs))
                while len(writing) > (0 if is_large else N_WAITING):
                    writing.popleft().result()
            for job in writing:
                job.result()

    def read_ahead(self, pictures: list[Picture], pool: ThreadPoolExecutor
                   ) -> Iterator[tuple[Picture, Future]]:
        """Yield pictures while the next ones are decoded, except for large ones."""
        queue = deque()
        for picture in pictures:
            queue.append((picture, pool.submit(read_picture, picture.path,
                                               self.n_pixels // N_WAITING)))
            if len(queue) > N_WAITING:
                yield queue.popleft()
        yield from queue

    def compute(self, picture: Picture, image: np.ndarray) -> tuple:
        """Return (mask, probs, responsibilities) for ResultFolder.write_all."""
        mask = probs = responsibilities = None
        try:
            if 'masks' in picture.missing or 'probabilities' in picture.missing:
                mask, probs = self.predict_mask(picture, image)
            if 'responsibilities' in picture.missing:
                responsibilities = self.find_responsibilities(picture, image)
        except (RuntimeError, MemoryError) as error:
            if not distributed.is_out_of_memory(error):
                raise
            raise PictureError('the memory does not hold it: lower --memory or '
                               'EVAL_BATCH, or set EVAL_WINDOW=513') from error
        if 'masks' not in picture.missing:
            mask = self.results.read_mask(picture)
            if mask.shape != image.shape[:2]:
                raise PictureError('its mask is of another size, as if the picture had '
                                   'been changed: give --overwrite')
        return mask, probs, responsibilities

    def predict_mask(self, picture: Picture, image: np.ndarray
                     ) -> tuple[np.ndarray, np.ndarray | None]:
        """Predict an image (h, w, 3), in blocks if it is large.

        Returns:
            (mask, probs): (h, w) uint8; (classes, h, w) float16, or None if not needed.

        Raises:
            PictureError: if the probabilities of a large picture are needed.
        """
        h, w = image.shape[:2]
        needs_probs = 'probabilities' in picture.missing
        if h * w > self.n_pixels:
            if needs_probs:
                raise PictureError(f'the probabilities of {w}x{h} pixels do not fit: '
                                   'raise --memory, or leave --probabilities out')
            tqdm.write(f'{picture.path}: {w}x{h} is predicted in blocks, and each sees '
                       'only its part: raise --memory, or shrink such pictures first')
        mask, probs = np.empty((h, w), np.uint8), None
        blocks = self.predictor.predict_blocks(to_tensor(image), self.n_pixels, MARGIN)
        for rows, columns, block in blocks:
            mask[rows, columns] = block[0].argmax(0).byte().cpu().numpy()
            self.bar.set_postfix_str(f'{w}x{h}: {rows.stop / h:.0%}')
            if needs_probs:
                probs = block[0].half().cpu().numpy()
        return mask, probs

    def find_responsibilities(self, picture: Picture, image: np.ndarray
                              ) -> ResponsibilityMaps:
        """Return the responsibilities for an image, reduced to what fits in memory."""
        small = image
        if image.shape[0] * image.shape[1] > self.n_pixels:
            small, = drawing.shrink(int(self.n_pixels ** 0.5), image)
        found = compute_responsibilities(self.predictor, small, self.bases)
        tqdm.write(f'{picture.path}, seen at {small.shape[1]}x{small.shape[0]}: '
                   f'{found.describe_unused()}')
        if len(self.overview_rows) < N_OVERVIEW:
            self.overview_rows.append((small, found.maps[-1:].copy(), found.bases))
        return found

    def write(self, picture: Picture, image: np.ndarray, outputs: tuple) -> None:
        """Write the results of a picture, and its row of the table."""
        self.results.write_all(picture, image, *outputs)
        self.results.add_row(picture, outputs[0])
        self.written.append(picture.name)

    def write_overview(self) -> None:
        """Write the responsibilities for the first pictures as one figure."""
        if len(self.overview_rows) > 1:
            net = self.predictor.nets[0]
            figure = responsibility_overview(self.overview_rows, net.stride,
                                             align_corners=net.align_corners)
            self.results.write_figure(self.results.out / Path(OVERVIEW).stem, figure)


def compute_responsibilities(predictor: inference.Predictor, image: np.ndarray,
                             bases: list[int]) -> ResponsibilityMaps:
    """Return the responsibilities of a network's bases for an image at scale 1.

    Args:
        predictor: its first network is used.
        image: (h, w, 3) uint8.
        bases: to draw; [] takes the four that are the largest for most pixels.
    """
    net, (h, w) = predictor.nets[0], image.shape[:2]
    with torch.inference_mode(), predictor.autocast():
        x = net.normalise(predictor.fetch(to_tensor(image))[None])
        bottom = inference.padded_size(h, net.stride, net.align_corners) - h
        right = inference.padded_size(w, net.stride, net.align_corners) - w
        feats = net.backbone(F.pad(x, (0, right, 0, bottom)))
        maps = net.head.responsibilities(feats)[:, 0]              # (t, k, h', w')
    # Leave out the features on the padding.
    rows, columns = (h - 1) // net.stride + 1, (w - 1) // net.stride + 1
    maps = maps[..., :rows, :columns].float().cpu().numpy()
    winners = partition(maps[-1], net.stride, (h, w), align_corners=net.align_corners)
    usage = np.bincount(winners.ravel(), minlength=maps.shape[1]) / winners.size
    most_used = np.argsort(-usage, kind='stable')[:4].tolist()
    return ResponsibilityMaps(image, maps, net.stride, net.align_corners, usage,
                              bases or most_used)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(h, w, 3) uint8 -> (3, h, w)."""
    return torch.from_numpy(image).permute(2, 0, 1)
