"""What measure.py found, as text: Markdown tables that read well on a console too."""
import settings
from measurement.manners import REFERENCE


def align(lines: list[list[str]]) -> str:
    """Return a Markdown table that reads well on a console too; the first line is its
    head, columns but the first are set to the right, empty ones are left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in kept]
    lines = [[line[i] for i in kept] for line in lines]
    lines.insert(1, ['-' * n if i == 0 else '-' * (n - 1) + ':'
                     for i, n in enumerate(widths)])
    return '\n'.join('| ' + ' | '.join(cell.ljust(n) if i == 0 else cell.rjust(n) for
                                       i, (cell, n) in enumerate(zip(line, widths,
                                                                     strict=True)))
                     + ' |' for line in lines)


def describe(part: str, found: dict) -> str:
    """Return what was measured of a part as text: a table, or a sentence."""
    if part == 'startup':
        return (f'train.py begins its first step {found["first_step_s"]:.1f} s after '
                f'its start; --help takes {found["help_s"]:.2f} s')
    if part == 'training':
        low, high = map(show, found['range'])
        return (f'train.py: {show(found["images_per_s"])} images/s ({low} .. {high}), '
                f'{show(found["steps_per_s"])} steps/s of {found["batch"]}, '
                f'{found["tflops"]:.3f} TFLOP/s, {found["waiting"]:.1%} of the time '
                f'waiting for data; {settings.ITER_MAX} steps of {settings.BATCH_SIZE} '
                f'would take {found["hours"]:.1f} hours')
    lines = [[part, 'images/s (range)', 'x reference (range)', 'x torchvision (range)',
              'memory: tensors', 'process', 'TFLOP/s', 'of peak']]
    for name, row in found.items():
        if name == 'agreement':
            continue
        twin = name.removesuffix(' compiled').replace('ours', 'torchvision')
        lines.append([
            name, '{} ({} .. {})'.format(*map(show, (row['images_per_s'],
                                                     *row['range']))),
            *(show_ratio(row['ratios'].get(other)) for other in (REFERENCE, twin)),
            *(show_memory(found, name, kind) for kind in ('tensors', 'process')),
            f'{row["tflops"]:.3f}' if 'tflops' in row else '',
            f'{row["share_of_peak"]:.0%}' if 'share_of_peak' in row else ''])
    agreement = (f'\n\nThe precisions name the same class at {found["agreement"]:.2%} '
                 'of the pixels.') if 'agreement' in found else ''
    return align(lines) + agreement


def show(number: float) -> str:
    """Return three digits of a number, all of those before the point."""
    return f'{number:.0f}' if number >= 100 else f'{number:.3g}'


def show_memory(found: dict, name: str, kind: str) -> str:
    """Return GB of a manner and its share of the reference's, where it was measured."""
    taken, least = (found.get(other, {}).get('GB', {}).get(kind, 0)
                    for other in (name, REFERENCE))
    if not taken:
        return ''
    is_shown = least and name != REFERENCE
    return f'{taken:.2f} GB' + (f' ({taken / least:.2f})' if is_shown else '')


def show_ratio(ratio: list[float] | None) -> str:
    """Return (median, least, most) as text, nothing where there is none."""
    return '{:.2f} ({:.2f} .. {:.2f})'.format(*ratio) if ratio else ''


def describe_profile(part: str, found: dict, n: int = 10) -> str:
    """Return the costliest kinds of operation as a table."""
    lines = [[f'{part}, kind of operation', 'share', 'ms', 'calls']]
    for kind in found['kinds'][:n]:
        lines.append([kind['kind'], f'{kind["share"]:.1%}', f'{kind["ms"]:.2f}',
                      f'{kind["calls"]:g}'])
    rest = sum(kind['ms'] for kind in found['kinds'][n:])
    lines.append(['the rest', f'{rest / found["ms"]:.1%}', f'{rest:.2f}', ''])
    return align(lines)
