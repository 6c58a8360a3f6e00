"""The pictures that a command line names: found, named apart, read.

    python predict.py a.jpg photos 'more/**/*.png'
"""
import contextlib
import glob
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

import dataset
import drawing

# What is written, as FOLDER/NAME.suffix; the mask is last and stands for all of them.
KINDS = {'overlays': '.jpg', 'probabilities': '.npz', 'responsibilities': '.npz',
         'masks': '.png'}
NOT_READ = {'BUFR', 'GRIB', 'HDF5', 'MPEG'}  # Pillow knows their names, no more
MOST_PIXELS = 10 ** 9        # of a picture


class Picture(NamedTuple):
    """A picture that was asked for."""
    path: str                  # as it was given or found
    name: str                  # of its results, below each folder of KINDS
    lacks: tuple[str, ...]     # of KINDS, what is to be computed


class Failure(NamedTuple):
    path: str
    sentence: str


def find_files(words: list[str], out: str) -> tuple[dict[str, str], list[Failure]]:
    """Find the pictures that words name: files, folders, patterns.

    Args:
        words: of the command line.
        out: folder of the results, which are never taken for pictures.

    Returns:
        (files, failures): of each file the folder that its results' names are relative
        to, each file once; and the words that name nothing.
    """
    files, seen, failures = {}, set(), []
    usable = {suffix for suffix, kind in Image.registered_extensions().items()
              if kind in Image.OPEN and kind not in NOT_READ}
    for word in words:
        if os.path.isfile(word):
            found, base = [word], os.path.dirname(os.path.abspath(word))
        elif os.path.isdir(word):
            found, base = search(word, word, out, usable, failures), word
        elif glob.has_magic(word):
            fixed = []
            for part in Path(word).parts:
                if glob.has_magic(part):
                    break
                fixed.append(part)
            base, found, own = os.path.join('.', *fixed), [], own_places(out, '.')
            for match in sorted(glob.glob(word, recursive=True)):
                if os.path.isdir(match):
                    found += search(match, base, out, usable, failures)
                elif suffix_of(match) in usable and not is_within(match, own):
                    found.append(match)
        else:
            hint = '; settings are NAME=VALUE in capitals' if '=' in word else ''
            failures.append(Failure(word, f'there is no such file or folder{hint}'))
            continue
        if not found:
            failures.append(Failure(word, 'no picture was found there'))
        for path in found:
            if os.path.abspath(path) not in seen:
                seen.add(os.path.abspath(path))
                files[path] = base
    return files, failures


def search(folder: str, base: str, out: str, usable: set[str], failures: list[Failure]
           ) -> list[str]:
    """Return the pictures below a folder, sorted; nothing hidden, no results."""
    found, own = [], own_places(out, base)

    def note(error):
        failures.append(Failure(error.filename, f'cannot be read ({error.strerror})'))

    for where, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith('.')
                            and not is_within(os.path.join(where, name), own))
        found += [os.path.join(where, name) for name in sorted(names)
                  if not name.startswith('.') and suffix_of(name) in usable
                  and not is_within(os.path.join(where, name), own)]
    return found


def suffix_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def own_places(out: str, base: str) -> list[str]:
    """Return what is left out of a search: DIR, or its parts where base lies in it."""
    own = os.path.realpath(out)
    if not is_within(base, [own]):
        return [own]
    return [os.path.join(own, name) for name in (*KINDS, 'responsibilities.png')]


def is_within(path: str, places: list[str]) -> bool:
    path = os.path.realpath(path)
    return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep)
               for place in places)


def as_text(path: str) -> str:
    """Return a file's whole path as text that any file can hold."""
    return encodable(os.path.abspath(path))


def encodable(text: str) -> str:
    return text.encode('utf-8', 'backslashreplace').decode()


def candidates(path: str, base: str) -> list[str]:
    """Return names for a picture's results: that of the file without its suffix, with
    it, with one folder more, and so on up to the whole path."""
    parts = Path(os.path.abspath(path)).parts[1:]
    n = max(len(parts) - len(Path(os.path.abspath(base)).parts[1:]), 1)
    names = ['/'.join(parts[-i:]) for i in range(n, len(parts) + 1)]
    return [os.path.splitext(names[0])[0], *names]


def read_picture(path: str, most: int) -> np.ndarray | None:
    """Decode a picture, turned upright as its EXIF data say.

    Args:
        path: of the file.
        most: pixels; a larger picture is left for later.

    Returns:
        (h, w, 3) uint8; None for a larger picture.

    Raises:
        ValueError: in a sentence without the path.
    """
    if not os.path.isfile(path):
        raise ValueError('it is not there or no file')
    if not os.path.getsize(path):
        raise ValueError('the file is empty: get it again')
    try:
        with Image.open(path) as picture:
            w, h = picture.size
            is_too_large = w * h > MOST_PIXELS
            if w * h > most or is_too_large:
                image = None
            else:
                picture.load()
                with contextlib.suppress(Exception):  # broken EXIF data turn nothing
                    ImageOps.exif_transpose(picture, in_place=True)
                image = dataset.as_rgb(picture)
    except Image.UnidentifiedImageError:
        with open(path, 'rb') as f:
            begin = f.read(16)
        raise ValueError(f'it is no picture that Pillow knows (begins with {begin!r})'
                         ) from None
    except MemoryError:
        raise ValueError('the memory does not hold it') from None
    except Exception as error:  # damage can raise anything deep inside Pillow
        raise ValueError(f'it cannot be decoded ({error}): get it again') from None
    if is_too_large:
        raise ValueError(f'it has {w}x{h} pixels: at most {MOST_PIXELS} are expected, '
                         'cut it into pieces')
    return image


def read_ahead(pictures: list[Picture], pool: ThreadPoolExecutor, most: int,
               n: int = 4) -> Iterator[tuple[Picture, Future]]:
    """Decode the next n pictures of up to `most` pixels while one is computed."""
    rest, queue = iter(pictures), deque()
    while True:
        while len(queue) < n and (picture := next(rest, None)):
            queue.append((picture, pool.submit(read_picture, picture.path, most)))
        if not queue:
            return
        yield queue.popleft()


def shrink(n_pixels: int, image: np.ndarray, *labels: np.ndarray) -> list[np.ndarray]:
    """Reduce a picture and its labels to so many pixels, where they have more."""
    h, w = image.shape[:2]
    scale = min((n_pixels / (h * w)) ** 0.5, n_pixels ** 0.5 * 8 / max(h, w))
    if scale >= 1:
        return [image, *labels]
    size, step = (max(int(w * scale), 1), max(int(h * scale), 1)), int(1 / scale)
    strips = [np.asarray(Image.fromarray(image[y:y + 64 * step]).reduce(step))
              for y in range(0, h, 64 * step)]  # no copy of all of it
    return drawing.resize(Image.fromarray(np.concatenate(strips)), size, *labels)
