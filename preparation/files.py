"""How the files of a data set are written: on all cores, and never by half.

    make_files(root, {Path('SegmentationClass/a.png'): (Path('a.mat'), read_sbd)}, '')
    write_lists(root, {'train': ['a']})

A file is written under a temporary name and renamed, and one that exists is kept, so a
run that was stopped can be repeated.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import recipes
from config import UserError
from loader import n_cores
from logger import write_text

ITEMS_PER_WORKER = 32  # fewer are not worth another process


def run_parallel(function: Callable, items: Sequence, title: str, unit: str) -> list:
    """Return function(item) for each item, computed on all cores."""
    loader = DataLoader(items, batch_size=None, collate_fn=function,  # on each item
                        num_workers=min(n_cores(), len(items) // ITEMS_PER_WORKER))
    return list(tqdm(loader, title, unit=unit, disable=None))


def save_picture(picture: Image.Image, file: Path, **options: Any) -> None:
    """Save a picture under a temporary name and rename it."""
    part = file.with_name(f'{file.name}.tmp')
    picture.save(part, **options)
    os.replace(part, file)


def make_files(root: Path, wanted: dict[Path, tuple[Any, Callable | None]],
               advice: str) -> None:
    """Write the files of a data set that do not exist yet.

    Args:
        root: folder of the data set.
        wanted: path below root -> (source, convert). Without `convert` the source file
            is linked or copied; else convert(source) returns a mask (h, w) uint8, or
            None to leave the file out. A source of None is missing.
        advice: what to do about missing sources.

    Raises:
        UserError: if a source is missing (nothing is written then), or a file cannot
            be made (those already written stay).
    """
    todo = {path: job for path, job in wanted.items() if not (root / path).exists()}
    missing = [path.as_posix() for path, (source, _) in todo.items() if source is None]
    if missing:
        raise UserError(f'{len(missing)} of {len(wanted)} files cannot be made from '
                        f'what was given, the first is {missing[0]}: {advice}')
    print(f'writing {len(todo)} files into {root}; {len(wanted) - len(todo)} exist and '
          'are kept', flush=True)
    for folder in {(root / path).parent for path in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(source, root / path, convert) for path, (source, convert) in todo.items()]
    run_parallel(write_file, jobs, root.name, 'file')


def write_file(job: tuple[Any, Path, Callable | None]) -> None:
    """Write one file of (source, target, convert): see make_files."""
    source, target, convert = job
    try:
        if convert is None:
            link_or_copy(source, target)
            return
        mask = convert(source)
        if mask is not None:
            picture = Image.fromarray(mask)
            picture.putpalette(recipes.voc_palette())
            save_picture(picture, target, format='PNG')
    except Exception as error:  # scipy, Pillow and pycocotools raise a dozen kinds
        name = source if isinstance(source, Path) else 'its annotations'
        raise UserError(f'{target} cannot be made from {name} ({error}): replace the '
                        'damaged file, or make room on the disk') from error


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system has none."""
    part = target.with_name(f'{target.name}.tmp')
    part.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), part)
    except OSError:
        shutil.copyfile(source, part)
    os.replace(part, target)


def write_lists(root: Path, lists: dict[str, Iterable[str]],
                counts: dict[str, int] | None = None) -> None:
    """Write the lists of a data set, except those that the user has changed.

    Args:
        root: folder of the data set.
        lists: name -> entries, a line each.
        counts: published lengths; a list of another length is noted.
    """
    folder = root / 'ImageSets' / 'Segmentation'
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / 'written.json'  # name -> hash of the list as written last
    hashes = json.loads(record.read_text()) if record.exists() else {}
    for name, entries in lists.items():
        file, entries = folder / f'{name}.txt', list(dict.fromkeys(entries))
        old = file.read_bytes() if file.exists() else b''
        new = ''.join(f'{entry}\n' for entry in entries)
        note = f'{len(entries)} in the list'
        expected = (counts or {}).get(name, len(entries))
        if expected != len(entries):
            note += f'; the published one has {expected}'
        if not old or hashlib.sha256(old).hexdigest() == hashes.get(name):
            write_text(file, new)
            hashes[name] = hashlib.sha256(new.encode()).hexdigest()
        elif set(old.decode().splitlines()) != set(entries):
            note += '; KEPT as it was, which differs: remove it to have it written'
        print(f'{file}: {note}')
    write_text(record, json.dumps(hashes))
