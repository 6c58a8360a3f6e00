"""eval.py: what it scores, compares, packs for a test server and writes."""
import csv
import io
import json
import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY, run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import config
import drawing
import eval as eval_script
import inference
import network
import recipes
import settings
from evaluation import report
from evaluation.submission import Submission


def evaluate(*words, **options):
    """Run eval.py's main in this process; return its exit status."""
    argv = ['eval.py', *map(str, words)]
    for name, value in options.items():
        argv += [f'--{name}'] if value is True else [f'--{name}', str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sys.argv', argv)
        for name, value in config.snapshot().items():
            patch.setattr(settings, name, value)  # put back at the end
        return eval_script.main()


def refuses(*words, **options):
    """Run it where a user's error is expected; return its sentence."""
    with pytest.raises(config.UserError) as caught:
        evaluate(*words, **options)
    message = config.get_message(caught.value)
    assert message and '\n' not in message
    return message


def save_network(path, n_classes=21, seed=0):
    """Save a random network as a checkpoint, one that predicts several classes."""
    config.apply_overrides(TINY)
    torch.manual_seed(seed)
    net = network.build(n_classes)
    images = torch.nn.functional.interpolate(255 * torch.rand(8, 3, 5, 5), 40).byte()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net(images)  # batch norms take the statistics of these images
        net.eval()
        net.head.classifier.bias -= net(images).mean((0, 2, 3))
    checkpoint.save({'net': net.state_dict(), 'step': 7, 'settings': config.snapshot(),
                     'run': {}}, path)
    return path


def read_json(folder, name):
    return json.loads((folder / 'eval' / f'{name}.json').read_text())


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def count_pixels(truth, prediction):
    matrix = np.zeros((21, 21), int)
    np.add.at(matrix, (truth[truth < 21], prediction[truth < 21]), 1)
    return matrix


def naive_miou(matrix):
    unions = [matrix[c].sum() + matrix[:, c].sum() - matrix[c, c] for c in range(21)]
    return np.mean([matrix[c, c] / union for c, union in enumerate(unions) if union])


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    """Two random networks: a.pth and b.pth."""
    folder, before = tmp_path_factory.mktemp('networks'), config.snapshot()
    for seed, name in enumerate('ab'):
        save_network(folder / f'{name}.pth', seed=seed)
    config.apply_settings(before)
    return folder


@pytest.fixture
def small_figures(monkeypatch):
    """Spare the time that confusion matrices take to draw."""
    monkeypatch.setattr(report, 'confusion_figure',
                        lambda *args: drawing.new_figure(1, 1))


@pytest.fixture
def words(voc, networks, tmp_path):
    """Words of eval.py: a random network and the made-up VOC folder."""
    for name in 'ab':
        shutil.copy(networks / f'{name}.pth', tmp_path)
    return [*TINY, f'DATA_ROOT={voc}', f'LOG_DIR={tmp_path}',
            f'CHECKPOINT={tmp_path / "a.pth"}']


def check_voc_tar(path, sizes):
    """Check a tar as FACTS says that the VOC server does; return the masks."""
    masks = {}
    with tarfile.open(path) as archive:
        for member in archive:
            assert member.isfile()
            folder, _, name = member.name.rpartition('/')
            assert folder == 'results/VOC2012/Segmentation/comp6_test_cls'
            data = archive.extractfile(member).read()
            assert data[:8] == b'\x89PNG\r\n\x1a\n' and b'PLTE' in data
            with Image.open(io.BytesIO(data)) as mask:
                assert name.endswith('.png') and mask.mode == 'P'
                assert mask.size == sizes[name[:-4]]
                assert mask.getpalette()[3:6] == [128, 0, 0]  # aeroplane
                masks[name[:-4]] = np.array(mask)
            assert masks[name[:-4]].max() <= 20
    assert set(masks) == set(sizes)
    return masks


VOC_SIZES = {f'pic_{i}': (52 - i, 40 + i) for i in (6, 7, 8)}


def test_files_of_an_evaluation(words, voc, tmp_path, capsys):
    assert evaluate(*words, worst=2, pictures=1, submit=True) == 0
    out, result = tmp_path / 'eval', read_json(tmp_path, 'voc_val_a')
    assert {p.name for p in out.iterdir()} == {
        'voc_val_a.json', 'voc_val_a.csv', 'voc_val_a_images.csv', 'voc_val_a.png',
        'voc_val_a_confusion.png', 'voc_val_a_worst.png', 'voc_val_a_submit',
        'voc_val_a_submit.tar'}
    for name in ('_confusion', '_worst', ''):
        assert Image.open(out / f'voc_val_a{name}.png').size[0] > 200

    # The JSON and the tables agree with the masks in the archive.
    masks = check_voc_tar(out / 'voc_val_a_submit.tar', VOC_SIZES)
    each = [count_pixels(np.asarray(Image.open(voc / f'SegmentationClass/{name}.png')),
                         masks[name]) for name in VOC_SIZES]
    matrix = sum(each)
    assert result['confusion'] == matrix.tolist()
    assert (matrix.sum(0) > 0).sum() > 2  # the network predicts several classes
    assert abs(result['mIoU'] - naive_miou(matrix)) < 1e-9
    assert result['mIoU_low'] < result['mIoU'] < result['mIoU_high']
    rows = read_csv(out / 'voc_val_a.csv')
    assert [row['class'] for row in rows] == list(recipes.VOC)
    for i, row in enumerate(rows):
        union = matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]
        assert row['true_pixels'] == str(matrix[i].sum())
        assert row['predicted_pixels'] == str(matrix[:, i].sum())
        assert row['IoU'] == (f'{matrix[i, i] / union:.6f}' if union else '')
    for name, own, row in zip(VOC_SIZES, each, read_csv(out / 'voc_val_a_images.csv'),
                              strict=True):
        assert row['image'] == name
        assert abs(float(row['mIoU']) - naive_miou(own)) < 1e-6
        assert abs(float(row['accuracy']) - own.trace() / own.sum()) < 1e-6
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('background'))
    assert [line.split()[0] for line in lines[first:first + 21]] == list(recipes.VOC)
    assert any(line.startswith('mIoU') and 'bootstrap' in line for line in lines)
    assert any(line.endswith('images/s') for line in lines)

    # clean.sh takes all of it and nothing else
    (out / 'mine.txt').write_text('mine')
    subprocess.run(['sh', config.ROOT / 'clean.sh', '--yes', tmp_path], check=True,
                   capture_output=True)
    assert [p.name for p in out.iterdir()] == ['mine.txt']


def test_batches_and_ranks_change_nothing(words, tmp_path, small_figures):
    evaluate(*words, 'EVAL_BATCH=1', f'LOG_DIR={tmp_path}/1', submit=True)
    evaluate(*words, 'EVAL_BATCH=3', 'N_WORKERS=2', f'LOG_DIR={tmp_path}/2')
    done = run_script('eval.py', *words, 'RANKS=2', f'LOG_DIR={tmp_path}/3', '--submit')
    assert done.returncode == 0, done.stderr
    assert 'processes: 2' in done.stdout and done.stdout.count('images/s') == 1
    name = f'voc_val_{tmp_path.name}_a'  # the checkpoint is not in LOG_DIR
    first, *others = (read_json(tmp_path / str(i), name) for i in (1, 2, 3))
    for other in others:
        assert other['confusion'] == first['confusion']
        assert other['mIoU_low'] == first['mIoU_low']
    one, two = (check_voc_tar(tmp_path / i / f'eval/{name}_submit.tar', VOC_SIZES)
                for i in '13')
    assert all(np.array_equal(one[name], two[name]) for name in VOC_SIZES)


def test_options_give_names_of_their_own(words, tmp_path, small_figures):
    evaluate(*words)
    plain = read_json(tmp_path, 'voc_val_a')
    for options, name, n_images in (
            ('EVAL_MODE=multi EVAL_SCALES=0.5,1.25 EVAL_FLIP=1', 'multi0.5-1.25_flip',
             3),
            ('EVAL_WINDOW=40,30 EVAL_STEP=0.5 EVAL_IMAGES=2',
             'window40x30by0.5_first2', 2),
            ('EVAL_STAGE_NUM=5 EVAL_STRIDE=8', 'T5_stride8', 3)):
        evaluate(*words, *options.split())
        other = read_json(tmp_path, f'voc_val_a_{name}')
        assert other['confusion'] != plain['confusion']
        assert other['n_images'] == n_images


def test_several_networks_and_iterations_in_one_pass(words, tmp_path, capsys,
                                                     small_figures):
    a, b = tmp_path / 'a.pth', tmp_path / 'b.pth'
    evaluate(*words, f'CHECKPOINT={a},{b}', stages='1,3')
    text = capsys.readouterr().out
    assert 'a_T1' in text and 'b_T3' in text and 'mIoU_low' in text
    for stem, t in ('a1', 'b3'):
        together = read_json(tmp_path, f'voc_val_{stem}_T{t}')
        evaluate(*words, f'CHECKPOINT={tmp_path / stem}.pth', f'EVAL_STAGE_NUM={t}')
        alone = read_json(tmp_path, f'voc_val_{stem}_T{t}')
        assert alone['confusion'] == together['confusion']
        assert together['stages'] == int(t) and together['step'] == 7
    each = [read_json(tmp_path, f'voc_val_{name}')['confusion']
            for name in ('a_T1', 'a_T3', 'b_T1', 'b_T3')]
    assert all(each.count(one) == 1 for one in each)

    # The mean of a network with itself is the network; of two it is another one.
    evaluate(*words, f'CHECKPOINT={a},{shutil.copy(a, tmp_path / "c.pth")}',
             average=True)
    assert read_json(tmp_path, 'voc_val_mean_of_a+c')['confusion'] == each[1]
    evaluate(*words, f'CHECKPOINT={a},{b}', average=True)
    mean = read_json(tmp_path, 'voc_val_mean_of_a+b')
    assert mean['confusion'] not in each and mean['averaged'] == [str(a), str(b)]


def test_checkpoints_keep_their_names_and_strides(words, tmp_path, capsys,
                                                  small_figures):
    content = checkpoint.load(tmp_path / 'b.pth')
    content['run'] = {'given': {'EVAL_STRIDE': 8, 'EVAL_FLIP': True, 'EVAL_IMAGES': 1}}
    for name in 'xy':
        (tmp_path / name).mkdir()
    one, two = tmp_path / 'x/final.pth', tmp_path / 'y/final.pth'
    shutil.copy(tmp_path / 'a.pth', one)
    checkpoint.save(content, two)
    evaluate(*words, f'CHECKPOINT={one},{two}')
    names = {p.name for p in (tmp_path / 'eval').glob('*.json')}
    assert names == {'voc_val_x_final.json', 'voc_val_y_final.json'}
    text = capsys.readouterr().out
    assert f'{one}, step 7, stride 16' in text and f'{two}, step 7, stride 8' in text
    result = read_json(tmp_path, 'voc_val_y_final')
    assert result['settings']['EVAL_STRIDE'] == 8 and result['n_images'] == 3
    assert result['settings']['EVAL_FLIP'] is False  # as for all networks of the pass
    assert 'must differ' in refuses(*words, f'CHECKPOINT={one},{one}')


def test_wrong_options(words, voc):
    for options, part in (
            (dict(stages='1,x'), '--stages=1,x'), (dict(stages='0'), 'at least 1'),
            (dict(stages='1,2', average=True), '--average and --stages'),
            (dict(stages='1,2', submit=True), 'one result'),
            (dict(worst=-1), '--worst')):
        assert part in refuses(*words, **options)
    for word, part in (
            ('EVAL_MODE=both', 'single, multi'), ('EVAL_WINDOW=1,2,3', 'height,width'),
            ('EVAL_STEP=1.5', 'at most 1'), ('EVAL_BATCH=0', 'EVAL_BATCH=0')):
        assert part in refuses(*words, word)
    assert 'set it to 0' in refuses(*words, 'EVAL_IMAGES=2', submit=True)
    assert 'voc and cityscapes' in refuses(*words, 'DATASET=coco_voc', submit=True)
    (voc / 'ImageSets/Segmentation/val.txt').write_text('pic_6\npic_7\npic_6\n')
    assert 'twice' in refuses(*words, submit=True)


# -- the test server -------------------------------------------------------------------

def test_a_test_split_has_no_masks(words, voc, tmp_path, capsys):
    split = voc / 'ImageSets/Segmentation/test.txt'
    split.write_text('pic_6\npic_7\npic_8\n')
    for name in VOC_SIZES:
        (voc / f'SegmentationClass/{name}.png').unlink()
    assert evaluate(*words, 'VAL_SPLIT=test', submit=True) == 0
    assert 'nothing to score' in capsys.readouterr().out
    check_voc_tar(tmp_path / 'eval/voc_test_a_submit.tar', VOC_SIZES)
    assert 'missing' in refuses(*words, 'VAL_SPLIT=test')
    split.write_text('pic_5\npic_6\n')  # some masks but not all
    assert 'pic_6.png' in refuses(*words, 'VAL_SPLIT=test', submit=True)


def test_a_bad_archive_is_noticed(words, tmp_path, monkeypatch):
    write = Submission.write
    monkeypatch.setattr(Submission, 'write', lambda self, index, prediction: write(
        self, index, prediction[:-1] if index == 1 else prediction))
    with pytest.raises(RuntimeError, match='pic_7.png .* another size'):
        evaluate(*words, submit=True)
    assert not list((tmp_path / 'eval').glob('*.tar'))


def test_the_cityscapes_zip(tmp_path):
    root, id = tmp_path / 'cityscapes', 'test/berlin/berlin_000000_000019'
    image = np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)
    for folder in ('leftImg8bit/test/berlin', 'ImageSets/Segmentation'):
        (root / folder).mkdir(parents=True)
    Image.fromarray(image).save(root / f'leftImg8bit/{id}_leftImg8bit.png')
    (root / 'ImageSets/Segmentation/test.txt').write_text(id)
    path = save_network(tmp_path / 'a.pth', 19)
    words = [*TINY, 'DATASET=cityscapes', f'DATA_ROOT={root}', f'CHECKPOINT={path}',
             f'LOG_DIR={tmp_path}', 'VAL_SPLIT=test']
    assert evaluate(*words, submit=True) == 0
    with zipfile.ZipFile(tmp_path / 'eval/cityscapes_test_a_submit.zip') as archive:
        assert archive.testzip() is None
        (name,) = archive.namelist()
        mask = np.array(Image.open(io.BytesIO(archive.read(name))))
    # The server finds the frame by the beginning of the name.
    assert name.startswith('berlin_000000_000019') and name.endswith('.png')
    assert mask.dtype == np.uint8 and len(np.unique(mask)) > 1
    assert set(np.unique(mask)) <= {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25,
                                    26, 27, 28, 31, 32, 33}
    # Its label ids read back as the classes that were predicted.
    (net,), _, _ = eval_script.load_networks([path], (), config.apply_overrides(words))
    logits = inference.predict_logits(net, torch.from_numpy(image).permute(2, 0, 1))
    classes = np.vectorize(recipes.DATASETS['cityscapes']['map'].get)(mask)
    assert np.array_equal(classes, logits.argmax(0).numpy())


# -- while training --------------------------------------------------------------------

def test_validation_is_logged(tiny, tmp_path):
    done = run_script('train.py', *tiny, 'ITER_MAX=4', 'EVAL_EVERY=2', 'EVAL_IMAGES=2',
                      'IMAGE_EVERY=2', 'N_BASES=5')
    assert done.returncode == 0, done.stderr
    log = tmp_path / 'log'
    rows = [json.loads(line) for line in (log / 'log.jsonl').read_text().splitlines()]
    rows = {row['step']: row for row in rows if row['kind'] == 'validation'}
    assert list(rows) == [2, 4]
    assert all(row['n_images'] == 2 and len(row['IoU']) == 21 for row in rows.values())
    best = checkpoint.load(log / 'best.pth')['run']
    assert best['best'] == max(row['mIoU'] for row in rows.values())
    assert best['classes'] == list(recipes.VOC)
    evaluate(*tiny, f'CHECKPOINT={log / "final.pth"}', 'EVAL_IMAGES=2')
    result = read_json(log, 'voc_val_final_first2')
    assert abs(result['mIoU'] - rows[4]['mIoU']) < 1e-9  # eval.py finds the same

    board = EventAccumulator(str(log), size_guidance=dict.fromkeys(
        ('scalars', 'histograms', 'tensors'), 0)).Reload()
    assert {'train/loss', 'validation/mIoU', 'validation/pAcc', 'bases/unused',
            'validation_IoU/background'} <= set(board.Tags()['scalars'])
    scalars = board.Scalars('validation/mIoU')
    assert [scalar.step for scalar in scalars] == [2, 4]
    assert abs(scalars[1].value - rows[4]['mIoU']) < 1e-6
    (tag,) = board.Tags()['histograms']
    values = board.Histograms(tag)[0].histogram_value
    assert values.num == 5 and abs(values.sum - 5) < 1e-3  # shares of 5 bases times 5
    assert 'settings/text_summary' in board.Tags()['tensors']
    data = b''.join(p.read_bytes() for p in log.glob('events.out.tfevents.*'))
    assert b'_hparams_/session_start_info' in data and b'EM_LAMBDA' in data
