"""The confusion matrix of an evaluation as a figure.

    from evaluation.confusion import confusion_figure
    drawing.save_figure(confusion_figure(matrix, classes), 'confusion.png')
"""
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NUMBERED = 30   # classes; with more the cells are too small for numbers


def confusion_figure(matrix: np.ndarray, classes: Sequence[str], title: str = ''
                     ) -> 'Figure':
    """Draw the confusion matrix, each row in percent of the pixels of its true class.

    Args:
        matrix: (C, C) counts of pixels; rows are the truth, columns the prediction.
        classes: C names.
        title: stands above.

    Returns:
        A figure for `drawing.save_figure`. Up to MAX_NUMBERED classes have numbers in
        their cells. The row of a class that never occurs is hatched. The IoU of each
        class stands on the right.
    """
    matrix, n = np.asarray(matrix, float), len(classes)
    truth = matrix.sum(1)
    share = 100 * matrix / np.maximum(truth, 1)[:, None]
    has_numbers = n <= MAX_NUMBERED
    side = max(0.27 * n, 1.6) if has_numbers else 0.09 * n     # inches

    figure = drawing.new_figure(side, side)
    from matplotlib.colors import PowerNorm
    axes = figure.add_axes((0, 0, 1, 1))    # save_figure makes room for the names
    # The square root keeps a confusion of one percent visible.
    cells = axes.imshow(share, 'Blues', norm=PowerNorm(0.5, 0, 100),
                        interpolation='nearest')
    lines = np.arange(1, n) - 0.5
    axes.vlines(lines, -0.5, n - 0.5, color='0.85', linewidth=0.3)
    axes.hlines(lines, -0.5, n - 0.5, color='0.85', linewidth=0.3)
    for i in np.flatnonzero(truth == 0):
        axes.axhspan(i - 0.5, i + 0.5, facecolor='0.93', edgecolor='0.7', hatch='////',
                     linewidth=0)
    if has_numbers:
        for i, j in np.argwhere(share >= 0.5):
            axes.text(j, i, f'{share[i, j]:.0f}', fontsize=5.5, ha='center',
                      va='center', color='white' if share[i, j] > 35 else 'black')

    # A dollar in a class name does not begin a formula.
    style = {'fontsize': 6.5 if has_numbers else 5.5, 'parse_math': False}
    names = [drawing.shorten(name) for name in classes]
    axes.set_xticks(range(n), names, rotation=90, **style)
    axes.set_yticks(range(n), names, **style)
    axes.set_xlabel('prediction', fontsize=7)
    axes.set_ylabel('truth', fontsize=7)
    axes.tick_params(length=0, pad=2)
    hit = matrix.diagonal()
    union = matrix.sum(0) + truth - hit
    ious = [f'{100 * hit[i] / union[i]:.1f}' if union[i] > 0 else '-' for i in range(n)]
    right = axes.secondary_yaxis('right')
    right.set_yticks(range(n), ious, **style)
    right.set_ylabel('IoU, %', fontsize=7)
    right.tick_params(length=0, pad=2)
    axes.set_title(drawing.shorten(title, 80), fontsize=8, parse_math=False)
    bar = figure.colorbar(cells, ticks=[0, 1, 5, 10, 25, 50, 100],
                          cax=axes.inset_axes((1 + 0.6 / side, 0, 0.08 / side, 1)))
    bar.ax.tick_params(labelsize=6, length=2)
    bar.set_label('share of the true class, %', fontsize=7)
    return figure
