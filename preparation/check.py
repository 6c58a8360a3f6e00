"""What is wrong with a data set: every picture, mask and list of it is gone over once.

    python prepare.py check DATASET=voc TRAIN_SPLIT=train

A fault stops training or evaluation with an error; a warning is what a careful person
wants to know. Both are printed a line each and written as JSON, with the share of each
class, and a sheet of random pictures with their masks. The data are only read.
"""
import contextlib
import hashlib
import io
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import dataset
import drawing
import runtime
import settings

SHOWN = 10           # findings of one kind on the console
N_COLUMNS = 5        # lists in the table of classes
N_WEIGHTS = 40       # classes whose weights are printed
ORIENTATION = 0x0112  # EXIF tag: 1 is upright, 2 to 8 are mirrored or turned


class Finding(NamedTuple):
    """One thing that was found in one file."""
    is_fault: bool
    kind: str
    file: str
    text: str


class Entry(NamedTuple):
    """What became of one picture and its mask; '' and None of a file that is bad."""
    findings: list[Finding]
    labels: dict[int, int]  # pixels of each class and of 255
    digest: str  # of the picture's bytes
    size: tuple[int, int] | None  # (width, height)
    image_mode: str
    mask_mode: str


# -- one picture -----------------------------------------------------------------------

class Examination(Dataset):
    """Examines pictures and their masks: an Entry for each index.

    Args:
        pairs: paths of picture and mask; '' is a mask that nobody expects.
        lost: the files that are missing.
        facts: of the data set, see DATASETS in recipes.py.
    """

    def __init__(self, pairs: list[tuple[str, str]], lost: set[str], facts: dict):
        self.pairs, self.lost = pairs, lost
        meaning = {**dict(enumerate(range(256))), **facts['map']}
        self.meaning = {value: label for value, label in meaning.items()
                        if label < len(facts['classes']) or label == dataset.IGNORED}
        self.expected = show_ranges(sorted(self.meaning))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Entry:
        image_file, mask_file = self.pairs[index]
        image, digest, found = self.decode(image_file, 'image')
        mask, _, more = self.decode(mask_file, 'mask')
        found, labels = found + more, {}
        if image and mask and image.size != mask.size:
            (w, h), (width, height) = mask.size, image.size
            found.append(Finding(True, 'size mismatch', mask_file, f'is {w}x{h}, '
                                 f'{width}x{height} as its image is expected'))
        if mask and mask.mode not in ('P', 'L'):
            found.append(Finding(True, 'mask mode', mask_file, f'is {mask.mode}, one '
                                 'byte a pixel (P or L), the class, is expected'))
        elif mask:
            labels, more = self.count(mask, mask_file)
            found += more
        return Entry(found, labels, digest, image.size if image else None,
                     image.mode if image else '', mask.mode if mask else '')

    def decode(self, file: str, what: str
               ) -> tuple[Image.Image | None, str, list[Finding]]:
        """Decode a file in full, as training does.

        Returns:
            (picture, digest, findings): None where it cannot be decoded, and a digest
            of the file's bytes.
        """
        if not file:
            return None, '', []
        if file in self.lost:
            return None, '', [Finding(True, f'missing {what}', file,
                                      'is not there, the list asks for it')]
        data, fault, is_turned = b'', (), False
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            try:
                data = Path(file).read_bytes()
                picture = Image.open(io.BytesIO(data))
                dataset.as_rgb(picture) if what == 'image' else picture.load()
                with contextlib.suppress(Exception):  # training never reads EXIF data
                    is_turned = picture.getexif().get(ORIENTATION) in range(2, 9)
            except UnidentifiedImageError:
                fault = ('not an image', f'begins with {data[:40]!r}, a picture is '
                         'expected') if data else ('empty file', 'has 0 bytes')
            except Exception as error:  # damage can raise anything deep inside Pillow
                fault = f'damaged {what}', f'cannot be decoded ({error})'
        digest = hashlib.blake2b(data, digest_size=16).hexdigest() if data else ''
        if fault:
            return None, digest, [Finding(True, fault[0], file,
                                          f'{fault[1]}, {dataset.GET_AGAIN}')]
        found = [Finding(False, 'Pillow warns', file, str(h.message)) for h in heard]
        if is_turned and what == 'image':
            found.append(Finding(False, 'turned picture', file, 'has an EXIF '
                                 'orientation: it is read as it is stored, see that '
                                 'the mask lies the same way'))
        return picture, digest, found

    def count(self, mask: Image.Image, file: str
              ) -> tuple[dict[int, int], list[Finding]]:
        """Return the pixels of each label of a mask, and what is wrong with them."""
        labels, unknown = Counter(), []
        for value, n in enumerate(mask.histogram()):
            if n and value in self.meaning:
                labels[self.meaning[value]] += n
            elif n:
                unknown.append(f'value {value} at {n} pixels')
        if unknown:
            more = f' and {len(unknown) - 5} other values' if len(unknown) > 5 else ''
            return labels, [Finding(True, 'unknown value', file, ', '.join(unknown[:5])
                                    + f'{more}, {self.expected} are expected')]
        if set(labels) == {dataset.IGNORED}:
            return labels, [Finding(False, 'only void', file, 'no pixel has a class')]
        return labels, []


def show_ranges(values: list[int]) -> str:
    """Return sorted numbers as text: 0 to 20, 255."""
    starts = [value for value in values if value - 1 not in values]
    ends = [value for value in values if value + 1 not in values]
    return ', '.join(str(first) if first == last else f'{first} to {last}'
                     for first, last in zip(starts, ends, strict=True))


# -- lists -----------------------------------------------------------------------------

def open_lists(root: Path, used: list[str], facts: dict
               ) -> tuple[dict[str, dataset.Folder], list[Finding]]:
    """Open every list of a data set, those that settings use first.

    Raises:
        FileNotFoundError: in a sentence, where there is no data set at all.
    """
    lists = root / 'ImageSets' / 'Segmentation'
    folders, findings = {}, []
    for name in dict.fromkeys([*used, *sorted(p.stem for p in lists.glob('*.txt'))]):
        try:
            folders[name] = dataset.Folder(str(root), name, facts, is_complete=False)
        except (OSError, ValueError) as error:
            if not root.is_dir():
                raise
            findings.append(Finding(name in used, 'list', str(lists / f'{name}.txt'),
                                    str(error)))
    return folders, findings


def examine_lists(folders: dict[str, dataset.Folder], used: list[str], facts: dict
                  ) -> tuple[dict[str, list[Entry]], list[Finding], dict[str, str]]:
    """Examine the pictures and masks of all lists, each once, on all cores.

    Args:
        folders: all lists.
        used: names of those that training and evaluation read.
        facts: of the data set.

    Returns:
        (entries, findings, digests): the entries of each list, all findings, and a
        digest of each picture.
    """
    lost = {file for folder in folders.values() for file in folder.find_missing()}
    pairs = {}
    for name, folder in folders.items():
        has_masks = name in used or not lost.issuperset(folder.labels)
        masks = folder.labels if has_masks else [''] * len(folder)
        pairs[name] = list(zip(folder.images, masks, strict=True))
    todo = list(dict.fromkeys(pair for name in pairs for pair in pairs[name]))
    n = dataset.n_cores() if len(todo) > 1 else 1
    loader = DataLoader(Examination(todo, lost, facts), batch_size=None,
                        collate_fn=dataset.as_it_is, num_workers=n if n > 1 else 0,
                        prefetch_factor=16 if n > 1 else None)
    bar = tqdm(loader, 'examining', unit='picture', disable=None)
    done = dict(zip(todo, bar, strict=True))

    # What neither training nor evaluation reads cannot stop them.
    read, findings = {pair for name in used for pair in pairs.get(name, [])}, []
    for (image, mask), entry in done.items():
        if (image, mask) in read:
            findings += entry.findings
        else:  # pictures of a list for prediction are often left out on purpose
            findings += [finding._replace(is_fault=False) for finding in entry.findings
                         if finding.is_fault and
                         (mask or finding.kind != 'missing image')]
    return ({name: [done[pair] for pair in pairs[name]] for name in pairs}, findings,
            {image: entry.digest for (image, _), entry in done.items()})


def compare_lists(folders: dict[str, dataset.Folder], train: str, val: str,
                  digests: dict[str, str]) -> list[Finding]:
    """Find entries that are twice in a list, or in training and evaluation.

    Args:
        folders: all lists.
        train, val: names of the lists to train and to evaluate on.
        digests: of the bytes of each picture; '' is unknown.
    """
    findings = [Finding(False, 'entry twice', image, f'stands {n} times in list {name}')
                for name, folder in folders.items()
                for image, n in Counter(folder.images).items() if n > 1]
    if train not in folders or val not in folders:
        return findings
    if train == val:
        return [*findings, Finding(False, 'LEAK', str(folders[train].file), 'is the '
                                   'list to evaluate on too: scores will be too good')]
    trained = dict.fromkeys(folders[train].images)
    twins = {digests[image]: image for image in trained if digests[image]}
    for image in dict.fromkeys(folders[val].images):
        if image in trained:
            findings.append(Finding(False, 'LEAK', image, f'is in the lists {train} '
                                    f'and {val}: scores will be too good'))
        elif digests[image] in twins:
            findings.append(Finding(False, 'LEAK of a copy', image, f'of list {val} is '
                                    f'equal to {twins[digests[image]]} of list '
                                    f'{train}: scores will be too good'))
    return findings


def summarise(entries: list[Entry], n_classes: int) -> dict:
    """Count over the entries of one list.

    Returns:
        Numbers for JSON. `share` of a class is that of the pixels that have a class,
        `void_share` that of all pixels, `images` the pictures that a class is in;
        `width` and `height` are the least, the median and the largest, in pixels.
    """
    pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for entry in entries:
        for label, n in entry.labels.items():
            pixels[label] += n
            images[label] += 1
    sizes = np.array([entry.size for entry in entries if entry.size]).reshape(-1, 2)
    return {
        'n_pictures': len(entries),
        'image_modes': Counter(e.image_mode for e in entries if e.image_mode),
        'mask_modes': Counter(e.mask_mode for e in entries if e.mask_mode),
        **{side: [int(v.min()), float(np.median(v)), int(v.max())] for side, v in
           zip(('width', 'height'), sizes.T, strict=True) if len(v)},
        'found': Counter(finding.kind for e in entries for finding in e.findings),
        'void_share': float(pixels[dataset.IGNORED] / max(pixels.sum(), 1)),
        'share': (pixels[:n_classes] / max(pixels[:n_classes].sum(), 1)).tolist(),
        'pixels': pixels[:n_classes].tolist(), 'images': images[:n_classes].tolist()}


def balance(pixels: list[int]) -> list[float]:
    """Return class weights by median frequency: median share of a class / its share.

    A class that never occurs gets 1.
    """
    found = [n for n in pixels if n]
    return [float(np.median(found) / n) if n else 1.0 for n in pixels]


# -- the report ------------------------------------------------------------------------

def describe(name: str, report: dict) -> str:
    """Return the summary of one list, a line."""
    n, official = report['n_pictures'], report['n_official']
    parts = [f'list {name}{report["use"]}: {n} pictures'
             + (f', officially {official}' if official not in (0, n) else '')]
    for what in ('image', 'mask'):
        modes = [f'{mode} ({n})' for mode, n in report[f'{what}_modes'].items()]
        parts += [f'{what}s of mode {", ".join(modes)}'] if modes else []
    for side in ('width', 'height'):
        if side in report:
            low, middle, high = report[side]
            parts.append(f'{side} {low} to {high}, median {middle:g}')
    parts.append(f'void {report["void_share"]:.2%}' if report['mask_modes'] else
                 'no masks' + ('' if report['use'] else ': for prediction only'))
    return '; '.join(parts + [f'{n} x {kind}' for kind, n in report['found'].items()])


def class_table(reports: dict[str, dict], classes: list[str]) -> str:
    """Return a line a class: its share of the pixels and its pictures, per list."""
    chosen = [(name, report, max(18, len(name) + 2)) for name, report
              in reports.items() if report['mask_modes']][:N_COLUMNS]
    width = max(map(len, ('class', *classes)))
    rows = [' ' * width + ''.join(f'{name:>{column}}' for name, _, column in chosen),
            f'{"class":{width}}' + ''.join(f'{"share %   images":>{column}}'
                                           for _, _, column in chosen)]
    rows += [f'{label:{width}}' + ''.join(
        f'{100 * report["share"][i]:{column - 9}.3f} {report["images"][i]:8d}'
        for _, report, column in chosen) for i, label in enumerate(classes)]
    return '\n'.join(rows)


def print_findings(findings: list[Finding]) -> None:
    """Print faults, then warnings, a line each; of one kind the first ones."""
    groups = {}
    for finding in sorted(findings, key=lambda finding: not finding.is_fault):
        head = f'{"FAULT" if finding.is_fault else "WARNING"} {finding.kind}: '
        groups.setdefault(head, []).append(f'{head}{finding.file}: {finding.text}')
    for head, lines in groups.items():
        print('\n'.join(lines[:SHOWN]))
        if len(lines) > SHOWN:
            print(f'{head}{len(lines)} in all, the JSON report names each')


def draw_sheet(folder: dataset.Folder, entries: list[Entry], n: int, facts: dict
               ) -> Image.Image | None:
    """Draw n random pictures of a list, two beside each other; None if none is sound.
    """
    order = np.random.default_rng(settings.SEED).permutation(len(entries))
    sound = [i for i in order if entries[i].labels and not any(
        finding.is_fault for finding in entries[i].findings)][:n]
    cells = [drawing.captioned(*folder.read(i), folder.ids[i], facts['classes'],
                               facts['palette']) for i in sound]
    return drawing.sheet(cells) if cells else None


def check(out: str, n_pictures: int = 12) -> bool:
    """Go over the data set in settings, print what is found and write a report.

    Args:
        out: folder of check_<DATASET>.json and the sheet check_<DATASET>.png.
        n_pictures: on the sheet, of the list to train on; 0 is no sheet.

    Returns:
        True where nothing was found that stops training or evaluation.

    Raises:
        OSError, ValueError: in a sentence, where there is no such data set at all, or
            `out` cannot be written.
    """
    began, facts = time.perf_counter(), dataset.get_facts()
    root, classes = Path(settings.DATA_ROOT or facts['root']), facts['classes']
    train = settings.TRAIN_SPLIT or facts['train']
    val = settings.VAL_SPLIT or facts['val']
    folders, findings = open_lists(root, [train, val], facts)
    if len(settings.CLASS_WEIGHTS) not in (1, len(classes)):
        findings.append(Finding(
            True, 'settings', 'CLASS_WEIGHTS', f'has {len(settings.CLASS_WEIGHTS)} '
            f'numbers, {len(classes)} or a single one are expected'))
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # learn it now, not after the work
    except OSError as error:
        raise OSError(f'cannot write into {out} ({error}): give a folder that can be '
                      'written') from None
    entries, more, digests = examine_lists(folders, [train, val], facts)
    findings += more + compare_lists(folders, train, val, digests)

    # Count over each list.
    reports, weights = {}, []
    for name in folders:
        use = [text for text, of in (('to train on', train), ('to evaluate on', val))
               if of == name]
        reports[name] = {'use': f' ({", ".join(use)})' if use else '',
                         'n_official': facts['counts'].get(name, 0),
                         **summarise(entries[name], len(classes))}
    if train in reports:
        weights = balance(reports[train]['pixels'])
        never = [name for name, n in zip(classes, reports[train]['pixels'],
                                         strict=True) if not n]
        if never:
            findings.append(Finding(
                False, 'class not trained', str(folders[train].file),
                f'{", ".join(never)}: no picture of this list shows them'))

    # Print and write.
    findings = list(dict.fromkeys(findings))
    n_faults, seconds = sum(f.is_fault for f in findings), time.perf_counter() - began
    print(f'{settings.DATASET} in {root}: {len(digests)} pictures, {seconds:.1f} s, '
          f'{len(digests) / seconds:.0f} a second')
    print('\n'.join(describe(name, report) for name, report in reports.items()))
    print(class_table(reports, classes))
    if weights and len(weights) <= N_WEIGHTS:
        print('weights that balance the classes, if you want them:\nCLASS_WEIGHTS='
              + ','.join(f'{weight:.3g}' for weight in weights))
    print_findings(findings)
    path = Path(out) / f'check_{settings.DATASET}'
    runtime.write_text(f'{path}.json', runtime.as_json({
        'dataset': settings.DATASET, 'root': str(root), 'train': train, 'val': val,
        'is_sound': not n_faults, 'n_pictures': len(digests), 'seconds': seconds,
        'classes': classes, 'class_weights': weights, 'splits': reports,
        'faults': [f._asdict() for f in findings if f.is_fault],
        'warnings': [f._asdict() for f in findings if not f.is_fault]}, 1) + '\n')
    print(f'report: {path}.json')
    sheet = draw_sheet(folders[train], entries[train], n_pictures, facts
                       ) if train in folders else None
    if sheet:
        sheet.save(f'{path}.png')
        print(f'pictures: {path}.png')
    print(f'faults: {n_faults}; warnings: {len(findings) - n_faults}; ' + (
        'training or evaluation would stop: mend the files or take them out of the '
        'lists' if n_faults else 'nothing stops training'))
    return not n_faults
