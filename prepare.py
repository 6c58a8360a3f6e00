"""Make a data set ready for training, once, and check it before a GPU sees it.

    python prepare.py voc --download          # or with --archive FILE what you have
    python prepare.py folder --images photos --masks masks --root data/mine
    python prepare.py check DATASET=folder DATA_ROOT=data/mine

`python prepare.py NAME --help` says where each is to be got. An --archive is a tar, tgz
or zip as it was published, the folder it was unpacked into, or a single file; archives
are unpacked into ROOT/unpacked. A file gets its name when it is complete and is kept
then, so a run that was stopped can be repeated.
"""
import argparse
import inspect
import re
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from torch.hub import download_url_to_file

import config
import recipes
import settings
from logger import lock_folder
from preparation import check, folder, published, shapes


def prepare_shapes(args: argparse.Namespace) -> None:
    """Draw the embedded data set, in seconds; pictures that exist are kept."""
    root = published.get_root(args)
    if args.train < 1 or args.val < 1 or args.seed < 0:
        raise config.UserError(
            f'--train {args.train} --val {args.val} --seed {args.seed}: at least one '
            'picture each and a seed of 0 or more are expected')
    print(f'drawing {args.train} + {args.val} pictures into {root}, those that exist '
          'are kept')
    with lock_folder(root, '--root'):
        shapes.write(root, args.train, args.val, args.seed)
    command = 'python train.py RECIPE=demo'
    if args.root:
        command += f' DATA_ROOT={root}'
    print(f'done: {command}')


def prepare_weights(args: argparse.Namespace) -> None:
    """torchvision's ImageNet weights, for machines without a network."""
    from torchvision.models import get_model_weights  # as slow as torch itself
    models = Path(args.root or settings.MODEL_DIR)
    models.mkdir(parents=True, exist_ok=True)
    for depth in args.depth:
        url = get_model_weights(f'resnet{depth}')['IMAGENET1K_V1'].url
        file = models / url.rsplit('/', 1)[-1]
        sha256 = re.search(r'-(\w+)\.', file.name)[1]  # its first digits
        try:
            if not file.exists():
                download_url_to_file(url, str(file), sha256)
        except (OSError, HTTPException, RuntimeError) as error:
            raise config.UserError(f'could not fetch {url} ({error}): put that file '
                                   f'into {models}/ by hand') from error
        print(f'{file} is complete')


def check_data(args: argparse.Namespace) -> int:
    """Go over every file of the data set in settings, on all cores.

    Prints counts, classes and all that is wrong; writes check_*.json and a picture into
    LOG_DIR. The exit status is 1 where training would stop.
    """
    config.apply_overrides(args.words)
    if args.pictures < 0:
        raise config.UserError(f'--pictures {args.pictures}: 0 or more is expected')
    is_sound = check.check(settings.LOG_DIR, args.pictures)
    return 0 if is_sound else 1


# -- command line ----------------------------------------------------------------------

COMMANDS = {
    'voc': published.prepare_voc, 'context': published.prepare_context,
    'cocostuff10k': published.prepare_cocostuff10k,
    'cocostuff164k': published.prepare_cocostuff164k,
    'cityscapes': published.prepare_cityscapes, 'coco_voc': published.prepare_coco_voc,
    'folder': folder.prepare_folder, 'shapes': prepare_shapes,
    'weights': prepare_weights, 'check': check_data}
FOLDER_OPTIONS = (
    ('--image-tag', 'END', "end of the images' names that the masks' lack"),
    ('--mask-tag', 'END', "end of the masks' names that the images' lack"),
    ('--classes', 'FILE', 'a name a line (default: classes.txt beside the folder of '
                          'the images, if it is there)'),
    ('--map', 'MAP', 'what values mean: 11=255,12=road'),
    ('--colours', 'FILE', '`r g b name` a line, for masks coded by colour'),
    ('--lists', 'DIR', 'of train.txt, val.txt: an image a line'))


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    layout = {'formatter_class': argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    commands = parser.add_subparsers(required=True, dest='name', metavar='NAME')
    for name, function in COMMANDS.items():
        text = inspect.getdoc(function)
        command = commands.add_parser(name, help=text.splitlines()[0], description=text,
                                      **layout)
        command.set_defaults(function=function)
        add_options(name, command.add_argument)
    return parser.parse_args()


def add_options(name: str, add: Callable) -> None:
    """Add the options of a command."""
    if name != 'check':
        root = recipes.DATASETS.get(name, {'root': settings.MODEL_DIR})['root']
        add('--root', default='', metavar='DIR', help=f'folder to make it in ({root})')
    if name == 'folder':
        add('--images', required=True, metavar='DIR', help='jpg, png, tif or bmp')
        add('--masks', required=True, metavar='DIR', help='palette, grey or RGB')
        for flag, metavar, text in FOLDER_OPTIONS:
            add(flag, default='', metavar=metavar, help=text)
        add('--val', type=float, default=0.2, metavar='SHARE',
            help='drawn for val if nothing tells (0.2)')
        add('--seed', type=int, default=0, help='of the draw')
    elif name == 'shapes':
        add('--train', type=int, default=400, help='pictures to train on (400)')
        add('--val', type=int, default=100, help='pictures to evaluate on (100)')
        add('--seed', type=int, default=0, help='of the drawings')
    elif name == 'weights':
        add('--depth', type=int, nargs='+', default=[50, 101],
            choices=(18, 34, 50, 101, 152), help='of the ResNets (50 101)')
    elif name == 'check':
        add('--pictures', type=int, default=12, metavar='N',
            help='on the contact sheet (12)')
        add('words', nargs='*', metavar='NAME=VALUE',
            help='settings: DATASET=voc DATA_ROOT=/fast/voc')
    else:
        add('--archive', nargs='+', action='extend', default=[], metavar='FILE',
            help='archives, or the folders they were unpacked into')
    if name in ('voc', 'context'):
        add('--download', action='store_true',
            help='fetch what torchvision has the address of')


def main() -> int | None:
    """Run the command that was named."""
    args = parse_args()
    return args.function(args)


if __name__ == '__main__':
    config.run(main)
