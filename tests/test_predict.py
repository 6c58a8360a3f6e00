"""predict.py: pictures, names, what is kept, blocks, responsibilities, failures."""
import csv
import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from test_inference import make_net

import checkpoint
import config
import dataset
import inference
import predict
from prediction import pictures, pipeline, results

CLASSES = ['sky', 'road', 'tree', 'car', 'a cat']
PALETTE = [(7 * i) % 256 for i in range(768)]


def save_net(path, change=None, classes=CLASSES):
    """Save a small network, and return it; each class is predicted somewhere."""
    net = make_net(N_LAYERS=18, STEM='plain', STRIDE=16)
    with torch.no_grad():
        if change:
            change(net)
        last = net.head.classifier
        image = torch.from_numpy(draw(99)).permute(2, 0, 1)
        logits = inference.predict_logits(net, image).flatten(1)
        mean, deviation = logits.mean(1), logits.std(1)
        last.weight.div_(deviation.view(-1, 1, 1, 1))
        last.bias.sub_(mean).div_(deviation)
    run = {'classes': classes, 'palette': PALETTE, 'given': {}}
    checkpoint.save({'net': net.state_dict(), 'step': 7, 'run': run,
                     'settings': config.snapshot()}, path)
    return net


def turn_over(net):
    """Make the most probable class the least probable one."""
    net.head.classifier.weight.neg_()
    net.head.classifier.bias.neg_()


@pytest.fixture
def net(tmp_path):
    return save_net(tmp_path / 'net.pth')


@pytest.fixture
def call(net, monkeypatch, tmp_path):
    """A function that runs predict.py's main in tmp_path and returns its status."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        before = config.snapshot()
        words = ['predict.py', 'CHECKPOINT=net.pth', 'DEVICE=cpu', 'PRECISION=fp32',
                 *map(str, words)]
        monkeypatch.setattr(sys, 'argv', words)
        try:
            return predict.main()
        finally:
            config.apply_settings(before)
    return run


def draw(seed=0, h=40, w=52):
    """Return a picture (h, w, 3) of coloured blocks."""
    values = np.random.default_rng(seed).integers(0, 256, (h // 8 + 1, w // 8 + 1, 3))
    return values.repeat(8, 0).repeat(8, 1)[:h, :w].astype(np.uint8)


def write(path, seed=0, h=40, w=52):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(seed, h, w)).save(path)


def read_rows(out):
    with open(out / 'coverage.csv', newline='', encoding='utf-8') as f:
        return {row['picture']: row for row in csv.DictReader(f)}


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob('*')
            if path.is_file()}


def predict_plainly(net, image):
    """Return mask and probabilities, without a Predictor."""
    logits = inference.predict_logits(net, torch.from_numpy(image).permute(2, 0, 1))
    return logits.argmax(0).numpy(), logits.softmax(0).numpy()


# -- pictures of every mode ------------------------------------------------------------

@pytest.mark.parametrize('values, expected', [
    (np.array([0, 255, 256, 40000, 65535], '<u2'), [0, 0, 1, 156, 255]),
    (np.array([-9, 512, 3, 4], 'i4'), [0, 2, 0, 0]),
    (np.array([-9, 0, 100000, 200000], 'i4'), [0, 0, 128, 255]),
    (np.array([-1, 0, 0.5, 1], 'f4'), [0, 128, 191, 255]),
    (np.array([np.nan, 2, np.inf, 4], 'f4'), [0, 0, 255, 255])])
def test_grey_of_many_bits(values, expected):
    found = dataset.as_rgb(Image.fromarray(values[None]))
    assert found.dtype == np.uint8 and found.tolist() == [[[v] * 3 for v in expected]]


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_lies_on_white(mode):
    grey = np.array([[200, 90, 10]], np.uint8)
    alpha = np.array([[255, 0, 128]], np.uint8)
    picture = Image.fromarray(np.dstack([grey, grey, grey, alpha])).convert(mode)
    if mode == 'P':
        picture = Image.frombytes('P', (3, 1), bytes([0, 1, 2]))
        picture.putpalette(grey.repeat(3).tolist())
        picture.info['transparency'] = alpha.tobytes()
    found = dataset.as_rgb(picture)
    assert abs(found - np.array([200, 255, 132])[:, None]).max() <= 1


# -- words, names ----------------------------------------------------------------------

def test_files_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('p/a.jpg', 'p/b.TIF', 'p/.hidden.jpg', 'p/.git/c.jpg', 'p/d/e.png',
                 'p/out/masks/a.png', 'p/notes.txt', 'q/r/f.gif', 'q/s/g.bmp',
                 'q/h.webp', 'p/x[1].png', 'p/masks2/z.png', 'named.dat'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def find(*words, out='p/out'):
        files, failures = pictures.find_files(list(words), out)
        return sorted(files), [word for word, _ in failures]

    inside = ['p/a.jpg', 'p/b.TIF', 'p/d/e.png', 'p/masks2/z.png', 'p/x[1].png']
    assert find('p') == (inside, [])
    assert find('p', out='p')[0] == [*inside[:-1], 'p/out/masks/a.png', inside[-1]]
    assert find('named.dat', './named.dat', 'p/x[1].png') == (
        ['named.dat', 'p/x[1].png'], [])
    assert find('q/**/*.gif', 'q/*', 'gone.jpg', '*.xyz', 'q/r') == (
        ['q/h.webp', 'q/r/f.gif', 'q/s/g.bmp'], ['gone.jpg', '*.xyz'])
    assert find('p/out/masks/a.png') == ([], ['p/out/masks/a.png'])  # a result


def test_names_differ():
    files = {'x/a.jpg': 'x', 'x/a.png': 'x', 'x/b.bmp': 'x', 'x/d/b.bmp': 'x'}
    assert list(pictures.name_results(files).values()) == [
        'a.jpg', 'a.png', 'b', 'd/b']
    files = {'/x/a.jpg': '/x', '/y/a.jpg': '/y', '/y/A.jpg': '/y', '/y/c.jpg': '/z'}
    assert list(pictures.name_results(files).values()) == [
        'x/a.jpg', 'y/a.jpg', 'y/A.jpg', 'c']


# -- what is written -------------------------------------------------------------------

def test_results(call, net, tmp_path, capsys):
    write(tmp_path / 'p/a b\u00e4.png', h=45, w=70)
    assert call('p', '--out', 'o', '--probabilities') == 0
    mask, probs = predict_plainly(net, draw(h=45, w=70))
    with Image.open(tmp_path / 'o/masks/a b\u00e4.png') as found:
        assert (found.mode, found.size) == ('P', (70, 45))
        assert np.array_equal(np.asarray(found), mask) and len(np.unique(mask)) > 1
        assert found.info['source'] == str(tmp_path / 'p/a b\u00e4.png')
        assert np.array_equal(np.asarray(found.convert('RGB')),
                              np.array(PALETTE).reshape(-1, 3)[mask])
    with np.load(tmp_path / 'o/probabilities/a b\u00e4.npz') as found:
        assert found['probabilities'].dtype == np.float16
        assert abs(found['probabilities'] - probs).max() < 1e-3
        assert found['classes'].tolist() == CLASSES
    with Image.open(tmp_path / 'o/overlays/a b\u00e4.jpg') as found:
        assert found.width >= 70 and found.height > 45  # the legend is below
    row = read_rows(tmp_path / 'o')['a b\u00e4']
    assert (row['width'], row['height']) == ('70', '45')
    assert [float(row[name]) for name in CLASSES] == pytest.approx(
        [(mask == c).mean() for c in range(5)], abs=1e-6)
    assert '1 written, 0 failed' in capsys.readouterr().out


def test_results_are_kept(call, tmp_path, capsys):
    for i, name in enumerate('ab'):
        write(tmp_path / f'p/{name}.png', i)
    assert call('p', '--out', 'o') == 0
    mask = tmp_path / 'o/masks/a.png'
    time, rows = mask.stat().st_mtime_ns, read_rows(tmp_path / 'o')
    (tmp_path / 'o/overlays/b.jpg').unlink()
    (tmp_path / 'o/coverage.csv').unlink()
    capsys.readouterr()
    assert call('p', '--out', 'o') == 0
    text = capsys.readouterr().out
    assert '2 pictures, 1 are kept' in text and '1 written, 0 failed' in text
    assert 'NOTE' not in text
    assert mask.stat().st_mtime_ns == time and read_rows(tmp_path / 'o') == rows
    assert files_in(tmp_path / 'o') == {
        'lock', 'coverage.csv', 'masks/a.png', 'masks/b.png', 'overlays/a.jpg',
        'overlays/b.jpg'}


def test_masks_of_others_are_noticed(call, tmp_path, capsys):
    write(tmp_path / 'p/a.png')
    write(tmp_path / 'q/a.png')
    assert call('p', '--out', 'o') == 0
    other = save_net(tmp_path / 'other.pth', turn_over)
    assert call('p', '--out', 'o', 'CHECKPOINT=other.pth') == 0
    assert 'NOTE: 1 of the masks that are kept are of another' in (
        capsys.readouterr().out)
    assert call('p', '--out', 'o', 'EVAL_MODE=multi', 'EVAL_SCALES=1,2') == 0
    assert 'or other scales' in capsys.readouterr().out
    assert call('q', '--out', 'o') == 1  # another picture of the same name
    assert f'which is of {tmp_path / "p/a.png"}' in capsys.readouterr().err
    assert call('p', '--out', 'o', 'CHECKPOINT=other.pth', '--overwrite') == 0
    mask = np.asarray(Image.open(tmp_path / 'o/masks/a.png'))
    assert np.array_equal(mask, predict_plainly(other, draw())[0])
    write(tmp_path / 'p/a.png', h=60)  # the picture was changed
    assert call('p', '--out', 'o', '--responsibilities') == 1
    assert 'a.png: its mask is of another size' in capsys.readouterr().err
    save_net(tmp_path / 'other.pth', None, list('vwxyz'))
    with pytest.raises(config.UserError, match='coverage.csv has 5 classes that are'):
        call('p', '--out', 'o', 'CHECKPOINT=other.pth')


def test_several_checkpoints_are_averaged(call, net, tmp_path):
    other = save_net(tmp_path / 'other.pth', turn_over)
    write(tmp_path / 'a.png')
    assert call('a.png', '--probabilities', 'CHECKPOINT=net.pth,other.pth') == 0
    mean = (predict_plainly(net, draw())[1] + predict_plainly(other, draw())[1]) / 2
    with np.load(tmp_path / 'predictions/probabilities/a.npz') as found:
        assert abs(found['probabilities'] - mean).max() < 1e-3
    save_net(tmp_path / 'other.pth', None, list('vwxyz'))
    with pytest.raises(config.UserError, match='only probabilities of the same'):
        call('a.png', 'CHECKPOINT=net.pth,other.pth')
    with pytest.raises(config.UserError, match='one CHECKPOINT'):
        call('a.png', '--responsibilities', 'CHECKPOINT=net.pth,net.pth')


# -- large pictures --------------------------------------------------------------------

def test_large_pictures(call, net, tmp_path, monkeypatch, capsys):
    """Those in blocks; those decoded alone; probabilities that do not fit."""
    write(tmp_path / 'large.png', 3, 530, 760)
    write(tmp_path / 'small.png')
    monkeypatch.setattr(predict, 'count_block_pixels', lambda *_: 512 * 512)
    n_seen, blocks = np.zeros((530, 760), int), []
    plain = inference.Predictor.predict_blocks

    def predict_blocks(self, image, n_pixels, margin):
        for rows, columns, probs in plain(self, image, n_pixels, margin):
            if image.shape[1] == 530:
                n_seen[rows, columns] += 1
                blocks.append((rows, columns, probs))
            yield rows, columns, probs

    monkeypatch.setattr(inference.Predictor, 'predict_blocks', predict_blocks)
    assert call('large.png', 'small.png', '--out', 'o') == 0
    assert (n_seen == 1).all() and len(blocks) > 3
    mask = np.asarray(Image.open(tmp_path / 'o/masks/large.png'))
    for rows, columns, probs in blocks:
        assert np.array_equal(mask[rows, columns], probs[0].argmax(0).numpy())
    assert call('large.png', 'small.png', '--out', 'o', '--probabilities') == 1
    assert 'probabilities of 760x530 pixels do not fit' in capsys.readouterr().err
    assert files_in(tmp_path / 'o/probabilities') == {'small.npz'}


def test_the_bound_of_memory():
    net = make_net(N_LAYERS=18, STEM='plain', HEAD='nonlocal')
    options = {'scales': (1.0,), 'use_flip': False, 'window': (0, 0)}
    net.register_buffer('more', torch.empty(23_000_000, device='meta'))  # 35 in all

    def count(memory, n_classes=21, **more):
        return pipeline.count_block_pixels(memory, [net], n_classes,
                                           {**options, **more})
    few = count(8)  # of all pairs of features: (n / 64) ** 2
    assert 8 * (few / 64) ** 2 + few * 1704 < 7.1e9
    net.head = torch.nn.Identity()
    n = count(8)
    assert 4e6 < n < 6e6 and count(8, 171) < n / 3 and few < n / 2
    assert count(8, scales=(0.5, 2.0), use_flip=True) == pytest.approx(n / 8, 1e-5)
    assert count(1e9) == 10 ** 9
    for memory in (0.5, 0, -1, float('nan')):
        with pytest.raises(config.UserError, match='GB is too little for 21 classes'):
            count(memory)


# -- what goes wrong -------------------------------------------------------------------

def test_ctrl_c_leaves_whole_files(call, tmp_path, monkeypatch, capsys):
    for i in range(6):
        write(tmp_path / f'p/{i}.png', i)
    plain, images = pipeline.Pipeline.predict_mask, []

    def predict_mask(self, picture, image):
        images.append(image)
        if len(images) == 4:
            raise KeyboardInterrupt
        return plain(self, picture, image)
    monkeypatch.setattr(pipeline.Pipeline, 'predict_mask', predict_mask)
    with pytest.raises(KeyboardInterrupt):
        call('p', '--out', 'o')
    assert 'stopped: 3 written; the same command goes on' in capsys.readouterr().out
    assert list(read_rows(tmp_path / 'o')) == ['0', '1', '2']
    assert files_in(tmp_path / 'o') == {
        'lock', 'coverage.csv', *(f'masks/{i}.png' for i in range(3)),
        *(f'overlays/{i}.jpg' for i in range(3))}
    assert call('p', '--out', 'o') == 0
    assert '3 written, 0 failed' in capsys.readouterr().out


def test_a_full_disk_stops_with_a_sentence(call, tmp_path, monkeypatch):
    for i in range(9):
        write(tmp_path / f'p/{i}.png', i)
    plain = os.replace

    def replace(a, b):
        if str(b).endswith('2.jpg'):
            raise OSError(28, 'No space left on device')
        plain(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(config.UserError, match='cannot write o/overlays/2.jpg .*room'):
        call('p', '--out', 'o')
    there = files_in(tmp_path / 'o')
    assert not any('tmp' in name for name in there)
    assert 'masks/1.png' in there and 'masks/2.png' not in there
    monkeypatch.setattr(os, 'replace', plain)
    assert call('p', '--out', 'o') == 0
    assert len(files_in(tmp_path / 'o/masks')) == len(read_rows(tmp_path / 'o')) == 9


def test_errors_of_the_user(call, tmp_path, monkeypatch):
    write(tmp_path / 'a.png')
    (tmp_path / 'file').write_text('x')
    for words, sentence in (
            ((), 'no picture is given'), (('gone.jpg',), 'gone.jpg: no picture is'),
            (('a.png', '--out', 'file/o'), 'cannot write into --out=file/o'),
            (('a.png', 'CHECKPOINT=gone.pth'), 'there is no checkpoint gone.pth'),
            (('a.png', '--responsibilities', '--bases', '1,4'), 'from 0 to 3'),
            (('a.png', '--responsibilities', '--bases', 'x'), '--bases=x: numbers'),
            (('a.png', '--bases', '1'), 'give that too'),
            (('a.png', '--labels'), '--labels is for --export'),
            (('gone.jpg', '--export', 'a.pt2'), 'gone.jpg: no picture is'),
            (('--export', 'a.pt2', 'CHECKPOINT=net.pth,net.pth'), 'one CHECKPOINT'),
            (('a.png', '--memory', '0.1'), 'GB is too little')):
        with pytest.raises(config.UserError, match=sentence):
            call(*words)
    assert not (tmp_path / 'predictions').exists()
    net = make_net(N_LAYERS=18, STEM='plain', HEAD='fcn')
    with pytest.raises(config.UserError, match='has no EM attention unit'):
        predict.read_bases('', [net])


def test_export(call, tmp_path, monkeypatch, capsys):
    exported = []
    monkeypatch.setattr(predict.deploy, 'export', lambda *words: exported.append(words)
                        or ['model.pt2: a line'])
    write(tmp_path / 'a.png')
    assert call('a.png', '--export', 'model.pt2', '--labels') == 0
    assert 'model.pt2: a line' in capsys.readouterr().out
    net, path, image, metadata, is_labels = exported[0]
    assert path == 'model.pt2' and is_labels and metadata['classes'] == CLASSES
    assert np.array_equal(image.permute(1, 2, 0).numpy(), draw())
    assert call('--export', 'model.pt2') == 0 and exported[1][2].shape == (3, 375, 500)


# -- responsibilities ------------------------------------------------------------------

def test_responsibilities(call, tmp_path, monkeypatch, capsys):
    def change(net):
        net.head.emau.conv1.weight.mul_(1e4)  # responsibilities that differ
        net.head.emau.mu[..., 3] = net.head.emau.mu[..., 1]  # never the first largest
    net, (h, w) = save_net(tmp_path / 'net.pth', change), (45, 70)
    for i in range(2):
        write(tmp_path / f'p/{i}.png', i, h, w)
    assert call('p', '--responsibilities', '--out', 'o', '--no-overlays') == 0
    assert files_in(tmp_path / 'o') == {
        'lock', 'coverage.csv', 'responsibilities.png', 'responsibilities.pdf',
        'masks/0.png', 'masks/1.png', *(f'responsibilities/{i}.{suffix}'
                                        for i in range(2)
                                        for suffix in ('npz', 'png', 'pdf'))}
    text, inputs = capsys.readouterr().out, []
    net.head.emau.register_forward_hook(lambda unit, words, _: inputs.append(words[0]))
    predict_plainly(net, draw(1, h, w))
    with torch.no_grad():
        zs = [z[0].numpy() for z in net.head.emau(inputs[0], return_z=True)[1]]
    with np.load(tmp_path / 'o/responsibilities/1.npz') as file:
        found = dict(file)
    # features on pixels 0, 16, ... of the picture: of 4 x 6 these are 3 x 5
    assert found['z'].shape == (3, 4, 3, 5) and inputs[0].shape[2:] == (4, 6)
    for t in range(3):
        for row in range(3):
            for column in range(5):
                assert np.allclose(found['z'][t, :, row, column],
                                   zs[t][row * 6 + column], atol=5e-3)
    assert found['stride'] == 16 and found['picture_size'].tolist() == [h, w]
    assert found['usage'].sum() == pytest.approx(1) and found['usage'][3] == 0
    assert found['bases'].tolist() == sorted(range(4), key=lambda k: -found['usage'][k])
    unused = [k for k in range(4) if found['usage'][k] == 0]
    assert (f'{len(unused)} of 4 bases are the largest for no pixel: '
            f'{", ".join(map(str, unused))}\n') in text

    # Chosen bases; a picture beyond the memory is reduced.
    monkeypatch.setattr(predict, 'count_block_pixels', lambda *_: h * w // 4 + 1)
    monkeypatch.setattr(results.ResultFolder, 'write_figure', lambda *_: None)
    (tmp_path / 'o/responsibilities/1.npz').unlink()
    assert call('p', '--responsibilities', '--out', 'o', '--bases', '2,0,2') == 0
    assert 'seen at 28x18' in capsys.readouterr().out
    with np.load(tmp_path / 'o/responsibilities/1.npz') as file:
        assert file['bases'].tolist() == [2, 0] and file['z'].shape == (3, 4, 2, 2)
        assert file['seen_size'].tolist() == [18, 28]


# -- the real script -------------------------------------------------------------------

def make_odd(folder):
    """Write sound pictures of odd kinds below a folder: name -> size (w, h)."""
    h, w, exif = 23, 31, Image.Exif()
    exif[274] = 6  # rotated
    rgb, grey = Image.fromarray(draw(0, h, w)), draw(0, h, w)[..., 0]
    clear = rgb.copy()
    clear.putalpha(Image.fromarray(grey))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    odd = {'rgb.jpg': rgb, 'grey.jpeg': rgb.convert('L'), 'see through.png': clear,
           'see through.webp': clear, 'deep/16 bit.png': deep, 'deep/16 bit.tif': deep,
           'one bit.png': rgb.convert('1'), 'cmyk.jpg': rgb.convert('CMYK'),
           'float.TIF': Image.fromarray(grey / np.float32(9)),
           '\u00fcml\u00e4\u00fct (1).bmp': rgb, 'clear palette.gif': rgb.quantize(9),
           'narrow.png': Image.fromarray(draw(0, 30, 1)), 'rotated.jpg': rgb}
    (folder / 'deep').mkdir(parents=True)
    for name, picture in odd.items():
        options = {'rotated.jpg': {'exif': exif}, 'clear palette.gif': {
            'transparency': 3}}.get(name, {})
        picture.save(folder / name, **options)
    return {**{name: picture.size for name, picture in odd.items()},
            'rotated.jpg': (h, w)}


def make_broken(folder):
    """Write broken pictures, and return the words that fail, with a part of why."""
    folder.mkdir()
    stream = io.BytesIO()
    Image.fromarray(draw()).save(stream, 'PNG')
    content = stream.getvalue()
    (folder / 'cut.png').write_bytes(content[:len(content) // 2])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'text.bmp').write_text('no picture')
    header = b'IHDR' + struct.pack('>IIBBBBB', 40000, 40000, 8, 2, 0, 0, 0)
    (folder / 'bomb.png').write_bytes(
        content[:12] + header + struct.pack('>I', zlib.crc32(header)) + content[33:])
    (folder / 'nowhere.jpg').symlink_to('gone.jpg')
    return {'bad/cut.png': 'truncated', 'bad/empty.png': 'cannot identify',
            'bad/text.bmp': 'cannot identify', 'bad/bomb.png': '40000x40000',
            'bad/nowhere.jpg': 'No such file', 'missing.jpg': 'no picture is there'}


def test_odd_and_broken_pictures(net, tmp_path):
    sizes, failing = make_odd(tmp_path / 'good'), make_broken(tmp_path / 'bad')
    done = run_script('predict.py', 'good', 'missing.jpg', 'bad', '--out', 'o',
                      'CHECKPOINT=net.pth', 'DEVICE=cpu', 'PRECISION=fp32',
                      cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert f'{len(sizes)} written, {len(failing)} failed' in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith('failed: ')]
    messages = {line.split(': ')[1]: line.split(': ', 2)[2] for line in lines}
    assert set(messages) == set(failing)
    assert all(failing[path] in messages[path] for path in failing)
    rows = read_rows(tmp_path / 'o')
    assert len(rows) == len(files_in(tmp_path / 'o/overlays')) == len(sizes)
    for name, (w, h) in sizes.items():
        is_double = name.startswith(('see', 'deep'))
        place = name if is_double else name.rsplit('.', 1)[0]
        with Image.open(tmp_path / f'o/masks/{place}.png') as mask:
            assert (mask.mode, mask.size) == ('P', (w, h))
            assert np.asarray(mask).max() < 5
        assert (rows[place]['width'], rows[place]['height']) == (str(w), str(h))
