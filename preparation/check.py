"""What is wrong with a data set: all files of its two lists are read as training does.

    python prepare.py check DATASET=voc TRAIN_SPLIT=train

A fault stops training or evaluation with an error; a warning is what a careful person
wants to know. Both are printed a line each and written as JSON, with the share of each
class, and a sheet of random pictures with their masks. The data are only read.
"""
import contextlib
import functools
import hashlib
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import dataset
import drawing
import settings
from config import UserError
from dataset import SegmentationDataset
from logger import to_json, write_text
from preparation.files import run_parallel

N_SHOWN = 10          # findings of one kind on the console
ORIENTATION = 0x0112  # EXIF tag: 1 is upright, 2 to 8 are mirrored or turned


class Finding(NamedTuple):
    """One thing that was found in one file, which the text names."""
    is_fault: bool
    kind: str
    file: str
    text: str


class Entry(NamedTuple):
    """What one picture and its mask contain."""
    findings: list[Finding]
    pixels: np.ndarray            # of each label, (256,)
    digest: str                   # of the picture's bytes, '' if it is damaged
    size: tuple[int, int] | None  # (w, h)
    image_mode: str
    mask_mode: str


def examine(data: SegmentationDataset, index: int) -> Entry:
    """Read a picture and its mask as training does."""
    image_file, mask_file = data.images[index], data.labels[index]
    findings, pixels, digest, size = [], np.zeros(256, np.int32), '', None
    image_mode, is_turned = read_header(image_file)
    mask_mode, _ = read_header(mask_file)
    try:
        h, w = data.read_image(index).shape[:2]
        size = w, h
        digest = hashlib.sha256(Path(image_file).read_bytes()).hexdigest()
    except UserError as error:
        findings.append(Finding(True, 'image', image_file, str(error)))
    try:
        label = data.read_label(index)
        pixels = np.bincount(label.ravel(), minlength=256).astype(np.int32)
        if size not in (None, label.shape[::-1]):
            findings.append(Finding(
                True, 'size mismatch', mask_file, f'{mask_file} is {label.shape[1]}x'
                f'{label.shape[0]}, {size[0]}x{size[1]} as its image is expected'))
        if pixels[dataset.IGNORED] == label.size:
            findings.append(Finding(False, 'only void', mask_file,
                                    f'{mask_file} has no pixel with a class'))
    except UserError as error:
        findings.append(Finding(True, 'mask', mask_file, str(error)))
    if is_turned:
        findings.append(Finding(
            False, 'turned picture', image_file, f'{image_file} has an EXIF orientation'
            ': it is read as it is stored, see that the mask lies the same way'))
    return Entry(findings, pixels, digest, size, image_mode, mask_mode)


def read_header(file: str) -> tuple[str, bool]:
    """Return (mode, whether EXIF data turn it) of a picture, ('', False) if unknown."""
    with contextlib.suppress(Exception), Image.open(file) as picture:
        return picture.mode, picture.getexif().get(ORIENTATION, 1) != 1
    return '', False


# -- lists -----------------------------------------------------------------------------

def open_lists(root: Path, names: list[str], info: dict
               ) -> tuple[dict[str, SegmentationDataset], list[Finding]]:
    """Open the lists of these names; one that cannot be opened is a fault."""
    lists, findings = {}, []
    for name in names:
        try:
            lists[name] = SegmentationDataset(str(root), name, info, is_complete=False)
        except UserError as error:
            if not root.is_dir():
                raise
            file = root / 'ImageSets' / 'Segmentation' / f'{name}.txt'
            findings.append(Finding(True, 'list', str(file), str(error)))
    return lists, findings


def find_repeated(lists: dict[str, SegmentationDataset],
                  entries: dict[str, list[Entry]], train: str, val: str
                  ) -> list[Finding]:
    """Find pictures that are twice in a list, or in training and evaluation."""
    findings = [Finding(False, 'entry twice', image, f'{image} is {n} times in list '
                        f'{name}')
                for name, data in lists.items()
                for image, n in Counter(data.images).items() if n > 1]
    if train not in lists or val not in lists:
        return findings
    trained = {entry.digest: image for image, entry
               in zip(lists[train].images, entries[train], strict=True)}
    trained.pop('', None)
    trained_files = set(lists[train].images)
    for image, entry in zip(lists[val].images, entries[val], strict=True):
        if image in trained_files:
            findings.append(Finding(False, 'LEAK', image, f'{image} is in the lists '
                                    f'{train} and {val}: scores will be too good'))
        elif entry.digest in trained:
            findings.append(Finding(
                False, 'LEAK of a copy', image, f'{image} of list {val} is equal to '
                f'{trained[entry.digest]} of list {train}: scores will be too good'))
    return findings


def find_untrained(classes: list[str], pixels: list[int], file: Path) -> list[Finding]:
    """Find the classes that are in no mask of the list to train on."""
    names = ', '.join(classes[i] for i, n in enumerate(pixels) if not n)
    if not names:
        return []
    return [Finding(False, 'class not trained', str(file), f'{file}: no picture of '
                    f'this list shows {names}')]


def summarise(entries: list[Entry], n_classes: int) -> dict:
    """Count over the entries of one list.

    Returns:
        Numbers for JSON. `share` of a class is that of the pixels that have a class,
        `void_share` that of all pixels, `images` the pictures that a class is in;
        `width` and `height` are the least, the median and the largest, in pixels.
    """
    counts = np.stack([entry.pixels for entry in entries])         # (n, 256)
    pixels = counts.sum(0, dtype=np.int64)
    summary = {
        'n_pictures': len(entries),
        'image_modes': Counter(e.image_mode for e in entries if e.image_mode),
        'mask_modes': Counter(e.mask_mode for e in entries if e.mask_mode),
        'found': Counter(finding.kind for e in entries for finding in e.findings),
        'void_share': float(pixels[dataset.IGNORED] / max(pixels.sum(), 1)),
        'share': (pixels[:n_classes] / max(pixels[:n_classes].sum(), 1)).tolist(),
        'pixels': pixels[:n_classes].tolist(),
        'images': (counts > 0).sum(0)[:n_classes].tolist()}
    sizes = np.array([entry.size for entry in entries if entry.size] or [(0, 0)])
    for side, values in zip(('width', 'height'), sizes.T, strict=True):
        summary[side] = [int(values.min()), float(np.median(values)), int(values.max())]
    return summary


def balance(pixels: list[int]) -> list[float]:
    """Return class weights by median frequency: median share of a class / its share.

    A class that never occurs gets 1.
    """
    found = [n for n in pixels if n]
    return [float(np.median(found) / n) if n else 1.0 for n in pixels]


# -- the report ------------------------------------------------------------------------

def check(out: str, n_pictures: int = 12) -> bool:
    """Examine the data set in settings, print what is found and write a report.

    Args:
        out: folder of check_<DATASET>.json and the sheet check_<DATASET>.png.
        n_pictures: on the sheet, of the list to train on; 0 is no sheet.

    Returns:
        True if nothing was found that stops training or evaluation.

    Raises:
        UserError: if there is no such data set, or `out` cannot be written.
    """
    began, info = time.perf_counter(), dataset.get_dataset_info()
    root = Path(settings.DATA_ROOT or info['root'])
    train = settings.TRAIN_SPLIT or info['train']
    val = settings.VAL_SPLIT or info['val']
    lists, findings = open_lists(root, [train, val], info)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # learn it now, not after the work
    except OSError as error:
        raise UserError(f'cannot write into {out} ({error}): give a folder that can be '
                        'written') from None
    entries = {name: run_parallel(functools.partial(examine, data), range(len(data)),
                                  f'list {name}', 'picture')
               for name, data in lists.items()}
    findings += [f for of in entries.values() for entry in of for f in entry.findings]
    findings += find_repeated(lists, entries, train, val)
    splits, weights = {}, []
    for name in lists:
        splits[name] = summarise(entries[name], len(info['classes']))
        splits[name]['n_official'] = info['counts'].get(name, 0)
    if train in lists:
        pixels = splits[train]['pixels']
        weights = balance(pixels)
        findings += find_untrained(info['classes'], pixels, lists[train].file)
    findings = list(dict.fromkeys(findings))
    faults = [finding._asdict() for finding in findings if finding.is_fault]
    report = {
        'dataset': settings.DATASET, 'root': str(root), 'train': train, 'val': val,
        'is_sound': not faults, 'classes': info['classes'], 'class_weights': weights,
        'n_pictures': len({image for data in lists.values() for image in data.images}),
        'seconds': time.perf_counter() - began, 'splits': splits, 'faults': faults,
        'warnings': [f._asdict() for f in findings if not f.is_fault]}
    path = Path(out) / f'check_{settings.DATASET}'
    write_text(f'{path}.json', to_json(report, 1) + '\n')
    if train in lists:
        draw_sheet(lists[train], entries[train], n_pictures, info, f'{path}.png')
    print_report(report, f'{path}.json')
    return not faults


def print_report(report: dict, file: str) -> None:
    """Print the report, which is in a JSON file too."""
    print(f'{report["dataset"]} in {report["root"]}: {report["n_pictures"]} pictures, '
          f'{report["seconds"]:.1f} s')
    for name, split in report['splits'].items():
        official = ''
        if split['n_official'] not in (0, split['n_pictures']):
            official = f', officially {split["n_official"]}'
        print(f'list {name}: {split["n_pictures"]} pictures{official}; width '
              f'{split["width"]} and height {split["height"]} (least, median, largest);'
              f' void {split["void_share"]:.2%}')
    width = max(len(name) for name in ('class', *report['classes']))
    heads = [f'{"% of " + name:>18}{"images":>8}' for name in report['splits']]
    print(f'{"class":{width}}' + ''.join(heads))
    for i, name in enumerate(report['classes']):
        cells = [f'{100 * split["share"][i]:18.3f}{split["images"][i]:8d}'
                 for split in report['splits'].values()]
        print(f'{name:{width}}' + ''.join(cells))
    if report['class_weights']:
        print('weights that balance the classes, if you want them:\nCLASS_WEIGHTS='
              + ','.join(f'{weight:.3g}' for weight in report['class_weights']))
    for word, key in (('FAULT', 'faults'), ('WARNING', 'warnings')):
        counts = Counter()
        for finding in report[key]:
            counts[finding['kind']] += 1
            if counts[finding['kind']] <= N_SHOWN:
                print(f'{word} {finding["kind"]}: {finding["text"]}')
        for kind, n in counts.items():
            if n > N_SHOWN:
                print(f'{word} {kind}: {n} in all, {file} names each')
    verdict = 'nothing stops training'
    if report['faults']:
        verdict = ('training or evaluation would stop: mend the files or take them out '
                   'of the lists')
    print(f'report: {file}\nfaults: {len(report["faults"])}; '
          f'warnings: {len(report["warnings"])}; {verdict}')


def draw_sheet(data: SegmentationDataset, entries: list[Entry], n: int, info: dict,
               file: str) -> None:
    """Draw n random pictures of a list that have no fault, two beside each other."""
    order = np.random.default_rng(settings.SEED).permutation(len(entries))
    chosen = [i for i in order if not any(f.is_fault for f in entries[i].findings)][:n]
    cells = [drawing.captioned(*data.read(i), data.ids[i], info['classes'],
                               info['palette']) for i in chosen]
    if cells:
        drawing.sheet(cells).save(file)
        print(f'pictures: {file}')
