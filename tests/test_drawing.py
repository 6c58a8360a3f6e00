"""What is drawn: pixels, words, and places that can be known beforehand."""
import io
import sys

import numpy as np
import pytest
from PIL import Image

import drawing
import recipes

PALETTE = recipes.voc_palette()
CLASSES = list(recipes.VOC)
ODD = ['猫', 'crème $x$ $', 'two\nlines', 'file\udcff.png', 'x' * 300, '', '$a_{b$']
SIZES = [(1, 1), (40, 1), (3, 50), (2, 5000), (37, 53)]


def as_image(figure):
    stream = io.BytesIO()
    drawing.save(figure, stream, 'png')
    return Image.open(stream).convert('RGB')


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


# -- words -----------------------------------------------------------------------------

def test_the_legend_lists_exactly_the_classes_found(monkeypatch):
    label = np.zeros((10, 10), np.uint8)
    label[:2], label[2:3], label[3, 0] = 15, 255, 77
    written = []
    write = drawing.write_entries
    monkeypatch.setattr(drawing, 'write_entries', lambda entries, *rest: (
        written.extend(entries), write(entries, *rest))[1])
    strip = drawing.legend(label, CLASSES, PALETTE, 500)
    assert written == [([0], 'background 69.0 %'), ([15], 'person 20.0 %'),
                       ([255], 'void 10.0 %'), ([77], 'class 77 1.0 %')]
    assert strip.width == 500 and has(strip, colour_of(15)) and has(strip, (0, 0, 0))
    assert not has(strip, colour_of(8))
    narrow = drawing.legend(label, CLASSES, PALETTE, 130)
    assert narrow.width == 130 and narrow.height == 4 * strip.height
    long = drawing.legend(label, ['x' * 300] * 16, PALETTE, 500)
    assert written[-4][1] == 'x' * 25 + '... 69.0 %' and long.height > strip.height
    one_line = write([([0], 'x' * 50)] * 9, PALETTE, 500, n_lines=1)
    assert one_line.height == strip.height
    assert drawing.percent(1e-6) == '< 0.1 %' and drawing.percent(0) == '0.0 %'


def test_words_fit_their_width():
    font = drawing.letters(13)
    assert drawing.shorten('short', font, 500) == 'short'
    cut = drawing.shorten('x' * 300, font, 100)
    assert cut.endswith('...') and 80 < font.getlength(cut) <= 100
    assert drawing.shorten('long', font, 1) == ''
    assert drawing.clean('a\n b\udcff') == 'a b?'
    if 'DejaVu' in font.getname()[0]:  # a letter, not the box of an unknown one
        assert font.getmask('é').getbbox() != font.getmask('\ue123').getbbox()


@pytest.mark.parametrize('size', SIZES)
def test_any_size_and_any_name(size):
    (image, label), (h, w) = sample(*size), size
    picture = drawing.overlay_with_legend(image, label, ODD, PALETTE)
    assert picture.width == max(w, 14 * 13) and picture.height > h
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


def test_worst_row():
    truth = np.full((48, 48), 15, np.uint8)
    truth[:, :12], truth[:, 36:] = 0, 255
    found = np.full((48, 48), 8, np.uint8)
    found[:, :24] = truth[:, :24]
    seen, write = [], drawing.write_entries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, 'write_entries', lambda entries, *rest, **more: (
            seen.extend(entries), write(entries, *rest, **more))[1])
        row = drawing.worst_row(np.zeros((48, 48, 3), np.uint8), truth, found, 'title',
                                CLASSES, PALETTE, 96)
    assert seen == [([], '66.7 % right'), ((15, 8), 'person as cat 33.3 %')]
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
    with pytest.raises(ValueError, match='no picture'):
        drawing.sheet([])


# -- figures ---------------------------------------------------------------------------

@pytest.mark.filterwarnings('ignore:Glyph')  # of a letter that no font here has
@pytest.mark.parametrize('n', [1, 2, 11, 21, 60, 171])
def test_confusion_of_any_number_of_classes(n):
    draw = np.random.default_rng(n)
    matrix = draw.integers(1, 900, (n, n))
    matrix[n // 2] = 0  # never in the truth
    figure = drawing.confusion_figure(matrix, (ODD + CLASSES * 9)[:n], '$a_{b$')
    axes = figure.axes[0]
    shown = np.asarray(axes.images[0].get_array())
    for i in {0, n // 2, n - 1}:
        expected = 0 if i == n // 2 else matrix[i] / matrix[i].sum() * 100
        assert shown[i] == pytest.approx(np.broadcast_to(expected, n))
    texts = [text.get_text() for text in axes.texts]
    ious = [100 * matrix[i, i] / union if union else -1 for i in range(n) for union in
            [matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]]]
    assert texts[:n] == [f'{iou:.1f}' if iou >= 0 else '-' for iou in ious]
    cells = texts[n + 1:]
    assert len(cells) == (int((shown >= 0.5).sum()) if n <= 30 else 0)
    assert len(axes.patches) == 1  # the empty row
    figure.dpi = 20  # is drawn, fast
    for kind in ('png', 'pdf') if n == 1 else ('png',):
        drawing.save(figure, stream := io.BytesIO(), kind)
        assert stream.tell() > 1000


def test_a_feature_lies_on_its_pixel():
    draw = np.random.default_rng(2)
    maps = draw.random((3, 5, 7)).astype(np.float32)
    for stride, size in ((8, (30, 45)), (16, (65, 97)), (4, (40, 40))):
        large = drawing.enlarge(maps, stride, size)
        assert large.shape == (3, *size)
        for i in range(5):
            for j in range(7):
                if i * stride < size[0] and j * stride < size[1]:
                    assert (large[:, i * stride, j * stride] == maps[:, i, j]).all()
        # Halfway between four features lies their mean.
        assert large[:, stride // 2, stride // 2] == pytest.approx(
            maps[:, :2, :2].mean((1, 2)))
    assert (drawing.enlarge(maps, 4, (40, 40))[:, 39, 39] == maps[:, 4, 6]).all()
    one = drawing.enlarge(maps, 8, (33, 49))
    assert drawing.enlarge(maps, 8, (33, 49), 3) == pytest.approx(
        one[:, 1::3, 1:48:3], abs=1e-6)  # the middle pixel of three


def test_partition():
    draw = np.random.default_rng(3)
    maps = draw.random((300, 4, 5))
    chosen = drawing.partition(maps, 8, (25, 33))
    assert (chosen == drawing.enlarge(maps, 8, (25, 33)).argmax(0)).all()
    assert (chosen[::8, ::8] == maps.argmax(0)).all()


def test_the_colours_of_the_bases():
    colours = drawing.basis_colours(64).astype(int)
    apart = abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(64)
    assert apart.min() > 40
    many = drawing.basis_colours()
    assert many.shape == (512, 3) and len({tuple(c) for c in many.tolist()}) == 512
    assert (many[:64] == colours).all()
    assert many.max(1).min() > 50 and many.min(1).max() < 245  # not black, not white


@pytest.mark.parametrize('stages', [1, 2, 3])
@pytest.mark.parametrize('size', [(1, 1), (3, 70), (60, 1), (33, 49)])
def test_responsibilities(stages, size):
    draw, (h, w) = np.random.default_rng(4), size
    image = draw.integers(0, 255, (h, w, 3), dtype=np.uint8)
    maps = draw.dirichlet(np.ones(6), (stages, -(-h // 16) + 1, -(-w // 16) + 1))
    maps = maps.transpose(0, 3, 1, 2)
    figure = drawing.responsibility_figure(image, maps, 16, [4, 0], mask=image)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 + stages * 3
    assert (np.asarray(panels[0].images[0].get_array()) == image).all()
    winners = drawing.partition(maps[-1], 16, size)
    last = np.asarray(panels[-1].images[0].get_array())
    assert (last == drawing.basis_colours()[winners]).all()
    headings = [axes.get_title() for axes in panels if axes.get_title()]
    share = 100 * (winners == 4).mean()
    assert headings[:2] == ['picture', 'prediction']
    assert headings[2].startswith('$z_{4}$') and f'{share:.1f} %' in headings[2]
    assert headings[-1] == 'largest of all 6'
    rows = [text.get_text() for text in figure.texts]
    assert [row for row in rows if 't =' in row] == [f'$t = {t + 1}$' for t in
                                                     range(stages)]
    # Nothing lies over anything else, or outside.
    boxes = [axes.get_position(original=True) for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1
        assert not any(box.x0 < other.x1 - 1e-9 and other.x0 < box.x1 - 1e-9
                       and box.y0 < other.y1 - 1e-9 and other.y0 < box.y1 - 1e-9
                       for other in boxes[:i])
    figure.dpi = 40
    whole = np.asarray(as_image(figure))
    inches = figure.get_size_inches()
    assert abs(whole.shape[:2] - inches[::-1] * 40).max() <= 1
    assert (whole[-1] == 255).all() and (whole[0] == 255).all()


def test_a_map_is_light_over_its_picture():
    image = np.full((2, 2, 3), 255, np.uint8)
    lit = drawing.heat(image, np.array([[0, 0.1], [0.2, 0.4]]), 0.2)
    assert lit.shape == (2, 2, 3) and 0 <= lit.min() and lit.max() <= 1
    light = lit.mean(-1).ravel()
    assert light[0] == pytest.approx(0.4, abs=0.02) and light[0] < light[1] < light[2]
    assert light[3] == light[2] > 0.8
    assert drawing.brightest([np.full(9, 0.031)]) == pytest.approx(0.04)
    assert drawing.brightest([np.zeros(9)]) == 0.02


def test_overview():
    draw = np.random.default_rng(5)
    rows = [(draw.integers(0, 255, (*size, 3), dtype=np.uint8),
             draw.dirichlet(np.ones(5), (2, 4, 5)).transpose(0, 3, 1, 2), bases)
            for size, bases in (((20, 30), [0, 3]), ((30, 20), [1, 2, 4]))]
    figure = drawing.responsibility_overview(rows, 8)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title()[:7] for axes in panels] == [
        '', '$z_{0}$', '$z_{3}$', '', '$z_{1}$', '$z_{2}$', '$z_{4}$']
    figure.dpi = 40
    assert np.asarray(as_image(figure)).std() > 20


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ValueError, match='pip install "matplotlib'):
        drawing.confusion_figure(np.eye(2), ['a', 'b'])
    image, label = sample(9, 9)
    assert drawing.overlay_with_legend(image, label, CLASSES, PALETTE).height > 9
