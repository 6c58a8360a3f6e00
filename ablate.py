"""Ablations: copy the project for every experiment, run the copies, report the results.

    python ablate.py list
    python ablate.py make bases iterations runs/study --scale laptop --seeds 1,2,3
    python ablate.py run runs/study --jobs 2        # the same command resumes
    python ablate.py report runs/study/results.json --out runs/study.md
    python ablate.py copy ../EMANet.stages5 STAGE_NUM=5

`make` copies the project for each variant and seed, changes the lines of settings.py
that differ, and links data/ and models/; NAME=VALUE words hold for all copies. `run`
trains and evaluates what is not finished, and collects DIR/results.json. `copy` makes
one such copy.
"""
import argparse
import shlex
from pathlib import Path

import config
import recipes
from ablation import folders, report, running
from ablation.experiments import EXPERIMENTS, SCALES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands."""
    parser.add_argument('--scale', default='', metavar='|'.join(SCALES),
                        help="make: the recipe (paper, or that of DIR's folders)")
    parser.add_argument('--seeds', default='1', metavar='S,S,...',
                        help='make: one folder for each seed (1)')
    parser.add_argument('--jobs', type=int, default=0, metavar='N',
                        help='run: folders at a time (1, or one a device)')
    parser.add_argument('--devices', default='', metavar='D,D,...',
                        help='run: as in cuda:0,cuda:1 (that of settings.py)')
    parser.add_argument('--again', action='store_true',
                        help='run: retry the folders that failed')
    parser.add_argument('--out', default='docs/ablations.md', metavar='FILE',
                        help='report: the Markdown file (docs/ablations.md); figures '
                             'go into the folder of that name')


def one_folder(command: str, inputs: list[str]) -> Path:
    """Return the folder of a command that takes one."""
    if len(inputs) != 1:
        raise config.UserError(f'{command} {" ".join(inputs)}: one folder is expected, '
                               f'as in {command} runs/study')
    return Path(inputs[0])


def list_experiments(inputs: list[str], args: argparse.Namespace) -> None:
    """Print the experiments with their variants, and the scales."""
    for name, about in EXPERIMENTS.items():
        print(f'{name}: {about["about"]}')
        for label, variant in about['variants'].items():
            words = [f'{key}={config.format_value(value)}'
                     for key, value in variant.items()]
            print(f'    {label:32} {" ".join(words) or "the baseline"}')
    for scale, recipe in SCALES.items():
        print(f'--scale {scale}: {recipes.RECIPES[recipe]["about"]}')


def make(inputs: list[str], args: argparse.Namespace) -> None:
    """Make the folders of experiments."""
    if len(inputs) < 2 or inputs[-1] in EXPERIMENTS:
        raise config.UserError(f'make {" ".join(inputs)}: names of experiments and '
                               'then a folder are expected, as in make bases '
                               'runs/bases; `python ablate.py list` shows the names')
    *names, root = inputs
    seeds = config.parse_value('--seeds', args.seeds, (1, 2, 3))
    seeds = tuple(dict.fromkeys(seeds))  # each once
    n_made, n_there = folders.make(names, Path(root), args.scale, seeds, args.overrides)
    print(f'{root}: {n_made} folders made, {n_there} existed already\n'
          f'next: python ablate.py run {shlex.quote(root)}')


def copy(inputs: list[str], args: argparse.Namespace) -> None:
    """Make a single copy of the project."""
    folder = one_folder('copy', inputs)
    values = folders.make_paths_absolute(folders.read_settings(config.ROOT),
                                         config.ROOT)
    values |= folders.make_paths_absolute(args.overrides, Path.cwd())
    folders.copy_project(folder, values)
    print(f'{folder}: a copy without data, results and virtual environment')


def run(inputs: list[str], args: argparse.Namespace) -> int:
    """Train and evaluate the folders of a study."""
    root = one_folder('run', inputs)
    if args.jobs < 0:
        raise config.UserError(f'--jobs {args.jobs}: 1 or more is expected')
    devices = [name.strip() for name in args.devices.split(',') if name.strip()]
    return running.run(root, args.jobs or len(devices) or 1, devices, args.again)


def write_report(inputs: list[str], args: argparse.Namespace) -> None:
    """Write tables and figures of results."""
    if not inputs:
        raise config.UserError('report: files of results are expected, as in '
                               'runs/study/results.json')
    report.report([Path(file) for file in inputs], Path(args.out))


COMMANDS = {'list': list_experiments, 'make': make, 'copy': copy, 'run': run,
            'report': write_report}


def main() -> int | None:
    """Run the command that the first word names."""
    doc = f'{__doc__}\nexperiments: {", ".join(EXPERIMENTS)}'
    args = config.parse_args(doc, add_options, '|'.join(COMMANDS))
    command, *inputs = args.inputs or ['list']
    config.check_name(command, COMMANDS, 'command')
    if args.overrides and command not in ('make', 'copy'):
        raise config.UserError(f'{command} takes no settings, but '
                               f'{", ".join(args.overrides)} was given: give settings '
                               'to make, which writes them into each settings.py')
    return COMMANDS[command](inputs, args)


if __name__ == '__main__':
    config.run(main)
