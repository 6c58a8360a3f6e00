"""Overlays, legends, sheets, confusion matrix: pixels and texts known beforehand."""
import io
import sys

import numpy as np
import pytest
from PIL import Image

import config
import drawing
import recipes
from evaluation.confusion import confusion_figure

PALETTE = recipes.voc_palette()
CLASSES = list(recipes.VOC)
ODD = ['猫', 'crème $x$ $', 'two\nlines', 'file\udcff.png', 'x' * 300, '', '$a_{b$']
SIZES = [(1, 1), (40, 1), (3, 50), (2, 5000), (37, 53)]


def colour_of(label):
    return tuple(PALETTE[3 * label:3 * label + 3])


def sample(h, w, n=6):
    """Return a picture of noise and a mask of n vertical bands; the last one is void.
    """
    image = np.random.default_rng(0).integers(0, 255, (h, w, 3), dtype=np.uint8)
    label = np.broadcast_to(np.arange(w) * n // w, (h, w)).astype(np.uint8)
    return image, np.where(label == n - 1, 255, label).astype(np.uint8)


def has(picture, colour):
    return bool((np.asarray(picture) == colour).all(-1).any())


# -- masks -----------------------------------------------------------------------------

def test_paint_and_overlay():
    label = np.full((12, 12), 15, np.uint8)
    label[:, 6:] = 255
    assert (drawing.paint(label, PALETTE)[:, :6] == colour_of(15)).all()
    image = np.full((12, 12, 3), 200, np.uint8)
    over = drawing.overlay(image, label, PALETTE)
    assert abs(over[:, :6] - (200 + np.array(colour_of(15))) / 2).max() <= 1
    assert (over[:, 6] == 255).all()  # the border
    assert set(np.unique(over[:, 7:])) == {90, 255} and (image == 200).all()


def test_the_error_map_marks_exactly_the_wrong_pixels():
    draw = np.random.default_rng(1)
    image = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    truth, found = (draw.integers(0, 3, (30, 40), dtype=np.uint8) for _ in range(2))
    truth[draw.random((30, 40)) < 0.2] = 255
    marked = drawing.error_map(image, truth, found)
    is_wrong = (marked == drawing.WRONG).all(-1)
    for y in range(30):
        for x in range(40):
            assert is_wrong[y, x] == (truth[y, x] not in (255, found[y, x]))
    rest = marked[~is_wrong]
    assert (rest == rest[:, :1]).all() and rest.min() >= 150  # faded greys
    assert not (drawing.error_map(image, truth, truth) == drawing.WRONG).all(-1).any()


# -- text ------------------------------------------------------------------------------

@pytest.fixture
def entries(monkeypatch):
    """Collect the (class, text) entries that are drawn."""
    entries, draw_legend = [], drawing.draw_legend

    def record(given, *args):
        entries.extend((int(value), text) for value, text in given)
        return draw_legend(given, *args)
    monkeypatch.setattr(drawing, 'draw_legend', record)
    return entries


def test_the_legend_lists_exactly_the_classes_found(entries):
    label = np.zeros((10, 10), np.uint8)
    label[:2], label[2:3], label[3, 0] = 15, 255, 77
    strip = drawing.legend(label, CLASSES, PALETTE, 500)
    assert entries == [(0, 'background 69.0 %'), (15, 'person 20.0 %'),
                       (255, 'void 10.0 %'), (77, 'class 77 1.0 %')]
    assert strip.width == 500 and has(strip, colour_of(15)) and has(strip, (0, 0, 0))
    assert not has(strip, colour_of(8))
    narrow = drawing.legend(label, CLASSES, PALETTE, 130)
    assert narrow.width == 130 and narrow.height == 4 * strip.height
    drawing.legend(label, ['x' * 300] * 16, PALETTE, 500)
    assert entries[-4][1] == 'x' * 25 + '... 69.0 %'
    assert drawing.percent(1e-6) == '< 0.1 %' and drawing.percent(0) == '0.0 %'


def test_odd_texts():
    assert drawing.shorten('a\n b\udcff') == 'a b?'
    assert drawing.shorten('x' * 300, 10) == 'xxxxxxx...'
    font = drawing.letters(13)
    if 'DejaVu' in font.getname()[0]:  # a letter, not the box of an unknown one
        assert font.getmask('é').getbbox() != font.getmask('\ue123').getbbox()


@pytest.mark.parametrize('size', SIZES)
def test_any_size_and_any_name(size):
    (image, label), (h, w) = sample(*size), size
    picture = drawing.overlay_with_legend(image, label, ODD, PALETTE)
    assert picture.width == max(w, 24 * 13) and picture.height > h
    whole = np.asarray(picture)
    assert (whole[:h, :w] == drawing.overlay(image, label, PALETTE)).all()
    assert (whole[:h, w:] == 255).all()
    cell = drawing.captioned(image, label, ODD[3], ODD, PALETTE, 64)
    row = drawing.worst_row(image, label, label[:, ::-1], ODD[4], ODD, PALETTE, 64)
    assert cell.width == 2 * 64 + 8 and row.width == 4 * 64 + 3 * 8


def test_the_letters_grow_with_the_picture():
    (image, label), (large, its_label) = sample(90, 160), sample(900, 1600)
    small = drawing.overlay_with_legend(image, label, CLASSES, PALETTE).height - 90
    one_line = drawing.legend(its_label, CLASSES, PALETTE, 9999).height
    assert drawing.overlay_with_legend(large, its_label, CLASSES, PALETTE
                                       ).height - 900 > 1.5 * one_line
    assert small < 130


# -- sheets ----------------------------------------------------------------------------

def test_worst_row(entries):
    truth = np.full((48, 48), 15, np.uint8)
    truth[:, :12], truth[:, 36:] = 0, 255
    found = np.full((48, 48), 8, np.uint8)
    found[:, :24] = truth[:, :24]
    row = drawing.worst_row(np.zeros((48, 48, 3), np.uint8), truth, found, 'title',
                            CLASSES, PALETTE, 96)
    assert entries == [(15, 'person taken for cat 33.3 %')]
    pixels, step, top = np.asarray(row), 96 + 8, row.height - 22 - 96
    y = top + 40
    assert tuple(pixels[y, step + 48]) == colour_of(15)       # truth
    assert tuple(pixels[y, 2 * step + 60]) == colour_of(8)    # prediction
    is_wrong = (pixels[y, 3 * step:] == drawing.WRONG).all(-1)
    assert is_wrong.tolist() == [48 <= x < 72 for x in range(96)]


def test_captioned_and_sheet():
    image, label = sample(60, 120)
    cell = drawing.captioned(image, label, 'title', CLASSES, PALETTE, 120)
    assert cell.width == 2 * 120 + 8 and cell.height > 60 + 2 * 18
    top = round(13 * 1.4)
    assert (np.asarray(cell)[top:top + 60, :120] == image).all()
    cells = [Image.new('RGB', (30, 10 + i), (i, 0, 0)) for i in range(5)]
    page = drawing.sheet(cells, 2)
    assert page.size == (2 * (30 + 16), 8 + (11 + 8) + (13 + 8) + (14 + 8))
    for i, (x, y) in enumerate([(8, 8), (54, 8), (8, 27), (54, 27), (8, 48)]):
        assert page.getpixel((x, y)) == page.getpixel((x + 29, y + 9 + i)) == (i, 0, 0)
        assert page.getpixel((x - 1, y)) == (255, 255, 255)


# -- figures ---------------------------------------------------------------------------

@pytest.mark.filterwarnings('ignore:Glyph')  # of a letter that no font here has
@pytest.mark.parametrize('n', [1, 21, 60])
def test_confusion_of_any_number_of_classes(n):
    draw = np.random.default_rng(n)
    matrix = draw.integers(1, 900, (n, n))
    matrix[n // 2] = 0  # never in the truth
    figure = confusion_figure(matrix, (ODD + CLASSES * 9)[:n], '$a_{b$')
    axes = figure.axes[0]
    shown = np.asarray(axes.images[0].get_array())
    for i in {0, n // 2, n - 1}:
        expected = 0 if i == n // 2 else matrix[i] / matrix[i].sum() * 100
        assert shown[i] == pytest.approx(np.broadcast_to(expected, n))
    right = next(axis for axis in axes.child_axes if axis.get_ylabel() == 'IoU, %')
    ious = [100 * matrix[i, i] / union if union else -1 for i in range(n) for union in
            [matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]]]
    assert [text.get_text() for text in right.get_yticklabels()] == [
        f'{iou:.1f}' if iou >= 0 else '-' for iou in ious]
    assert len(axes.texts) == (int((shown >= 0.5).sum()) if n <= 30 else 0)
    assert len(axes.patches) == 1  # the empty row
    figure.dpi = 20  # is drawn, fast
    for kind in ('png', 'pdf') if n == 1 else ('png',):
        drawing.save_figure(figure, stream := io.BytesIO(), kind)
        assert stream.tell() > 1000


def test_a_saved_figure_leaves_room_for_its_names(tmp_path):
    figure = confusion_figure(np.eye(2), ['x' * 28, 'b'], 'title')
    drawing.save_figure(figure, tmp_path / 'a.png')
    pixels = np.asarray(Image.open(tmp_path / 'a.png').convert('L'))
    inches = figure.get_size_inches()
    assert (np.array(pixels.shape) > (inches[::-1] + 0.5) * figure.dpi).all()
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (edge == 255).all()  # nothing is cut


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(config.UserError, match='pip install "matplotlib'):
        confusion_figure(np.eye(2), ['a', 'b'])
    image, label = sample(9, 9)
    assert drawing.overlay_with_legend(image, label, CLASSES, PALETTE).height > 9
