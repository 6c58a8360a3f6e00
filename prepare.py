"""Make a data set ready for training, once.

    python prepare.py shapes                 # draw the embedded data set, in seconds
    python prepare.py shapes --root /fast/disk/shapes --train 400 --val 100
"""
import argparse
from pathlib import Path

import runtime


def prepare_shapes(args: argparse.Namespace) -> None:
    """Draw the embedded data set in the VOC layout; what is there is kept."""
    from tqdm import tqdm

    import dataset
    import shapes
    facts = dataset.DATASETS['shapes']
    root = Path(args.root or facts['root'])
    if args.train < 1 or args.val < 1 or args.seed < 0:
        raise ValueError(f'--train {args.train} --val {args.val} --seed {args.seed}: '
                         'at least one picture each and a seed of 0 or more are '
                         'expected')
    there = len(list((root / 'JPEGImages').glob('shapes_*.jpg')))
    print(f'drawing {args.train} + {args.val} pictures into {root}'
          + (f'; the {there} that are there are kept' if there else ''))
    shapes.write(root, args.train, args.val, args.seed, facts['palette'],
                 lambda ids: tqdm(ids, 'drawing', unit='image', disable=None))
    print(f'done: python train.py RECIPE=demo DATA_ROOT={root}' if args.root else
          'done: python train.py RECIPE=demo')


def main() -> None:
    """Read the command line and prepare the data set it names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(metavar='NAME', required=True)
    sub = names.add_parser('shapes', help='draw the embedded data set')
    sub.add_argument('--root', default='', help='folder (default data/shapes)')
    sub.add_argument('--train', type=int, default=400, help='pictures to train on')
    sub.add_argument('--val', type=int, default=100, help='pictures to evaluate on')
    sub.add_argument('--seed', type=int, default=0, help='of the drawings')
    sub.set_defaults(prepare=prepare_shapes)
    args = parser.parse_args()
    runtime.run(args.prepare, args)


if __name__ == '__main__':
    main()
