"""Tables and figures of studies, from their results.json alone.

    python ablate.py report docs/ablations/camvid.json --out docs/ablations.md

A study is named after its file. In the Markdown file, what stands between
`<!-- ablate -->` and `<!-- end -->` is replaced; the text around it is kept.
"""
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config
import logger
from ablation.experiments import EXPERIMENTS

CONFIDENCE = 0.95           # of the t-intervals
START, END = '<!-- ablate -->', '<!-- end -->'
EMPTY = f'# Ablations\n\n{START}\n{END}\n'
HOW_TO_READ = (
    'mIoU is in percent, with the standard deviation over seeds. Differences are '
    f'paired by seed, with their {100 * CONFIDENCE:.0f} % t-interval; they are bold '
    'where the interval excludes 0, which happens by chance one time in twenty. The '
    'column `paper` is of VOC val: ResNet-50 from ImageNet weights, trained for 30,000 '
    "steps at stride 16 and evaluated at 8; Table 1's heads, as noted, ResNet-101 at "
    'stride 8. In the figures the bands go from the lowest to the highest seed.\n')


@dataclass
class Experiment:
    """The runs of a study that belong to an experiment."""
    study: str
    name: str
    about: dict[str, Any]                   # of EXPERIMENTS
    variants: dict[str, dict[int, dict]]    # label -> seed -> run
    baseline: str                           # label; '' if it was not run
    stages: list[int]       # EM iterations at evaluation; none if a head has none

    def scores(self, label: str, stages: int = 0) -> dict[int, float]:
        """Return seed -> mIoU in percent, with EM iterations other than its own."""
        found = {}
        for seed, run in sorted(self.variants[label].items()):
            miou = run['mIoU'].get(str(stages or run['stages']))
            if miou is not None:
                found[seed] = 100 * miou
        return found

    def paper(self, label: str, stages: int) -> str:
        """Return the paper's mIoU in percent as text, '' if it prints none."""
        number = self.about.get('paper', {}).get(label, '')
        if isinstance(number, dict):
            return f'{number[stages]:.2f}' if stages in number else ''
        return number


def read_study(file: Path) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        study = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        study = {}
    if 'runs' not in study:
        raise config.UserError(f'{file} holds no results: give the results.json that '
                               '`python ablate.py run` writes, or a copy of it')
    return study


def group_runs(name: str, study: dict[str, Any]) -> list[Experiment]:
    """Group a study's runs by experiment and variant, in the order of EXPERIMENTS."""
    found = {}
    for run in study['runs']:
        for experiment, label in run['serves']:
            config.check_name(experiment, EXPERIMENTS, 'experiment')
            found.setdefault(experiment, {}).setdefault(label, {})[run['seed']] = run
    return [make_experiment(name, experiment, found[experiment])
            for experiment in EXPERIMENTS if experiment in found]


def make_experiment(study: str, name: str, found: dict[str, dict[int, dict]]
                    ) -> Experiment:
    """Return an experiment with its variants sorted."""
    about = EXPERIMENTS[name]
    labels = [label for label in about['variants'] if label in found]
    labels += [label for label in found if label not in labels]
    runs = [run for label in labels for run in found[label].values()]
    baseline = [label for label in labels
                if not any(run['settings'] for run in found[label].values())]
    evaluated = [run['mIoU'] for run in runs if run['mIoU']]
    stages = sorted({int(t) for mious in evaluated for t in mious})
    if any(len(mious) == 1 for mious in evaluated):
        stages = []
    return Experiment(name=name, study=study, about=about, stages=stages,
                      variants={label: found[label] for label in labels},
                      baseline=baseline[0] if baseline else '')


def paired_difference(scores: dict[int, float], base: dict[int, float]
                      ) -> tuple[float, float, float] | None:
    """Return the mean difference of two variants and its t-interval, paired by seed.

    Args:
        scores, base: seed -> score.

    Returns:
        (mean, low, high), low and high infinite with one common seed; None without any.
    """
    from scipy.special import stdtrit
    values = [scores[seed] - base[seed] for seed in scores if seed in base]
    if not values:
        return None
    mean, half = statistics.fmean(values), float('inf')
    if len(values) > 1:
        t = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)
        half = t * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def format_mean(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    if len(values) > 1:
        return f'{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}'
    return f'{values[0]:.2f}' if values else '-'


def format_difference(difference: tuple[float, float, float] | None) -> str:
    """Return a difference with its interval as text, bold if that excludes 0."""
    if difference is None:
        return '-'
    mean, low, high = difference
    if high == float('inf'):
        return f'{mean:+.2f}'
    text = f'{mean:+.2f} ({low:+.2f} .. {high:+.2f})'
    return f'**{text}**' if low > 0 or high < 0 else text


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return ''.join(f'| {" | ".join(row)} |\n'
                   for row in (head, ['---'] * len(head), *rows))


def score_table(e: Experiment) -> str:
    """Return the table of an experiment: means, seeds, differences, the paper."""
    base = e.scores(e.baseline) if e.baseline else {}
    seeds = sorted({seed for runs in e.variants.values() for seed in runs})
    head = ['variant', 'mIoU', *(f'seed {seed}' for seed in seeds),
            f'difference to {e.baseline or "the baseline"}', 'paper']
    rows = []
    for label, runs in e.variants.items():
        scores = e.scores(label)
        row = [label, format_mean(list(scores.values()))]
        for seed in seeds:
            missing = 'failed' if seed in runs else '-'
            row.append(f'{scores[seed]:.2f}' if seed in scores else missing)
        difference = format_difference(paired_difference(scores, base))
        row.append('' if label == e.baseline else difference)
        own_stages = next(iter(runs.values()))['stages']
        rows.append([*row, e.paper(label, own_stages) or '-'])
    return format_table(head, rows)


def stages_table(e: Experiment) -> str:
    """Return the table of mIoU over the EM iterations at evaluation."""
    rows = []
    for label in e.variants:
        rows.append([label, *(format_mean(list(e.scores(label, t).values()))
                              for t in e.stages)])
        if e.paper(label, e.stages[-1]):
            rows.append([f'{label}, paper', *(e.paper(label, t) for t in e.stages)])
    return format_table(['evaluated with T =', *map(str, e.stages)], rows)


def list_failures(e: Experiment) -> str:
    """Return a line for each run that failed."""
    return ''.join(f'- {label}, seed {seed}, failed after step {run["step"]}: '
                   f'{run["error"]}\n' for label, runs in e.variants.items()
                   for seed, run in sorted(runs.items()) if run['error'])


def describe_study(name: str, study: dict[str, Any]) -> str:
    """Return what a study is: its settings, machine and time."""
    runs, words = study['runs'], []
    for key, value in study['base'].items():
        value = tuple(value) if isinstance(value, list) else value
        words.append(f'{key}={config.format_value(value)}')
    done = [run for run in runs if not run['error']]
    hours = sum(run['seconds'] for run in runs) / 3600

    def join(values):
        return ', '.join(sorted({str(x) for x in values if x})) or 'unknown'

    device, torch, precision = (join(run['environment'].get(key) for run in done)
                                for key in ('device', 'torch', 'precision'))
    return (
        f'## {name}\n\n{study["scale"]} scale, recipe `{study["recipe"]}`; {len(done)} '
        f'of {study["n_planned"]} runs are finished, {len(runs) - len(done)} failed; '
        f'{hours:.1f} hours of training on {device}; torch {torch}, {precision}; '
        f'source {join(run["source"] for run in runs)}; evaluated on '
        f'{join(run["n_images"] for run in done)} images. All runs have these settings '
        'in common, besides the defaults of settings.py:\n\n'
        f'```\n{" ".join(words)}\n```\n')


def describe_experiment(e: Experiment, figure: str) -> str:
    """Return the Markdown of an experiment, with the path of its figure."""
    parts = [f'### {e.study}: {e.name}\n', f'{e.about["about"]}\n']
    if 'paper_says' in e.about:
        parts.append(f'The paper: {e.about["paper_says"]}\n')
    parts += [score_table(e), list_failures(e)]
    if e.stages:
        parts.append(stages_table(e))
    parts.append(f'![{e.name}, {e.study}: mIoU, training loss, validation]({figure})\n')
    return '\n'.join(part for part in parts if part)


def replace_tables(text: str, tables: str, out: Path) -> str:
    """Put the tables between the two marks of a Markdown file.

    Raises:
        UserError: if the text does not have the marks.
    """
    before, start, rest = text.partition(f'{START}\n')
    _, end, after = rest.partition(END)
    if not start or not end:
        raise config.UserError(f'{out} has no lines {START} and {END}: put both where '
                               'the tables belong, or give another --out')
    return f'{before}{START}\n{tables}{END}{after}'


def report(files: list[Path], out: Path) -> None:
    """Write the tables of studies into a Markdown file, and their figures beside it.

    Args:
        files: results; a study is named after its file.
        out: the Markdown file; in an old one the text between the marks is replaced.

    Raises:
        UserError: for wrong files, before anything is written.
    """
    names = [file.stem for file in files]
    if out.suffix != '.md' or len(set(names)) < len(names):
        raise config.UserError(f'report {" ".join(map(str, files))} --out {out}: files '
                               'of different names, which name the studies, and an '
                               '--out that ends in .md are expected')
    parts, figures = [HOW_TO_READ], {}
    folder = out.with_suffix('')
    for name, file in zip(names, files, strict=True):
        study = read_study(file)
        parts.append(describe_study(name, study))
        for experiment in group_runs(name, study):
            path = folder / f'{name}_{experiment.name}.png'
            parts.append(describe_experiment(experiment, f'{folder.name}/{path.name}'))
            figures[path] = experiment
    text = out.read_text(encoding='utf-8') if out.is_file() else EMPTY
    text = replace_tables(text, '\n'.join(parts), out)
    folder.mkdir(parents=True, exist_ok=True)
    for path, experiment in figures.items():
        draw(experiment).savefig(path, dpi=100, metadata={'Software': None})
    logger.write_text(out, text)
    print(f'{out}: {len(files)} studies, {len(figures)} figures in {folder}')


def draw(e: Experiment) -> Any:
    """Return a matplotlib Figure: mIoU, training loss and validation mIoU."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.2), layout='constrained')
    scores, loss, validation = figure.subplots(1, 3)
    for index, (label, runs) in enumerate(e.variants.items()):
        style = {'color': f'C{index % 10}', 'linestyle': '-' if index < 10 else '--'}
        draw_mean(loss, [run['loss'] for run in runs.values()], label, style)
        draw_mean(validation, [[(step, 100 * miou) for step, miou in run['validation']]
                               for run in runs.values()], label, style)
        if e.stages:
            draw_mean(scores, [[(int(t), 100 * miou) for t, miou in run['mIoU'].items()]
                               for run in runs.values()], label, style)
        else:
            mious = list(e.scores(label).values())
            scores.plot(mious, [label] * len(mious), 'o', color=style['color'])
    if e.stages:
        scores.set(xlabel='EM iterations at evaluation', ylabel='mIoU, %')
    else:
        scores.set_xlabel('mIoU, % (one dot per seed)')
        scores.invert_yaxis()
    loss.set(xlabel='step', ylabel='training loss')
    validation.set(xlabel='step', ylabel='validation mIoU, %')
    figure.legend(*loss.get_legend_handles_labels(), loc='outside right upper',
                  fontsize='small')
    return figure


def draw_mean(axes: Any, curves: list[list[tuple[int, float]]], label: str,
              style: dict[str, Any]) -> None:
    """Draw the mean of curves, and a band from the lowest to the highest.

    Only where all have a point: a mean of other seeds would jump.
    """
    curves = [dict(curve) for curve in curves if curve]
    x = sorted(set.intersection(*map(set, curves))) if curves else []
    y = [[curve[point] for curve in curves] for point in x]
    axes.plot(x, list(map(statistics.fmean, y)), label=label, **style)
    axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=style['color'],
                      alpha=0.1, linewidth=0)
