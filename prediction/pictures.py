"""The pictures that a command line names: finding, naming and reading them.

    python predict.py a.jpg photos 'more/**/*.png'
"""
import contextlib
import glob
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

import dataset
from config import UserError

# Results are FOLDER/NAME.suffix below --out.
SUFFIXES = {'masks': '.png', 'overlays': '.jpg', 'probabilities': '.npz',
            'responsibilities': '.npz'}
OVERVIEW = 'responsibilities.png'            # below --out, of several pictures
NOT_READ = {'BUFR', 'GRIB', 'HDF5', 'MPEG'}  # formats that Pillow only recognises
MAX_PIXELS = 10 ** 9                         # of a picture


class PictureError(UserError):
    """What is wrong with one picture, in a sentence without its path."""


class Picture(NamedTuple):
    """A picture to predict."""
    path: str                   # as it was given or found
    name: str                   # of its results, below each folder of SUFFIXES
    missing: list[str]          # folders of SUFFIXES that lack a result of it


# -- finding and naming ----------------------------------------------------------------

def find_files(words: list[str], out: str
               ) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Find the pictures that words of the command line name.

    Args:
        words: files, folders and patterns; folders are searched below.
        out: folder of the results, which are never taken for pictures.

    Returns:
        (files, failures): of each picture the folder that the name of its results is
        relative to; and (word, message) of each word that names no picture.
    """
    files, failures, seen = {}, [], set()
    for word in words:
        if os.path.isfile(word):
            paths, base = [word], os.path.dirname(word) or '.'
        elif os.path.isdir(word):
            paths, base = search(word, failures), word
        else:
            paths, base = match(word, failures)
        paths = [path for path in paths if not is_result(path, out)]
        if not paths:
            failures.append((word, f'no picture is there, other than results in {out}'))
        for path in paths:
            if os.path.abspath(path) not in seen:
                seen.add(os.path.abspath(path))
                files[path] = base
    return files, failures


def search(folder: str, failures: list[tuple[str, str]]) -> list[str]:
    """Return the pictures below a folder, sorted; note folders that cannot be read."""
    def note(error):
        failures.append((error.filename, f'it cannot be read ({error.strerror})'))

    paths = []
    for parent, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths += [os.path.join(parent, name) for name in sorted(names)
                  if not name.startswith('.') and is_picture(name)]
    return paths


def match(pattern: str, failures: list[tuple[str, str]]) -> tuple[list[str], str]:
    """Return the pictures that match a pattern, or lie in folders that match it, and
    the folder before its first wildcard."""
    paths = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            paths += search(path, failures)
        elif is_picture(path):
            paths.append(path)
    base = Path(pattern)
    while glob.has_magic(str(base)):
        base = base.parent
    return paths, str(base)


def is_picture(path: str) -> bool:
    """Return whether a file's suffix is one of a format that Pillow reads."""
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    return kind in Image.OPEN and kind not in NOT_READ


def is_result(path: str, out: str) -> bool:
    """Return whether a path is where results are written."""
    path = os.path.realpath(path)
    folders = tuple(os.path.realpath(os.path.join(out, name)) + os.sep
                    for name in SUFFIXES)
    is_overview = path == os.path.realpath(os.path.join(out, OVERVIEW))
    return is_overview or path.startswith(folders)


def name_results(files: dict[str, str]) -> dict[str, str]:
    """Name the results of each picture, relative to the folders of the results.

    The name is the path below the picture's folder without the suffix. Pictures that
    would share a name keep the suffix, as a.jpg and a.png. Those that still would, as
    x/a.jpg and y/a.jpg, are named by their paths below the root of the file system.

    Args:
        files: path and folder of each picture: see find_files.
    """
    below, names = {}, {}
    for path, base in files.items():
        relative = Path(os.path.relpath(path, base))
        below[path] = relative.name if '..' in relative.parts else relative.as_posix()
        names[path] = os.path.splitext(below[path])[0]
    whole = {path: '/'.join(Path(os.path.abspath(path)).parts[1:]) for path in files}
    for longer in (below, whole):
        # a.png and A.png are one file on some systems
        counts = Counter(name.casefold() for name in names.values())
        for path, name in names.items():
            if counts[name.casefold()] > 1:
                names[path] = longer[path]
    if len(set(names.values())) < len(names):
        raise UserError('two pictures have the same name: give them to different --out')
    return names


# -- reading ---------------------------------------------------------------------------

def read_picture(path: str, max_pixels: int) -> np.ndarray | None:
    """Decode a picture, rotated as its EXIF data say.

    Args:
        path: of the file.
        max_pixels: a larger picture is not decoded.

    Returns:
        (h, w, 3) uint8; None for a larger picture.

    Raises:
        PictureError: if it cannot be decoded, or has more than MAX_PIXELS.
    """
    try:
        with Image.open(path) as picture:
            w, h = picture.size
            if w * h <= min(max_pixels, MAX_PIXELS):
                picture.load()
                with contextlib.suppress(Exception):  # damaged EXIF data are ignored
                    ImageOps.exif_transpose(picture, in_place=True)
                return dataset.as_rgb(picture)
    except Exception as error:  # damage can raise anything deep inside Pillow
        raise PictureError(f'it cannot be decoded ({type(error).__name__}: {error})'
                           ) from None
    if w * h > MAX_PIXELS:
        raise PictureError(f'it has {w}x{h} pixels: at most {MAX_PIXELS} are expected, '
                           'cut it into pieces')
    return None
