"""Tables and pictures of studies, from their JSON alone.

    python ablate.py report docs/ablations/camvid.json --out docs/ablations.md

A study is called as its file. In the Markdown, what stands between `<!-- ablate: STUDY
EXPERIMENT -->` and `<!-- end -->` is written anew, the prose around it is left alone.
"""
import io
import json
import re
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from scipy.special import stdtrit

import drawing
import runtime
from ablation.experiments import EXPERIMENTS, FIGURE_4

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000',
           '#999999')
DASHES = ('-', '--', ':')
POINTS, DPI = 8, 140        # the letters of a picture, and its pixels per inch
SHARE = 0.95                # of the t-intervals
MARK, ANY_MARK, END = '<!-- ablate: {} {} -->', '<!-- ablate:', '<!-- end -->'
# Settings that say where files are and how fast it goes: not told.
UNTOLD = ('DATA_ROOT', 'MODEL_DIR', 'CACHE', 'N_WORKERS', 'LOG_EVERY', 'IMAGE_EVERY',
          'ITER_SAVE', 'KEEP', 'EVAL_EVERY', 'DEVICE', 'RANKS')


class Experiment(NamedTuple):
    """What a study has of an experiment."""
    study: str
    name: str
    about: dict[str, Any]               # of EXPERIMENTS
    variants: dict[str, dict[int, dict]]  # label -> seed -> result
    baseline: str                       # label; '' where no variant has its settings
    base: dict[str, Any]                # what of settings.py the baseline has otherwise

    @property
    def seeds(self) -> list[int]:
        """All seeds, in order."""
        return sorted({seed for runs in self.variants.values() for seed in runs})

    def scores(self, label: str, stages: int = 0) -> dict[int, float]:
        """Return a variant's mIoU in percent, of each seed that has one.

        Args:
            stages: iterations at evaluation; 0 is as the variant wants it.
        """
        return {seed: 100 * run['mIoU'][str(stages or run['stages'])]
                for seed, run in sorted(self.variants[label].items())
                if str(stages or run['stages']) in run['mIoU']}

    def stages(self) -> list[int]:
        """Return all numbers of iterations at evaluation that were scored."""
        return sorted({int(t) for runs in self.variants.values()
                       for run in runs.values() for t in run['mIoU']
                       if len(run['mIoU']) > 1})

    def paper(self, label: str, stages: int = 0) -> float | None:
        """Return the paper's mIoU in percent, if it gives one."""
        number = self.about['variants'].get(label, {}).get('paper')
        if isinstance(number, dict):
            run = next(iter(self.variants[label].values()))
            return number.get(stages or run['stages'])
        return None if stages else number


# -- numbers ---------------------------------------------------------------------------

def read_study(file: Path) -> dict[str, Any]:
    """Read results that `run` wrote.

    Raises:
        FileNotFoundError, ValueError: in a sentence.
    """
    if file.is_dir():
        file = file / 'results.json'
    if not file.is_file():
        raise FileNotFoundError(f'{file} is not there: give the results.json of a '
                                'folder of `python ablate.py run`, or a copy of it')
    try:
        study = json.loads(file.read_text(encoding='utf-8'))
        if not all(run['serves'] for run in study['runs']):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{file} holds no results of `python ablate.py run`: give the '
                         'results.json of its folder, or a copy of it') from None
    return study


def sort_runs(name: str, study: dict[str, Any]) -> list[Experiment]:
    """Sort a study's runs into experiments, both in the order of experiments.py."""
    found = {}
    for run in study['runs']:
        for experiment, label in run['serves']:
            runtime.known(experiment, EXPERIMENTS, 'experiment')
            found.setdefault(experiment, {}).setdefault(label, {})[run['seed']] = run
    experiments = []
    for experiment, about in EXPERIMENTS.items():
        if experiment in found:
            labels = sorted(found[experiment], key=[*about['variants'],
                                                    *found[experiment]].index)
            variants = {label: found[experiment][label] for label in labels}
            baseline = next((
                label for label, runs in variants.items() if not about.get('chain')
                and not any(run['settings'] for run in runs.values())), '')
            experiments.append(Experiment(name, experiment, about, variants, baseline,
                                          study['base']))
    return experiments


def compare(scores: dict[int, float], base: dict[int, float]
            ) -> tuple[float, float, float] | None:
    """Return the mean difference of two variants and its t-interval, paired by seed.

    Args:
        scores: seed -> score.
        base: the same of the baseline.

    Returns:
        (mean, low, high); low and high are infinite with one seed in common, and there
        is nothing with none.
    """
    values = [scores[seed] - base[seed] for seed in scores if seed in base]
    if not values:
        return None
    mean, half = statistics.fmean(values), float('inf')
    if len(values) > 1:
        half = (stdtrit(len(values) - 1, (1 + SHARE) / 2) * statistics.stdev(values)
                / len(values) ** 0.5)
    return mean, mean - half, mean + half


def show_mean(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    if not values:
        return '-'
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.2f}{spread}'


# -- Markdown --------------------------------------------------------------------------

def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return ''.join(f'| {" | ".join(row)} |\n'
                   for row in (head, ['---'] * len(head), *rows))


def score_table(experiment: Experiment) -> str:
    """Return the table of an experiment: means, seeds, differences, the paper."""
    e, seeds, base = experiment, experiment.seeds, {}
    head = ['variant', 'mIoU', *(f'seed {seed}' for seed in seeds)]
    if e.baseline:
        base = e.scores(e.baseline)
        head.append(f'difference to {e.baseline}')
    rows = []
    for label, runs in e.variants.items():
        scores = e.scores(label)
        row = [label, show_mean([*scores.values()])]
        row += [f'{scores[seed]:.2f}' if seed in scores else
                'failed' if seed in runs else '-' for seed in seeds]
        if e.baseline:
            row.append(show_difference(compare(scores, base))
                       if label != e.baseline else '')
        number, note = e.paper(label), e.about['variants'].get(label, {})
        note = f' ({note["paper_note"]})' if note.get('paper_note') else ''
        rows.append([*row, f'{number:.2f}{note}' if number else '-'])
    return table([*head, 'paper'], rows)


def show_difference(difference: tuple[float, float, float] | None) -> str:
    """Return a difference with its interval as text."""
    if difference is None:
        return '-'
    mean, low, high = difference
    if high == float('inf'):
        return f'{mean:+.2f}'
    return f'{mean:+.2f} ({low:+.2f} .. {high:+.2f})'


def stages_table(experiment: Experiment) -> str:
    """Return the table of mIoU over the iterations at evaluation."""
    e, stages = experiment, experiment.stages()
    rows = []
    for label in e.variants:
        rows.append([label, *(show_mean([*e.scores(label, t).values()])
                              for t in stages)])
        numbers = [e.paper(label, t) for t in stages]
        if any(numbers):
            rows.append([f'*{label}, paper*', *(f'*{x:.2f}*' if x else ''
                                                for x in numbers)])
    return table(['evaluated with T =', *map(str, stages)], rows)


def verdict(experiment: Experiment) -> str:
    """Return the sentence that says which variants the seeds tell apart."""
    e, clear, unclear = experiment, [], []
    if not e.baseline:
        return ('No variant that was run has the settings of the baseline, so there '
                'are no differences to tell.')
    base = e.scores(e.baseline)
    for label in e.variants:
        n = len(e.scores(label).keys() & base.keys())
        if label == e.baseline or not n:
            continue
        mean, low, high = compare(e.scores(label), base)
        if low > 0 or high < 0:
            clear.append(f'{label} ({"better" if mean > 0 else "worse"}, {n} seeds)')
        else:
            unclear.append(f'{label} ({n} seed{"s" * (n > 1)})')
    parts = ([f'Told apart from {e.baseline} by the spread over seeds: '
              f'{", ".join(clear)}.'] if clear else [])
    if unclear:
        parts.append(f'Not told apart: {", ".join(unclear)}.' if clear else
                     f'No variant is told apart from {e.baseline} by the spread over '
                     f'seeds: {", ".join(unclear)}.')
    return ' '.join(parts) or 'There is nothing to compare yet.'


def failures(experiment: Experiment) -> str:
    """Return a line for each run that failed."""
    return ''.join(
        f'- {label}, seed {seed}, failed after step {run["step"]}: '
        f'{textwrap.shorten(run["error"], 160, placeholder=" ...")}\n'
        for label, runs in experiment.variants.items()
        for seed, run in sorted(runs.items()) if run['error'])


def describe_study(name: str, study: dict[str, Any], experiments: list[Experiment]
                   ) -> str:
    """Return what a study is: its settings, machine, time, and how to read it."""
    runs = study['runs']
    done = [run for run in runs if not run['error']]
    hours = sum(run['seconds'] for run in runs) / 3600
    n_failed = len(runs) - len(done)
    chains = [e.name for e in experiments if e.about.get('chain')]
    is_based = not chains or len(chains) < len(experiments)

    def told(values):
        return ', '.join(sorted({str(value) for value in values if value})) or 'unknown'

    machine = {key: told(run['environment'].get(key) for run in done)
               for key in ('device', 'torch', 'precision')}
    recipes = ([f'{study["scale"]} scale, recipe `{study["recipe"]}`'] * is_based
               + [f'{chain} with its own recipes' for chain in chains])
    failed = f', {n_failed} failed: each is told below its table' * bool(n_failed)
    parts = [
        f'Study `{name}`: {", ".join(recipes)}; {len(done)} of {study["n_planned"]} '
        f'runs are finished{failed}; {hours:.1f} hours of training on '
        f'{machine["device"]}; torch {machine["torch"]}, {machine["precision"]}; '
        f'source {told(run["source"] for run in runs)}; scored on '
        f'{told(run["n_images"] for run in done)} images.']
    if is_based:
        parts.append(f'What all runs{" but the chains" * bool(chains)} have in common, '
                     'where settings.py has it otherwise:\n\n'
                     f'```\n{show_settings(study["base"])}\n```\n')
    parts.append(
        'mIoU is in percent, with the standard deviation over seeds; differences are '
        f'paired by seed and come with their {100 * SHARE:.0f} % t-interval, which '
        'misses one time in twenty by chance alone. Bands in the plots are from the '
        'least to the largest seed. The column `paper` is of VOC val: '
        'ResNet-50 from ImageNet weights, trained for 30,000 steps at stride 16 and '
        "evaluated at 8; Table 1's heads, as noted, ResNet-101 at stride 8.\n")
    return '\n'.join(parts)


def show_settings(values: dict[str, Any]) -> str:
    """Return settings as words, without those that say where files are."""
    def show(value):
        return runtime.show_value(tuple(value) if isinstance(value, list) else value)

    return ' '.join(f'{name}={show(value)}' for name, value in values.items()
                    if name not in UNTOLD and not str(value).startswith('../'))


def describe_stages(experiment: Experiment) -> str:
    """Return what recipe and settings each stage of a chain has."""
    e, parts = experiment, []
    for label, runs in e.variants.items():
        recipe = e.about['variants'].get(label, {}).get('recipe', 'unknown')
        values = {**e.base, **next(iter(runs.values()))['settings']}
        parts.append(f'{label}: recipe `{recipe}`, and in all\n\n'
                     f'```\n{show_settings(values)}\n```\n')
    return '\n'.join(parts)


def describe_experiment(experiment: Experiment, folder: str) -> str:
    """Return the Markdown of an experiment; its pictures are in `folder`."""
    e, plot = experiment, experiment.about['plot']
    says = f' The paper: {e.about["paper_says"]}' if 'paper_says' in e.about else ''
    parts = [f'{e.about["about"]}{says}\n', score_table(e), failures(e)]
    parts.append(describe_stages(e) if e.about.get('chain') else verdict(e) + '\n')
    if plot != 'dots' and e.stages():
        parts.append(stages_table(e))
    parts += [f'![{e.name}, {e.study}: {what}]({folder}/{file})\n'
              for file, (what, _) in pictures_of(e).items()]
    return '\n'.join(part for part in parts if part)


def put(text: str, study: str, name: str, content: str) -> str:
    """Put content between its marks, which are appended where they are not.

    Raises:
        ValueError: in a sentence, for a mark without an end.
    """
    mark, lines = MARK.format(study, name), text.split('\n')
    plain = [line.strip() for line in lines]
    if mark not in plain:
        level, title = ('##', study) if name == 'study' else ('###', f'{study}: {name}')
        return f'{text.rstrip()}\n\n{level} {title}\n\n{mark}\n{content}{END}\n'
    first = plain.index(mark)
    last = next((i for i in range(first + 1, len(plain))
                 if plain[i] == END or plain[i].startswith(ANY_MARK)), first)
    if plain[last] != END:
        raise ValueError(f'{mark} has no {END} on a line after it: put one where the '
                         'text of the report ends')
    return '\n'.join([*lines[:first], f'{mark}\n{content}{END}',
                      *(lines[last + 1:] or [''])])


def report(files: list[Path], out: Path) -> None:
    """Write the tables of studies into a Markdown file, and their pictures beside it.

    Args:
        files: of results; a study is named after its file.
        out: the Markdown file.

    Raises:
        ValueError, OSError: in a sentence.
    """
    if out.suffix != '.md':  # its pictures go to a folder of the name without it
        raise ValueError(f'--out {out}: a Markdown file is expected, as in {out}.md')
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f'{" ".join(map(str, files))}: studies are named after their '
                         'files, so these must differ: rename one')
    for file in files:
        if re.search(r'[^\w.+-]', file.stem):
            raise ValueError(f'{file.name} is a study\'s name: letters, digits and _ . '
                             '+ - are expected, rename the file')
    studies = {file.stem: read_study(file) for file in files}
    text = ('# Ablations\n\nWhat stands between the marks is written by `python '
            'ablate.py report`, the prose around it is not.\n')
    if out.is_file():
        text = out.read_text(encoding='utf-8')
    folder, drawn = out.with_suffix(''), {}
    for name, study in studies.items():
        experiments = sort_runs(name, study)
        text = put(text, name, 'study', describe_study(name, study, experiments))
        for experiment in experiments:
            text = put(text, name, experiment.name,
                       describe_experiment(experiment, folder.name))
            drawn |= {file: (draw, experiment) for file, (_, draw) in
                      pictures_of(experiment).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'cannot make the folder {folder} ({error}): give another --out'
                      ) from None
    for file, (draw, experiment) in drawn.items():
        save_small(draw(experiment), folder / file)
    runtime.write_text(out, text)
    print(f'{out}: {len(studies)} studies; {len(drawn)} pictures in {folder}')


# -- pictures --------------------------------------------------------------------------

def pictures_of(experiment: Experiment) -> dict[str, tuple[str, Callable]]:
    """Return the pictures of an experiment: file -> what it shows, what draws it."""
    e, stem = experiment, f'{experiment.study}_{experiment.name}'
    pictures = {}
    if e.about['plot'] == 'lines' and e.stages():
        pictures[f'{stem}.png'] = 'mIoU over the iterations at evaluation', draw_lines
    elif e.about['plot'] == 'matrix' and e.stages():
        pictures[f'{stem}.png'] = ('mIoU over the iterations in training and at '
                                   'evaluation', draw_matrix)
    elif any(e.scores(label) for label in e.variants):
        pictures[f'{stem}.png'] = 'mIoU of each seed', draw_dots
    if any(run['loss'] for runs in e.variants.values() for run in runs.values()):
        pictures[f'{stem}_curves.png'] = 'loss and mIoU while training', draw_curves
    return pictures


def save_small(figure: 'Figure', file: Path) -> None:
    """Write a figure as a PNG of 256 colours and no dates: a small part of the size."""
    stream = io.BytesIO()
    figure.savefig(stream, format='png', dpi=DPI)
    picture = Image.open(stream).convert('RGB')
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
                     ).save(file, optimize=True)


def style(index: int) -> dict[str, Any]:
    """Return colour and dashes of a variant's line."""
    return {'color': COLOURS[index % len(COLOURS)], 'linewidth': 1.2,
            'linestyle': DASHES[index // len(COLOURS) % len(DASHES)]}


def tidy(axes, x: str, y: str) -> None:
    """Name the axes and leave out what says nothing."""
    axes.set_xlabel(x, fontsize=POINTS)
    axes.set_ylabel(y, fontsize=POINTS)
    axes.tick_params(labelsize=POINTS - 1, length=2)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='0.92', linewidth=0.6)
    axes.set_axisbelow(True)


def draw_curve(axes, curves: list[list], index: int, label: str) -> None:
    """Draw the mean of curves of (x, y), one a seed, and the band from least to most.

    Only where all of them have a point: a mean of others each time is none.
    """
    values, n = {}, sum(map(bool, curves))
    for x, y in (point for curve in curves for point in curve):
        values.setdefault(x, []).append(y)
    x = sorted(key for key in values if len(values[key]) == n)
    axes.plot(x, [statistics.fmean(values[key]) for key in x], label=label,
              **style(index))
    axes.fill_between(x, [min(values[key]) for key in x],
                      [max(values[key]) for key in x], color=style(index)['color'],
                      alpha=0.15, linewidth=0)


def draw_lines(experiment: Experiment) -> 'Figure':
    """Draw mIoU over the iterations at evaluation, a line a variant: figure 3."""
    e = experiment
    figure = drawing.new_figure(5.6, 2.9)
    figure.set_layout_engine('constrained')
    axes, stages = figure.subplots(), e.stages()
    for index, label in enumerate(e.variants):
        seeds = {t: e.scores(label, t) for t in stages}
        if not any(seeds.values()):
            continue
        draw_curve(axes, [[(t, seeds[t][seed]) for t in stages if seed in seeds[t]]
                          for seed in e.seeds], index, label)
        own = next(iter(e.variants[label].values()))['stages']
        axes.plot(own, statistics.fmean(seeds[own].values()), 'o', markersize=5,
                  markerfacecolor='white', color=style(index)['color'])
    axes.set_xticks(stages)
    tidy(axes, 'EM iterations at evaluation (circle: that of the table)', 'mIoU, %')
    figure.legend(loc='outside right upper', fontsize=POINTS, frameon=False)
    return figure


def draw_matrix(experiment: Experiment) -> 'Figure':
    """Draw mIoU over T in training (rows) and at evaluation (columns): figure 4."""
    e, stages = experiment, experiment.stages()
    ours = {}
    for label, runs in e.variants.items():
        run = next(iter(runs.values()))
        trained = e.about['variants'].get(label, run)['settings']
        ours[trained.get('STAGE_NUM', run['stages'])] = {
            t: statistics.fmean(values.values()) for t in stages
            if (values := e.scores(label, t))}
    figure = drawing.new_figure(8.4, 3.9)
    figure.set_layout_engine('constrained')
    several = figure.subplots(1, 2)
    n = len(e.seeds)
    for axes, cells, title in (
            (several[0], ours, f'{e.study}, mean of {n} seeds' if n > 1 else e.study),
            (several[1], FIGURE_4, 'the paper, VOC')):
        rows = sorted(cells)
        values = [[cells[row].get(t, float('nan')) for t in stages] for row in rows]
        known = [x for row in values for x in row if x == x]
        low, high = min(known), max(known)
        axes.imshow(values, 'viridis', vmin=low, vmax=high, aspect='auto')
        for i, row in enumerate(values):
            for j, x in enumerate(row):
                if x == x:
                    is_dark = x < low + 0.6 * (high - low)
                    axes.text(j, i, f'{x:.2f}', ha='center', va='center',
                              fontsize=POINTS - 1, color='white' if is_dark else 'k',
                              weight='bold' if x == high else 'normal')
        axes.set_xticks(range(len(stages)), stages, fontsize=POINTS)
        axes.set_yticks(range(len(rows)), rows, fontsize=POINTS)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel('EM iterations at evaluation', fontsize=POINTS)
        axes.set_ylabel('EM iterations in training', fontsize=POINTS)
        axes.set_title(f'mIoU, %: {title}', fontsize=POINTS)
    return figure


def draw_dots(experiment: Experiment) -> 'Figure':
    """Draw the mIoU of each seed as a dot, and the mean as a bar across."""
    e, labels = experiment, [*experiment.variants]
    figure = drawing.new_figure(5.6, 0.75 + 0.27 * len(labels))
    figure.set_layout_engine('constrained')
    axes = figure.subplots()
    for index, label in enumerate(labels):
        values = [*e.scores(label).values()]
        if not values:
            axes.annotate('failed', (0.01, index), xycoords=('axes fraction', 'data'),
                          va='center', fontsize=POINTS - 1, color='0.4')
            continue
        mean = statistics.fmean(values)
        colour = COLOURS[label == e.baseline]
        axes.plot(values, [index] * len(values), 'o', markersize=4, color=colour,
                  alpha=0.6, markeredgewidth=0)
        axes.plot([mean, mean], [index - 0.3, index + 0.3], color=colour, linewidth=1.6)
        if label == e.baseline:
            axes.axvline(mean, color=colour, linewidth=0.7, linestyle=':')
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    tidy(axes, 'mIoU, % (dots: seeds, bars: means)', '')
    return figure


def draw_curves(experiment: Experiment) -> 'Figure':
    """Draw the loss, and the mIoU of the validations if there were any."""
    from matplotlib.ticker import LogLocator, NullLocator
    e = experiment
    has_scores = any(run['validation'] for runs in e.variants.values()
                     for run in runs.values())
    figure = drawing.new_figure(8.4 if has_scores else 5.6, 2.7)
    figure.set_layout_engine('constrained')
    several = figure.subplots(1, 1 + has_scores, squeeze=False)[0]
    for index, (label, runs) in enumerate(e.variants.items()):
        draw_curve(several[0], [run['loss'] for run in runs.values()], index, label)
        if has_scores:
            draw_curve(several[1], [[(step, 100 * y) for step, y in run['validation']]
                                    for run in runs.values()], index, label)
    several[0].set_yscale('log')
    several[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    several[0].yaxis.set_major_formatter('{x:g}')
    several[0].yaxis.set_minor_locator(NullLocator())
    for axes, what in zip(several, ('loss', 'validation mIoU, %'), strict=False):
        tidy(axes, 'step', what)
    figure.legend(*several[0].get_legend_handles_labels(), loc='outside right upper',
                  fontsize=POINTS, frameon=False)
    return figure
