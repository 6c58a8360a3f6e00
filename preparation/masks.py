"""Masks of every kind, as they were published or drawn, to one byte a pixel.

    from preparation.masks import read_sbd
    mask = read_sbd(Path("2008_000051.mat").read_bytes())     # (h, w) uint8

prepare.py runs these over whole data sets. Each function that turns the bytes of a file
into a mask can be called in another process; 255 is void everywhere.
"""
import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

import recipes

VOID = 255
PICTURES = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp')
IS_VOID = ('void', 'ignored')  # names in a table of colours
# The label of each of the 59 classes among the 459 of PASCAL Context, which calls three
# of them otherwise.
CONTEXT_IDS = (
    2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416,
    427, 9, 18, 22, 33, 44, 46, 68, 80, 85, 104, 115, 144, 158, 159, 162, 187, 189, 220,
    232, 259, 260, 105, 296, 355, 295, 324, 326, 349, 354, 360, 366, 19, 415, 420, 424,
    440, 445, 454, 458)
CONTEXT_NAMES = {'diningtable': 'table', 'clothes': 'cloth', 'bedcloth': 'bedclothes'}
NEVER_ANNOTATED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of COCO-Stuff's 182
VOC_FROM_COCO = {'airplane': 'aeroplane', 'motorcycle': 'motorbike', 'couch': 'sofa',
                 'dining table': 'diningtable', 'potted plant': 'pottedplant',
                 'tv': 'tvmonitor'}  # the others are called alike
LEAST_PIXELS = 1000  # of the 20 classes, in a COCO image that is kept


# -- as they were published ------------------------------------------------------------

def load_mat(content: bytes, name: str) -> np.ndarray:
    """Return one variable of a MATLAB file."""
    from scipy.io import loadmat
    return loadmat(io.BytesIO(content), variable_names=[name])[name]


def read_sbd(content: bytes) -> np.ndarray:
    """Return the mask (h, w) uint8 of an SBD cls/*.mat."""
    return load_mat(content, 'GTcls')[0, 0]['Segmentation'].astype(np.uint8)


def read_context(content: bytes) -> np.ndarray:
    """Return the mask of a PASCAL Context LabelMap, 60 classes.

    Names beyond the 59 are background, as in the paper's count of 60.
    """
    table = np.zeros(460, np.uint8)
    table[list(CONTEXT_IDS)] = np.arange(1, 60)
    return table[load_mat(content, 'LabelMap')]


def check_context_names(text: str) -> None:
    """Check the names of the 459 labels, `2: aeroplane` a line, against what we map.

    Raises:
        ValueError: in a sentence, where a label is called otherwise.
    """
    found = dict(re.findall(r'^(\d+):\s*(.+?)\s*$', text, re.MULTILINE))
    for label, name in zip(CONTEXT_IDS, recipes.CONTEXT[1:], strict=True):
        name = CONTEXT_NAMES.get(name, name)
        if found.get(str(label)) != name:
            raise ValueError(f'label {label} is called {found.get(str(label))} in the '
                             f'list of names, expected {name}: this is not the list of '
                             'the 459 published labels')


def stuff_table() -> np.ndarray:
    """Return the class of each COCO-Stuff label 0 .. 182; void for what is none."""
    table = np.full(183, VOID, np.uint8)
    ids = [i for i in range(1, 183) if i not in NEVER_ANNOTATED]
    table[ids] = np.arange(len(ids))
    return table


def read_stuff_mat(content: bytes) -> np.ndarray:
    """Return the mask of a COCO-Stuff 10K v1.1 annotation, 171 classes."""
    return stuff_table()[load_mat(content, 'S')]


def read_stuff_png(content: bytes) -> np.ndarray:
    """Return the mask of a 164k pixel map, whose values are the labels less 1."""
    table = np.append(stuff_table()[1:], np.full(74, VOID, np.uint8))
    with Image.open(io.BytesIO(content)) as picture:
        return table[np.asarray(picture)]


def read_instances(data: dict) -> dict[str, tuple]:
    """Collect the instances of the 20 VOC classes of a COCO annotation file.

    Args:
        data: of the file.

    Returns:
        Image name without suffix -> (h, w, [(class, is_crowd, outline), ...]).
    """
    classes = {c['id']: VOC_FROM_COCO.get(c['name'], c['name'])
               for c in data['categories']}
    classes = {i: recipes.VOC.index(name) for i, name in classes.items()
               if name in recipes.VOC}
    images, found = {image['id']: image for image in data['images']}, {}
    for item in data['annotations']:
        if item['category_id'] in classes:
            image = images[item['image_id']]
            name = os.path.splitext(image['file_name'])[0]
            _, _, items = found.setdefault(name, (image['height'], image['width'], []))
            items.append((classes[item['category_id']], item['iscrowd'],
                          item['segmentation']))
    return found


def draw_instances(image: tuple) -> np.ndarray | None:
    """Draw the instances of an image; none where they have under LEAST_PIXELS pixels.

    Crowds are void where no instance is, and so are pixels that instances of two
    classes claim.

    Args:
        image: (h, w, [(class, is_crowd, outline), ...]); an outline is a list of
            polygons or a run-length encoding.

    Returns:
        (h, w) uint8, VOC classes or 255.
    """
    from pycocotools import mask
    h, w, items = image
    label = np.zeros((h, w), np.uint8)
    for number, is_crowd, outline in sorted(items, key=lambda item: item[1]):
        if not outline:
            continue
        if isinstance(outline, list):
            runs = mask.merge(mask.frPyObjects(outline, h, w))
        elif isinstance(outline['counts'], list):
            runs = mask.frPyObjects(outline, h, w)
        else:
            runs = outline
        inside = mask.decode(runs) > 0
        if is_crowd:
            label[inside & (label == 0)] = VOID
        else:
            is_free = (label == 0) | (label == number)
            label[inside] = np.where(is_free[inside], number, VOID)
    n_pixels = ((label > 0) & (label != VOID)).sum()
    return label if n_pixels >= LEAST_PIXELS else None


def paint(mask: np.ndarray, palette: list[int] | None = None) -> Image.Image:
    """Return a mask (h, w) uint8 as a palette picture, in VOC's colours or others."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette or recipes.voc_palette())
    return picture


# -- of a user's own folder ------------------------------------------------------------

def pair_up(images: Path, masks: Path, image_tag: str = '', mask_tag: str = ''
            ) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Find the mask of each image: the same name in the same subfolder.

    Args:
        images, masks: folders.
        image_tag, mask_tag: ends of the names that only the one or the other has.

    Returns:
        (pairs, lost): name without tag and suffix -> (image, mask), relative to the
        folders; and the images without a mask and masks without an image.

    Raises:
        ValueError, FileNotFoundError: in a sentence, where nothing fits together.
    """
    found = []
    for folder, tag in ((images, image_tag), (masks, mask_tag)):
        if not folder.is_dir():
            raise FileNotFoundError(f'there is no folder {folder}: give those of the '
                                    'images and of the masks with --images and --masks')
        names = {}
        for path in sorted(folder.rglob('*')):
            stem, suffix = os.path.splitext(path.relative_to(folder).as_posix())
            if (suffix.lower() in PICTURES and stem.endswith(tag)
                    and not path.name.startswith('.')):
                key = stem.removesuffix(tag)
                if key in names:
                    raise ValueError(f'{folder} has both {names[key]} and {stem}'
                                     f'{suffix}: one picture of a name is expected')
                names[key] = stem + suffix
        found.append(names)
    pairs = {key: (name, found[1][key]) for key, name in found[0].items()
             if key in found[1]}
    if not pairs:
        first = [next(iter(names.values()), 'none') for names in found]
        raise ValueError(
            f'none of the {len(found[0])} images in {images} (first: {first[0]}) has a '
            f'mask of its name among the {len(found[1])} in {masks} (first: {first[1]})'
            ': name them alike, or see --image-tag and --mask-tag')
    lossy = [m for _, m in pairs.values() if m.lower().endswith(('.jpg', '.jpeg'))]
    if lossy:
        raise ValueError(f'{len(lossy)} masks are JPEG, which changes values, the '
                         f'first is {lossy[0]}: masks are expected as PNG')
    return pairs, [name for one, other in (found, found[::-1])
                   for key, name in one.items() if key not in other]


def split_up(pairs: dict[str, tuple[str, str]], lists: str, share: float, seed: int
             ) -> dict[str, list[str]]:
    """Divide names: by given lists, by their first folder, else at random.

    Args:
        pairs: of pair_up.
        lists: folder of train.txt, val.txt ...; '' is without.
        share: drawn for val where nothing tells.
        seed: of the draw.

    Raises:
        ValueError: in a sentence, for a list that names what is not there.
    """
    known = {'training': 'train', 'validation': 'val', 'valid': 'val',
             'testing': 'test', 'train': 'train', 'val': 'val', 'test': 'test'}
    splits, keys = {}, list(pairs)
    if lists:
        stems = {}  # all that a line may call an image, '' where that is not clear
        for key, (image, _) in pairs.items():
            for name in {key, os.path.splitext(image)[0]}:
                short = name.rsplit('/', 1)[-1]
                stems[short] = '' if stems.get(short, key) != key else key
        for key, (image, _) in pairs.items():
            stems |= {key: key, os.path.splitext(image)[0]: key}
        for file in sorted(Path(lists).glob('*.txt')):
            names = read_names(file) if file.stem in known else []
            lost = [name for name in names if not stems.get(name)]
            if lost:
                raise ValueError(f'{file} names {len(lost)} images that are not there, '
                                 'have no mask or are in several folders, the first: '
                                 f'{lost[0]}; an image a line is expected, relative to '
                                 '--images')
            if names:
                splits[known[file.stem]] = [stems[name] for name in names]
        if 'train' not in splits:
            raise ValueError(f'--lists {lists} has no train.txt: train.txt and val.txt '
                             'are expected, with an image a line')
    else:
        for key in keys:
            splits.setdefault(known.get(key.split('/')[0].lower()), []).append(key)
        if None in splits and 'train' in splits:
            raise ValueError('there are images in subfolders train, val or test and '
                             f'others, as {splits[None][0]}: move them, or say with '
                             '--lists what belongs where')
        if 'train' not in splits:
            splits = {'train': keys}
    if 'val' not in splits:
        keys = splits['train']
        if len(keys) < 2 or not 0 < share < 1:
            raise ValueError(f'{len(keys)} images cannot be divided with --val {share}:'
                             ' at least 2 are expected, and a share between 0 and 1')
        order = np.random.default_rng(seed).permutation(len(keys))
        n = min(max(round(share * len(keys)), 1), len(keys) - 1)
        splits['val'] = [keys[i] for i in sorted(order[:n])]
        splits['train'] = [keys[i] for i in sorted(order[n:])]
    return splits


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty and no `# comments`."""
    text = file.read_text(encoding='utf-8-sig', errors='replace')
    return [line.strip() for line in text.splitlines()
            if line.strip() and not line.lstrip().startswith('#')]


def read_names(file: Path) -> list[str]:
    """Read a list of images, one a line, with or without the suffix of a picture."""
    names = []
    for line in read_lines(file):
        name = line.split('\t')[0].strip()
        stem, suffix = os.path.splitext(name)
        names.append(stem if suffix.lower() in PICTURES else name)
    return names


def read_map(text: str, classes: tuple[str, ...]) -> dict[int, int]:
    """Read a value map, `11=255,12=road` or a file of such lines.

    Raises:
        ValueError: in a sentence.
    """
    if text and Path(text).is_file():
        text = ','.join(read_lines(Path(text)))
    found = {}
    for part in filter(str.strip, text.split(',')):
        value, _, label = (p.strip() for p in part.partition('='))
        label = classes.index(label) if label in classes else label
        try:
            value, label = int(value), int(label)
            if not (0 <= value < 256 and 0 <= label < 256):
                raise ValueError
        except ValueError:
            raise ValueError(f'--map {part}: VALUE=CLASS is expected, a number and the '
                             'number or name of a class, or 255 to ignore') from None
        if found.setdefault(value, label) != label:
            raise ValueError(f'--map gives {value} two meanings, {found[value]} and '
                             f'{label}: one is expected')
    return found


def read_colours(file: Path) -> tuple[tuple[str, ...], dict[tuple, int]]:
    """Read a table of colours, `r g b name` a line; the name void is 255.

    Returns:
        (classes in the order of the lines, colour -> class).

    Raises:
        ValueError, FileNotFoundError: in a sentence.
    """
    if not file.is_file():
        raise FileNotFoundError(f'--colours {file} is not there: give a text file with '
                                '`r g b name` a line')
    classes, table = [], {}
    for line in read_lines(file):
        match = re.fullmatch(r'\s*(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(.+?)\s*', line)
        rgb = tuple(map(int, match.groups()[:3])) if match else (256,)
        if max(rgb) > 255:
            raise ValueError(f'{file}: {line!r} is not understood: `r g b name` is '
                             'expected, with colours of 0 to 255')
        label, is_void = VOID, match[4].lower() in IS_VOID
        if not is_void:
            if match[4] not in classes:
                classes.append(match[4])
            label = classes.index(match[4])
        if table.setdefault(rgb, label) != label:
            raise ValueError(f'{file}: the colour {" ".join(map(str, rgb))} stands '
                             'there twice: give each class a colour of its own')
    if not 0 < len(classes) < VOID:
        raise ValueError(f'{file} names {len(classes)} classes: 1 to 254 are expected')
    return tuple(classes), table


def by_colour(table: dict[tuple, int], content: bytes) -> np.ndarray:
    """Return the mask of a picture whose colours are the classes.

    Raises:
        ValueError: for a colour that the table does not name.
    """
    with Image.open(io.BytesIO(content)) as picture:
        rgb = np.asarray(picture.convert('RGB')).astype(np.uint32)
    code = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]      # (h, w)
    codes, counts = np.unique(code, return_counts=True)
    labels = np.zeros(len(codes), np.uint8)
    for i, value in enumerate(codes.tolist()):
        colour = value >> 16, value >> 8 & 255, value & 255
        if colour not in table:
            raise ValueError(f'{counts[i]} pixels have the colour '
                             f'{" ".join(map(str, colour))}, which the table does not '
                             'name; a line `r g b void` ignores them')
        labels[i] = table[colour]
    return labels[np.searchsorted(codes, code)]


def by_value(content: bytes) -> np.ndarray:
    """Return the mask of a picture of any mode whose values are the classes.

    Raises:
        ValueError: where the values are colours, or beyond a byte.
    """
    with Image.open(io.BytesIO(content)) as picture:
        values = np.asarray(picture)
    if values.ndim == 3:
        colours = values[..., :3] if values.shape[2] > 2 else values[..., :1]
        if (colours != colours[..., :1]).any():
            raise ValueError('it is coded by colour: give the table, `r g b name` a '
                             'line, with --colours')
        values = values[..., 0]
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise ValueError(f'it has the value {values.max()}: 0 to 255 are expected')
    return values.astype(np.uint8)


def look_at(path: Path) -> tuple[list[int], str, bool]:
    """Return the values of a mask, what is wrong with it, and if it is of bytes."""
    try:
        with Image.open(path) as picture:
            mode = picture.mode
        values = by_value(path.read_bytes())
    except ValueError as error:
        return [], str(error), False
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        return [], f'it cannot be decoded ({error}): get it again', False
    return np.flatnonzero(np.bincount(values.ravel())).tolist(), '', mode in ('P', 'L')
