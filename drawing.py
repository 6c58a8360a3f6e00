"""Pictures to look at: masks over pictures, errors, confusions, responsibilities.

    import drawing
    drawing.overlay_with_legend(image, label, classes, palette).save('seen.png')
    drawing.save(drawing.confusion_figure(matrix, classes), 'confusion.pdf')

Everywhere `image` is (h, w, 3) uint8; `label`, `truth` and `prediction` are (h, w)
uint8, classes and 255, which is void: no class; `classes` are names, and a `palette` is
768 numbers, RGB of 0..255. Pictures come back as arrays or PIL images, figures for a
paper as matplotlib's.
"""
import functools
import importlib.util
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOID = 255
GAP, FONT = 8, 13            # pixels: between pictures, height of the letters
WRONG = (214, 30, 40)        # the colour of wrong pixels
INCH, SPACE = 1.15, 0.06     # inches: a panel of a figure, and between two
POINTS, DPI = 7, 300         # the letters of a figure, and its pixels per inch
HEAD_ROOM, BAR_ROOM = 0.2, 0.46  # inches: above a panel, below all of them
HEAT = 'magma'               # the colours of responsibilities
PANEL_PIXELS = 512           # on the longer side of a panel; larger pictures are shrunk


# -- masks -----------------------------------------------------------------------------

def paint(label: np.ndarray, palette: Sequence[int]) -> np.ndarray:
    """Paint labels (h, w) uint8 in the colours of a palette: (h, w, 3) uint8."""
    return np.asarray(palette, np.uint8).reshape(-1, 3)[label]


def overlay(image: np.ndarray, label: np.ndarray, palette: Sequence[int]
            ) -> np.ndarray:
    """Lay a mask over its picture, with white borders and stripes where it is void.

    Returns:
        (h, w, 3) uint8.
    """
    thick = max(1, round(max(label.shape) / 640))
    colours = Image.fromarray(paint(label, palette))
    over = np.array(Image.blend(Image.fromarray(image), colours, 0.5))
    over = stripe(over, label == VOID, 90, thick)
    is_border = np.zeros(label.shape, bool)
    for step in range(1, thick + 1):
        is_border[:, step:] |= label[:, step:] != label[:, :-step]
        is_border[step:] |= label[step:] != label[:-step]
    over[is_border] = 255
    return over


def stripe(image: np.ndarray, where: np.ndarray, dark: int, thick: int = 1
           ) -> np.ndarray:
    """Fill pixels with stripes, white and a grey, and return the picture (h, w, 3)."""
    rows, columns = (np.arange(n, dtype=np.int32) for n in where.shape)
    is_white = np.add.outer(rows, columns) // (3 * thick) % 2
    image[where] = np.where(is_white, 255, dark)[where][:, None]
    return image


def error_map(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray
              ) -> np.ndarray:
    """Mark the wrong pixels in red on the faded picture; void ones are striped.

    Where the truth is void nothing is wrong.

    Returns:
        (h, w, 3) uint8: WRONG is at wrong pixels only, all others are grey.
    """
    grey = np.asarray(Image.fromarray(image).convert('L')) // 5 * 2 + 153
    marked = stripe(grey[..., None].repeat(3, 2), truth == VOID, 205)
    marked[(truth != VOID) & (truth != prediction)] = WRONG
    return marked


# -- words below pictures --------------------------------------------------------------

@functools.cache
def letters(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's font in this size: Pillow's own is little more than ASCII."""
    found = importlib.util.find_spec('matplotlib')
    folder = Path(found.origin).parent if found and found.origin else Path()
    try:
        return ImageFont.truetype(
            str(folder / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf'), size - 1)
    except OSError:
        return ImageFont.load_default(size)


def clean(text: str) -> str:
    """Return text of one line that can be drawn, whatever a file was called."""
    return ' '.join(str(text).encode('utf-8', 'replace').decode().split())


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return clean text, cut with dots to a width in pixels."""
    text = clean(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + '...') > width:
        text = text[:-1]
    return text + '...' if text else ''


def cut(text: str, n: int = 28) -> str:
    """Return clean text of n letters at most."""
    text = clean(text)
    return text if len(text) <= n else text[:n - 3] + '...'


def name_of(value: int, classes: Sequence[str]) -> str:
    if value == VOID:
        return 'void'
    return cut(classes[value]) if value < len(classes) else f'class {value}'


def write_entries(entries: Sequence[tuple[Sequence[int], str]], palette: Sequence[int],
                  width: int, size: int = FONT, n_lines: int = 0) -> Image.Image:
    """Write words with colour boxes before them, wrapped to a width.

    Args:
        entries: (labels, words): a box for each label; void is a struck box.
        width: of the strip, in pixels.
        size: of the letters, in pixels.
        n_lines: what would need more lines is left out; 0 is no limit.

    Returns:
        A white strip of this width, as high as it needs to be.
    """
    font, line, box = letters(size), round(size * 1.4), size - 1
    lines, x = [], width + 1
    for labels, words in entries:
        start = len(labels) * (box + 1) + (size // 3 if labels else 0)
        words = shorten(words, font, width - start)
        needed = start + font.getlength(words)
        if x + needed > width:
            if n_lines and len(lines) == n_lines:
                break
            lines, x = [*lines, []], 0
        lines[-1].append((round(x), labels, start, words))
        x += needed + size
    strip = Image.new('RGB', (width, max(len(lines), 1) * line), 'white')
    draw, edge = ImageDraw.Draw(strip), max(1, size // 13)
    for i, entries_of in enumerate(lines):
        for x, labels, start, words in entries_of:
            top = i * line + round(size * 0.2)
            for j, label in enumerate(labels):
                left = x + j * (box + 1)
                at = (left, top, left + box - 1, top + box - 1)
                fill = 'white' if label == VOID else tuple(
                    palette[3 * label:3 * label + 3])
                draw.rectangle(at, fill, 'black', edge)
                if label == VOID:
                    draw.line((at[0], at[3], at[2], at[1]), 'black', 2 * edge)
            draw.text((x + start, i * line), words, 'black', font)
    return strip


def count(label: np.ndarray) -> list[tuple[int, float]]:
    """Return the labels that are found and their share of the pixels, largest first."""
    counts = np.bincount(label.ravel(), minlength=256)
    return [(int(i), counts[i] / label.size) for i in np.argsort(-counts, kind='stable')
            if counts[i]]


def percent(share: float) -> str:
    return '< 0.1 %' if 0 < share < 0.0005 else f'{share * 100:.1f} %'


def legend(label: np.ndarray, classes: Sequence[str], palette: Sequence[int],
           width: int, size: int = FONT) -> Image.Image:
    """Write the classes of a mask, each with its colour and its share of the pixels.

    Args:
        width: of the strip, in pixels; lines are wrapped to it.
        size: of the letters, in pixels.

    Returns:
        A white strip of this width, the most frequent class first.
    """
    return write_entries([([value], f'{name_of(value, classes)} {percent(share)}')
                          for value, share in count(label)], palette, width, size)


def overlay_with_legend(image: np.ndarray, label: np.ndarray, classes: Sequence[str],
                        palette: Sequence[int]) -> Image.Image:
    """Lay a mask over its picture at full size, with the names of its classes below.

    Returns:
        A picture that is wider than the given one only where names need it.
    """
    h, w = label.shape
    size = max(FONT, round((h * w) ** 0.5 / 36))
    words = legend(label, classes, palette, max(w, 14 * size), size)
    return stack([Image.fromarray(overlay(image, label, palette)), words], size // 2)


# -- sheets ----------------------------------------------------------------------------

def stack(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Put pictures below each other, on white."""
    tops = np.cumsum([0, *(picture.height + gap for picture in pictures)])
    both = Image.new('RGB', (max(p.width for p in pictures), int(tops[-1]) - gap),
                     'white')
    for picture, top in zip(pictures, tops, strict=False):
        both.paste(picture, (0, int(top)))
    return both


def line_up(pictures: Sequence[np.ndarray], headings: Sequence[str], tile: int
            ) -> Image.Image:
    """Put pictures (h, w, 3) beside each other, with a heading above each."""
    font = letters(FONT)
    h, top = max(len(picture) for picture in pictures), round(FONT * 1.4)
    row = Image.new('RGB', (len(pictures) * (tile + GAP) - GAP, top + h), 'white')
    draw = ImageDraw.Draw(row)
    for i, (picture, heading) in enumerate(zip(pictures, headings, strict=True)):
        draw.text((i * (tile + GAP), 0), shorten(heading, font, tile), 'black', font)
        row.paste(Image.fromarray(picture), (i * (tile + GAP), top))
    return row


def shrink(tile: int, image: np.ndarray, *labels: np.ndarray) -> list[np.ndarray]:
    """Resize a picture and its labels until the longer side is a tile's."""
    h, w = image.shape[:2]
    size = tuple(max(1, round(n * tile / max(h, w))) for n in (w, h))
    return resize(Image.fromarray(image), size, *labels)


def resize(image: Image.Image, size: tuple[int, int], *labels: np.ndarray
           ) -> list[np.ndarray]:
    """Resize a picture smoothly, and labels by the nearest pixel, to (w, h)."""
    return [np.asarray(image.resize(size, Image.Resampling.LANCZOS)),
            *(np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
              for label in labels)]


def captioned(image: np.ndarray, label: np.ndarray, title: str, classes: Sequence[str],
              palette: Sequence[int], tile: int = 320) -> Image.Image:
    """Draw a picture, the same with its mask over it, and the names of its classes.

    Args:
        title: stands above.
        tile: the longer side of a picture, in pixels.

    Returns:
        A cell for `sheet`, two tiles and a gap wide.
    """
    plain, small = shrink(tile, image, label)
    row = line_up([plain, overlay(plain, small, palette)], [title, ''], tile)
    return stack([row, legend(label, classes, palette, row.width)], GAP // 2)


def worst_row(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, title: str,
              classes: Sequence[str], palette: Sequence[int], tile: int = 240
              ) -> Image.Image:
    """Draw picture, truth, prediction and errors, and what was taken for what.

    Args:
        title: stands above the picture.
        tile: the longer side of a picture, in pixels.

    Returns:
        A cell for `sheet`, four tiles and three gaps wide. Shares are of the pixels
        that have a class.
    """
    plain, true, found = shrink(tile, image, truth, prediction)
    masks = [stripe(paint(label, palette), label == VOID, 205)
             for label in (true, found)]
    row = line_up([plain, *masks, error_map(plain, true, found)],
                  [title, 'truth', 'prediction', 'errors'], tile)
    is_valid = truth != VOID
    pairs = np.bincount(256 * truth[is_valid].astype(int) + prediction[is_valid],
                        minlength=256 ** 2).reshape(256, 256) / max(is_valid.sum(), 1)
    entries = [([], f'{percent(pairs.trace())} right')]
    np.fill_diagonal(pairs, 0)
    for i in np.argsort(-pairs, axis=None, kind='stable')[:np.count_nonzero(pairs)][:8]:
        pair = divmod(int(i), 256)
        entries.append((pair, ' as '.join(name_of(label, classes) for label in pair)
                        + f' {percent(pairs[pair])}'))
    return stack([row, write_entries(entries, palette, row.width, n_lines=1)], GAP // 2)


def sheet(cells: Sequence[Image.Image], n_columns: int = 2) -> Image.Image:
    """Put cells of any size in rows, on white.

    Raises:
        ValueError: where there is no cell.
    """
    if not cells:
        raise ValueError('there is no picture to put on the sheet: give one at least')
    rows = [cells[i:i + n_columns] for i in range(0, len(cells), n_columns)]
    step = max(cell.width for cell in cells) + 2 * GAP
    tops = np.cumsum([GAP, *(max(cell.height for cell in row) + GAP for row in rows)])
    page = Image.new('RGB', (len(rows[0]) * step, int(tops[-1])), 'white')
    for row, top in zip(rows, tops[:-1], strict=True):
        for i, cell in enumerate(row):
            page.paste(cell, (GAP + i * step, int(top)))
    return page


# -- figures ---------------------------------------------------------------------------

def new_figure(width: float, height: float) -> 'Figure':
    """Return an empty figure of this size in inches.

    Raises:
        ValueError: in a sentence, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('matplotlib, which draws the figures, is missing: run `pip '
                         'install "matplotlib>=3.7"`') from None
    return Figure((width, height), dpi=DPI, facecolor='white')


def save(figure: 'Figure', file: str | os.PathLike | io.BytesIO, kind: str = ''
         ) -> None:
    """Write a figure as its suffix says: .png, .pdf, .svg.

    Args:
        figure: of this file.
        file: path, or a stream that wants `kind`.
        kind: png, pdf or svg; '' is the suffix of the path.
    """
    from matplotlib import rc_context
    with rc_context({'pdf.fonttype': 42}):  # letters that journals take
        figure.savefig(file, format=kind or None, dpi=figure.dpi)


def confusion_figure(matrix: np.ndarray, classes: Sequence[str], title: str = ''
                     ) -> 'Figure':
    """Draw what was taken for what: each row is a class of the truth, in percent.

    Args:
        matrix: (C, C) counts of pixels; rows are the truth, columns the prediction.
        classes: C names.
        title: stands above.

    Returns:
        A figure for `save`. Up to 30 classes have numbers in their
        cells; a class that never occurs is an empty row; the IoU stands on the right.
    """
    matrix, n = np.asarray(matrix, float), len(classes)
    right, truth = matrix.diagonal(), matrix.sum(1)
    union = truth + matrix.sum(0) - right
    share = 100 * matrix / np.maximum(truth, 1)[:, None]
    has_numbers = n <= 30
    cell = (float(np.clip(1.6 / n, 0.27, 0.5)) if has_numbers else
            max(0.075, 0.15 - n / 2000))                    # inches
    points = 6.5 if has_numbers else min(POINTS, cell * 72 * 0.85)
    names = [cut(name).replace('$', r'\$') for name in classes]  # '$' begins a formula
    margin = 0.35 + max(map(len, names)) * points * 0.62 / 72
    side, top, long = n * cell, 0.42, float(np.clip(n * cell, 1.4, 2.0))
    width = margin + side + 0.8 + 4 * points / 72
    height = top + max(side + margin, long + 0.1)
    figure = new_figure(width, height)
    axes = figure.add_axes((margin / width, 1 - (top + side) / height,
                            side / width, side / height))
    # The root keeps a confusion of one percent visible.
    from matplotlib.colors import PowerNorm
    drawn = axes.imshow(share, 'Blues', norm=PowerNorm(0.5, 0, 100), aspect='auto',
                        interpolation='nearest')
    for i in np.flatnonzero(truth == 0):
        axes.axhspan(i - 0.5, i + 0.5, facecolor='0.93', edgecolor='0.7', hatch='////',
                     linewidth=0)
    for i in range(n):
        iou = f'{100 * right[i] / union[i]:.1f}' if union[i] else '-'
        axes.annotate(iou, (1, i), (4, 0), ('axes fraction', 'data'), 'offset points',
                      fontsize=points, va='center')
    axes.annotate('IoU %', (1, 1), (4, 3), 'axes fraction', 'offset points',
                  fontsize=points, va='bottom')
    for i, j in np.argwhere((share >= 0.5) & has_numbers):
        axes.text(j, i, f'{share[i, j]:.0f}', fontsize=points - 1, ha='center',
                  va='center', color='white' if share[i, j] > 35 else 'black')

    axes.set_xticks(range(n), names, rotation=90, fontsize=points)
    axes.set_yticks(range(n), names, fontsize=points)
    axes.tick_params(length=0, pad=2)
    lines = np.arange(1, n) - 0.5, -0.5, n - 0.5
    axes.vlines(*lines, color='0.85', linewidth=0.4 if has_numbers else 0.15)
    axes.hlines(*lines, color='0.85', linewidth=0.4 if has_numbers else 0.15)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    axes.set_xlabel('prediction', fontsize=POINTS)
    axes.set_ylabel('truth', fontsize=POINTS)
    figure.text(0.5, 1 - 0.18 / height, clean(title), fontsize=POINTS + 1, ha='center',
                va='center', parse_math=False)
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
    at = figure.add_axes(((width - 0.5) / width, 1 - (top + long) / height,
                          0.08 / width, long / height))
    draw_bar(figure, drawn, at, [0, 1, 5, 10, 25, 50, 100], 'vertical',
             'share of the true class, %')
    return figure


def draw_bar(figure, drawn, axes, ticks, orientation: str, label: str) -> None:
    """Draw a colour bar into its own axes."""
    bar = figure.colorbar(drawn, cax=axes, orientation=orientation, ticks=ticks)
    bar.ax.tick_params(labelsize=POINTS - 1, length=2, pad=2, width=0.4)
    bar.ax.minorticks_off()
    bar.set_label(label, fontsize=POINTS - 1, labelpad=2)
    bar.outline.set_linewidth(0.4)


# -- responsibilities ------------------------------------------------------------------

def grids(shape: tuple[int, ...], stride: int, size: tuple[int, int], step: int
          ) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of bilinear interpolation: rows (h, h'), columns (w', w).

    Feature i lies exactly on pixel i * stride, as in the network. Of blocks of
    step x step pixels the centres are computed.
    """
    sides = []
    for n, n_features in zip(size, shape[-2:], strict=True):
        at = (np.arange(n // step) * step + (step - 1) / 2) / stride
        at = np.minimum(at, n_features - 1)[:, None]        # nothing beyond the last
        sides.append(np.maximum(1 - abs(at - np.arange(n_features)), 0))
    rows, columns = (side.astype(np.float32) for side in sides)
    return rows, columns.T


def enlarge(maps: np.ndarray, stride: int, size: tuple[int, int], step: int = 1
            ) -> np.ndarray:
    """Enlarge maps bilinearly to the picture that they belong to, and cut them to it.

    Args:
        maps: (..., h', w') float; value (i, j) lies on pixel (i * stride, j * stride).
        stride: pixels per feature.
        size: (h, w) of the picture.
        step: blocks of so many pixels are drawn as one.

    Returns:
        (..., h // step, w // step) float32.
    """
    rows, columns = grids(maps.shape, stride, size, step)
    return rows @ np.asarray(maps, np.float32) @ columns


def partition(maps: np.ndarray, stride: int, size: tuple[int, int], step: int = 1
              ) -> np.ndarray:
    """Return for each pixel the basis that is most responsible for it.

    Args:
        maps: (K, h', w') responsibilities.
        stride, size, step: see `enlarge`.

    Returns:
        (h // step, w // step) int16, 0 .. K - 1.
    """
    rows, columns = grids(maps.shape, stride, size, step)
    tall = rows @ np.asarray(maps, np.float32)              # (K, h, w')
    best, chosen = tall[0] @ columns, np.zeros((len(rows), columns.shape[1]), np.int16)
    for k in range(1, len(maps)):  # one by one: all of them together are large
        now = tall[k] @ columns
        np.copyto(chosen, k, where=now > best)
        np.maximum(now, best, out=best)
    return chosen


@functools.cache
def basis_colours(n: int = 512) -> np.ndarray:
    """Return colours that tell n bases apart; that of a basis does not depend on n.

    Each is the colour that is farthest from all before it (CIE Lab, 1976).

    Returns:
        (n, 3) uint8.
    """
    side = np.linspace(0.1, 0.95, 16)
    rgb = np.stack(np.meshgrid(side, side, side, indexing='ij'), -1).reshape(-1, 3)
    xyz = rgb ** 2.2 @ np.array([[0.434, 0.213, 0.018], [0.376, 0.715, 0.109],
                                 [0.190, 0.072, 0.873]])  # sRGB, white is 1 1 1
    x, y, z = np.cbrt(xyz).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    is_usable = (lab[:, 0] > 25) & (lab[:, 0] < 88)  # neither black nor white
    rgb, lab = rgb[is_usable], lab[is_usable]
    chosen, far = [int(lab[:, 1].argmax())], np.full(len(lab), np.inf)
    for _ in range(n - 1):
        far = np.minimum(far, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(far.argmax()))
    return np.round(rgb[chosen] * 255).astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray, limit: float) -> np.ndarray:
    """Lay a map (h, w) over its darkened picture, as light: (h, w, 3) float, 0..1."""
    from matplotlib import colormaps
    grey = image @ np.array([[0.299], [0.587], [0.114]]) / 255
    colours = colormaps[HEAT](np.clip(values / limit, 0, 1))[..., :3]
    return 1 - (1 - colours) * (1 - 0.4 * grey)


def shrink_panel(image: np.ndarray) -> tuple[np.ndarray, int, float]:
    """Return a picture for a panel, the step (see `grid`), and the panel's inches.

    The height is bounded: the panel of a very long picture is not as long.
    """
    h, w = image.shape[:2]
    step = max(1, min(-(-max(h, w) // PANEL_PIXELS), h, w))
    blocks = image[:h // step * step, :w // step * step].reshape(
        h // step, step, w // step, step, 3)
    return (blocks.mean((1, 3)).round().astype(np.uint8), step,
            INCH * min(max(h / w, 0.25), 2.0))


def put_panel(figure: 'Figure', left: float, top: float, height: float,
              picture: np.ndarray, heading: str, colour: np.ndarray | None = None
              ) -> None:
    """Show a picture, with a heading and a colour box above; the place is in inches."""
    width, whole = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + height) / whole, INCH / width,
                            height / whole))
    axes.set_axis_off()
    axes.imshow(picture)
    axes.set_title(heading, fontsize=POINTS, pad=2.5)
    if colour is not None:
        axes.annotate('\u25a0', (0, 1), (2, 2.5), 'axes fraction', 'offset points',
                      fontsize=POINTS, color=colour / 255, va='baseline')


def brightest(maps: Sequence[np.ndarray]) -> float:
    """Return the responsibility that the brightest colour stands for, 0.02 to 1.

    One of 200 pixels may lie above it, or a single peak would darken all the rest.
    """
    high = np.quantile(np.concatenate([of.ravel() for of in maps]), 0.995)
    return float(np.clip(np.ceil(high * 50) / 50, 0.02, 1))


def put_bar(figure: 'Figure', left: float, length: float, limit: float) -> None:
    """Draw the colour bar of responsibilities at the bottom; the place is in inches."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    width, whole = figure.get_size_inches()
    bar = min(length, 2.2)
    axes = figure.add_axes(((left + (length - bar) / 2) / width, 0.32 / whole,
                            bar / width, 0.06 / whole))
    draw_bar(figure, ScalarMappable(Normalize(0, limit), HEAT), axes,
             [0, limit / 2, limit], 'horizontal', 'responsibility')
    axes.set_xticklabels(['0', f'{limit / 2:.2g}', '\u2265 ' * (limit < 1)
                          + f'{limit:.2g}'])


def responsibility_figure(image: np.ndarray, maps: np.ndarray, stride: int,
                          bases: Sequence[int], mask: np.ndarray | None = None
                          ) -> 'Figure':
    """Draw the responsibilities of some bases after each iteration (figure 5, more).

    A row is an iteration, a column a basis. The last column shows which of all bases
    is most responsible for each pixel; above the column of a basis stand its colour
    there and its share of the pixels at the last iteration.

    Args:
        maps: (T, K, h', w') responsibilities, sum to 1 over K; value (i, j) lies on
            pixel (i * stride, j * stride).
        stride: pixels per feature.
        bases: the indices to show, one at least.
        mask: (h, w, 3) uint8, the prediction as `overlay` paints it, or None.

    Returns:
        A figure for `save`.
    """
    maps, bases, size = np.asarray(maps), list(bases), image.shape[:2]
    small, step, inches = shrink_panel(image)
    shown = enlarge(maps[:, bases], stride, size, step)     # (T, n, h, w)
    winners = [partition(of, stride, size, step) for of in maps]
    limit = brightest([shown])
    column, row = INCH + SPACE, inches + SPACE
    n_stages, is_wide = len(maps), mask is not None and len(maps) == 1
    # Where the bases and the last column begin, from the left.
    first = HEAD_ROOM + (1 + is_wide) * column + SPACE
    last = first + len(bases) * column + SPACE
    height = HEAD_ROOM + n_stages * row + BAR_ROOM
    figure = new_figure(last + column, height)

    put_panel(figure, SPACE, HEAD_ROOM, inches, small, 'picture')
    if mask is not None:
        below = 0 if is_wide else row + HEAD_ROOM - SPACE
        put_panel(figure, SPACE + is_wide * column, HEAD_ROOM + below, inches,
                  shrink_panel(mask)[0], 'prediction')
    for t in range(n_stages):
        top = HEAD_ROOM + t * row
        figure.text((first - SPACE) / (last + column), 1 - (top + inches / 2) / height,
                    f'$t = {t + 1}$', fontsize=POINTS, rotation=90, ha='right',
                    va='center')
        for i, k in enumerate(bases):
            put_panel(figure, first + i * column, top, inches,
                      heat(small, shown[t, i], limit),
                      '' if t else basis_heading(k, winners[-1]),
                      None if t else basis_colours()[k % 512])
        put_panel(figure, last, top, inches, basis_colours()[winners[t] % 512],
                  '' if t else f'largest of all {maps.shape[1]}')
    put_bar(figure, first, len(bases) * column - SPACE, limit)
    return figure


def responsibility_overview(
        rows: Sequence[tuple[np.ndarray, np.ndarray, Sequence[int]]], stride: int
        ) -> 'Figure':
    """Draw the responsibilities of some bases at the last iteration (figure 5).

    Args:
        rows: (image, maps, bases) of each picture, see `responsibility_figure`.
        stride: pixels per feature.

    Returns:
        A figure for `save`: a row is a picture and its bases.
    """
    drawn = []
    for image, maps, bases in rows:
        (small, step, inches), size = shrink_panel(image), image.shape[:2]
        winners = partition(maps[-1], stride, size, step)
        shown = enlarge(np.asarray(maps[-1])[list(bases)], stride, size, step)
        drawn.append((small, inches, bases, shown, winners))
    limit = brightest([shown for *_, shown, _ in drawn])
    n, column = max(len(bases) for _, _, bases in rows), INCH + SPACE
    figure = new_figure(SPACE + (n + 1) * column, BAR_ROOM + sum(
        HEAD_ROOM + inches for _, inches, *_ in drawn))
    top = 0.0
    for small, inches, bases, shown, winners in drawn:
        top += HEAD_ROOM
        put_panel(figure, SPACE, top, inches, small, '')
        for i, k in enumerate(bases):
            put_panel(figure, SPACE + (i + 1) * column, top, inches,
                      heat(small, shown[i], limit), basis_heading(k, winners))
        top += inches
    put_bar(figure, SPACE + column, n * column - SPACE, limit)
    return figure


def basis_heading(k: int, winners: np.ndarray) -> str:
    return f'$z_{{{k}}}$  {percent((winners == k).mean())}'
