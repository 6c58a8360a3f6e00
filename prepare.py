"""Make a data set ready for training, once, and check it before a GPU sees it.

    python prepare.py voc --download          # or with --archive FILE what you have
    python prepare.py folder --images photos --masks masks --root data/mine
    python prepare.py check DATASET=folder DATA_ROOT=data/mine

`python prepare.py NAME --help` says where each is to be got. An --archive is a tar, tgz
or zip as it was published, the folder it was unpacked into, or a single file; archives
are unpacked into ROOT/unpacked. A file appears under its name when it is whole; what is
there is kept, so a run that was stopped can be repeated.
"""
import argparse
import functools
import inspect
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

import masks
import recipes
import runtime
import settings

ARCHIVES = ('.tar', '.tgz', '.gz', '.zip')
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


# -- archives --------------------------------------------------------------------------

def members(archive: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Yield (name, function that opens it) of each file in a tar or zip."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for member in tqdm(opened.infolist(), f'unpacking {archive.name}',
                               unit='file', leave=False, disable=None):
                if not member.is_dir():
                    yield member.filename, functools.partial(opened.open, member)
        return
    with (open(archive, 'rb') as raw, tarfile.open(fileobj=raw) as opened,
          tqdm(total=archive.stat().st_size, desc=f'unpacking {archive.name}', unit='B',
               unit_scale=True, leave=False, disable=None) as bar):
        for member in opened:
            bar.update(raw.tell() - bar.n)
            if member.isfile():
                yield member.name, functools.partial(opened.extractfile, member)


def unpack(archive: Path, where: Path) -> Path:
    """Unpack an archive into a folder of its name; what is there is taken as it is.

    Raises:
        ValueError: in a sentence, where it is damaged, cut off, or has a member that
            would land outside; nothing is left of it then.
    """
    target = where / archive.name
    if target.is_dir():
        return target
    print(f'unpacking {archive} into {target}', flush=True)
    part = where / f'{archive.name}.tmp'
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, opener in members(archive):
            parts = PurePosixPath(name.replace('\\', '/')).parts
            if '..' in parts or parts[0] == '/' or ':' in parts[0]:
                raise ValueError(f'{archive} is refused: its member {name} would land '
                                 'outside of the folder it is unpacked into')
            file = part.joinpath(*parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            with opener() as source, open(file, 'wb') as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        os.replace(part, target)
    except BROKEN as error:
        raise ValueError(f'{archive} is cut off or no sound archive ({error}; '
                         f'{archive.stat().st_size} bytes): get it again') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def download(url: str, file: Path, md5: str) -> Path:
    """Fetch an archive unless it is there; it gets its name when its md5 is right.

    Raises:
        OSError: in a sentence, where it cannot be fetched or is not what it should be.
    """
    from http.client import HTTPException

    from torch.hub import download_url_to_file
    from torchvision.datasets.utils import calculate_md5
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f'fetching {url} to {file}', flush=True)
    part = file.with_name(f'{file.name}.part')
    other = f'try again, or get {file.name} by other means and give it with --archive'
    try:
        download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        size, found = part.stat().st_size, calculate_md5(str(part))
        if found != md5:
            raise OSError(f'{size} bytes came, of md5 {found}, expected {md5}')
        os.replace(part, file)
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f'could not fetch {url} ({error}): {other}') from error
    finally:
        part.unlink(missing_ok=True)
    return file


def addresses() -> dict[str, tuple[str, str]]:
    """Return file name -> (address, md5) of the archives that torchvision knows."""
    from torchvision.datasets import SBDataset, voc
    known = {SBDataset.filename: (SBDataset.url, SBDataset.md5)}
    for year in ('2012', '2010'):
        facts = voc.DATASET_YEAR_DICT[year]
        known[facts['filename']] = facts['url'], facts['md5']
    return known


class Sources:
    """The files that a data set is made from.

    First what was given, then what was unpacked before, then what is in the root.

    Args:
        args: of the command line: archive, download, root.
        root: folder of the data set.
        names: archives that --download fetches.
    """

    def __init__(self, args: argparse.Namespace, root: Path, names: Iterable[str] = ()):
        given = [Path(path) for path in args.archive]
        for path in given:
            if not path.exists():
                raise FileNotFoundError(f'--archive {path} is not there: give an '
                                        'archive, or the folder it was unpacked into')
        if getattr(args, 'download', False):
            have, known = {path.name for path in given}, addresses()
            given += [download(known[name][0], root / 'archives' / name, known[name][1])
                      for name in names if name not in have]
        where = root / 'unpacked'
        given = [unpack(path, where) if path.is_file() and path.suffix in ARCHIVES
                 else path for path in given]
        given += sorted({p for p in where.glob('*') if p.suffix != '.tmp'} - {*given})
        self.files = []  # (name, path), the name relative to what was given
        for path in (*given, root):
            if path.is_file():
                self.files.append((path.name, path))
            for where, folders, files in os.walk(path):
                folders[:] = sorted(set(folders) - {'unpacked'})
                self.files += [(Path(where, name).relative_to(path).as_posix(),
                                Path(where, name)) for name in sorted(files)]

    def find(self, pattern: str) -> dict[str, Path]:
        """Return, for each text of the pattern's group, the first file that fits."""
        found, regex = {}, re.compile(pattern)
        for name, path in self.files:
            if match := regex.search(name):
                found.setdefault(match[1], path)
        return found

    def lists(self, pattern: str, *needed: str) -> dict[str, list[str]]:
        """Return the ids of each list whose file fits; none if a needed one lacks."""
        found = {name: path.read_text().split()
                 for name, path in self.find(pattern).items()}
        return found if set(needed) <= set(found) else {}


# -- writing ---------------------------------------------------------------------------

def write_one(job: tuple) -> str:
    """Make one file of (source, target, convert), under its name when it is whole.

    Without `convert` the source is linked, or copied where that cannot be; else it
    turns the source, a file's bytes or a value, into a mask, or none if it is left out.

    Returns:
        What was wrong, in a sentence; '' if nothing was.
    """
    source, target, convert = job
    part = target.with_name(f'{target.name}.tmp')
    part.unlink(missing_ok=True)
    if convert is None:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
    else:
        is_file = isinstance(source, Path)
        try:
            mask = convert(source.read_bytes() if is_file else source)
        except Exception as error:  # scipy, Pillow, pycocotools: a dozen kinds
            return (f'{source if is_file else target} cannot be made into a mask '
                    f'({error}): get it again or mend it')
        if mask is None:
            return ''
        with open(part, 'wb') as file:
            masks.paint(mask).save(file, 'PNG')
    os.replace(part, target)
    return ''


def make_files(root: Path, wanted: dict[Path, tuple], get: str) -> None:
    """Say what will be written, and write what is not there yet, on all cores.

    Args:
        root: folder of the data set.
        wanted: path below root -> (source or none where there is none, convert).
        get: what to do where a source is missing.

    Raises:
        ValueError: in a sentence, where a source is missing (nothing is written then)
            or cannot be converted (what is written stays).
    """
    todo = {path: job for path, job in wanted.items() if not (root / path).exists()}
    lost = [path.as_posix() for path, (source, _) in todo.items() if source is None]
    if lost:
        raise ValueError(f'{len(lost)} of {len(wanted)} files cannot be made from what '
                         f'was given, the first is {lost[0]}: {get}')
    counts = {path.parts[0]: 0 for path in wanted}
    for path in todo:
        counts[path.parts[0]] += 1
    print(f'writing into {root}: '
          + ', '.join(f'{n} files of {folder}' for folder, n in counts.items())
          + f'; {len(wanted) - len(todo)} are there and kept', flush=True)
    for folder in {(root / path).parent for path in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(source, root / path, convert) for path, (source, convert) in todo.items()]
    links = [job for job in jobs if job[2] is None]
    others = [job for job in jobs if job[2] is not None]
    with (ProcessPoolExecutor(mp_context=get_context('spawn')) as pool,
          tqdm(total=len(jobs), desc=root.name, unit='file', disable=None) as bar):
        done = pool.map(write_one, others, chunksize=8) if others else ()
        for results in (map(write_one, links), done):
            for problem in results:
                if problem:
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(problem)
                bar.update()


def write_list(root: Path, split: str, entries: Iterable[str],
               counts: dict[str, int] | None = None, is_ours: bool = False) -> None:
    """Write a list, and say so if the published one has another length.

    A list that is there is kept, unless it is ours or a part of the new one.
    """
    entries, expected = list(dict.fromkeys(entries)), (counts or {}).get(split, 0)
    file = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    old = file.read_text().splitlines() if file.exists() else []
    note = f'{len(entries)} entries'
    if expected and len(entries) != expected:
        note += f', where the published list has {expected}: this is another part'
    if set(old) - set(entries) and not is_ours:
        note += f'; kept with {len(old)} others: remove it to have it written anew'
    elif set(old) != set(entries):
        file.parent.mkdir(parents=True, exist_ok=True)
        runtime.write_text(file, ''.join(f'{entry}\n' for entry in entries))
    print(f'{file}: {note}')


def place(args: argparse.Namespace) -> Path:
    """Return the folder that the data set is made in."""
    return Path(args.root or recipes.DATASETS[args.name]['root'])


def finish(root: Path, words: str) -> None:
    """Print what to do next."""
    words += f' DATA_ROOT={root}'
    print(f'done. Check it:  python prepare.py check {words}\n'
          f'then train:      python train.py {words}')


# -- data sets -------------------------------------------------------------------------

def prepare_voc(args: argparse.Namespace) -> None:
    """PASCAL VOC 2012 with the masks of SBD, 21 classes.

    Wanted: VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012) and
    benchmark.tgz (SBD, the Semantic Boundaries Dataset, www2.eecs.berkeley.edu);
    --download fetches both, 3.4 GB. Besides, if you have it, VOC2012test.tar of the
    test server. The list trainaug is VOC's train and SBD's train and val, less VOC's
    val; VOC's own masks go before SBD's.
    """
    root, counts = place(args), recipes.DATASETS['voc']['counts']
    sources = Sources(args, root, ('VOCtrainval_11-May-2012.tar', 'benchmark.tgz'))
    get = ('give VOCtrainval_11-May-2012.tar and benchmark.tgz, or the folders they '
           'were unpacked into, with --archive, or say --download')
    lists = sources.lists(r'ImageSets/Segmentation/(train|val|test)\.txt$', 'train',
                          'val')
    sbd = sources.lists(r'(?:^|dataset/)(train|val)\.txt$', 'train', 'val')
    if not lists:
        raise ValueError('there are no lists ImageSets/Segmentation/train.txt and '
                         f'val.txt of VOC in what was given: {get}')
    images = {**sources.find(r'(?:^|/)img/([^/]+)\.jpg$'),
              **sources.find(r'(?:^|/)JPEGImages/([^/]+)\.jpg$')}
    drawn = sources.find(r'(?:^|/)SegmentationClass/([^/]+)\.png$')
    mats = sources.find(r'(?:^|/)cls/([^/]+)\.mat$')
    lists['trainval'] = lists['train'] + lists['val']
    folder = 'SegmentationClass'
    if sbd and mats:
        folder = 'SegmentationClassAug'
        lists['trainaug'] = join_trainaug(lists['train'], lists['val'],
                                          sbd['train'] + sbd['val'])
    wanted = {Path('JPEGImages', f'{i}.jpg'): (images.get(i), None)
              for i in sum(lists.values(), [])}
    for i in lists['trainval'] + lists.get('trainaug', []):
        wanted[Path(folder, f'{i}.png')] = ((drawn[i], None) if i in drawn else
                                            (mats.get(i), masks.read_sbd))
    make_files(root, wanted, get)
    for split, ids in lists.items():
        write_list(root, split, ids, counts)
    if 'trainaug' not in lists:
        print('SBD (benchmark.tgz) was not given, so there is no list trainaug, which '
              'the published recipe trains on')
    finish(root, 'DATASET=voc' + ('' if 'trainaug' in lists else ' TRAIN_SPLIT=train'))


def join_trainaug(train: list[str], val: list[str], sbd: list[str]) -> list[str]:
    """Return the ids of VOC's train and of SBD, less those of VOC's val."""
    return list(dict.fromkeys(train + sorted(set(sbd) - set(val))))


def prepare_context(args: argparse.Namespace) -> None:
    """PASCAL Context, 60 classes with background (context) or 59 (context59).

    Wanted: VOCtrainval_03-May-2010.tar, which --download fetches; of
    cs.stanford.edu/~roozbeh/pascal-context the label maps trainval.tar.gz and, to
    check the names, labels.txt. Lists train.txt and val.txt of your own go before
    those of VOC 2010.
    """
    root, counts = place(args), recipes.DATASETS['context']['counts']
    sources = Sources(args, root, ('VOCtrainval_03-May-2010.tar',))
    get = ('give the pictures VOCtrainval_03-May-2010.tar and the label maps '
           'trainval.tar.gz with --archive')
    lists = (sources.lists(r'^(train|val)\.txt$', 'train', 'val')
             or sources.lists(r'Main/(train|val)\.txt$', 'train', 'val'))
    if not lists:
        raise ValueError(f'there are no lists train.txt and val.txt: {get}')
    for file in sources.find(r'(?:^|/)(labels|classes-459)\.txt$').values():
        masks.check_context_names(file.read_text())
    images = sources.find(r'(?:^|/)JPEGImages/([^/]+)\.jpg$')
    mats = sources.find(r'(?:^|/)(\d{4}_\d{6})\.mat$')
    wanted = {}
    for i in lists['train'] + lists['val']:
        wanted[Path('JPEGImages', f'{i}.jpg')] = images.get(i), None
        wanted[Path('SegmentationClass', f'{i}.png')] = mats.get(i), masks.read_context
    make_files(root, wanted, get)
    for split, ids in lists.items():
        write_list(root, split, ids, counts)
    finish(root, 'DATASET=context')


def prepare_cocostuff10k(args: argparse.Namespace) -> None:
    """COCO-Stuff 10K, 171 classes.

    Wanted: cocostuff-10k-v1.1.zip (github.com/nightrome/cocostuff10k). Or the maps of
    164k, stuffthingmaps_trainval2017.zip (github.com/nightrome/cocostuff), with
    train2017.zip and val2017.zip (cocodataset.org) and the folder of the 10K lists
    train.txt and test.txt.
    """
    sources = Sources(args, place(args))
    get = ('give cocostuff-10k-v1.1.zip, or stuffthingmaps_trainval2017.zip with the '
           'pictures and the folder of the lists, with --archive')
    lists = sources.lists(r'(?:^|imageLists/)(train|test)\.txt$', 'train', 'test')
    mats = sources.find(r'COCO_train2014_(\d{12})\.mat$')
    make_cocostuff(args, sources, lists, mats, get)


def prepare_cocostuff164k(args: argparse.Namespace) -> None:
    """COCO-Stuff 164k, 171 classes.

    Wanted: stuffthingmaps_trainval2017.zip (github.com/nightrome/cocostuff),
    train2017.zip and val2017.zip (cocodataset.org).
    """
    sources = Sources(args, place(args))
    lists = {split: sorted(sources.find(rf'{split}2017/(\d{{12}})\.png$'))
             for split in ('train', 'val')}
    make_cocostuff(args, sources, {s: ids for s, ids in lists.items() if ids}, {},
                   'give stuffthingmaps_trainval2017.zip, train2017.zip and '
                   'val2017.zip with --archive')


def make_cocostuff(args: argparse.Namespace, sources: Sources,
                   lists: dict[str, list[str]], mats: dict[str, Path], get: str
                   ) -> None:
    """Make either COCO-Stuff from its lists; the last 12 digits of an id find files."""
    if not lists:
        raise ValueError(f'there are no lists of pictures in what was given: {get}')
    root = place(args)
    images = sources.find(r'(?<!\d)(\d{12})\.jpg$')
    maps = sources.find(r'(?:train|val)2017/(\d{12})\.png$')
    wanted = {}
    for i in sum(lists.values(), []):
        wanted[Path('JPEGImages', f'{i}.jpg')] = images.get(i[-12:]), None
        wanted[Path('SegmentationClass', f'{i}.png')] = (
            (mats[i[-12:]], masks.read_stuff_mat) if i[-12:] in mats else
            (maps.get(i[-12:]), masks.read_stuff_png))
    make_files(root, wanted, get)
    for split, ids in lists.items():
        write_list(root, split, ids, recipes.DATASETS[args.name]['counts'])
    finish(root, f'DATASET={args.name}')


def prepare_cityscapes(args: argparse.Namespace) -> None:
    """Cityscapes, 19 classes.

    Wanted: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of
    cityscapes-dataset.com (after registration). For a folder that holds leftImg8bit and
    gtFine already give it as --root: only the lists are written. The label ids stay in
    the files, they become classes when a mask is read.
    """
    root, counts = place(args), recipes.DATASETS['cityscapes']['counts']
    sources = Sources(args, root)
    get = ('give leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, or the '
           'folder that holds leftImg8bit and gtFine, with --archive')
    frames = sources.find(r'leftImg8bit/((?:train|val|test)/.+)_leftImg8bit\.png$')
    labels = sources.find(r'gtFine/((?:train|val|test)/.+)_gtFine_labelIds\.png$')
    if not frames:
        raise ValueError(f'there are no frames leftImg8bit/*/*/*.png: {get}')
    wanted = {}
    for i, frame in frames.items():
        wanted[Path('leftImg8bit', f'{i}_leftImg8bit.png')] = frame, None
        if i in labels or not i.startswith('test/'):
            wanted[Path('gtFine', f'{i}_gtFine_labelIds.png')] = labels.get(i), None
    make_files(root, wanted, get)
    for split in ('train', 'val', 'test'):
        ids = sorted(i for i in frames if i.startswith(f'{split}/'))
        if ids:
            write_list(root, split, ids, counts)
    finish(root, 'DATASET=cityscapes')


def prepare_coco_voc(args: argparse.Namespace) -> None:
    """COCO with the 21 classes of VOC, for the VOC test server.

    Wanted: annotations_trainval2017.zip, train2017.zip and val2017.zip
    (cocodataset.org), and pip install pycocotools. Images with fewer than 1,000 pixels
    of the 20 classes are left out.
    """
    root = place(args)
    sources = Sources(args, root)
    get = ('give annotations_trainval2017.zip, train2017.zip and val2017.zip with '
           '--archive')
    files = sources.find(r'instances_(train|val)20\d\d\.json$')
    images = sources.find(r'([^/]+)\.jpg$')
    if not files:
        raise ValueError(f'there is no instances_train2017.json: {get}')
    try:
        import pycocotools.mask  # noqa: F401  better now than in each process
    except ImportError:
        raise ValueError('COCO is read with pycocotools: pip install pycocotools'
                         ) from None
    found = {split: masks.read_instances(json.loads(file.read_bytes()))
             for split, file in files.items()}
    lost = [i for items in found.values() for i in items if i not in images]
    if lost:
        raise ValueError(f'{len(lost)} pictures are not among what was given, first '
                         f"{lost[0]}.jpg: {get}")
    make_files(root, {Path('SegmentationClass', f'{i}.png'):
                      (image, masks.draw_instances)
                      for items in found.values() for i, image in items.items()}, get)
    lists = {split: [i for i in sorted(items)
                     if (root / 'SegmentationClass' / f'{i}.png').exists()]
             for split, items in found.items()}
    lists['trainval'] = sum(lists.values(), [])
    make_files(root, {Path('JPEGImages', f'{i}.jpg'): (images[i], None)
                      for i in lists['trainval']}, get)
    for split, ids in lists.items():
        write_list(root, split, ids)
    finish(root, 'DATASET=coco_voc')


def prepare_folder(args: argparse.Namespace) -> None:
    """Images and masks of your own; the images stay where they are.

    A mask is called like its image, in the same subfolder, and its values are the
    classes 0, 1, ...; 255 is ignored. Subfolders train, val and test are the lists;
    else give --lists, or a share is drawn for val. Masks that are coded by colour
    become masks of values with --colours.

        python prepare.py folder --images my/images --masks my/masks --map 11=255
    """
    root, images, drawn = place(args), Path(args.images), Path(args.masks)
    pairs, lost = masks.pair_up(images, drawn, args.image_tag, args.mask_tag)
    splits = masks.split_up(list(pairs), args.lists, args.val, args.seed)
    print(f'{len(pairs)} images with masks'
          + (f'; {len(lost)} have none and are left out, the first is {lost[0]}'
             if lost else ''), flush=True)
    facts = {'palette': recipes.voc_palette(), 'map': {}, 'images': below(root, images),
             'masks': [below(root, drawn)]}
    if args.colours:
        facts['classes'], table = masks.read_colours(Path(args.colours))
        shown = {label: rgb for rgb, label in table.items()}
        facts['palette'] = recipes.fill_palette(
            *(shown[i] for i in range(len(facts['classes']))))
        convert = functools.partial(masks.by_colour, table)
    else:
        paths = [drawn / mask for _, mask in pairs.values()]
        facts['classes'], facts['map'], is_plain = read_values(args, paths)
        convert = None if is_plain else masks.by_value
    if convert:  # else the masks are read where they are
        make_files(root, {Path('SegmentationClass', f'{key}.png'):
                          (drawn / mask, convert)
                          for key, (_, mask) in pairs.items()}, '')
        pairs = {key: (image, f'{key}.png') for key, (image, _) in pairs.items()}
        facts['masks'] = ['SegmentationClass/{}']
    print(f'writing into {root}: dataset.json and the lists\n'
          f'{len(facts["classes"])} classes: {", ".join(facts["classes"])}')
    is_ours = (root / 'dataset.json').exists()
    for split, keys in splits.items():
        write_list(root, split, ('\t'.join(pairs[key]) for key in keys), None, is_ours)
    runtime.write_text(root / 'dataset.json', json.dumps(facts) + '\n')
    finish(root, 'DATASET=folder')


def read_values(args: argparse.Namespace, paths: list[Path]
                ) -> tuple[tuple[str, ...], dict[int, int], bool]:
    """Read what values a user's masks have, and what these are called.

    Returns:
        (classes, map, is_plain): the names, what other values mean, and whether all
        masks are of one byte a pixel as they are.

    Raises:
        ValueError, FileNotFoundError: in a sentence, for a mask that is damaged or
            coded by colour, or a value that has no name.
    """
    file = Path(args.classes or Path(args.images).parent / 'classes.txt')
    classes = ()
    if file.is_file():
        classes = tuple(line.strip() for line in file.read_text().splitlines()
                        if line.strip())
    elif args.classes:
        raise FileNotFoundError(f'--classes {file} is not there: give a text file with '
                                'a name a line, in the order of the values')
    value_map, is_plain, top = masks.read_map(args.map, classes), True, 1
    with ProcessPoolExecutor(mp_context=get_context('spawn')) as pool:
        looks = tqdm(pool.map(masks.look_at, paths, chunksize=16), 'reading',
                     len(paths), unit='mask', disable=None)
        for path, (values, problem, is_byte) in zip(paths, looks, strict=True):
            if problem:
                raise ValueError(f'{path}: {problem}')
            is_plain &= is_byte
            for value in values:
                label = value_map.get(value, value)
                if classes and masks.VOID != label >= len(classes):
                    raise ValueError(
                        f'{path} has the value {value}, but {file} names '
                        f'{len(classes)} classes, 0 to {len(classes) - 1}: name it '
                        f'there, or say --map {value}=CLASS, or --map {value}=255 to '
                        'ignore it')
                top = max(top, label if label != masks.VOID else 0)
    return classes or tuple(f'class {i}' for i in range(top + 1)), value_map, is_plain


def below(root: Path, folder: Path) -> str:
    """Return the pattern of a folder's files, relative to root where it is below it."""
    folder, root = folder.resolve(), root.resolve()
    if folder.is_relative_to(root):
        folder = folder.relative_to(root)
    return f'{folder.as_posix()}/{{}}'


def prepare_shapes(args: argparse.Namespace) -> None:
    """Draw the embedded data set, in seconds; pictures that are there are kept."""
    import shapes
    root = place(args)
    if args.train < 1 or args.val < 1 or args.seed < 0:
        raise ValueError(f'--train {args.train} --val {args.val} --seed {args.seed}: '
                         'at least one picture each and a seed of 0 or more are '
                         'expected')
    there = len(list((root / 'JPEGImages').glob('shapes_*.jpg')))
    print(f'drawing {args.train} + {args.val} pictures into {root}'
          + (f'; the {there} that are there are kept' if there else ''))
    shapes.write(root, args.train, args.val, args.seed,
                 recipes.DATASETS['shapes']['palette'],
                 lambda ids: tqdm(ids, 'drawing', unit='image', disable=None))
    print('done: python train.py RECIPE=demo'
          + (f' DATA_ROOT={root}' if args.root else ''))


def prepare_weights(args: argparse.Namespace) -> None:
    """torchvision's ImageNet weights, for machines without a network."""
    from torch.hub import download_url_to_file
    from torchvision.models import get_model_weights
    folder = Path(args.root or settings.MODEL_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    for depth in args.depth:
        url = get_model_weights(f'resnet{depth}')['IMAGENET1K_V1'].url
        file = folder / url.rsplit('/', 1)[-1]
        if file.exists():
            print(f'{file} is there and kept')
            continue
        print(f'fetching {url} to {file}', flush=True)
        try:  # under another name until the hash that its name ends with is right
            download_url_to_file(url, str(file), re.search(r'-(\w+)\.', file.name)[1],
                                 progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise OSError(f'could not fetch {url} ({error}): put that file into '
                          f'{folder}/ by hand') from error


def check_data(args: argparse.Namespace) -> int:
    """Go over every file of the data set in settings, on all cores.

    Prints counts, classes and all that is wrong; writes check_*.json and a picture into
    LOG_DIR. The exit status is 1 where training would stop.
    """
    runtime.override(args.words)
    import check
    return 0 if check.check(settings.LOG_DIR, args.pictures) else 1


# -- command line ----------------------------------------------------------------------

MAKERS = {'voc': prepare_voc, 'context': prepare_context,
          'cocostuff10k': prepare_cocostuff10k, 'cocostuff164k': prepare_cocostuff164k,
          'cityscapes': prepare_cityscapes, 'coco_voc': prepare_coco_voc,
          'folder': prepare_folder, 'shapes': prepare_shapes,
          'weights': prepare_weights, 'check': check_data}


def read_options() -> argparse.Namespace:
    """Read the command line."""
    layout = {'formatter_class': argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    names, subs = parser.add_subparsers(metavar='NAME', required=True), {}
    for name, make in MAKERS.items():
        text = inspect.getdoc(make)
        sub = subs[name] = names.add_parser(name, help=text.splitlines()[0],
                                            description=text, **layout)
        sub.set_defaults(make=make, name=name)
        if name != 'check':
            root = recipes.DATASETS.get(name, {'root': 'models'})['root']
            sub.add_argument('--root', default='', metavar='DIR',
                             help=f'folder to make it in ({root})')
        if name not in ('folder', 'shapes', 'weights', 'check'):
            sub.add_argument('--archive', nargs='+', action='extend', default=[],
                             metavar='FILE', help='archives, or the folders they were '
                             'unpacked into')
    for name in ('voc', 'context'):
        subs[name].add_argument('--download', action='store_true',
                                help='fetch what torchvision has the address of')
    add = subs['folder'].add_argument
    add('--images', required=True, metavar='DIR', help='jpg, png, tif or bmp')
    add('--masks', required=True, metavar='DIR', help='palette, grey or RGB')
    for flag, metavar, text in (
            ('--image-tag', 'END', "end of the images' names that the masks' lack"),
            ('--mask-tag', 'END', "end of the masks' names that the images' lack"),
            ('--classes', 'FILE', 'a name a line (default: classes.txt beside the '
                                  'folder of the images, if it is there)'),
            ('--map', 'MAP', 'what values mean: 11=255,12=road, or a file of such'),
            ('--colours', 'FILE', '`r g b name` a line, for masks coded by colour'),
            ('--lists', 'DIR', 'of train.txt, val.txt: an image a line')):
        add(flag, default='', metavar=metavar, help=text)
    add('--val', type=float, default=0.2, metavar='SHARE',
        help='drawn for val if nothing tells (0.2)')
    add('--seed', type=int, default=0, help='of the draw')
    add = subs['shapes'].add_argument
    add('--train', type=int, default=400, help='pictures to train on (400)')
    add('--val', type=int, default=100, help='pictures to evaluate on (100)')
    add('--seed', type=int, default=0, help='of the drawings')
    subs['weights'].add_argument('--depth', type=int, nargs='+', default=[50, 101],
                                 choices=(18, 34, 50, 101, 152),
                                 help='of the ResNets (50 101)')
    add = subs['check'].add_argument
    add('--pictures', type=int, default=12, metavar='N',
        help='on the contact sheet (12)')
    add('words', nargs='*', metavar='NAME=VALUE',
        help='settings: DATASET=voc DATA_ROOT=/fast/voc')
    return parser.parse_args()


if __name__ == '__main__':
    options = read_options()
    runtime.run(options.make, options)
