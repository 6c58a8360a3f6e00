"""Figures of responsibilities: where features lie, and what each panel shows."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

import drawing
import inference
import network
from prediction.responsibilities import (
    basis_colours,
    enlarge,
    partition,
    responsibility_figure,
    responsibility_overview,
    shrink,
)


def place_of_feature(n, stride, align_corners):
    """Return the coordinates, in pixels, of n features along one side."""
    first = 0 if align_corners else (stride - 1) / 2  # the middle of the first block
    return first + stride * np.arange(n)


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('stride', [8, 16])
def test_a_feature_lies_at_its_place(stride, align_corners):
    draw, size = np.random.default_rng(stride), (3 * stride - 3, 5 * stride)
    n_rows, n_columns = 3, 5
    maps = draw.random((2, n_rows, n_columns))
    # Interpolated by numpy, first down, then across; constant beyond the last feature.
    down = np.stack([[np.interp(np.arange(size[0]), place_of_feature(
        n_rows, stride, align_corners), column) for column in one.T] for one in maps])
    wanted = np.stack([[np.interp(np.arange(size[1]), place_of_feature(
        n_columns, stride, align_corners), row) for row in one.T] for one in down])
    found = enlarge(maps, stride, size, align_corners)
    assert found.dtype == np.float32 and found.shape == (2, *size)
    assert np.abs(found - wanted).max() < 1e-5
    assert (partition(maps, stride, size, align_corners) == wanted.argmax(0)).all()


@pytest.mark.parametrize('align_corners', [True, False])
def test_a_single_feature_is_centred_on_its_place(align_corners):
    maps = np.zeros((1, 6, 6))
    maps[0, 2, 3] = 1
    image = np.zeros((48, 48, 3), np.uint8)
    figures = (responsibility_figure(image, maps[None], 8, [0],
                                     align_corners=align_corners),
               responsibility_overview([(image, maps[None], [0])], 8, align_corners))
    for figure in figures:
        light = np.asarray(figure.axes[2].images[1].get_array())
        centre = [(light.sum(axis) * np.arange(48)).sum() / light.sum()
                  for axis in (1, 0)]
        expected = (16, 24) if align_corners else (19.5, 27.5)
        assert centre == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize('align_corners', [True, False])
def test_features_lie_where_the_logits_do(align_corners):
    h, w = 37, 50
    sides = [inference.padded_size(n, 8, align_corners) for n in (h, w)]
    n_features = [(n + 7) // 8 for n in sides]
    maps = np.random.default_rng(0).random((3, *n_features)).astype(np.float32)
    logits = network.upsample(torch.from_numpy(maps)[None], sides, align_corners)
    assert np.array_equal(enlarge(maps, 8, (h, w), align_corners),
                          logits[0, :, :h, :w].numpy())


def test_partition_of_many_bases():
    maps = np.random.default_rng(3).random((300, 4, 5))
    chosen = partition(maps, 8, (25, 33))
    assert (chosen[::8, ::8] == maps.argmax(0)).all()


def test_a_large_image_is_shrunk_with_its_stride():
    image = np.zeros((900, 1200, 3), np.uint8)
    small, stride = shrink(image, 8)
    assert small.shape == (225, 300, 3) and stride == 2
    small, stride = shrink(np.zeros((2, 9000, 3), np.uint8), 8)
    assert small.shape == (1, 1125, 3) and stride == 1


def test_colours_tell_the_bases_apart():
    colours = 255 * basis_colours(64)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(64)
    assert distances.min() > 10
    assert (basis_colours(512)[:64] * 255 == colours).all()


def as_pixels(figure):
    figure.dpi, stream = 100, io.BytesIO()
    drawing.save_figure(figure, stream, 'png')
    return np.asarray(Image.open(stream).convert('RGB'))


@pytest.mark.parametrize('n_stages, size', [(1, (1, 1)), (2, (3, 70)), (3, (33, 49))])
def test_responsibility_figure(n_stages, size):
    draw, (h, w) = np.random.default_rng(4), size
    image = draw.integers(0, 255, (h, w, 3), dtype=np.uint8)
    maps = draw.dirichlet(np.ones(6), (n_stages, (h - 1) // 16 + 1, (w - 1) // 16 + 1))
    maps = maps.transpose(0, 3, 1, 2)
    figure = responsibility_figure(image, maps, 16, [4, 0], mask=255 - image)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 + n_stages * 3
    assert (np.asarray(panels[0].images[0].get_array()) == image).all()
    titles = {axes.get_title(): axes for axes in panels}
    assert (np.asarray(titles['prediction'].images[0].get_array()) == 255 - image).all()
    winners = partition(maps[-1], 16, size)
    last = np.asarray(panels[-1].images[0].get_array())
    assert (last == basis_colours(6)[winners]).all()
    assert panels[-1].get_title() == 'largest of all 6'
    share = 100 * (winners == 4).mean()
    assert panels[-3].get_title().startswith('$z_{4}$')
    assert panels[-3].get_title().endswith(f'{share:.1f} %')
    shown = np.asarray(panels[-3].images[1].get_array())
    assert (shown == enlarge(maps[-1], 16, size)[4]).all()
    labels = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [label for label in labels if 't =' in label] == [
        f'$t = {t + 1}$' for t in range(n_stages)]
    # No panel lies over another or outside.
    boxes = [axes.get_position(original=True) for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert min(box.x0, box.y0) > -1e-9 and max(box.x1, box.y1) < 1 + 1e-9
        assert not any(box.x0 < other.x1 - 1e-9 and other.x0 < box.x1 - 1e-9
                       and box.y0 < other.y1 - 1e-9 and other.y0 < box.y1 - 1e-9
                       for other in boxes[:i])
    pixels = as_pixels(figure)
    assert (pixels[-1] == 255).all() and (pixels[0] == 255).all()  # nothing is cut


def test_overview():
    draw = np.random.default_rng(5)
    rows = [(draw.integers(0, 255, (*size, 3), dtype=np.uint8),
             draw.dirichlet(np.ones(5), (2, 4, 5)).transpose(0, 3, 1, 2), bases)
            for size, bases in (((20, 30), [0, 3]), ((30, 20), [1, 2, 4]))]
    figure = responsibility_overview(rows, 8)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title()[:7] for axes in panels] == [
        '', '$z_{0}$', '$z_{3}$', 'largest', '', '$z_{1}$', '$z_{2}$', '$z_{4}$',
        'largest']
    assert as_pixels(figure).std() > 20
