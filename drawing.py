"""Overlays of masks, error maps, legends, sheets of pictures, and figure files.

    import drawing
    drawing.overlay_with_legend(image, label, classes, palette).save('overlay.png')
    drawing.save_figure(figure, 'curve.pdf')

In this file `image` is (h, w, 3) uint8. `label`, `truth` and `prediction` are (h, w)
uint8 with class indices and 255 for void, which means no class. `classes` is a list of
names, and `palette` is a flat list of 768 numbers, RGB of 0..255.
"""
import functools
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOID = 255
GAP = 8                  # pixels between pictures
FONT_SIZE = 13           # pixels
WRONG = (214, 30, 40)    # the colour of wrong pixels
N_CONFUSIONS = 4         # pairs of classes that are named below the errors of an image
DPI = 300                # pixels per inch of figures


def paint(label: np.ndarray, palette: Sequence[int]) -> np.ndarray:
    """Paint labels (h, w) uint8 in the colours of a palette: (h, w, 3) uint8."""
    return np.asarray(palette, np.uint8).reshape(-1, 3)[label]


def overlay(image: np.ndarray, label: np.ndarray, palette: Sequence[int]
            ) -> np.ndarray:
    """Blend a mask with its image, with white borders and stripes on void pixels.

    Returns:
        (h, w, 3) uint8.
    """
    thickness = max(1, round(max(label.shape) / 640))
    colours = Image.fromarray(paint(label, palette))
    blended = np.array(Image.blend(Image.fromarray(image), colours, 0.5))
    fill_stripes(blended, label == VOID, 90, thickness)
    is_border = np.zeros(label.shape, bool)
    for step in range(1, thickness + 1):
        is_border[:, step:] |= label[:, step:] != label[:, :-step]
        is_border[step:] |= label[step:] != label[:-step]
    blended[is_border] = 255
    return blended


def fill_stripes(image: np.ndarray, where: np.ndarray, grey: int, thickness: int = 1
                 ) -> None:
    """Fill the pixels `where` (h, w) bool with white and grey stripes, in place."""
    rows, columns = (np.arange(n, dtype=np.int32) for n in where.shape)
    is_white = np.add.outer(rows, columns) // (3 * thickness) % 2
    image[where] = np.where(is_white, 255, grey)[where][:, None]


def error_map(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray
              ) -> np.ndarray:
    """Mark wrong pixels in red on the faded image, and void ones with stripes.

    No pixel is wrong where the truth is void.

    Returns:
        (h, w, 3) uint8: wrong pixels have the colour WRONG, all others are grey.
    """
    grey = np.asarray(Image.fromarray(image).convert('L')) // 5 * 2 + 153
    marked = grey[..., None].repeat(3, 2)
    fill_stripes(marked, truth == VOID, 205)
    marked[(truth != VOID) & (truth != prediction)] = WRONG
    return marked


@functools.cache
def letters(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, or Pillow's, which has little more than ASCII."""
    try:
        from matplotlib import get_data_path
        return ImageFont.truetype(f'{get_data_path()}/fonts/ttf/DejaVuSans.ttf',
                                  size - 1)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def shorten(text: str, n_letters: int = 28) -> str:
    """Return text as one line of valid Unicode, with dots in place of what is too long.
    """
    text = ' '.join(str(text).encode('utf-8', 'replace').decode().split())
    return text if len(text) <= n_letters else text[:n_letters - 3] + '...'


def class_name(value: int, classes: Sequence[str]) -> str:
    """Return the short name of a class."""
    if value == VOID:
        return 'void'
    return shorten(classes[value]) if value < len(classes) else f'class {value}'


def percent(share: float) -> str:
    """Format a share of 0..1."""
    return '< 0.1 %' if 0 < share < 0.0005 else f'{share * 100:.1f} %'


def draw_legend(entries: Sequence[tuple[int, str]], palette: Sequence[int], width: int,
                size: int = FONT_SIZE) -> Image.Image:
    """Draw (class, text) entries, a colour box before each text, wrapped to a width.

    Void has a white box. `size` is the height of the letters in pixels.

    Returns:
        A white strip of this width, as high as it needs to be.
    """
    font, line_height = letters(size), round(size * 1.4)
    placed, x, y = [], 0, 0
    for value, text in entries:
        entry_width = size * 4 // 3 + round(font.getlength(text))
        if x > 0 and x + entry_width > width:
            x, y = 0, y + line_height
        placed.append((x, y, value, text))
        x += entry_width + size
    strip = Image.new('RGB', (width, y + line_height), 'white')
    draw = ImageDraw.Draw(strip)
    for x, y, value, text in placed:
        colour = tuple(palette[3 * value:3 * value + 3])
        top, side = y + size // 5, size - 2
        draw.rectangle((x, top, x + side, top + side),
                       'white' if value == VOID else colour, 'black', 1 + size // 26)
        draw.text((x + size * 4 // 3, y), text, 'black', font)
    return strip


def legend(label: np.ndarray, classes: Sequence[str], palette: Sequence[int],
           width: int, size: int = FONT_SIZE) -> Image.Image:
    """Draw the classes of a mask, each with its colour and its share of the pixels.

    Returns:
        A white strip `width` pixels wide, the most frequent class first.
    """
    shares = np.bincount(label.ravel()) / label.size
    found = [value for value in np.argsort(-shares, kind='stable') if shares[value] > 0]
    entries = [(value, f'{class_name(value, classes)} {percent(shares[value])}')
               for value in found]
    return draw_legend(entries, palette, width, size)


def overlay_with_legend(image: np.ndarray, label: np.ndarray, classes: Sequence[str],
                        palette: Sequence[int]) -> Image.Image:
    """Draw the overlay at full size, with the legend of its classes below.

    Returns:
        A picture that is wider than the image only where the legend needs it.
    """
    h, w = label.shape
    size = max(FONT_SIZE, round((h * w) ** 0.5 / 36))
    below = legend(label, classes, palette, max(w, 24 * size), size)
    return stack([Image.fromarray(overlay(image, label, palette)), below], size // 2)


def stack(pictures: Sequence[Image.Image], gap: int = GAP, is_row: bool = False
          ) -> Image.Image:
    """Put pictures below each other, or beside each other in a row, on white."""
    size = np.array([picture.size for picture in pictures])   # (n, 2): width, height
    steps = (size + gap) * (int(is_row), int(not is_row))
    corners = np.cumsum(steps, 0) - steps
    page = Image.new('RGB', tuple((corners + size).max(0).tolist()), 'white')
    for picture, corner in zip(pictures, corners.tolist(), strict=True):
        page.paste(picture, tuple(corner))
    return page


def tile_row(pictures: Sequence[np.ndarray], headings: Sequence[str], tile: int
             ) -> Image.Image:
    """Put pictures (h, w, 3) in tiles beside each other, with a heading above each."""
    tiles, top = [], round(FONT_SIZE * 1.4)
    for picture, heading in zip(pictures, headings, strict=True):
        cell = Image.new('RGB', (tile, top + len(picture)), 'white')
        ImageDraw.Draw(cell).text((0, 0), shorten(heading, tile // 8), 'black',
                                  letters(FONT_SIZE))
        cell.paste(Image.fromarray(picture), (0, top))
        tiles.append(cell)
    return stack(tiles, is_row=True)


def shrink(tile: int, image: np.ndarray, *labels: np.ndarray) -> list[np.ndarray]:
    """Resize an image and its labels until the longer side has `tile` pixels."""
    h, w = image.shape[:2]
    scale = tile / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    return resize(Image.fromarray(image), size, *labels)


def resize(image: Image.Image, size: tuple[int, int], *labels: np.ndarray
           ) -> list[np.ndarray]:
    """Resize an image smoothly and labels to the nearest pixel; size is PIL's (w, h).
    """
    resized = [np.asarray(image.resize(size, Image.Resampling.LANCZOS))]
    for label in labels:
        small = Image.fromarray(label).resize(size, Image.Resampling.NEAREST)
        resized.append(np.asarray(small))
    return resized


def captioned(image: np.ndarray, label: np.ndarray, title: str, classes: Sequence[str],
              palette: Sequence[int], tile: int = 320) -> Image.Image:
    """Draw an image with a title, its overlay, and the legend of its classes.

    Returns:
        A cell for `sheet`: two tiles of `tile` pixels and a gap wide.
    """
    plain, small = shrink(tile, image, label)
    row = tile_row([plain, overlay(plain, small, palette)], [title, ''], tile)
    return stack([row, legend(label, classes, palette, row.width)], GAP // 2)


def worst_row(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, title: str,
              classes: Sequence[str], palette: Sequence[int], tile: int = 240
              ) -> Image.Image:
    """Draw image, truth, prediction and errors, and name the largest confusions.

    Returns:
        A cell for `sheet`: four tiles of `tile` pixels and three gaps wide. Shares are
        of the pixels that have a class.
    """
    plain, true, found = shrink(tile, image, truth, prediction)
    is_valid = truth != VOID
    is_wrong = is_valid & (truth != prediction)
    n_valid = max(is_valid.sum(), 1)
    pairs = 256 * truth[is_wrong].astype(int) + prediction[is_wrong]
    pairs, counts = np.unique(pairs, return_counts=True)
    entries = []
    for i in np.argsort(-counts, kind='stable')[:N_CONFUSIONS]:
        names = [class_name(value, classes) for value in divmod(pairs[i], 256)]
        entries.append((pairs[i] // 256, f'{names[0]} taken for {names[1]} '
                                         f'{percent(counts[i] / n_valid)}'))
    row = tile_row([plain, paint(true, palette), paint(found, palette),
                    error_map(plain, true, found)],
                   [title, 'truth', 'prediction',
                    f'errors {percent(is_wrong.sum() / n_valid)}'], tile)
    return stack([row, draw_legend(entries, palette, row.width)], GAP // 2)


def sheet(cells: Sequence[Image.Image], n_columns: int = 2) -> Image.Image:
    """Put cells of one width, at least one, in rows on white."""
    rows = [stack(cells[i:i + n_columns], 2 * GAP, is_row=True)
            for i in range(0, len(cells), n_columns)]
    return ImageOps.expand(stack(rows), GAP, 'white')


def new_figure(width: float, height: float) -> 'Figure':
    """Return an empty matplotlib figure of this size in inches.

    Raises:
        UserError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise config.UserError('matplotlib, which draws the figures, is missing: run '
                               '`pip install "matplotlib>=3.7"`') from None
    return Figure((width, height), dpi=DPI, facecolor='white')


def save_figure(figure: 'Figure', file: str | os.PathLike | io.BytesIO, kind: str = ''
                ) -> None:
    """Write a figure, enlarged or cut to what is drawn.

    Args:
        figure: from `new_figure`.
        file: a path, or a stream, which needs `kind`.
        kind: png, pdf or svg; '' takes the suffix of the path.
    """
    from matplotlib import rc_context
    with rc_context({'pdf.fonttype': 42}):  # embed TrueType: journals refuse Type 3
        figure.savefig(file, format=kind or None, dpi=figure.dpi,
                       bbox_inches='tight', pad_inches=0.05)
