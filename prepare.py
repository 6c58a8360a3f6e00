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
import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

from tqdm import tqdm

import recipes
import runtime
import settings
from preparation import masks
from preparation.sources import Sources, download, make_files, start_pool, write_list

OWN_MASKS = 'masks_made'  # folder of the masks of a user's own that were converted
VOC_COLOURS = recipes.voc_palette()
FOLDER_PALETTE = VOC_COLOURS[3:765] + [64, 64, 64] + VOC_COLOURS[765:]  # 0 is not black


# -- data sets -------------------------------------------------------------------------

def place(args: argparse.Namespace) -> Path:
    """Return the folder that the data set is made in."""
    return Path(args.root or recipes.DATASETS[args.name]['root'])


def finish(root: Path, words: str) -> None:
    """Print what to do next."""
    words += ' ' + shlex.quote(f'DATA_ROOT={root}')
    print(f'done. Check it:  python prepare.py check {words}\n'
          f'then train:      python train.py {words}')


def prepare_voc(args: argparse.Namespace) -> None:
    """PASCAL VOC 2012 with the masks of SBD, 21 classes.

    Wanted: VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012) and
    benchmark.tgz (SBD, the Semantic Boundaries Dataset, www2.eecs.berkeley.edu);
    --download fetches both, 3.4 GB. Besides, if you have it, VOC2012test.tar of the
    test server. The list trainaug is VOC's train and SBD's train and val, less VOC's
    val; VOC's own masks go before SBD's.
    """
    root, counts = place(args), recipes.DATASETS['voc']['counts']
    fetch = ('VOCtrainval_11-May-2012.tar', 'benchmark.tgz') if args.download else ()
    sources = Sources(args.archive, root, fetch, not_from=r'VOC(?!2012)\d{4}/')
    get = ('give VOCtrainval_11-May-2012.tar and benchmark.tgz, or the folders they '
           'were unpacked into, with --archive, or say --download')
    lists = sources.lists(r'ImageSets/Segmentation/(train|val|test)\.txt$', 'train',
                          'val')
    sbd = sources.lists(r'(?:^[^/]+|dataset)/(train|val)\.txt$', 'train', 'val')
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
    fetch = ('VOCtrainval_03-May-2010.tar',) if args.download else ()
    sources = Sources(args.archive, root, fetch, not_from=r'VOC(?!2010|2012)\d{4}/')
    get = ('give the pictures VOCtrainval_03-May-2010.tar and the label maps '
           'trainval.tar.gz with --archive')
    lists = (sources.lists(r'^[^/]+/(train|val)\.txt$', 'train', 'val')
             or sources.lists(r'VOC2010/.*Main/(train|val)\.txt$', 'train', 'val'))
    if not lists:
        raise ValueError(f'there are no lists train.txt and val.txt: {get}')
    for file in sources.find(r'(?:^|/)(labels|classes-459)\.txt$').values():
        masks.check_context_names(file.read_text(errors='replace'))
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
    sources = Sources(args.archive, place(args))
    get = ('give cocostuff-10k-v1.1.zip, or stuffthingmaps_trainval2017.zip with the '
           'pictures and the folder of the lists, with --archive')
    lists = sources.lists(r'(?:^[^/]+|imageLists)/(train|test)\.txt$', 'train', 'test')
    mats = sources.find(r'COCO_train2014_(\d{12})\.mat$')
    make_cocostuff(args, sources, lists, mats, get)


def prepare_cocostuff164k(args: argparse.Namespace) -> None:
    """COCO-Stuff 164k, 171 classes.

    Wanted: stuffthingmaps_trainval2017.zip (github.com/nightrome/cocostuff),
    train2017.zip and val2017.zip (cocodataset.org).
    """
    sources = Sources(args.archive, place(args))
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
    sources = Sources(args.archive, root)
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
        else:
            print(f'there are no frames of {split}, so there is no list {split}')
    finish(root, 'DATASET=cityscapes')


def prepare_coco_voc(args: argparse.Namespace) -> None:
    """COCO with the 21 classes of VOC, for the VOC test server.

    Wanted: annotations_trainval2017.zip, train2017.zip and val2017.zip
    (cocodataset.org), and pip install pycocotools. Images with fewer than 1,000 pixels
    of the 20 classes are left out. Reading the annotations takes several GB of memory.
    """
    root = place(args)
    sources = Sources(args.archive, root)
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
    found = {}
    for split, file in files.items():
        try:
            found[split] = masks.read_instances(json.loads(file.read_bytes()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file} is cut off or no file of instances ({error!r}): '
                             'get it again') from error
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
    n = sum(map(len, found.values())) - len(lists['trainval'])
    print(f'{n} images have fewer than {masks.LEAST_PIXELS} labelled pixels and are '
          'left out')
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
    become masks of values with --colours, a file with `r g b name` a line; the name
    void is ignored.

        python prepare.py folder --images my/images --masks my/masks --map 11=255
    """
    root, images, drawn = place(args), Path(args.images), Path(args.masks)
    pairs, lost = masks.pair_up(images, drawn, args.image_tag, args.mask_tag)
    splits = masks.split_up(pairs, args.lists, args.val, args.seed)
    print(f'{len(pairs)} images with masks: '
          + ', '.join(f'{len(keys)} to {split}' for split, keys in splits.items())
          + (f'; {len(lost)} images or masks have no partner and are left out, the '
             f'first is {lost[0]}' if lost else ''), flush=True)
    facts = {'palette': FOLDER_PALETTE, 'map': {}, 'images': below(root, images),
             'masks': [below(root, drawn)]}
    file = root / 'dataset.json'
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.get('images', facts['images']) != facts['images']:
        other = before['images'].removesuffix('/{}')
        raise ValueError(f'{root} holds the data set of other images ({other}): give '
                         'another --root')
    if args.colours:
        facts['classes'], table = masks.read_colours(Path(args.colours))
        shown = {label: rgb for rgb, label in table.items()}
        facts['palette'] = recipes.fill_palette(
            *(shown[i] for i in range(len(facts['classes']))))
        convert = functools.partial(masks.by_colour, table)
    else:
        paths = [drawn / mask for _, mask in pairs.values()]
        facts['classes'], facts['map'], is_plain = read_values(args, paths)
        convert, table = None if is_plain else masks.by_value, {}
    lock = runtime.lock(root, '--root')
    if convert:  # else the masks are read where they are
        stats = [(mask, os.stat(drawn / mask)) for _, mask in pairs.values()]
        clear_masks(root / OWN_MASKS, [str(table), *(
            f'{mask} {stat.st_size} {stat.st_mtime_ns}' for mask, stat in stats)])
        make_files(root, {Path(OWN_MASKS, f'{key}.png'): (drawn / mask, convert)
                          for key, (_, mask) in pairs.items()}, '')
        pairs = {key: (image, f'{key}.png') for key, (image, _) in pairs.items()}
        facts['masks'] = [f'{OWN_MASKS}/{{}}']
    print(f'writing into {root}: dataset.json and the lists\n'
          f'{len(facts["classes"])} classes: {", ".join(facts["classes"])}')
    ours = before.get('lists', {})
    facts['lists'] = {split: write_list(
        root, split, ('\t'.join(pairs[key]) for key in keys), None, ours.get(split, ''))
        for split, keys in splits.items()}
    runtime.write_text(file, json.dumps(facts) + '\n')
    lock.close()
    finish(root, 'DATASET=folder')


def clear_masks(folder: Path, made_from: list[str]) -> None:
    """Remove the masks that we made of other files, or with another table."""
    mark = folder / 'made_from.txt'
    digest = hashlib.sha256('\n'.join(made_from).encode()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return
    if folder.is_dir():
        print(f'the masks or the table have changed: {folder} is made anew')
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    runtime.write_text(mark, digest)


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
    classes = tuple(masks.read_lines(file)) if file.is_file() else ()
    if args.classes and not classes:
        raise FileNotFoundError(f'--classes {file} is not there: give a text file with '
                                'a name a line, in the order of the values')
    value_map, is_plain, found = masks.read_map(args.map, classes), True, {}
    with start_pool() as pool:
        try:
            looks = tqdm(pool.map(masks.look_at, paths, chunksize=16), 'reading',
                         len(paths), unit='mask', disable=None)
            for path, (values, problem, is_byte) in zip(paths, looks, strict=True):
                if problem:
                    raise ValueError(f'{path}: {problem}')
                is_plain &= is_byte
                found |= {value: path for value in values if value not in found}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if set(found) == {0, 255} and 255 not in value_map:
        raise ValueError('the masks have the values 0 and 255 only, and 255 is '
                         'ignored: say --map 255=1 if it is the second class')
    labels = {value: value_map.get(value, value) for value in found}
    used = sorted({*labels.values()} - {masks.VOID})
    for value, label in labels.items():
        if classes and masks.VOID != label >= len(classes):
            raise ValueError(
                f'{found[value]} has the value {value}, but {file} names '
                f'{len(classes)} classes, 0 to {len(classes) - 1}: name it there, or '
                f'say --map {value}=CLASS, or --map {value}=255 to ignore it')
    top = max(used, default=0)
    if not classes and len(used) <= top:
        first = found[next(v for v, label in labels.items() if label == top)]
        print(f'note: not all values up to {top} occur; is {top}, as in {first}, a '
              f'class? --map {top}=255 ignores it, --classes gives names')
    unused = sorted(set(value_map) - set(found))
    if unused:
        print(f'note: --map names values that no mask has: {unused}')
    return (classes or tuple(f'class {i}' for i in range(max(top, 1) + 1)), value_map,
            is_plain)


def below(root: Path, folder: Path) -> str:
    """Return the pattern of a folder's files, relative to root where it is below it."""
    folder, root = folder.resolve(), root.resolve()
    if folder.is_relative_to(root):
        folder = folder.relative_to(root)
    return f'{folder.as_posix()}/{{}}'


def prepare_shapes(args: argparse.Namespace) -> None:
    """Draw the embedded data set, in seconds; pictures that are there are kept."""
    from preparation import shapes
    root = place(args)
    lock = runtime.lock(root, '--root')
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
    lock.close()
    print('done: python train.py RECIPE=demo'
          + (f' DATA_ROOT={root}' if args.root else ''))


def prepare_weights(args: argparse.Namespace) -> None:
    """torchvision's ImageNet weights, for machines without a network."""
    from torchvision.models import get_model_weights
    folder = Path(args.root or settings.MODEL_DIR)
    for depth in args.depth:
        url = get_model_weights(f'resnet{depth}')['IMAGENET1K_V1'].url
        name = url.rsplit('/', 1)[-1]  # it ends with how its sha256 begins
        download(url, folder / name, 'sha256', re.search(r'-(\w+)\.', name)[1],
                 f'put that file into {folder}/ by hand')


def check_data(args: argparse.Namespace) -> int:
    """Go over every file of the data set in settings, on all cores.

    Prints counts, classes and all that is wrong; writes check_*.json and a picture into
    LOG_DIR. The exit status is 1 where training would stop.
    """
    runtime.override(args.words)
    if args.pictures < 0:
        raise ValueError(f'--pictures {args.pictures}: 0 or more is expected')
    from preparation import check
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
    names, subs = parser.add_subparsers(required=True, dest='name'), {}
    for name, make in MAKERS.items():
        text = inspect.getdoc(make)
        sub = subs[name] = names.add_parser(name, help=text.splitlines()[0],
                                            description=text, **layout)
        sub.set_defaults(make=make)
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the pool as well
    runtime.run(options.make, options)
