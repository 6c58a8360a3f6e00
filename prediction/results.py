"""What is written of pictures: masks, overlays, probabilities, figures, coverage.

Every file is written under a temporary name and renamed; the mask is the last, and
tells in its metadata which picture and network it is of.
"""
import contextlib
import csv
import errno
import io
import os
import shutil
import tempfile
import textwrap
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

import drawing
from prediction.pictures import (
    KINDS,
    Failure,
    Picture,
    as_text,
    candidates,
    encodable,
    shrink,
)

OVERLAY_PIXELS = 4_000_000   # of an overlay; that of a larger picture is reduced
NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class NoMore(OSError):
    """The folder of the results takes nothing any more."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the errors that every other file would meet too into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_MORE:
            raise
        raise NoMore(f'cannot write {path} ({error.strerror}): make room or give '
                     'another --out; the pictures that are done are kept') from error


class Shown(NamedTuple):
    """The responsibilities for a picture, and which are drawn."""
    image: np.ndarray   # (h, w, 3) uint8, as the network saw it
    maps: np.ndarray    # (t, k, h', w') float32
    stride: int         # value (i, j) lies on pixel (i * stride, j * stride)
    usage: np.ndarray   # (k,) share of the pixels whose largest responsibility it is
    bases: list[int]    # that are drawn

    def tell(self) -> str:
        """Return words on the bases that no pixel uses."""
        unused = np.flatnonzero(self.usage == 0).tolist()
        if not unused:
            return f'each of the {len(self.usage)} bases is the largest somewhere'
        which = ', '.join(map(str, unused[:16])) + ', ...' * (len(unused) > 16)
        return (f'{len(unused)} of {len(self.usage)} bases are used by no pixel, as '
                f'their largest: {which}')


class Results:
    """The folder of the results.

    Args:
        out: the folder.
        classes: names.
        palette: 768 numbers.
        made_by: the networks and how the pictures are seen, for the masks' metadata.

    Raises:
        ValueError: where coverage.csv is there and not of these classes.
    """

    def __init__(self, out: str, classes: list[str], palette: list[int], made_by: str):
        self.out, self.classes, self.palette = Path(out), classes, palette
        self.made_by, self.infos = encodable(made_by), {}
        self.drawing = threading.Lock()
        self.header, self.rows = ['picture', 'width', 'height', *classes], {}
        with contextlib.suppress(FileNotFoundError), open(
                self.out / 'coverage.csv', newline='', encoding='utf-8',
                errors='surrogateescape') as f:
            first, *rows = list(csv.reader(f)) or [self.header]
            if first != self.header:
                raise ValueError(f'{f.name} has {len(first) - 3} classes that are not '
                                 f'the {len(classes)} of this checkpoint: give another '
                                 '--out')
            self.rows = {row[0]: row for row in rows if row}

    def path(self, kind: str, name: str, suffix: str = '') -> Path:
        return self.out / kind / (name + (suffix or KINDS[kind]))

    def places(self, name: str) -> list[str]:
        """Return all files that a picture of this name might be written to."""
        files = [self.path(kind, name) for kind in KINDS]
        files += [self.path('responsibilities', name, s) for s in ('.png', '.pdf')]
        return [os.path.join(os.path.realpath(f.parent), f.name) for f in files]

    def info(self, name: str) -> dict | None:
        """Return the metadata of the mask of this name; none where there is none."""
        if name not in self.infos:
            file, self.infos[name] = self.path('masks', name), None
            if os.path.lexists(file):
                self.infos[name] = {}
                with contextlib.suppress(Exception), Image.open(file) as mask:
                    self.infos[name] = dict(mask.info)
        return self.infos[name]

    def owner(self, name: str) -> str | None:
        """Return the picture whose mask has this name: '' is unknown."""
        info = self.info(name)
        return None if info is None else info.get('source', '')

    def find_lacking(self, name: str, wanted: list[str], overwrite: bool
                     ) -> tuple[str, ...]:
        """Return which results are to be written; without a mask it is all of them,
        because nothing tells whose the others are."""
        if overwrite or self.info(name) is None:
            return tuple(wanted)
        return tuple(kind for kind in wanted if not self.path(kind, name).exists())

    def write(self, path: Path, save: Callable[[BinaryIO], None]) -> None:
        """Write a file under a temporary name and rename it.

        Args:
            path: of the file.
            save: called with the open file.

        Raises:
            NoMore: in a sentence, for a full disk and such.
            OSError: for what ails this file alone.
        """
        temporary = path.with_name(f'.{threading.get_ident():x}.tmp')
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, 'wb') as f:
                    save(f)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def write_image(self, path: Path, picture: Image.Image, **options) -> None:
        """Write a picture as its suffix says."""
        stream = io.BytesIO()  # Pillow writing to a full disk would not tell why
        picture.save(stream, 'PNG' if path.suffix == '.png' else 'JPEG', **options)
        self.write(path, lambda f: f.write(stream.getbuffer()))

    def write_figure(self, path: Path, figure) -> None:
        """Write a figure as .png and .pdf; the path has no suffix."""
        for kind in ('pdf', 'png'):
            stream = io.BytesIO()
            drawing.save(figure, stream, kind)
            file = path.with_name(f'{path.name}.{kind}')
            self.write(file, lambda f, stream=stream: f.write(stream.getbuffer()))

    def write_mask(self, picture: Picture, mask: np.ndarray) -> None:
        """Write a mask with its colours, and with what it was made of."""
        coloured, about = Image.fromarray(mask), PngImagePlugin.PngInfo()
        coloured.putpalette(self.palette)
        about.add_text('source', as_text(picture.path))
        about.add_text('network', self.made_by)
        self.write_image(self.path('masks', picture.name), coloured, pnginfo=about)

    def read_mask(self, picture: Picture) -> np.ndarray:
        """Read a mask that was kept: (h, w) uint8.

        Raises:
            ValueError: in a sentence, for one that is not of these classes.
        """
        path = self.path('masks', picture.name)
        try:
            with Image.open(path) as mask:
                values = np.array(mask)
        except Exception as error:
            raise ValueError(f'its mask {path} cannot be read ({error}): give '
                             '--overwrite') from None
        if values.ndim != 2 or values.max() >= len(self.classes):
            raise ValueError(f'its mask {path} has other classes: give --overwrite')
        return values

    def count(self, picture: Picture, mask: np.ndarray) -> None:
        """Put the share of each class of a mask into the table."""
        counts = Image.fromarray(mask).histogram()[:len(self.classes)]
        self.rows[picture.name] = [picture.name, mask.shape[1], mask.shape[0],
                                   *(f'{n / mask.size:.8f}' for n in counts)]

    def write_table(self) -> None:
        """Write coverage.csv: the rows that were there, renewed, and the new ones."""
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows([self.header,
                                                         *self.rows.values()])
        content = text.getvalue().encode('utf-8', 'surrogateescape')
        self.write(self.out / 'coverage.csv', lambda f: f.write(content))

    def write_all(self, picture: Picture, image: np.ndarray, mask: np.ndarray,
                  store: 'Store | None', shown: Shown | None) -> None:
        """Write what a picture lacks, the mask last."""
        if 'overlays' in picture.lacks:
            self.write_image(
                self.path('overlays', picture.name), drawing.overlay_with_legend(
                    *shrink(OVERLAY_PIXELS, image, mask), self.classes, self.palette),
                quality=92)
        if store is not None:
            self.write(self.path('probabilities', picture.name), store.pack)
        if shown is not None:
            small = np.asarray(Image.fromarray(mask).resize(
                shown.image.shape[1::-1], Image.Resampling.NEAREST))
            with self.drawing:  # matplotlib draws one figure at a time
                figure = drawing.responsibility_figure(
                    shown.image, shown.maps, shown.stride, shown.bases,
                    drawing.paint(small, self.palette))
                figure.text(0.01, 0.02, textwrap.fill(shown.tell(), 40), fontsize=5)
                self.write_figure(self.out / 'responsibilities' / picture.name, figure)
            self.write(self.path('responsibilities', picture.name),
                       lambda f: np.savez(
                           f, z=shown.maps, stride=shown.stride, usage=shown.usage,
                           bases=shown.bases, picture_size=image.shape[:2],
                           seen_size=shown.image.shape[:2],
                           source=as_text(picture.path)))
        if 'masks' in picture.lacks:
            self.write_mask(picture, mask)


class Store:
    """Probabilities on their way into an .npz, on the disk and not in memory.

    Args:
        out: folder, for a temporary file without a name.
        source: whole path of the picture.
        classes: names.
        size: (h, w).
    """

    def __init__(self, out: Path, source: str, classes: list[str],
                 size: tuple[int, int]):
        self.out, self.source, self.classes, self.size = out, source, classes, size
        with writing(out):
            self.file = tempfile.TemporaryFile(dir=out)

    def add(self, rows: slice, columns: slice, found: np.ndarray) -> None:
        """Put the probabilities (classes, rows, columns) of a place into the file."""
        h, w = self.size
        with writing(self.out):  # no memory map: a full disk would end the process
            for c, values in enumerate(found.astype('<f2')):
                if values.shape[1] == w:  # whole rows follow each other
                    values = values.reshape(1, -1)
                for y, row in enumerate(values, rows.start):
                    self.file.seek(2 * ((c * h + y) * w + columns.start))
                    self.file.write(row.tobytes())

    def pack(self, f: BinaryIO) -> None:
        """Write the .npz: probabilities (classes, h, w), the classes, the source."""
        self.file.seek(0)
        with self.file, zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED,
                                        compresslevel=1) as archive:
            with archive.open('probabilities.npy', 'w', force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, {
                    'descr': '<f2', 'fortran_order': False,
                    'shape': (len(self.classes), *self.size)})
                shutil.copyfileobj(self.file, entry, 2 ** 20)
            for name, value in (('classes', self.classes), ('source', self.source)):
                with archive.open(f'{name}.npy', 'w') as entry:
                    np.lib.format.write_array(entry, np.array(value))


def name_pictures(files: dict[str, str], results: Results
                  ) -> tuple[dict[str, str], list[Failure]]:
    """Give the results of each picture a name that no other has.

    A picture keeps the name that its mask has in the folder already. Otherwise it is
    the first candidate that no other picture of these wants, under which there is no
    mask of another picture, and which writes over none of the pictures.

    Args:
        files: path and base of each, see find_files.
        results: the folder.

    Returns:
        (names, failures): of each picture; and those that have none.
    """
    sources = {os.path.realpath(path) for path in files}

    def is_free(name, path):
        return results.owner(name) in (None, as_text(path)) and not any(
            place in sources for place in results.places(name))

    choices = {path: candidates(path, base) for path, base in files.items()}
    names = {path: name for path in files for name in reversed(choices[path][:3])
             if results.owner(name) == as_text(path) and is_free(name, path)}
    taken, failures = {name.casefold() for name in names.values()}, []
    todo = {path: 0 for path in files if path not in names}
    while True:
        wanted = {path: choices[path][level] for path, level in todo.items()}
        # A.png and a.png are one file on some systems
        counts = Counter(name.casefold() for name in wanted.values())
        clashes = [path for path, name in wanted.items()
                   if counts[name.casefold()] > 1 or name.casefold() in taken
                   or not is_free(name, path)]
        if not clashes:
            break
        for path in clashes:
            todo[path] += 1
            if todo[path] == len(choices[path]):
                del todo[path]
                failures.append(Failure(path, 'there are other files where its results '
                                        f'would be in {results.out}: give another '
                                        '--out'))
    names = {path: names.get(path, wanted.get(path)) for path in files}
    return {path: name for path, name in names.items() if name}, failures
