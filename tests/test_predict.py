"""predict.py: odd pictures, names, what is kept, blocks, responsibilities."""
import csv
import errno
import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import HERE, TINY, run_script
from PIL import Image
from test_inference import make_net

import checkpoint
import dataset
import inference
import predict
import runtime
import settings
from prediction import pictures

CLASSES = ['sky', 'road', 'tree', 'car', 'a cat']
PALETTE = [(7 * i) % 256 for i in range(768)]
SMALL = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A checkpoint of a small network, and the network."""
    return save_net(tmp_path / 'net.pth', monkeypatch)


def save_net(path, monkeypatch, change=None, classes=CLASSES):
    net = make_net(**SMALL)
    last = net.head.fc2
    with torch.no_grad():  # each class is to be the most probable somewhere
        if change:
            change(net)
        logits = inference.predict_logits(net, torch.from_numpy(draw(99)).permute(
            2, 0, 1)).flatten(1)
        mean, deviation = logits.mean(1), logits.std(1)
        last.weight.div_(deviation.view(-1, 1, 1, 1))
        last.bias.sub_(mean).div_(deviation)
    run = {'classes': classes, 'palette': PALETTE, 'given': {}}
    checkpoint.save({'net': net.state_dict(), 'step': 7, 'run': run,
                     'settings': runtime.snapshot()}, path)
    return path, net


def turn_over(net):
    """Make the most probable class the least probable one."""
    net.head.fc2.weight.neg_()
    net.head.fc2.bias.neg_()


@pytest.fixture
def call(model, monkeypatch, tmp_path):
    """A function that runs predict.py's main in tmp_path with words, and returns its
    exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        before = runtime.snapshot()
        monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, words), 'DEVICE=cpu',
                                          'PRECISION=fp32'])
        try:
            if not any(str(word).startswith('CHECKPOINT') for word in words):
                sys.argv.append(f'CHECKPOINT={model[0]}')
            return predict.main(runtime.read_command_line(
                predict.__doc__, predict.add_options, 'PICTURE'))
        finally:
            for name, value in before.items():
                setattr(settings, name, value)
    return run


def draw(seed=0, h=40, w=52):
    """A picture (h, w, 3) of coloured blocks."""
    values = np.random.default_rng(seed).integers(0, 256, (h // 8 + 1, w // 8 + 1, 3))
    return values.repeat(8, 0).repeat(8, 1)[:h, :w].astype(np.uint8)


def write(path, seed=0, h=40, w=52):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(seed, h, w)).save(path)
    return path


def read_rows(out):
    with open(out / 'coverage.csv', newline='', encoding='utf-8') as f:
        return {row['picture']: row for row in csv.DictReader(f)}


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob('*')
            if path.is_file()}


def mask_of(net, image):
    """The mask and the probabilities, without a Predictor."""
    logits = inference.predict_logits(net, torch.from_numpy(image).permute(2, 0, 1))
    return logits.argmax(0).numpy(), logits.softmax(0).numpy()


# -- pictures of every mode ------------------------------------------------------------

def test_modes_that_stay_as_they_are():
    rgb = draw()
    picture = Image.fromarray(rgb)
    assert np.array_equal(dataset.as_rgb(picture), rgb)
    for mode in ('L', 'P', 'CMYK', 'YCbCr', '1', 'HSV'):
        other = picture.convert(mode)
        assert np.array_equal(dataset.as_rgb(other), np.asarray(other.convert('RGB')))
    bits = dataset.as_rgb(Image.fromarray(rgb[..., 0] > 127))
    assert np.array_equal(bits[..., 1], 255 * (rgb[..., 0] > 127))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA', 'P'])
def test_transparency_lies_on_white(mode):
    rgb = np.array([[[200, 40, 0], [200, 40, 0], [10, 20, 30]]], np.uint8)
    alpha = np.array([[255, 0, 128]], np.uint8)
    if mode == 'RGBA':
        picture = Image.fromarray(np.dstack([rgb, alpha]))
    elif mode == 'LA':
        rgb[..., 1:] = rgb[..., :1]
        picture = Image.fromarray(np.dstack([rgb[..., 0], alpha]))
        assert picture.mode == 'LA'
    else:
        picture = Image.frombytes('P', (3, 1), bytes([0, 1, 2]))
        picture.putpalette([*rgb.ravel().tolist(), *[0] * 759])
        stream = io.BytesIO()
        picture.save(stream, 'PNG', transparency=bytes(alpha.ravel().tolist()))
        picture = Image.open(stream)
        assert picture.mode == 'P'
        if mode == 'PA':
            picture = picture.convert('PA')
    share = alpha[..., None] / 255
    expected = rgb * share + 255 * (1 - share)
    assert abs(dataset.as_rgb(picture) - expected).max() <= 1


@pytest.mark.parametrize('mode', ['I;16', 'I;16L', 'I;16B'])
def test_16_bits_keep_the_high_byte(mode):
    values = np.array([[0, 255, 256, 40000, 65535]])
    kind = '>u2' if mode == 'I;16B' else '<u2'
    picture = Image.frombytes(mode, (5, 1), values.astype(kind).tobytes())
    assert dataset.as_rgb(picture).tolist() == [[[v] * 3 for v in (0, 0, 1, 156, 255)]]


@pytest.mark.parametrize('kind, values, expected', [
    ('i4', [0, 255, 256, 65535], [0, 0, 1, 255]), ('i4', [-9, 512, 3, 4], [0, 2, 0, 0]),
    ('i4', [-9, 0, 100000, 200000], [0, 0, 128, 255]),
    ('f4', [-1, 0, 0.5, 1], [0, 128, 191, 255]), ('f4', [7, 7, 7, 7], [0] * 4),
    ('f4', [np.nan, 2, np.inf, 4], [0, 0, 255, 255]), ('f4', [np.nan] * 4, [0] * 4)])
def test_grey_of_32_bits(kind, values, expected):
    picture = Image.fromarray(np.array([values], kind))
    found = dataset.as_rgb(picture)
    assert found.dtype == np.uint8 and found.shape == (1, 4, 3)
    assert abs(found[0].astype(int) - np.array(expected)[:, None]).max() <= 0


TURNED = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
          5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
          7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
@pytest.mark.parametrize('orientation', TURNED)
def test_exif_orientation(tmp_path, orientation, suffix):
    stored, exif = draw(), Image.Exif()
    exif[274] = orientation
    file = str(tmp_path / f'a.{suffix}')
    Image.fromarray(stored).save(file, exif=exif, **{'lossless': True} if suffix ==
                                 'webp' else {})
    found = pictures.read_picture(file, 10 ** 6)
    assert np.array_equal(found, TURNED[orientation](stored))
    assert pictures.read_picture(file, stored.size // 3 - 1) is None


# -- words, names ----------------------------------------------------------------------

def test_words_are_settings_or_pictures(monkeypatch, capsys):
    words = ['a.jpg', 'LR=0.5', './B=c.png', '--out', 'x', 'photos', 'lr=1',
             'N_BASES=8', 'x/LR=2']
    monkeypatch.setattr(sys, 'argv', ['predict.py', *words])
    args = runtime.read_command_line('doc', predict.add_options, 'PICTURE')
    assert args.others == ['a.jpg', './B=c.png', 'photos', 'lr=1', 'x/LR=2']
    assert args.given == {'LR': 0.5, 'N_BASES': 8} and args.out == 'x'
    monkeypatch.setattr(sys, 'argv', ['predict.py', 'a.jpg', 'LRR=0.5'])
    with pytest.raises(SystemExit) as end:
        runtime.read_command_line('doc', predict.add_options, 'PICTURE')
    assert end.value.code == 2 and 'did you mean LR?' in capsys.readouterr().err
    monkeypatch.setattr(sys, 'argv', ['eval.py', 'a.jpg'])
    with pytest.raises(SystemExit) as end:  # other scripts take none
        runtime.read_command_line('doc')
    assert end.value.code == 2 and 'is not understood' in capsys.readouterr().err


def test_help_is_there_before_torch():
    code = ('import runpy, sys; sys.argv = ["predict.py", "--help"]\n'
            'try: runpy.run_path("predict.py", run_name="__main__")\n'
            'except SystemExit: print("torch" in sys.modules, "numpy" in sys.modules)')
    found = os.popen(f"cd '{HERE}' && {sys.executable} -c '{code}'").read()
    assert found.endswith('False False\n') and 'PICTURE ...' in found
    assert '--responsibilities' in found and 'EVAL_WINDOW' in found


def test_files_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('p/a.jpg', 'p/b.TIF', 'p/.hidden.jpg', 'p/.git/c.jpg', 'p/d/e.png',
                 'p/out/masks/a.png', 'q/r/f.gif', 'q/s/g.bmp', 'q/h.webp',
                 'p/x[1].png', 'masks/z.png', 'named.dat'):
        write(tmp_path / 'new.bmp').rename(tmp_path / 'new')
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'new').rename(tmp_path / name)
    (tmp_path / 'p/notes.txt').write_text('x')

    def find(*words, out='p/out'):
        files, failures = pictures.find_files(list(words), out)
        return sorted(files), [failure.path for failure in failures]

    assert find('p') == (['p/a.jpg', 'p/b.TIF', 'p/d/e.png', 'p/x[1].png'], [])
    assert find('named.dat', './named.dat', 'p/x[1].png') == (
        ['named.dat', 'p/x[1].png'], [])
    assert find('q/**/*.gif', 'q/*', 'gone.jpg', '*.xyz', 'q/r') == (
        ['q/h.webp', 'q/r/f.gif', 'q/s/g.bmp'], ['gone.jpg', '*.xyz'])
    assert find('.', out='.')[0] == [  # its own results are no pictures
        './p/a.jpg', './p/b.TIF', './p/d/e.png', './p/out/masks/a.png',
        './p/x[1].png', './q/h.webp', './q/r/f.gif', './q/s/g.bmp']
    assert find('**/*.png', out='.')[0] == ['p/d/e.png', 'p/out/masks/a.png',
                                            'p/x[1].png']


def test_names_are_told_apart_and_stay(call, tmp_path, capsys):
    for i, name in enumerate(('x/a.jpg', 'y/a.jpg', 'x/a.png', 'x/b.bmp', 'f/g/a.bmp')):
        write(tmp_path / name, i)
    assert call('x/b.bmp', 'x/a.jpg', 'f', '--out', 'o') == 0
    assert files_in(tmp_path / 'o/masks') == {'b.png', 'a.png', 'g/a.png'}
    before = (tmp_path / 'o/masks/a.png').read_bytes()
    capsys.readouterr()
    assert call('y/a.jpg', 'x', '--out', 'o') == 0
    text = capsys.readouterr().out
    assert files_in(tmp_path / 'o/masks') == {'b.png', 'a.png', 'g/a.png', 'a.png.png',
                                              'a.jpg.png'}
    assert '2 pictures have a longer name' in text and 'y/a.jpg as a.jpg' in text
    assert '2 written, 2 kept, 0 failed' in text
    assert (tmp_path / 'o/masks/a.png').read_bytes() == before
    with Image.open(tmp_path / 'o/masks/a.jpg.png') as mask:
        assert mask.info['source'] == str(tmp_path / 'y/a.jpg')
    assert call('y/a.jpg', 'x/a.jpg', 'x/a.png', '--out', 'n') == 0
    assert files_in(tmp_path / 'n/masks') == {'a.png.png', 'y/a.jpg.png', 'x/a.jpg.png'}
    assert set(read_rows(tmp_path / 'n')) == {'a.png', 'y/a.jpg', 'x/a.jpg'}


def test_no_picture_is_written_over(call, tmp_path):
    for name in ('o/masks/a.png', 'o/overlays/b.jpg', 'o/probabilities/c.npz'):
        file = write(tmp_path / 'new.png')
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        file.rename(tmp_path / name)
    before = {name: (tmp_path / 'o' / name).read_bytes()
              for name in files_in(tmp_path / 'o')}
    assert call(*(f'o/{name}' for name in before), '--out', 'o', '--overwrite',
                '--probabilities') == 0
    for name, content in before.items():
        assert (tmp_path / 'o' / name).read_bytes() == content
    assert files_in(tmp_path / 'o/masks') == {'a.png', 'a.png.png', 'b.jpg.png',
                                              'c.npz.png'}


# -- what is written -------------------------------------------------------------------

def test_results(call, model, tmp_path, capsys):
    file = write(tmp_path / 'p/a b\u00e4.png', h=45, w=70)
    (tmp_path / 'data').mkdir()  # no data set is asked for
    assert call('p', '--out', 'o', '--probabilities') == 0
    mask, share = mask_of(model[1], draw(h=45, w=70))
    with Image.open(tmp_path / 'o/masks/a b\u00e4.png') as found:
        assert (found.mode, found.size) == ('P', (70, 45))
        assert np.array_equal(np.asarray(found), mask) and len(np.unique(mask)) > 1
        assert found.info['source'] == str(file)
        assert np.array_equal(np.asarray(found.convert('RGB')),
                              np.array(PALETTE).reshape(-1, 3)[mask])
    with np.load(tmp_path / 'o/probabilities/a b\u00e4.npz') as found:
        assert found['probabilities'].dtype == np.float16
        assert abs(found['probabilities'] - share).max() < 1e-3
        assert found['classes'].tolist() == CLASSES
    with Image.open(tmp_path / 'o/overlays/a b\u00e4.jpg') as found:
        assert found.width >= 70 and found.height > 45  # the legend is below
    row = read_rows(tmp_path / 'o')['a b\u00e4']
    assert (row['width'], row['height']) == ('70', '45')
    shares = [float(row[name]) for name in CLASSES]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert shares == pytest.approx([(mask == c).mean() for c in range(5)], abs=1e-6)
    assert '1 written, 0 kept, 0 failed' in capsys.readouterr().out


def test_an_upright_picture_and_a_turned_one(call, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(draw())).save(tmp_path / 'turned.png', exif=exif)
    Image.fromarray(draw()).save(tmp_path / 'upright.png')
    assert call('turned.png', 'upright.png', '--out', 'o', '--no-overlays') == 0
    masks = [np.asarray(Image.open(tmp_path / f'o/masks/{name}.png'))
             for name in ('turned', 'upright')]
    assert np.array_equal(*masks) and masks[0].shape == (40, 52)
    assert not (tmp_path / 'o/overlays').exists()


def test_what_is_there_is_kept(call, tmp_path, capsys, monkeypatch):
    for i, name in enumerate('ab'):
        write(tmp_path / f'p/{name}.png', i)
    assert call('p/a.png', '--out', 'o') == 0
    times = {name: (tmp_path / 'o' / name).stat().st_mtime_ns
             for name in ('masks/a.png', 'overlays/a.jpg')}
    first = read_rows(tmp_path / 'o')
    assert call('p', '--out', 'o') == 0
    assert '1 pictures were kept as they are, --overwrite' in capsys.readouterr().out
    assert list(read_rows(tmp_path / 'o')) == ['a', 'b']
    assert read_rows(tmp_path / 'o')['a'] == first['a']

    # What lacks is made: probabilities, an overlay, a row. The masks stay.
    (tmp_path / 'o/overlays/b.jpg').unlink()
    (tmp_path / 'o/coverage.csv').unlink()
    assert call('p', '--out', 'o', '--probabilities') == 0
    for name, when in times.items():
        assert (tmp_path / 'o' / name).stat().st_mtime_ns == when
    assert files_in(tmp_path / 'o') == {
        'lock', 'coverage.csv', *(f'{kind}/{name}' for name in 'ab' for kind, name in (
            ('masks', f'{name}.png'), ('overlays', f'{name}.jpg'),
            ('probabilities', f'{name}.npz')))}
    assert read_rows(tmp_path / 'o')['a'] == first['a']
    (tmp_path / 'o/coverage.csv').unlink()  # all is kept, only the row lacks
    capsys.readouterr()
    assert call('p/a.png', '--out', 'o') == 0
    assert read_rows(tmp_path / 'o') == {'a': first['a']}
    assert '0 written, 1 kept' in capsys.readouterr().out

    # Another network: told, and used where that is wanted.
    other, net = save_net(tmp_path / 'other.pth', monkeypatch, turn_over)
    assert call('p/a.png', '--out', 'o', f'CHECKPOINT={other}') == 0
    text = capsys.readouterr().out
    assert 'NOTE: 1 of the masks that were kept are of another' in text
    assert (tmp_path / 'o/masks/a.png').stat().st_mtime_ns == times['masks/a.png']
    assert call('p/a.png', '--out', 'o', f'CHECKPOINT={other}', '--overwrite') == 0
    found = np.asarray(Image.open(tmp_path / 'o/masks/a.png'))
    assert np.array_equal(found, mask_of(net, draw(0))[0])
    shares = [(found == c).mean() for c in range(5)]
    row = read_rows(tmp_path / 'o')['a']
    assert [float(row[c]) for c in CLASSES] == pytest.approx(shares, abs=1e-6)

    # A picture that was changed does not go with its mask.
    write(tmp_path / 'p/a.png', h=60)
    assert call('p/a.png', '--out', 'o', '--responsibilities') == 1
    assert 'a.png: its mask is of another size' in capsys.readouterr().err
    # Other classes do not go with the table.
    other, _ = save_net(tmp_path / 'other.pth', monkeypatch, None, list('vwxyz'))
    with pytest.raises(ValueError, match='coverage.csv has 5 classes that are not'):
        call('p', '--out', 'o', f'CHECKPOINT={other}')


def test_several_checkpoints_are_averaged(call, model, tmp_path, monkeypatch):
    other, net = save_net(tmp_path / 'other.pth', monkeypatch, turn_over)
    write(tmp_path / 'a.png')
    assert call('a.png', '--probabilities', f'CHECKPOINT={model[0]},{other}') == 0
    mean = (mask_of(model[1], draw())[1] + mask_of(net, draw())[1]) / 2
    with np.load(tmp_path / 'predictions/probabilities/a.npz') as found:
        assert abs(found['probabilities'] - mean).max() < 1e-3
    save_net(other, monkeypatch, None, list('vwxyz'))
    with pytest.raises(ValueError, match='only probabilities of the same classes'):
        call('a.png', f'CHECKPOINT={model[0]},{other}')
    with pytest.raises(ValueError, match='one CHECKPOINT'):
        call('a.png', '--responsibilities', f'CHECKPOINT={model[0]},{model[0]}')


# -- large pictures --------------------------------------------------------------------

def test_blocks_make_the_whole(call, tmp_path, monkeypatch):
    def change(net):  # EM sees the whole of what it is given: here it does nothing
        net.head.emau.conv2[1].weight.zero_()
        net.head.emau.conv2[1].bias.zero_()
    _, net = save_net(tmp_path / 'net.pth', monkeypatch, change)
    h, w = 530, 760
    image = draw(3, h, w)
    write(tmp_path / 'large.png', 3, h, w)
    n_seen, places = np.zeros((h, w), int), []
    plain = inference.Predictor.predict_blocks

    def predict_blocks(self, image, n_pixels, margin):
        assert n_pixels == 512 * 512 and margin == 128
        for rows, columns, found in plain(self, image, n_pixels, margin):
            n_seen[rows, columns] += 1
            places.append((rows, columns))
            yield rows, columns, found

    monkeypatch.setattr(predict, 'block_pixels', lambda *_: 512 * 512)
    monkeypatch.setattr(inference.Predictor, 'predict_blocks', predict_blocks)
    assert call('large.png', '--probabilities') == 0
    assert (n_seen == 1).all() and len(places) > 3
    found = np.asarray(Image.open(tmp_path / 'predictions/masks/large.png'))
    with np.load(tmp_path / 'predictions/probabilities/large.npz') as file:
        shares = file['probabilities']
    for rows, columns in places:  # each block is predicted with its margin
        y, x = max(rows.start - 128, 0), max(columns.start - 128, 0)
        mask, share = mask_of(net, image[y:rows.stop + 128, x:columns.stop + 128])
        inside = (slice(rows.start - y, rows.stop - y),
                  slice(columns.start - x, columns.stop - x))
        assert (found[rows, columns] == mask[inside]).mean() > 0.9999
        share = share[:, inside[0], inside[1]]
        assert abs(shares[:, rows, columns] - share).max() < 2e-3
    whole, share = mask_of(net, image)
    spread = abs(share - share.mean((1, 2), keepdims=True)).mean()
    assert abs(shares - share).mean() < 0.5 * spread  # the features lie elsewhere
    assert (found == whole).mean() > 0.95 and len(np.unique(found)) == 5


def test_the_bound_of_memory():
    options = {'scales': (1.0,), 'use_flip': False, 'window': (0, 0)}
    n = predict.block_pixels(4, 21, 35_000_000, options)
    assert 4e6 < n < 6e6
    assert predict.block_pixels(4, 171, 35_000_000, options) < n / 3
    assert predict.block_pixels(4, 21, 35_000_000, {
        **options, 'scales': (0.5, 2.0), 'use_flip': True}) == pytest.approx(
            n / 8, 1e-5)
    assert predict.block_pixels(1e9, 21, 0, options) == 10 ** 9
    few = predict.block_pixels(4, 21, 35_000_000, options, 8 / 8 ** 4)  # Non-local
    spent = (4e9 - 0.8e9 - 4 * 35_000_000) / n  # bytes a pixel
    assert few * spent + few ** 2 * 8 / 8 ** 4 == pytest.approx(n * spent, rel=1e-4)
    assert few < n / 3
    for memory in (0.5, 0, -1, float('nan')):
        with pytest.raises(ValueError, match='at least 1.2 GB are needed'):
            predict.block_pixels(memory, 21, 35_000_000, options)


def test_reduced_pictures():
    image, label = draw(0, 300, 200), np.arange(60000).reshape(300, 200) % 251
    same = pictures.shrink(60000, image, label)
    assert same[0] is image and same[1] is label
    small, few = pictures.shrink(15000, image, label.astype(np.uint8))
    assert small.shape == (150, 100, 3) and few.shape == (150, 100)
    assert abs(small.astype(int) - image.reshape(150, 2, 100, 2, 3).mean((1, 3))
               ).mean() < 12
    assert pictures.shrink(10000, np.zeros((1, 100000, 3), np.uint8))[0].shape == (
        1, 800, 3)


# -- what goes wrong -------------------------------------------------------------------

def test_ctrl_c_leaves_whole_files(call, tmp_path, monkeypatch, capsys):
    for i in range(6):
        write(tmp_path / f'p/{i}.png', i)
    plain = predict.predict_mask

    def predict_mask(*words):
        predict_mask.n += 1
        if predict_mask.n == 4:
            raise KeyboardInterrupt
        return plain(*words)
    predict_mask.n = 0
    monkeypatch.setattr(predict, 'predict_mask', predict_mask)
    with pytest.raises(KeyboardInterrupt):
        call('p', '--out', 'o', '--probabilities')
    assert 'stopped: 3 written; the same command goes on' in capsys.readouterr().out
    assert set(read_rows(tmp_path / 'o')) == {'0', '1', '2'}
    there = files_in(tmp_path / 'o')
    wanted = {f'{kind}/{i}{suffix}' for i in range(3)
              for kind, suffix in pictures.KINDS.items() if kind != 'responsibilities'}
    assert there == {'lock', 'coverage.csv', *wanted}
    assert call('p', '--out', 'o', '--probabilities') == 0
    assert '3 written, 3 kept, 0 failed' in capsys.readouterr().out


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_stops_with_a_sentence(call, tmp_path, monkeypatch, number):
    for i in range(9):
        write(tmp_path / f'p/{i}.png', i)
    plain = os.replace

    def replace(a, b):
        if str(b).endswith('2.jpg'):
            raise OSError(number, os.strerror(number))
        plain(a, b)
    monkeypatch.setattr(predict.os, 'replace', replace)
    with pytest.raises(OSError) as caught:
        call('p', '--out', 'o')
    sentence = runtime.explain(caught.value)
    assert sentence.startswith('cannot write o/overlays/2.jpg (')
    assert 'make room or give another --out' in sentence
    there = files_in(tmp_path / 'o')
    assert not any('tmp' in name for name in there)
    assert 'masks/1.png' in there and 'masks/2.png' not in there
    monkeypatch.setattr(predict.os, 'replace', plain)
    assert call('p', '--out', 'o') == 0
    assert len(files_in(tmp_path / 'o/masks')) == len(read_rows(tmp_path / 'o')) == 9


def test_one_name_that_cannot_be_written(call, tmp_path, capsys):
    write(tmp_path / 'p/a.png')
    write(tmp_path / 'p/b.png')
    (tmp_path / 'o/overlays/a.jpg').mkdir(parents=True)
    assert call('p', '--out', 'o') == 1
    assert 'p/a.png: its results cannot be written' in capsys.readouterr().err
    assert files_in(tmp_path / 'o/masks') == {'b.png'}


def test_errors_of_the_user(call, tmp_path, monkeypatch):
    write(tmp_path / 'a.png')
    (tmp_path / 'file').write_text('x')
    for words, sentence in (
            ((), 'no picture is given'), (('gone.jpg',), 'gone.jpg: there is no such'),
            (('a.png', '--out', 'file/o'), 'cannot write into --out=file/o'),
            (('a.png', 'CHECKPOINT=gone.pth'), 'there is no checkpoint gone.pth'),
            (('a.png', '--responsibilities', '--bases', '1,4'), 'from 0 to 3'),
            (('a.png', '--responsibilities', '--bases', 'x'), '--bases=x: numbers'),
            (('a.png', '--bases', '1'), 'give that too'),
            (('a.png', 'EVAL_MODE=all'), 'EVAL_MODE=all is none of'),
            (('a.png', '--memory', '0.1'), 'GB are needed')):
        with pytest.raises((ValueError, OSError)) as caught:
            call(*words)
        assert sentence in runtime.explain(caught.value)
    assert not (tmp_path / 'predictions').exists()
    build = predict.network.build

    def without(*words, **more):
        net = build(*words, **more)
        net.head = torch.nn.Identity()
        return net
    monkeypatch.setattr(predict.network, 'build', without)
    monkeypatch.setattr(predict.checkpoint, 'load_net', lambda *_: None)
    with pytest.raises(ValueError, match='has no EM attention unit'):
        call('a.png', '--responsibilities')


# -- responsibilities ------------------------------------------------------------------

def test_responsibilities(call, tmp_path, monkeypatch, capsys):
    def change(net):
        net.head.emau.conv1.weight.mul_(1e4)  # responsibilities that differ
        net.head.emau.mu[..., 3] = net.head.emau.mu[..., 1]  # never the first largest
    _, net = save_net(tmp_path / 'net.pth', monkeypatch, change)
    h, w = 45, 70
    for i in range(2):
        write(tmp_path / f'p/{i}.png', i, h, w)
    assert call('p', '--responsibilities', '--out', 'o') == 0
    assert files_in(tmp_path / 'o') == {
        'lock', 'coverage.csv', 'responsibilities.png', 'responsibilities.pdf',
        *(f'{kind}/{i}.{suffix}' for i in range(2) for kind, suffix in (
            ('masks', 'png'), ('overlays', 'jpg'), ('responsibilities', 'npz'),
            ('responsibilities', 'png'), ('responsibilities', 'pdf')))}
    text = capsys.readouterr().out
    caught = []
    net.head.emau.register_forward_hook(lambda unit, words, _: caught.append(words[0]))
    for i in range(2):
        mask_of(net, draw(i, h, w))
        x = caught[-1]
        zs = [z[0].detach().numpy() for z in net.head.emau(x, return_z=True)[1]]
        with np.load(tmp_path / f'o/responsibilities/{i}.npz') as file:
            found = {name: file[name] for name in file}
        maps = found['z']
        # features on pixels 0, 16, ... in the picture: of 5 x 6 these are 3 x 5
        assert maps.shape == (3, 4, 3, 5) and x.shape[2:] == (4, 6)
        for t in range(3):
            for row in range(3):
                for column in range(5):
                    assert np.allclose(maps[t, :, row, column],
                                       zs[t][row * 6 + column], atol=5e-3)
        assert found['stride'] == 16 and found['picture_size'].tolist() == [h, w]
        last = np.stack([[np.interp(np.arange(w), 16 * np.arange(5), line)
                          for line in of] for of in maps[-1]])
        last = np.stack([[np.interp(np.arange(h), 16 * np.arange(3), line)
                          for line in of.T] for of in last]).transpose(0, 2, 1)
        usage = np.bincount(last.argmax(0).ravel(), minlength=4) / (h * w)
        assert np.allclose(found['usage'], usage, atol=2e-3) and usage[3] == 0
        assert np.ptp(maps[-1]) > 0.3 and np.allclose(maps.sum(1), 1, atol=1e-4)
        unused = [k for k in range(4) if found['usage'][k] == 0]
        assert (f'p/{i}.png: {len(unused)} of 4 bases are used by no pixel, as '
                'their largest: '
                f'{", ".join(map(str, unused))}\n') in text
        assert found['bases'].tolist() == sorted(range(4), key=lambda k: -usage[k])
    # Kept; chosen bases; a picture beyond the memory is seen smaller.
    monkeypatch.setattr(predict, 'block_pixels', lambda *_: h * w // 4 + 1)
    assert call('p/1.png', '--responsibilities', '--out', 'o') == 0
    assert '0 written, 1 kept' in capsys.readouterr().out
    monkeypatch.setattr(inference.Predictor, 'predict_blocks', lambda self, image, *_: [
        (slice(0, h), slice(0, w), self.predict([image])[0])])
    assert call('p', '--responsibilities', '--out', 'n', '--bases', '2,0,2') == 0
    assert 'p/1.png: ' in (text := capsys.readouterr().out) and 'seen at 35x22' in text
    with np.load(tmp_path / 'n/responsibilities/1.npz') as file:
        assert file['bases'].tolist() == [2, 0] and file['z'].shape == (3, 4, 2, 3)
        assert file['seen_size'].tolist() == [22, 35]


# -- the real script -------------------------------------------------------------------

def chunk(kind, content, crc=None):
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', crc)


def make_odd(folder):
    """Write 190 sound pictures of odd kinds below a folder: name -> size (w, h)."""
    sizes, rng = {}, np.random.default_rng(5)

    def save(name, picture, size=None, **options):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, **options)
        assert name not in sizes
        sizes[name] = size or picture.size

    turned = Image.Exif()
    turned[274] = 6
    for i in range(10):
        h, w = rng.integers(9, 60, 2)
        rgb = Image.fromarray(draw(i, h, w))
        alpha = Image.fromarray(draw(i + 50, h, w)[..., 0])
        clear = rgb.copy()
        clear.putalpha(alpha)
        deep = draw(i, h, w)[..., 0].astype(np.uint16) * 257
        page = Image.fromarray(draw(i + 70, h + 3, w))
        save(f'{i}/rgb.jpg', rgb)
        save(f'{i}/grey.jpeg', rgb.convert('L'))
        save(f'{i}/palette.png', rgb.quantize(9))
        save(f'{i}/see through.png', clear)
        save(f'{i}/see through.webp', clear)
        save(f'{i}/deep/16 bit.png', Image.fromarray(deep))
        save(f'{i}/deep/16 bit.tif', Image.fromarray(deep))
        save(f'{i}/one bit.png', rgb.convert('1'))
        save(f'{i}/cmyk.jpg', rgb.convert('CMYK'))
        save(f'{i}/cmyk.tiff', rgb.convert('CMYK'))
        save(f'{i}/pages.tif', rgb, save_all=True, append_images=[page])
        save(f'{i}/float.TIF', Image.fromarray(draw(i, h, w)[..., 0] / np.float32(9)))
        save(f'{i}/\u00fcml\u00e4\u00fct (1).bmp', rgb)
        save(f'{i}/moving.gif', rgb.quantize(9), save_all=True,
             append_images=[page.resize(rgb.size).quantize(5)])
        save(f'{i}/plain.ppm', rgb)
        save(f'{i}/turned.jpg', rgb, (h, w), exif=turned)
        save(f'{i}/la.png', clear.convert('LA'))
        save(f'{i}/clear palette.gif', rgb.quantize(9), transparency=3)
    for i in range(3):
        save(f'narrow {i}.png', Image.fromarray(draw(i, 30 + i, 1)))
        save(f'long {i}.jpg', Image.fromarray(draw(i, 1 + 6 * i, 5000)))
    for i in range(2):
        save(f'same {i}.png', Image.fromarray(draw(i)))
        save(f'same {i}.jpg', Image.fromarray(draw(i, 20, 20)))
    assert len(sizes) == 190
    return sizes


def make_broken(folder):
    """Write eight broken pictures, and return ten words that fail."""
    folder.mkdir()
    stream = io.BytesIO()
    Image.fromarray(draw(h=80, w=80)).save(stream, 'JPEG')
    (folder / 'cut.jpg').write_bytes(stream.getvalue()[:len(stream.getvalue()) // 2])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'text.bmp').write_text('no picture')
    stream = io.BytesIO()
    Image.fromarray(draw()).save(stream, 'PNG')
    png = bytearray(stream.getvalue())
    wrong = png.copy()
    wrong[29] ^= 1  # the checksum of the header
    (folder / 'header.png').write_bytes(wrong)
    wrong = png.copy()
    wrong[png.index(b'IDAT') + 30] ^= 255
    (folder / 'content.png').write_bytes(wrong)
    (folder / 'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(
        b'IHDR', struct.pack('>IIBBBBB', 40000, 40000, 8, 2, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))
    (folder / 'nowhere.jpg').symlink_to('gone.jpg')
    stream = io.BytesIO()
    Image.fromarray(draw()).save(stream, 'TIFF')
    (folder / 'cut.tif').write_bytes(stream.getvalue()[:3000])
    (folder / 'folder.png').mkdir()
    return [*(f'bad/{name}' for name in (
        'cut.jpg', 'empty.png', 'text.bmp', 'header.png', 'content.png', 'bomb.png',
        'nowhere.jpg', 'cut.tif')), 'bad/folder.png', 'missing.jpg']


def test_200_odd_pictures(model, tmp_path):
    sizes = make_odd(tmp_path / 'good')
    failing = make_broken(tmp_path / 'bad')
    done = run_script('predict.py', 'good', 'missing.jpg', 'bad', 'bad/folder.png',
                      '--out', 'o', f'CHECKPOINT={model[0]}', *(
                          word for word in TINY if word[:6] in ('DEVICE', 'PRECIS')),
                      cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert '190 written, 0 kept, 10 failed' in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith('failed: ')]
    named = {line.split(': ')[1]: line.split(': ', 2)[2] for line in lines}
    assert len(lines) == 10 and set(named) == set(failing)
    for name, part in (('cut.jpg', 'truncated'), ('empty.png', 'empty'),
                       ('text.bmp', "b'no picture'"), ('bomb.png', '40000x40000'),
                       ('nowhere.jpg', 'not there'), ('folder.png', 'no picture was')):
        assert part in named[f'bad/{name}']
    rows = read_rows(tmp_path / 'o')
    masks = {name[:-4] for name in files_in(tmp_path / 'o/masks')}
    assert len(masks) == 190 and set(rows) == masks
    assert {name[:-4] for name in files_in(tmp_path / 'o/overlays')} == masks
    stems = [os.path.splitext(name)[0] for name in sizes]
    for name, (w, h) in sizes.items():
        stem = os.path.splitext(name)[0]
        place = stem if stems.count(stem) == 1 else name
        with Image.open(tmp_path / f'o/masks/{place}.png') as mask:
            assert (mask.mode, mask.size) == ('P', (w, h))
            assert mask.info['source'] == str(tmp_path / 'good' / name)
            assert np.asarray(mask).max() < 5
        row = rows[place]
        assert (int(row['width']), int(row['height'])) == (w, h)
        assert sum(float(row[c]) for c in CLASSES) == pytest.approx(1, abs=1e-6)
    same = sum(stems.count(stem) > 1 for stem in stems)
    assert same == 64  # and two of the broken ones
    assert '66 pictures have a longer name' in done.stdout
