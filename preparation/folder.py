"""A user's own images and annotations, made into a data set.

    python prepare.py folder --images my/images --masks my/masks --map 11=255

Each source format has one function that returns an Export, as read_mask_folder does.
What is written depends on the Export alone.
"""
import argparse
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import recipes
from config import UserError
from dataset import IGNORED
from logger import lock_folder, write_text
from preparation import masks
from preparation.files import make_files, run_parallel, write_lists
from preparation.published import get_root, print_next

OWN_MASKS = 'masks_made'  # folder of the masks that were converted
SUFFIXES = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp')
SPLITS = {'training': 'train', 'validation': 'val', 'valid': 'val', 'testing': 'test',
          'train': 'train', 'val': 'val', 'test': 'test'}
VOC_COLOURS = recipes.voc_palette()
PALETTE = VOC_COLOURS[3:765] + [64, 64, 64] + VOC_COLOURS[765:]  # 0 is not black


class Export(NamedTuple):
    """What a source format holds. Names are image names without suffix and tag."""
    images: dict[str, str]     # name -> file, relative to the folder of the images
    masks: dict[str, Any]      # name -> file of the mask, or other input of `convert`
    mask_folder: Path          # the folder of masks that need no conversion
    convert: Callable | None   # turns an item of `masks` into a mask (h, w) uint8
    classes: tuple[str, ...]
    palette: list[int]
    value_map: dict[int, int]  # other values of the masks -> class or 255


def prepare_folder(args: argparse.Namespace) -> None:
    """Images and masks of your own; the images stay where they are.

    A mask is called like its image, in the same subfolder, and its values are the
    classes 0, 1, ...; 255 is ignored. Subfolders train, val and test are the lists;
    else give --lists, or a share is drawn for val. Masks that are coded by colour
    become masks of values with --colours, a file with `r g b name` a line; the name
    void is ignored.

        python prepare.py folder --images my/images --masks my/masks --map 11=255
    """
    root, images = get_root(args), Path(args.images)
    file, pattern = root / 'dataset.json', make_pattern(root, images)
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get('images', pattern) != pattern:
        raise UserError(f'{root} holds the data set of other images '
                        f'({known["images"]}): give another --root')
    export = read_mask_folder(args)
    if args.lists:
        lists = split_by_lists(export.images, Path(args.lists))
    else:
        lists = split_by_folders(list(export.images))
    if 'val' not in lists:
        lists['train'], lists['val'] = draw_val(lists['train'], args.val, args.seed)
    print(f'{len(export.images)} images with masks: '
          + ', '.join(f'{len(names)} to {split}' for split, names in lists.items()))
    with lock_folder(root, '--root'):
        mask_folder, files = write_masks(root, export)
        print(f'writing into {root}: dataset.json and the lists\n'
              f'{len(export.classes)} classes: {", ".join(export.classes)}')
        write_lists(root, {
            split: [f'{export.images[name]}\t{files[name]}' for name in names]
            for split, names in lists.items()})
        write_text(file, json.dumps({
            'classes': export.classes, 'palette': export.palette,
            'map': export.value_map, 'images': pattern,
            'masks': [make_pattern(root, mask_folder)]}) + '\n')
    print_next(root, 'DATASET=folder')


def make_pattern(root: Path, folder: Path) -> str:
    """Return the pattern of a folder's files, relative to root if it is below it."""
    folder, root = folder.resolve(), root.resolve()
    if folder.is_relative_to(root):
        folder = folder.relative_to(root)
    return f'{folder.as_posix()}/{{}}'


def write_masks(root: Path, export: Export) -> tuple[Path, dict[str, str]]:
    """Convert masks where that is needed; return (folder, name -> file in it).

    Masks are always converted anew. The old ones are removed first: a run that is
    stopped in between leaves missing masks, but never masks of two kinds.
    """
    if export.convert is None:
        return export.mask_folder, {
            name: file.relative_to(export.mask_folder).as_posix()
            for name, file in export.masks.items()}
    shutil.rmtree(root / OWN_MASKS, ignore_errors=True)
    make_files(root, {Path(OWN_MASKS, f'{name}.png'): (source, export.convert)
                      for name, source in export.masks.items()}, '')
    return root / OWN_MASKS, {name: f'{name}.png' for name in export.masks}


# -- a folder of images and a folder of masks ------------------------------------------

def read_mask_folder(args: argparse.Namespace) -> Export:
    """Read a folder of images and a folder of masks, coded by value or by colour."""
    images, paths = pair_files(args)
    folder = Path(args.masks)
    if args.colours:
        classes, table = read_colours(Path(args.colours))
        colours = {label: rgb for rgb, label in table.items()}
        palette = recipes.fill_palette(*(colours[i] for i in range(len(classes))))
        convert = functools.partial(masks.read_coded_by_colour, table)
        return Export(images, paths, folder, convert, classes, palette, {})
    file = Path(args.classes or Path(args.images).parent / 'classes.txt')
    classes = tuple(read_lines(file)) if file.is_file() else ()
    if args.classes and not classes:
        raise UserError(f'--classes {file} does not exist or is empty: give a text '
                        'file with a name a line, in the order of the values')
    value_map = read_map(args.map, classes)
    found, is_plain = scan_masks(list(paths.values()))
    check_values(found, value_map, classes, file)
    if not classes:
        classes = name_classes(found, value_map)
    convert = None if is_plain else masks.read_coded_by_value
    return Export(images, paths, folder, convert, classes, PALETTE, value_map)


def pair_files(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, Path]]:
    """Return (name -> image, name -> mask) of the images that have a mask."""
    images = find_pictures(Path(args.images), args.image_tag)
    files = find_pictures(Path(args.masks), args.mask_tag)
    names = [name for name in images if name in files]
    if not names:
        raise UserError(
            f'none of the {len(images)} images in {args.images} (first: '
            f'{next(iter(images.values()), "none")}) has a mask of its name among the '
            f'{len(files)} in {args.masks} (first: '
            f'{next(iter(files.values()), "none")}): name them alike, or see '
            '--image-tag and --mask-tag')
    for name in names:
        if files[name].lower().endswith(('.jpg', '.jpeg')):
            raise UserError(f'{args.masks}/{files[name]} is a JPEG, which changes '
                            'values: masks are expected as PNG')
    alone = [images[name] for name in images if name not in files]
    alone += [files[name] for name in files if name not in images]
    if alone:
        print(f'{len(alone)} images or masks have no partner and are left out, the '
              f'first is {alone[0]}')
    return ({name: images[name] for name in names},
            {name: Path(args.masks, files[name]) for name in names})


def find_pictures(folder: Path, tag: str) -> dict[str, str]:
    """Return name without tag and suffix -> file, relative to the folder."""
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}: give those of the images and of '
                        'the masks with --images and --masks')
    found = {}
    for path in sorted(folder.rglob('*')):
        stem, suffix = os.path.splitext(path.relative_to(folder).as_posix())
        name = stem.removesuffix(tag)
        if (suffix.lower() not in SUFFIXES or not stem.endswith(tag)
                or path.name.startswith('.')):
            continue
        if name in found:
            raise UserError(f'{folder} has both {found[name]} and {stem}{suffix}: one '
                            'picture of a name is expected')
        found[name] = stem + suffix
    return found


def scan_masks(paths: list[Path]) -> tuple[dict[int, Path], bool]:
    """Return (value -> a mask that has it, whether all masks are of one byte a pixel).
    """
    found, is_plain = {}, True
    scans = run_parallel(scan_mask, paths, 'reading', 'mask')
    for path, (values, is_byte) in zip(paths, scans, strict=True):
        is_plain = is_plain and is_byte
        for value in values:
            found.setdefault(value, path)
    return found, is_plain


def scan_mask(file: Path) -> tuple[list[int], bool]:
    """Return the values of a mask, and if it is of one byte a pixel."""
    try:
        values = masks.read_coded_by_value(file)
        with Image.open(file) as picture:
            is_byte = picture.mode in ('P', 'L')
    except Exception as error:  # damage can raise anything deep inside Pillow
        raise UserError(f'{file} cannot be read as a mask: {error}') from error
    return np.flatnonzero(np.bincount(values.ravel())).tolist(), is_byte


def check_values(found: dict[int, Path], value_map: dict[int, int],
                 classes: tuple[str, ...], file: Path) -> None:
    """Refuse values that cannot be meant as they are; `file` holds the classes."""
    if set(found) == {0, 255} and 255 not in value_map:
        raise UserError('the masks have the values 0 and 255 only, and 255 is ignored: '
                        'say --map 255=1 if it is the second class')
    for value, path in found.items():
        label = value_map.get(value, value)
        if classes and label >= len(classes) and label != IGNORED:
            raise UserError(
                f'{path} has the value {value}, but {file} names {len(classes)} '
                f'classes, 0 to {len(classes) - 1}: name it there, or say '
                f'--map {value}=CLASS, or --map {value}=255 to ignore it')


def name_classes(found: dict[int, Path], value_map: dict[int, int]) -> tuple[str, ...]:
    """Return a name for each class up to the largest that occurs, two at least."""
    labels = {value_map.get(value, value): path for value, path in found.items()}
    labels.pop(IGNORED, None)
    top = max(labels, default=0)
    if len(labels) <= top:
        print(f'note: not all values up to {top} occur; is {top}, as in {labels[top]}, '
              f'a class? --map {top}=255 ignores it, --classes gives names')
    return tuple(f'class {i}' for i in range(max(top, 1) + 1))


# -- lists -----------------------------------------------------------------------------

def split_by_lists(images: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """Divide names by train.txt, val.txt and test.txt, with an image a line."""
    known = {os.path.splitext(image)[0]: name for name, image in images.items()}
    known |= {name: name for name in images}
    lists = {}
    for file in sorted(folder.glob('*.txt')):
        lines = read_lines(file) if file.stem in SPLITS else []
        lines = [without_suffix(line.split('\t')[0].strip()) for line in lines]
        missing = [line for line in lines if line not in known]
        if missing:
            raise UserError(f'{file} names {len(missing)} images that do not exist or '
                            f'have no mask, the first: {missing[0]}; an image a line '
                            'is expected, relative to --images')
        if lines:
            lists[SPLITS[file.stem]] = [known[line] for line in lines]
    if 'train' not in lists:
        raise UserError(f'--lists {folder} has no train.txt: train.txt and val.txt are '
                        'expected, with an image a line')
    return lists


def without_suffix(name: str) -> str:
    """Return a name without the suffix of a picture, if it has one."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def split_by_folders(names: list[str]) -> dict[str, list[str]]:
    """Divide names by their first folder; all are for training without such."""
    lists = {}
    for name in names:
        lists.setdefault(SPLITS.get(name.split('/')[0].lower()), []).append(name)
    if 'train' not in lists:
        return {'train': names}
    if None in lists:
        raise UserError('there are images in subfolders train, val or test and others, '
                        f'as {lists[None][0]}: move them, or say with --lists what '
                        'belongs where')
    return lists


def draw_val(names: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Divide names at random into (train, val), with this share for val."""
    if len(names) < 2 or not 0 < share < 1:
        raise UserError(f'{len(names)} images cannot be divided with --val {share}: at '
                        'least 2 are expected, and a share between 0 and 1')
    order = np.random.default_rng(seed).permutation(len(names))
    n = min(max(round(share * len(names)), 1), len(names) - 1)
    return [names[i] for i in sorted(order[n:])], [names[i] for i in sorted(order[:n])]


# -- text files of the user ------------------------------------------------------------

def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file without empty ones and `# comments`."""
    text = file.read_text(encoding='utf-8-sig', errors='replace')
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith('#')]


def read_map(text: str, classes: tuple[str, ...]) -> dict[int, int]:
    """Read a value map, `11=255,12=road`."""
    value_map = {}
    for part in filter(str.strip, text.split(',')):
        value, _, label = (word.strip() for word in part.partition('='))
        if label in classes:
            label = str(classes.index(label))
        is_understood = value.isdecimal() and label.isdecimal()
        if not is_understood or int(value) > 255 or int(label) > 255:
            raise UserError(f'--map {part}: VALUE=CLASS is expected, a number and the '
                            'number or name of a class, or 255 to ignore')
        if value_map.setdefault(int(value), int(label)) != int(label):
            raise UserError(f'--map gives {value} two meanings: one is expected')
    return value_map


def read_colours(file: Path) -> tuple[tuple[str, ...], dict[tuple, int]]:
    """Read a table of colours, `r g b name` a line; the name void is 255.

    Returns:
        (classes in the order of the lines, (r, g, b) -> class).
    """
    if not file.is_file():
        raise UserError(f'--colours {file} does not exist: give a text file with '
                        '`r g b name` a line')
    classes, table = [], {}
    for line in read_lines(file):
        match = re.fullmatch(r'(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(.+)', line)
        rgb = tuple(int(number) for number in match.groups()[:3]) if match else ()
        if not match or max(rgb) > 255:
            raise UserError(f'{file}: {line!r} is not understood: `r g b name` is '
                            'expected, with colours of 0 to 255')
        name, label = match[4], IGNORED
        if name.lower() not in ('void', 'ignored'):
            if name not in classes:
                classes.append(name)
            label = classes.index(name)
        if table.setdefault(rgb, label) != label:
            raise UserError(f'{file}: the colour {" ".join(map(str, rgb))} is '
                            'there twice: give each class a colour of its own')
    if not 0 < len(classes) < IGNORED:
        raise UserError(f'{file} names {len(classes)} classes: 1 to 254 are expected')
    return tuple(classes), table
