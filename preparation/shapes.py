"""Draw "shapes", the embedded data set: small scenes of things on a shore.

    python prepare.py shapes

Nothing is downloaded: a picture is a function of (seed, index). A scene is sand beside
a lake, or sand beside a meadow. The bird of a lake is a duck, the bird of a meadow is a
goose, and the same code draws both. They often stand on the sand, so a network has to
use the context to tell which it is.
"""
import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import recipes
from dataset import IGNORED
from preparation.files import run_parallel, save_picture, write_lists

CLASSES = recipes.DATASETS['shapes']['classes']


# Objects: each paints its outline, colours and texture on a board of 200 x 200 pixels.

def _colour(rng, hues, saturation=(60, 90), lightness=(42, 58)):
    hue = rng.choice(hues) + rng.uniform(-9, 9)
    saturation, lightness = rng.uniform(*saturation), rng.uniform(*lightness)
    return f'hsl({hue % 360:.0f},{saturation:.0f}%,{lightness:.0f}%)'


def _spin(n, radii):
    """Return n points round the middle of the board; radii is one number or n."""
    angles = 2 * np.pi * np.arange(n) / n
    points = 100 + np.stack([np.sin(angles), -np.cos(angles)]) * radii
    return [(x, y) for x, y in points.T.tolist()]


def _balloon(pen, rng):
    colour = _colour(rng, (0, 215, 280, 330))
    pen.polygon([(100, 160), (82, 192), (118, 192)], colour)
    pen.ellipse((32, 8, 168, 172), colour)
    pen.ellipse((58, 32, 92, 82), 'hsl(0,0%,93%)')


def _house(pen, rng):
    wall = _colour(rng, (25, 40), (20, 60), (55, 80))
    mortar = _colour(rng, (25,), (20, 30), (35, 50))
    pen.rectangle((30, 90, 170, 190), wall)
    for row, y in enumerate(range(90, 190, 14)):
        pen.line((30, y, 170, y), mortar, 3)
        for x in range(30 + 14 * (row % 2), 170, 28):
            pen.line((x, y, x, min(y + 14, 190)), mortar, 3)
    roof = _colour(rng, (5, 20, 215), (35, 70), (28, 42))
    pen.polygon([(100, 10), (190, 92), (10, 92)], roof)
    pen.rectangle((84, 134, 118, 190), 'hsl(25,50%,20%)')
    for x in (44, 130):
        pen.rectangle((x, 106, x + 28, 134), 'hsl(50,90%,75%)', 'white', 4)


def _mushroom(pen, rng):
    stem = _colour(rng, (40,), (25, 45), (75, 88))
    pen.rounded_rectangle((72, 90, 128, 190), 22, stem)
    pen.chord((12, 14, 188, 210), 180, 360, _colour(rng, (0, 20)))
    dots = (100, 42, 15), (55, 70, 13), (146, 72, 14), (100, 86, 10), (32, 98, 7)
    for x, y, r in dots:
        pen.ellipse((x - r, y - r, x + r, y + r), 'hsl(45,60%,93%)')


def _parasol(pen, rng):
    colours = _colour(rng, (0, 50, 140, 215)), 'hsl(45,60%,92%)'
    rim = _spin(10, 92.0)
    for i in range(10):
        pen.polygon([(100, 100), rim[i], rim[(i + 1) % 10]], colours[i % 2])
    pen.ellipse((90, 90, 110, 110), 'hsl(30,50%,30%)')


def _pumpkin(pen, rng):
    pen.rectangle((88, 14, 112, 60), _colour(rng, (100,), (35, 55), (22, 34)))
    hue, light = rng.uniform(15, 38), rng.uniform(44, 54)
    for half, shift in ((92, 0), (66, 5), (42, -5), (17, 5)):  # the ribs, outside in
        colour = f'hsl({hue:.0f},88%,{light + shift:.0f}%)'
        pen.ellipse((100 - half, 42, 100 + half, 188), colour, 'hsl(18,80%,30%)', 4)


def _star(pen, rng):
    radii = np.tile((96.0, rng.uniform(44, 54)), 5)
    pen.polygon(_spin(10, radii), _colour(rng, (20, 48, 55)))
    for radius in (20.0, 42.0, 64.0):
        for x, y in _spin(5, radius):
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), 'hsl(45,80%,85%)')


def _tree(pen, rng):
    pen.rectangle((78, 150, 122, 196), _colour(rng, (25,), (35, 55), (22, 34)))
    hue, light = rng.uniform(95, 165), rng.uniform(20, 32)
    for top, bottom, half in ((76, 172, 92), (38, 126, 76), (4, 82, 58)):
        light += 4
        colour = f'hsl({hue:.0f},50%,{light:.0f}%)'
        pen.polygon([(100, top), (100 + half, bottom), (100 - half, bottom)], colour)


def _bird(pen, rng):
    colour = _colour(rng, (35, 210), (5, 25), (75, 94))
    pen.polygon([(150, 60), (196, 66), (152, 82)], 'hsl(32,95%,50%)')
    pen.polygon([(4, 88), (70, 120), (60, 170)], colour)
    pen.polygon([(104, 60), (156, 70), (150, 150), (80, 120)], colour)
    pen.ellipse((22, 92, 162, 190), colour)
    pen.ellipse((100, 26, 162, 94), colour)
    pen.chord((44, 88, 128, 164), 20, 190, _colour(rng, (30, 210), (15, 35), (35, 55)))
    pen.ellipse((132, 46, 146, 60), 'black')


# What there is to draw, with the largest rotation, in degrees. Two birds in nine, as
# they are ducks in one half of the scenes and geese in the other.
STOCK = ((_balloon, 40), (_house, 15), (_mushroom, 30), (_parasol, 180), (_pumpkin, 30),
         (_star, 180), (_tree, 15), (_bird, 15), (_bird, 15))


def _sprite(rng, paint, turn):
    """Return an object (h, w, RGBA) in 0..1, about 36 to 100 pixels across."""
    board = Image.new('RGBA', (200, 200))
    paint(ImageDraw.Draw(board), rng)
    if rng.random() < 0.5:
        board = board.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-turn, turn)
    board = board.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    board = board.crop(board.getbbox())
    across = 36 * 2.8 ** rng.random() * np.exp(rng.uniform(-.1, .1, 2))
    size = np.maximum(across * np.array(board.size) / max(board.size), 8).round()
    board = board.resize([int(n) for n in size], Image.Resampling.BOX)
    return np.asarray(board, np.float32) / 255


# Grounds

def _noise(rng, h, w, rows, columns):
    """Return smooth noise (h, w) in about -1..1, with so many hills each way."""
    coarse = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC))


def _ground(rng, h, w, is_lake):
    """Return the ground (h, w, 3) in 0..1 and how much of it is sand (h, w)."""
    y, x = np.mgrid[:h, :w].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    height = (np.cos(angle) * x + np.sin(angle) * y) / 90 + .8 * _noise(rng, h, w, 4, 5)
    height = height - np.quantile(height, rng.uniform(.5, .8))
    sand = np.clip(height * 8 + .5, 0, 1)
    hills, fine = _noise(rng, h, w, 7, 8), _noise(rng, h, w, h // 2, w // 2)
    dunes = np.sin(y / 2.2 + x / 9 + 5 * hills)
    grain = .05 * hills + .05 * fine + .025 * dunes
    beach = np.array((.83, .72, .50)) * (1 + grain)[..., None]
    if is_lake:
        ripples = np.sin(y / rng.uniform(1.2, 1.8) + 4 * _noise(rng, h, w, 8, 5))
        level = 1 + .12 * hills + .12 * ripples * np.clip(.5 + fine, 0, 1)
        wild = np.array((.20, rng.uniform(.45, .58), .68)) * level[..., None]
    else:
        blades = _noise(rng, h, w, h // 5, w) + fine
        level = 1 + .15 * hills + .16 * blades
        wild = np.array((rng.uniform(.33, .48), .58, .22)) * level[..., None]
    image = wild + (beach - wild) * sand[..., None]
    rim = np.exp(-(height / .07) ** 2)[..., None]  # foam, or the dark edge of the turf
    image = image + rim * ((.25 if is_lake else -.12) * (1 + .5 * fine))[..., None]
    return image.astype(np.float32), sand


# Scenes

def _moved(part, h, w, top, left):
    """Return a canvas (h, w, 4) of zeros with part on it, cut at the edges."""
    canvas = np.zeros((h, w, 4), np.float32)
    y, x = max(top, 0), max(left, 0)
    part = part[y - top:h - top, x - left:w - left]
    canvas[y:y + part.shape[0], x:x + part.shape[1]] = part
    return canvas


def _spots(rng, sprite, things, areas):
    """Yield canvases with the sprite, and things with it, where no thing is hidden."""
    h, w = things.shape
    for _ in range(8):
        top, left = (int(rng.uniform(-.15 * part, whole - .85 * part))
                     for part, whole in zip(sprite.shape[:2], (h, w), strict=True))
        canvas = _moved(sprite, h, w, top, left)
        after = np.where(canvas[..., 3] > .5, len(areas), things)
        seen = np.bincount(after.ravel(), minlength=len(areas) + 1)
        if (seen[1:] > .65 * np.array([*areas[1:], (sprite[..., 3] > .5).sum()])).all():
            yield canvas, after


def _lit(rng, image, canvas, slope):
    """Return the image with the canvas's object on it, and the object's shadow."""
    h, w, _ = image.shape
    cover = canvas[..., 3]
    soft = Image.fromarray((cover * 255).astype(np.uint8))
    soft = np.asarray(soft.filter(ImageFilter.GaussianBlur(4)), np.float32) / 255
    # The blurred outline, moved away from the sun, is the shadow; less the one moved
    # towards the sun, it lights one side of the object and darkens the other.
    soft = np.pad(soft, 5, mode='edge')
    away = soft[:h, 5 - slope:w + 5 - slope]
    towards = soft[10:, 5 + slope:w + 5 + slope]
    image = image * (1 - .45 * away)[..., None]
    light = 1 + .5 * (away - towards) + .05 * _noise(rng, h, w, h // 3, w // 3)
    return image + cover[..., None] * (canvas[..., :3] * light[..., None] - image)


def draw(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw picture `index` of the data set `seed`.

    Returns:
        The image (h, w, 3) uint8 RGB and its labels (h, w) uint8: positions in
        CLASSES, or 255. h is 144..176 and w 176..208 pixels.
    """
    rng = np.random.default_rng((seed, index))
    h, w = int(rng.integers(144, 177)), int(rng.integers(176, 209))
    is_lake = rng.random() < .5
    image, sand = _ground(rng, h, w, is_lake)
    things = np.zeros((h, w), np.int64)  # 0 is the ground, then objects as they come
    names, areas = [0], [h * w]
    slope = int(rng.choice((-4, -2, 2, 4)))  # the sun: left or right, always above
    for kind in rng.permutation(len(STOCK))[:rng.integers(5, 8)].tolist():
        paint, turn = STOCK[kind]
        sprite = _sprite(rng, paint, turn)
        spots = list(_spots(rng, sprite, things, areas))
        if not spots:
            continue
        canvas, after = spots[0]
        name = kind + 1
        if paint is _bird:  # the sandier of two places
            canvas, after = max(spots[:2],
                                key=lambda spot: (spot[0][..., 3] * sand).sum())
            name = CLASSES.index('duck' if is_lake else 'goose')
        image, things = _lit(rng, image, canvas, slope), after
        names.append(name)
        areas.append((sprite[..., 3] > .5).sum())
    labels = np.array(names, np.uint8)[things]
    for a, b in ((labels, things), (labels.T, things.T)):  # either side of an outline
        edge = b[1:] != b[:-1]
        a[1:][edge] = a[:-1][edge] = IGNORED
    return _photograph(rng, image), labels


def _photograph(rng, image):
    """Return the scene as a camera sees it (h, w, 3) uint8."""
    h, w, _ = image.shape
    y, x = np.mgrid[-1:1:h * 1j, -1:1:w * 1j]
    light = 1 + rng.uniform(-.15, .15) * y + rng.uniform(-.15, .15) * x
    light = rng.uniform(.8, 1.15) * light[..., None] * rng.uniform(.9, 1.1, 3)
    image = np.clip(image * light, 0, 1) ** rng.uniform(.85, 1.2)
    blur = ImageFilter.GaussianBlur(rng.uniform(.2, .8))
    image = Image.fromarray((image * 255).astype(np.uint8)).filter(blur)
    noise = rng.uniform(2, 6) * rng.standard_normal((h, w, 3), np.float32)
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


# Files

def write(root: Path, n_train: int = 400, n_val: int = 100, seed: int = 0) -> None:
    """Write the data set in the layout of PASCAL VOC; pictures that exist are kept.

    Args:
        root: folder of JPEGImages, SegmentationClass and ImageSets/Segmentation.
        n_train: pictures 1..n_train are for training.
        n_val: the next n_val pictures are for validation.
        seed: the data set, 0 or more. For another seed use another root.
    """
    for folder in ('JPEGImages', 'SegmentationClass'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    ids = [f'shapes_{index:05d}' for index in range(1, n_train + n_val + 1)]
    run_parallel(functools.partial(_write_scene, root, seed), ids, 'drawing', 'picture')
    write_lists(root, {'train': ids[:n_train], 'val': ids[n_train:], 'trainval': ids})


def _write_scene(root, seed, name):
    jpg = root / 'JPEGImages' / f'{name}.jpg'
    png = root / 'SegmentationClass' / f'{name}.png'
    if jpg.exists() and png.exists():
        return
    image, labels = draw(seed, int(name.removeprefix('shapes_')))
    save_picture(Image.fromarray(image), jpg, format='JPEG', quality=90)
    mask = Image.fromarray(labels)
    mask.putpalette(recipes.DATASETS['shapes']['palette'])
    save_picture(mask, png, format='PNG')
