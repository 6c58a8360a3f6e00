"""What measure.py found, as Markdown tables that read well on a console too."""
from collections.abc import Sequence

import settings
from measurement.implementations import RELEASED


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right.

    Columns without any text are left out.
    """
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in kept]
    rules = ['-' * widths[0]] + ['-' * (n - 1) + ':' for n in widths[1:]]
    lines = [rules]
    for row in (header, *rows):
        cells = [row[i].rjust(n) for i, n in zip(kept, widths, strict=True)]
        lines.append([row[0].ljust(widths[0]), *cells[1:]])
    lines[:2] = [lines[1], rules]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def describe(part: str, result: dict) -> str:
    """Return what was measured of a part as text: a table, or a sentence."""
    if part == 'training':
        return ('train.py: {images_per_s:.3g} images/s ({range[0]:.3g} .. '
                '{range[1]:.3g}) with batches of {batch}, {tflops:.3g} TFLOP/s, '
                '{waiting:.1%} of the time waiting for data, {startup_s:.1f} s for '
                'start and end; a run of {steps} steps of {run_batch} would take '
                '{hours:.1f} hours').format(
                    **result, steps=settings.ITER_MAX, run_batch=settings.BATCH_SIZE)
    rows = []
    for name, row in result.items():
        cells = [name, format_range([row['images_per_s'], *row['range']]),
                 format_range(row['ratios'].get(RELEASED)),
                 format_range(row['ratios'].get('torchvision'))]
        cells.append(f'{row["memory_GB"]:.2f} GB' if row.get('memory_GB') else '')
        cells.append(f'{row["tflops"]:.3g}' if 'tflops' in row else '')
        cells.append(f'{row["share_of_peak"]:.0%}' if 'tflops' in row else '')
        rows.append(cells)
    return format_table(
        [part, 'images/s (range)', f'x {RELEASED} (range)', 'x torchvision (range)',
         'peak memory', 'TFLOP/s', 'of the matrix product'], rows)


def format_range(numbers: list[float] | None) -> str:
    """Return (median, least, most) as text; '' for None."""
    if numbers is None:
        return ''
    return '{:.3g} ({:.3g} .. {:.3g})'.format(*numbers)
