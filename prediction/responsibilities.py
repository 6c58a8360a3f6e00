"""Figures of the bases' responsibilities for the pixels (the paper's figure 5).

    from prediction.responsibilities import responsibility_figure
    figure = responsibility_figure(image, maps, stride=8, bases=[3, 10])
    drawing.save_figure(figure, 'responsibilities.pdf')

In this file `image` is (h, w, 3) uint8. `maps` are responsibilities (T, K, h', w') of
T iterations and K bases, which sum to 1 over K. `bases` are indices of those to show.
`stride` is the pixels per feature. `align_corners` is the network's: with it a feature
lies on every stride-th pixel, without it in the middle of a block of stride x stride.
"""
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL, GAP, FOOT = 1.15, 0.2, 0.46   # inches: a panel's width, between rows, below all
PANEL_PIXELS = 512                   # on the longer side; larger images are shrunk
TITLE = {'fontsize': 7, 'pad': 2.5}


def enlarge(maps: np.ndarray, stride: int, size: tuple[int, int],
            align_corners: bool = True) -> np.ndarray:
    """Upsample maps (n, h', w') bilinearly to an image (h, w), as logits are.

    They cover the padded image, of which the padding is cut off. Where they are too
    short, because features on the padding were left out, the last ones are repeated.

    Returns:
        (n, h, w) float32.
    """
    maps = torch.tensor(np.asarray(maps, np.float32))[None]
    if align_corners:
        padded = [(n - 1) * stride + 1 for n in maps.shape[2:]]
    else:
        padded = [n * stride for n in maps.shape[2:]]
    large = F.interpolate(maps, padded, mode='bilinear', align_corners=align_corners)
    below, right = (max(n - side, 0) for n, side in zip(size, padded, strict=True))
    large = F.pad(large, (0, right, 0, below), mode='replicate')
    return large[0, :, :size[0], :size[1]].numpy()


def partition(maps: np.ndarray, stride: int, size: tuple[int, int],
              align_corners: bool = True) -> np.ndarray:
    """Return for each pixel the basis with the largest responsibility.

    Args:
        maps: (K, h', w') after one iteration.
        stride: pixels per feature.
        size: (h, w) of the image.
        align_corners: the network's.

    Returns:
        (h, w) int16, 0 .. K - 1.
    """
    winners, largest = np.zeros(size, np.int16), np.zeros(size, np.float32)
    for k in range(len(maps)):  # one by one: all of them at full size are large
        values = enlarge(maps[k:k + 1], stride, size, align_corners)[0]
        winners[values > largest] = k
        np.maximum(largest, values, out=largest)
    return winners


def responsibility_figure(image: np.ndarray, maps: np.ndarray, stride: int,
                          bases: Sequence[int], mask: np.ndarray | None = None,
                          align_corners: bool = True) -> 'Figure':
    """Draw the responsibilities of some bases after each iteration.

    A row is an iteration, a column a basis. The last column shows the basis with the
    largest responsibility for each pixel, in the colours of the bases' frames. Above
    each basis stands its share of these pixels. `mask` is the painted prediction
    (h, w, 3) uint8, or None.

    Returns:
        A figure for `drawing.save_figure`.
    """
    pictures = [('image', image)]
    if mask is not None:
        pictures.append(('prediction', mask))
    rows = [Row(pictures[t:t + 1], f'$t = {t + 1}$', image, maps[t], list(bases))
            for t in range(len(maps))]
    if len(rows) == 1:
        rows[0] = rows[0]._replace(pictures=pictures)
    return draw_rows(rows, stride, align_corners)


def responsibility_overview(
        rows: Sequence[tuple[np.ndarray, np.ndarray, Sequence[int]]], stride: int,
        align_corners: bool = True) -> 'Figure':
    """Draw the responsibilities of some bases at the last iteration.

    A row is one of the given (image, maps, bases).

    Returns:
        A figure for `drawing.save_figure`.
    """
    return draw_rows([Row([('', image)], '', image, maps[-1], list(bases))
                      for image, maps, bases in rows], stride, align_corners)


class Row(NamedTuple):
    """A row of a figure: pictures, bases, and the partition."""
    pictures: list[tuple[str, np.ndarray]]   # (heading, picture) on the left
    label: str                               # before the bases
    image: np.ndarray                        # under the bases
    maps: np.ndarray                         # (K, h', w')
    bases: list[int]


def draw_rows(rows: list[Row], stride: int, align_corners: bool) -> 'Figure':
    """Draw the rows of a figure with one scale of colours."""
    shown = []
    for row in rows:
        small, small_stride = shrink(row.image, stride)
        place = small_stride, small.shape[:2], align_corners
        shown.append((small, enlarge(row.maps[row.bases], *place),
                      partition(row.maps, *place)))
    # One pixel of 200 may lie above the scale: a single peak would darken all others.
    everything = np.concatenate([values.ravel() for _, values, _ in shown])
    limit = max(np.quantile(everything, 0.995), 0.02)
    first = max(len(row.pictures) for row in rows) + 1     # column of the first basis
    n_bases = max(len(row.bases) for row in rows)
    figure, axes = make_grid([len(small) / small.shape[1] for small, _, _ in shown],
                             [1] * (first - 1) + [0.2] + [1] * (n_bases + 1))
    for line, row, (small, values, winners) in zip(axes, rows, shown, strict=True):
        for panel, (heading, picture) in zip(line, row.pictures, strict=False):
            panel.imshow(shrink(picture, stride)[0])
            panel.set_title(heading, **TITLE)
        line[first - 1].text(0.5, 0.5, row.label, fontsize=7, rotation=90, ha='center',
                             va='center')
        colours = basis_colours(len(row.maps))
        for panel, k, value in zip(line[first:], row.bases, values, strict=False):
            panel.imshow(small.mean(2), 'gray', vmin=0, vmax=500)
            light = panel.imshow(value, 'plasma', vmin=0, vmax=limit,
                                 alpha=np.clip(2 * value / limit, 0, 0.9))
            share = drawing.percent((winners == k).mean())
            panel.set_title(f'$z_{{{k}}}$  {share}', **TITLE)
            panel.spines[:].set(visible=True, color=colours[k], linewidth=1.5)
        line[-1].imshow(colours[winners])
        line[-1].set_title(f'largest of all {len(colours)}', **TITLE)

    place, height = axes[-1, -2].get_position(original=True), figure.get_figheight()
    below = figure.add_axes((place.x0, (FOOT - 0.14) / height, place.width,
                             0.06 / height))
    bar = figure.colorbar(light, cax=below, orientation='horizontal', format='%.2g',
                          extend='max', ticks=[0, limit / 2, limit])
    bar.ax.tick_params(labelsize=6, length=2, pad=2)
    bar.set_label('responsibility', fontsize=6, labelpad=2)
    return figure


def make_grid(aspects: Sequence[float], widths: Sequence[float]
              ) -> tuple['Figure', np.ndarray]:
    """Return a figure and its bare axes.

    Args:
        aspects: height by width of the images, one a row.
        widths: of the columns, in panels.
    """
    heights = [PANEL * min(max(aspect, 0.25), 2) for aspect in aspects]
    height = sum(heights) + GAP * (len(heights) - 1) + FOOT
    figure = drawing.new_figure(PANEL * sum(widths), height)
    axes = figure.subplots(len(heights), len(widths), squeeze=False, gridspec_kw={
        'left': 0, 'right': 1, 'top': 1, 'bottom': FOOT / height, 'wspace': 0.05,
        'hspace': GAP / np.mean(heights), 'height_ratios': heights,
        'width_ratios': widths})
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(False)
    return figure, axes


def shrink(image: np.ndarray, stride: int) -> tuple[np.ndarray, int]:
    """Return an image for a panel and its pixels per feature."""
    step = 1
    while max(image.shape) > step * PANEL_PIXELS and stride % (2 * step) == 0:
        step *= 2
    return np.asarray(Image.fromarray(image).reduce(step)), stride // step


def basis_colours(n: int) -> np.ndarray:
    """Return a colour for each of n bases, (n, 3) of 0..1; after 69 they repeat."""
    from matplotlib import colormaps
    names = 'tab20', 'tab20b', 'Set1', 'Dark2', 'Set3'
    colours = np.concatenate([colormaps[name].colors for name in names])
    return colours[np.arange(n) % len(colours)]
