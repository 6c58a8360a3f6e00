"""The folder of results: masks, overlays, probabilities, responsibilities, coverage.

    results = ResultFolder('predictions', classes, palette, 'net.pth: step 7; scales 1')
    missing = results.find_missing('cat', ['masks', 'overlays'])

Every file is written under a temporary name and renamed. The mask is the last file of a
picture; its PNG metadata name the picture and the network.
"""
import csv
import io
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

import drawing
from config import UserError
from logger import lock_folder
from prediction.pictures import SUFFIXES, Picture, PictureError
from prediction.responsibilities import responsibility_figure

OVERLAY_SIDE = 2400     # pixels of an overlay's longer side, at most


class ResponsibilityMaps(NamedTuple):
    """The responsibilities of all bases for a picture."""
    image: np.ndarray     # (h, w, 3) uint8, as the network saw it
    maps: np.ndarray      # (t, k, h', w') float32
    stride: int           # pixels per feature
    align_corners: bool   # of the network
    usage: np.ndarray     # (k,) share of the pixels whose largest responsibility it is
    bases: list[int]      # to draw

    def describe_unused(self) -> str:
        """Return a sentence on the bases that are the largest for no pixel."""
        unused = np.flatnonzero(self.usage == 0).tolist()
        names = ', '.join(map(str, unused)) or 'none'
        return (f'{len(unused)} of {len(self.usage)} bases are the largest for no '
                f'pixel: {names}')


class ResultFolder:
    """The folder of --out, locked for other processes as long as this one runs.

    Args:
        out: the folder.
        classes: names of the classes.
        palette: 768 numbers.
        network: the checkpoints and scales, for the metadata of masks.

    Raises:
        UserError: if another process writes there, or coverage.csv has other classes.
    """

    def __init__(self, out: str, classes: list[str], palette: list[int], network: str):
        self.lock = lock_folder(out, '--out')
        self.out, self.classes, self.palette = Path(out), classes, palette
        self.network = encodable(network)
        self.figure_lock = threading.Lock()
        self.header, self.rows = ['picture', 'width', 'height', *classes], {}
        table = self.out / 'coverage.csv'
        if not table.exists():
            return
        with open(table, newline='', encoding='utf-8', errors='surrogateescape') as f:
            header, *rows = list(csv.reader(f)) or [self.header]
        if header != self.header:
            raise UserError(f'{table} has {len(header) - 3} classes that are not the '
                            f'{len(classes)} of this checkpoint: give another --out')
        self.rows = {row[0]: row for row in rows if row}

    def path(self, folder: str, name: str) -> Path:
        return self.out / folder / (name + SUFFIXES[folder])

    # -- what is there -----------------------------------------------------------------

    def find_missing(self, name: str, wanted: list[str]) -> list[str]:
        """Return the folders that lack a result of this name.

        Without a mask these are all, because nothing tells which picture the other
        results are of.
        """
        if not self.path('masks', name).exists():
            return wanted
        return [f for f in wanted if not self.path(f, name).exists()]

    def check_mask(self, picture: Picture) -> bool:
        """Check a mask that is kept, and add its row to the table if it is missing.

        Returns:
            Whether it is of this network and these scales.

        Raises:
            PictureError, OSError: if it is of another picture or cannot be read.
        """
        path = self.path('masks', picture.name)
        with Image.open(path) as mask:
            source = mask.info.get('source', 'an unknown picture')
            network = mask.info.get('network')
        if source != absolute(picture.path):
            raise PictureError(f'its mask would be {path}, which is of {source}: give '
                               'another --out, or --overwrite')
        if picture.name not in self.rows:
            self.add_row(picture, self.read_mask(picture))
        return network == self.network

    def read_mask(self, picture: Picture) -> np.ndarray:
        """Read a mask that is kept: (h, w) uint8.

        Raises:
            PictureError, OSError: if it is of other classes or damaged.
        """
        path = self.path('masks', picture.name)
        with Image.open(path) as mask:
            values = np.array(mask)
        if values.ndim != 2 or values.max() >= len(self.classes):
            raise PictureError(f'its mask {path} has other classes: give --overwrite')
        return values

    # -- writing -----------------------------------------------------------------------

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Write a file under a temporary name and rename it.

        Raises:
            UserError: if it cannot be written, as on a full disk.
        """
        temporary = path.with_name(f'.{threading.get_ident():x}.tmp')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f'cannot write {path} ({error.strerror}): make room or '
                            'give another --out; the pictures that are done are kept'
                            ) from error

    def write_image(self, path: Path, image: Image.Image, **options) -> None:
        """Write an image as .png or .jpg."""
        stream = io.BytesIO()
        image.save(stream, 'PNG' if path.suffix == '.png' else 'JPEG', **options)
        self.write(path, stream.getbuffer())

    def write_figure(self, path: Path, figure) -> None:
        """Write a figure as .png and .pdf; the path has no suffix."""
        for kind in ('pdf', 'png'):
            stream = io.BytesIO()
            drawing.save_figure(figure, stream, kind)
            self.write(path.with_name(f'{path.name}.{kind}'), stream.getbuffer())

    def write_all(self, picture: Picture, image: np.ndarray, mask: np.ndarray,
                  probs: np.ndarray | None,
                  responsibilities: ResponsibilityMaps | None) -> None:
        """Write what a picture lacks, the mask last.

        image is (h, w, 3) uint8, mask (h, w) uint8, probs (classes, h, w) float16.
        """
        if 'overlays' in picture.missing:
            pair = image, mask
            if max(mask.shape) > OVERLAY_SIDE:
                pair = drawing.shrink(OVERLAY_SIDE, image, mask)
            overlay = drawing.overlay_with_legend(*pair, self.classes, self.palette)
            self.write_image(self.path('overlays', picture.name), overlay, quality=92)
        if probs is not None:
            stream = io.BytesIO()
            np.savez_compressed(stream, probabilities=probs, classes=self.classes,
                                source=absolute(picture.path))
            self.write(self.path('probabilities', picture.name), stream.getbuffer())
        if responsibilities is not None:
            self.write_responsibilities(picture, mask, responsibilities)
        if 'masks' in picture.missing:
            coloured, info = Image.fromarray(mask), PngImagePlugin.PngInfo()
            coloured.putpalette(self.palette)
            info.add_text('source', absolute(picture.path))
            info.add_text('network', self.network)
            self.write_image(self.path('masks', picture.name), coloured, pnginfo=info)

    def write_responsibilities(self, picture: Picture, mask: np.ndarray,
                               responsibilities: ResponsibilityMaps) -> None:
        """Write the figure and the numbers of the responsibilities for a picture."""
        image, maps, stride, align_corners, usage, bases = responsibilities
        h, w = image.shape[:2]
        small = Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST)
        painted = drawing.paint(np.asarray(small), self.palette)
        with self.figure_lock:  # matplotlib is not safe with threads
            figure = responsibility_figure(image, maps, stride, bases, painted,
                                           align_corners=align_corners)
            self.write_figure(self.out / 'responsibilities' / picture.name, figure)
        stream = io.BytesIO()
        np.savez(stream, z=maps, stride=stride, usage=usage, bases=bases,
                 picture_size=mask.shape, seen_size=(h, w),
                 source=absolute(picture.path))
        self.write(self.path('responsibilities', picture.name), stream.getbuffer())

    # -- coverage.csv ------------------------------------------------------------------

    def add_row(self, picture: Picture, mask: np.ndarray) -> None:
        """Add the share of each class in a mask to the table."""
        counts = Image.fromarray(mask).histogram()[:len(self.classes)]
        self.rows[picture.name] = [picture.name, mask.shape[1], mask.shape[0],
                                   *(f'{n / mask.size:.8f}' for n in counts)]

    def write_table(self) -> None:
        """Write coverage.csv: earlier rows and those of this run, sorted."""
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(
            [self.header, *(self.rows[name] for name in sorted(self.rows))])
        self.write(self.out / 'coverage.csv',
                   text.getvalue().encode('utf-8', 'surrogateescape'))


def absolute(path: str) -> str:
    """Return the absolute path of a file as text that any file can hold."""
    return encodable(os.path.abspath(path))


def encodable(text: str) -> str:
    """Escape what UTF-8 cannot hold, as names of files can."""
    return text.encode('utf-8', 'backslashreplace').decode()
