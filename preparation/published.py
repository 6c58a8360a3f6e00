"""The published data sets: which of their files become images, masks and lists.

    python prepare.py voc --archive VOCtrainval_11-May-2012.tar benchmark.tgz

Each prepare function makes one data set; its docstring is the --help of its command.
"""
import argparse
import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import recipes
from config import UserError
from preparation import masks
from preparation.files import make_files, write_lists
from preparation.sources import Sources

if TYPE_CHECKING:
    from pycocotools.coco import COCO

Job = tuple[Any, Callable | None]  # source of a file and what converts it


def get_root(args: argparse.Namespace) -> Path:
    """Return the folder that the data set is made in."""
    return Path(args.root or recipes.DATASETS[args.name]['root'])


def print_next(root: Path, overrides: str) -> None:
    """Print the two commands that come next."""
    overrides += ' ' + shlex.quote(f'DATA_ROOT={root}')
    print(f'done. Check it:  python prepare.py check {overrides}\n'
          f'then train:      python train.py {overrides}')


def finish(args: argparse.Namespace, sources: Sources, wanted: dict[Path, Job],
           lists: dict[str, list[str]], overrides: str = '') -> None:
    """Write the files and the lists, and print what comes next."""
    make_files(get_root(args), wanted, sources.advice)
    write_lists(get_root(args), lists, recipes.DATASETS[args.name]['counts'])
    print_next(get_root(args), f'DATASET={args.name}{overrides}')


def prepare_voc(args: argparse.Namespace) -> None:
    """PASCAL VOC 2012 with the masks of SBD, 21 classes.

    Wanted: VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012) and
    benchmark.tgz (SBD, the Semantic Boundaries Dataset, www2.eecs.berkeley.edu);
    --download fetches both, 3.4 GB. Optional: VOC2012test.tar of the test server.
    The list trainaug is VOC's train and SBD's train and val without VOC's val. Where
    both have a mask, VOC's is taken.
    """
    fetch = ('VOCtrainval_11-May-2012.tar', 'benchmark.tgz') if args.download else ()
    sources = Sources('voc', args.archive, get_root(args), fetch,
                      skip=r'VOC(?!2012)\d{4}/')
    lists = sources.read_lists(r'ImageSets/Segmentation/(train|val|test)\.txt$',
                               'train', 'val')
    sbd = sources.read_lists(r'(?:^[^/]+|dataset)/(train|val)\.txt$')
    images = {**sources.find(r'(?:^|/)img/([^/]+)\.jpg$'),
              **sources.find(r'(?:^|/)JPEGImages/([^/]+)\.jpg$')}
    pngs = sources.find(r'(?:^|/)SegmentationClass/([^/]+)\.png$')
    mats = sources.find(r'(?:^|/)cls/([^/]+)\.mat$')
    labelled = lists['trainval'] = lists['train'] + lists['val']
    folder, overrides = 'SegmentationClass', ' TRAIN_SPLIT=train'
    if mats and len(sbd) == 2:
        lists['trainaug'] = join_trainaug(lists['train'], lists['val'],
                                          sbd['train'] + sbd['val'])
        labelled = labelled + lists['trainaug']
        folder, overrides = 'SegmentationClassAug', ''
    else:
        print('SBD (benchmark.tgz) was not given, so there is no list trainaug, which '
              'the published recipe trains on')
    wanted = {Path('JPEGImages', f'{i}.jpg'): (images.get(i), None)
              for ids in lists.values() for i in ids}
    for i in labelled:
        mask = (pngs[i], None) if i in pngs else (mats.get(i), masks.read_sbd)
        wanted[Path(folder, f'{i}.png')] = mask
    finish(args, sources, wanted, lists, overrides)


def join_trainaug(train: list[str], val: list[str], sbd: list[str]) -> list[str]:
    """Return the ids of VOC's train and of SBD without those of VOC's val."""
    return list(dict.fromkeys(train + sorted(set(sbd) - set(val))))


def prepare_context(args: argparse.Namespace) -> None:
    """PASCAL Context, 60 classes with background (context) or 59 (context59).

    Wanted: VOCtrainval_03-May-2010.tar, which --download fetches, and the label maps
    trainval.tar.gz (cs.stanford.edu/~roozbeh/pascal-context). Lists train.txt and
    val.txt of your own, given in a folder, are taken instead of those of VOC 2010.
    """
    fetch = ('VOCtrainval_03-May-2010.tar',) if args.download else ()
    sources = Sources('context', args.archive, get_root(args), fetch,
                      skip=r'VOC(?!2010|2012)\d{4}/')
    lists = sources.read_lists(r'^[^/]+/(train|val)\.txt$')
    if len(lists) < 2:
        lists = sources.read_lists(r'VOC2010/.*Main/(train|val)\.txt$', 'train', 'val')
    images = sources.find(r'(?:^|/)JPEGImages/([^/]+)\.jpg$')
    mats = sources.find(r'(?:^|/)(\d{4}_\d{6})\.mat$')
    wanted = {}
    for i in lists['train'] + lists['val']:
        wanted[Path('JPEGImages', f'{i}.jpg')] = images.get(i), None
        wanted[Path('SegmentationClass', f'{i}.png')] = mats.get(i), masks.read_context
    finish(args, sources, wanted, lists)


def prepare_cocostuff10k(args: argparse.Namespace) -> None:
    """COCO-Stuff 10K, 171 classes.

    Wanted: cocostuff-10k-v1.1.zip (github.com/nightrome/cocostuff10k). Or the maps of
    164k, stuffthingmaps_trainval2017.zip (github.com/nightrome/cocostuff), with
    train2017.zip and val2017.zip (cocodataset.org) and the folder of the 10K lists
    train.txt and test.txt.
    """
    sources = Sources('cocostuff10k', args.archive, get_root(args))
    lists = sources.read_lists(r'(?:^[^/]+|imageLists)/(train|test)\.txt$', 'train',
                               'test')
    mats = sources.find(r'COCO_train2014_(\d{12})\.mat$')
    make_cocostuff(args, sources, lists, mats)


def prepare_cocostuff164k(args: argparse.Namespace) -> None:
    """COCO-Stuff 164k, 171 classes.

    Wanted: stuffthingmaps_trainval2017.zip (github.com/nightrome/cocostuff),
    train2017.zip and val2017.zip (cocodataset.org).
    """
    sources = Sources('cocostuff164k', args.archive, get_root(args))
    lists = {split: sorted(sources.find(rf'{split}2017/(\d{{12}})\.png$'))
             for split in ('train', 'val')}
    lists = {split: ids for split, ids in lists.items() if ids}
    if not lists:
        raise UserError('there are no maps train2017/*.png or val2017/*.png in what '
                        f'was given: {sources.advice}')
    make_cocostuff(args, sources, lists, {})


def make_cocostuff(args: argparse.Namespace, sources: Sources,
                   lists: dict[str, list[str]], mats: dict[str, Path]) -> None:
    """Make either COCO-Stuff; the last 12 digits of an id find its files."""
    images = sources.find(r'(?<!\d)(\d{12})\.jpg$')
    maps = sources.find(r'(?:train|val)2017/(\d{12})\.png$')
    wanted = {}
    for i in [i for ids in lists.values() for i in ids]:
        number = i[-12:]
        mask = maps.get(number), masks.read_stuff_png
        if number in mats:
            mask = mats[number], masks.read_stuff_mat
        wanted[Path('JPEGImages', f'{i}.jpg')] = images.get(number), None
        wanted[Path('SegmentationClass', f'{i}.png')] = mask
    finish(args, sources, wanted, lists)


def prepare_cityscapes(args: argparse.Namespace) -> None:
    """Cityscapes, 19 classes.

    Wanted: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of
    cityscapes-dataset.com (after registration). A folder that already holds leftImg8bit
    and gtFine can be the --root: only the lists are written. The label ids stay in the
    files, they become classes when a mask is read.
    """
    sources = Sources('cityscapes', args.archive, get_root(args))
    frames = sources.find(r'leftImg8bit/((?:train|val|test)/.+)_leftImg8bit\.png$')
    labels = sources.find(r'gtFine/((?:train|val|test)/.+)_gtFine_labelIds\.png$')
    if not frames:
        raise UserError('there are no frames leftImg8bit/*/*/*.png in what was given: '
                        f'{sources.advice}')
    wanted, lists = {}, {}
    for i, frame in sorted(frames.items()):
        split = i.split('/')[0]
        lists.setdefault(split, []).append(i)
        wanted[Path('leftImg8bit', f'{i}_leftImg8bit.png')] = frame, None
        if i in labels or split != 'test':
            wanted[Path('gtFine', f'{i}_gtFine_labelIds.png')] = labels.get(i), None
    finish(args, sources, wanted, lists)


def prepare_coco_voc(args: argparse.Namespace) -> None:
    """COCO with the 21 classes of VOC, for the VOC test server.

    Wanted: annotations_trainval2017.zip, train2017.zip and val2017.zip
    (cocodataset.org), and pip install pycocotools. Images with fewer than 1,000 pixels
    of the 20 classes are left out. Reading the annotations takes several GB of memory.
    """
    root = get_root(args)
    sources = Sources('coco_voc', args.archive, root)
    images = sources.find(r'([^/]+)\.jpg$')
    files = sources.find(r'instances_(train|val)20\d\d\.json$')
    if not files:
        raise UserError('there is no instances_train2017.json in what was given: '
                        f'{sources.advice}')
    drawn, lists = {}, {}
    for split, file in files.items():
        coco, classes = read_coco(file)
        ids = {Path(coco.imgs[item['image_id']]['file_name']).stem: item['image_id']
               for item in coco.anns.values() if item['category_id'] in classes}
        lists[split] = sorted(ids)
        for i in ids:
            if i not in images:
                raise UserError(f'{i}.jpg is not in what was given: {sources.advice}')
            draw = functools.partial(masks.draw_instances, coco, classes)
            drawn[Path('SegmentationClass', f'{i}.png')] = ids[i], draw
    make_files(root, drawn, sources.advice)
    for split in files:  # without the images that were left out
        lists[split] = [i for i in lists[split]
                        if (root / 'SegmentationClass' / f'{i}.png').exists()]
    lists['trainval'] = sum(lists.values(), [])
    print(f'{len(drawn) - len(lists["trainval"])} images have fewer than '
          f'{masks.MIN_PIXELS} labelled pixels and are left out')
    linked = {Path('JPEGImages', f'{i}.jpg'): (images[i], None)
              for i in lists['trainval']}
    finish(args, sources, linked, lists)


def read_coco(file: Path) -> tuple['COCO', dict[int, int]]:
    """Return (a COCO annotation file, id of a category -> VOC class)."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise UserError('COCO is read with pycocotools: pip install pycocotools'
                        ) from None
    try:
        coco, classes = COCO(file), {}
        for category in coco.cats.values():
            name = masks.VOC_FROM_COCO.get(category['name'], category['name'])
            if name in recipes.VOC:
                classes[category['id']] = recipes.VOC.index(name)
        return coco, classes
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f'{file} is cut off or no file of instances ({error!r}): get '
                        'it again') from error
