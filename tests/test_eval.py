"""eval.py: what it scores, compares, packs for a test server and writes."""
import argparse
import csv
import io
import json
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import HERE, TINY, run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import dataset
import eval as eval_script
import network
import recipes
import runtime
import settings


def evaluate(*words, **options):
    """Run eval.py's main in this process; return its exit status."""
    before = runtime.snapshot()
    options = {**dict(pictures=0, worst=0, stages='', average=False, submit=False),
               **options}
    try:
        given = runtime.override([str(word) for word in words])
        return eval_script.main(argparse.Namespace(given=given, **options))
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def refuses(*words, **options):
    with pytest.raises(Exception) as caught:
        evaluate(*words, **options)
    sentence = runtime.explain(caught.value)
    assert sentence and '\n' not in sentence, repr(caught.value)
    return sentence


def save_network(path, n_classes=21, seed=0):
    """Save a random network as a checkpoint, one that predicts several classes."""
    runtime.override(TINY)
    torch.manual_seed(seed)
    net = network.build(n_classes)
    blocks = torch.rand(8, 3, 5, 5)
    images = torch.nn.functional.interpolate(255 * blocks, 40).byte()
    with torch.no_grad():
        for _ in range(30):  # batch norms get to know pictures
            net(images)
        net.eval()
        net.head.fc2.bias -= net(images).mean((0, 2, 3))
        net.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save({'net': net.state_dict(), 'step': 7, 'settings': runtime.snapshot(),
                     'run': {}}, path)
    return path


def read_json(folder, name):
    return json.loads((folder / 'eval' / f'{name}.json').read_text())


@pytest.fixture
def words(voc, tmp_path):
    """Words of eval.py: a random network and the made-up VOC folder."""
    path = save_network(tmp_path / 'a.pth')
    return [*TINY, f'DATA_ROOT={voc}', f'LOG_DIR={tmp_path}', f'CHECKPOINT={path}']


def test_files_of_an_evaluation(words, voc, tmp_path, capsys):
    assert evaluate(*words, worst=2, pictures=1) == 0
    out, result = tmp_path / 'eval', read_json(tmp_path, 'voc_val_a')
    assert {p.name for p in out.iterdir()} == {
        'voc_val_a.json', 'voc_val_a.csv', 'voc_val_a_images.csv', 'voc_val_a.png',
        'voc_val_a_confusion.png', 'voc_val_a_worst.png'}
    for name in ('_confusion', '_worst', ''):
        assert Image.open(out / f'voc_val_a{name}.png').size[0] > 200

    # the tables tell what the matrix and the masks tell
    matrix = np.array(result['confusion'])
    labels = [np.asarray(Image.open(voc / f'SegmentationClass/pic_{i}.png'))
              for i in (6, 7, 8)]
    assert matrix.sum(1).tolist() == [sum((x == c).sum() for x in labels)
                                      for c in range(21)]
    rows = list(csv.DictReader(open(out / 'voc_val_a.csv')))
    assert [row['class'] for row in rows] == list(recipes.VOC)
    for i, row in enumerate(rows):
        union = matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]
        assert row['true_pixels'] == str(matrix[i].sum())
        assert row['predicted_pixels'] == str(matrix[:, i].sum())
        if union:
            assert abs(float(row['IoU']) - matrix[i, i] / union) < 1e-6
        else:
            assert row['IoU'] == ''
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('background'))
    assert [line.split()[0] for line in lines[first:first + 21]] == list(recipes.VOC)
    assert any(line.startswith('mIoU') and 'bootstrap' in line for line in lines)
    assert any(line.endswith('images/s') for line in lines)

    images = list(csv.DictReader(open(out / 'voc_val_a_images.csv')))
    assert [row['image'] for row in images] == ['pic_6', 'pic_7', 'pic_8']
    each = []
    for i in range(3):  # one image at a time gives its row
        list_file = voc / 'ImageSets/Segmentation/one.txt'
        list_file.write_text(f'pic_{6 + i}\n')
        evaluate(*words, 'VAL_SPLIT=one')
        each.append(read_json(tmp_path, 'voc_one_a'))
    for row, one in zip(images, each, strict=True):
        assert abs(float(row['mIoU']) - one['mIoU']) < 1e-6
        assert abs(float(row['accuracy']) - one['pAcc']) < 1e-6
    assert np.array_equal(sum(np.array(one['confusion']) for one in each), matrix)


def test_batches_and_ranks_change_nothing(words, tmp_path):
    for n, options in enumerate((['EVAL_BATCH=1'], ['EVAL_BATCH=3'],
                                 ['EVAL_BATCH=2', 'N_WORKERS=2'])):
        evaluate(*words, *options, f'LOG_DIR={tmp_path / str(n)}')
    done = run_script('eval.py', *words, 'RANKS=2', f'LOG_DIR={tmp_path / "3"}')
    assert done.returncode == 0, done.stderr
    name = f'voc_val_{tmp_path.name}_a'  # the checkpoint is not of LOG_DIR
    found = [read_json(tmp_path / str(n), name) for n in range(4)]
    for other in found[1:]:
        assert other['confusion'] == found[0]['confusion']
        assert other['mIoU_low'] == found[0]['mIoU_low']


@pytest.mark.parametrize('options, name', [
    (['EVAL_MODE=multi', 'EVAL_FLIP=true'], '_multi0.5-0.75-1.0-1.25-1.5-1.75_flip'),
    (['EVAL_WINDOW=33', 'EVAL_STEP=0.5'], '_window33x33by0.5'),
    (['EVAL_MODE=wide', 'EVAL_WINDOW=40,30', 'EVAL_IMAGES=2'],
     '_wide0.5-0.75-1.0-1.25-1.5-1.75-2.0_window40x30by0.67_first2'),
    (['EVAL_STAGE_NUM=5', 'EVAL_STRIDE=8'], '_T5_stride8')])
def test_other_ways_to_look_have_names_of_their_own(words, options, name, tmp_path):
    evaluate(*words)
    evaluate(*words, *options)
    plain, other = (read_json(tmp_path, f'voc_val_a{n}') for n in ('', name))
    assert other['confusion'] != plain['confusion']
    n = 2 if 'first2' in name else 3
    assert other['n_images'] == n
    if n == 3:
        assert np.array_equal(np.sum(other['confusion'], 1),
                              np.sum(plain['confusion'], 1))


def test_several_networks_and_iterations_in_one_pass(words, tmp_path, capsys):
    other = save_network(tmp_path / 'b.pth', seed=1)
    both = f'CHECKPOINT={tmp_path / "a.pth"},{other}'
    evaluate(*words, both, stages='1,3')
    text = capsys.readouterr().out
    assert 'a_T1' in text and 'b_T3' in text and 'mIoU_low' in text
    for stem in 'ab':
        for t in (1, 3):
            evaluate(*words, f'CHECKPOINT={tmp_path / stem}.pth', f'EVAL_STAGE_NUM={t}',
                     f'LOG_DIR={tmp_path / "single"}')
            alone = read_json(tmp_path / 'single',
                              f'voc_val_{tmp_path.name}_{stem}_T{t}')
            together = read_json(tmp_path, f'voc_val_{stem}_T{t}')
            assert alone['confusion'] == together['confusion']
            assert together['stages'] == t and together['step'] == 7
    assert (read_json(tmp_path, 'voc_val_a_T3')['confusion']
            != read_json(tmp_path, 'voc_val_b_T3')['confusion'])

    # the mean of a network with itself is the network; of two it is another one
    copy = save_network(tmp_path / 'c.pth')
    evaluate(*words)
    plain = read_json(tmp_path, 'voc_val_a')['confusion']
    evaluate(*words, f'CHECKPOINT={tmp_path / "a.pth"},{copy}', average=True)
    assert read_json(tmp_path, 'voc_val_mean_of_a+c')['confusion'] == plain
    evaluate(*words, both, average=True)
    mean = read_json(tmp_path, 'voc_val_mean_of_a+b')
    assert mean['confusion'] != plain
    assert mean['averaged'] == [str(tmp_path / 'a.pth'), str(other)]


def test_same_names_are_told_apart_by_their_folders(words, tmp_path):
    one, two = (save_network(tmp_path / run / 'final.pth') for run in ('x', 'y'))
    evaluate(*words, f'CHECKPOINT={one},{two}')
    names = {p.name for p in (tmp_path / 'eval').glob('*.json')}
    assert names == {'voc_val_x_final.json', 'voc_val_y_final.json'}
    assert 'must differ' in refuses(*words, f'CHECKPOINT={one},{one}')


@pytest.mark.parametrize('options, parts', [
    (dict(stages='1,x'), ['--stages=1,x', 'as in']),
    (dict(stages='0'), ['--stages 0', 'at least 1']),
    (dict(stages='1,2', average=True), ['--average and --stages']),
    (dict(stages='1,2', submit=True), ['--submit', 'one result'])])
def test_wrong_options(words, options, parts):
    sentence = refuses(*words, **options)
    assert all(part in sentence for part in parts)


@pytest.mark.parametrize('word, part', [
    ('EVAL_MODE=both', 'single, multi, wide'), ('EVAL_WINDOW=1,2,3', 'height,width'),
    ('EVAL_WINDOW=-4', 'height,width'), ('EVAL_STEP=0', 'above 0'),
    ('EVAL_STEP=1.5', 'at most 1'), ('EVAL_BATCH=0', 'EVAL_BATCH=0'),
    ('EVAL_IMAGES=-1', 'EVAL_IMAGES=-1')])
def test_wrong_ways_to_look(words, word, part):
    assert part in refuses(*words, word)


def test_wrong_scales(words):
    assert 'above 0' in refuses(*words, 'EVAL_MODE=multi', 'EVAL_SCALES=0.5,0')


# -- the test server -------------------------------------------------------------------

def check_voc_tar(path, sizes):
    """What FACTS.md says of the VOC server's tar; returns the masks."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            assert member.isfile()
            folder, _, name = member.name.rpartition('/')
            assert folder == 'results/VOC2012/Segmentation/comp6_test_cls'
            assert name.endswith('.png')
            data = archive.extractfile(member).read()
            assert data[:8] == b'\x89PNG\r\n\x1a\n' and b'PLTE' in data
            with Image.open(io.BytesIO(data)) as mask:
                assert mask.mode == 'P' and mask.size == sizes[name[:-4]]
                assert mask.getpalette()[3:6] == [128, 0, 0]  # aeroplane
                found[name[:-4]] = np.array(mask)
                assert found[name[:-4]].max() <= 20
    assert set(found) == set(sizes)
    return found


def test_the_voc_tar(words, voc, tmp_path, capsys):
    sizes = {f'pic_{i}': (52 - i, 40 + i) for i in (6, 7, 8)}
    assert evaluate(*words, submit=True) == 0
    masks = check_voc_tar(tmp_path / 'eval' / 'voc_val_a_submit.tar', sizes)
    result = read_json(tmp_path, 'voc_val_a')  # there are masks, so it is scored too
    matrix = np.zeros((21, 21), int)
    for name, mask in masks.items():
        truth = np.asarray(Image.open(voc / f'SegmentationClass/{name}.png'))
        np.add.at(matrix, (truth[truth < 21], mask[truth < 21]), 1)
    assert matrix.tolist() == result['confusion']

    # without masks, as for the real test list
    (voc / 'ImageSets/Segmentation/test.txt').write_text('pic_6\npic_7\npic_8\n')
    for i in (6, 7, 8):
        (voc / f'SegmentationClass/pic_{i}.png').unlink()
    capsys.readouterr()
    assert evaluate(*words, 'VAL_SPLIT=test', submit=True) == 0
    assert 'nothing to score' in capsys.readouterr().out
    again = check_voc_tar(tmp_path / 'eval' / 'voc_test_a_submit.tar', sizes)
    assert all(np.array_equal(again[name], masks[name]) for name in sizes)
    assert 'missing' in refuses(*words, 'VAL_SPLIT=test')
    # some masks but not all is a fault, not a test list
    (voc / 'ImageSets/Segmentation/test.txt').write_text('pic_5\npic_6\n')
    assert 'pic_6.png' in refuses(*words, 'VAL_SPLIT=test', submit=True)


def test_a_bad_archive_is_noticed(words, voc, tmp_path, monkeypatch):
    write = eval_script.Submission.write
    monkeypatch.setattr(eval_script.Submission, 'write', lambda self, index, values:
                        write(self, index, values[:-1] if index == 1 else values))
    with pytest.raises(RuntimeError, match='pic_7.png .* another size'):
        evaluate(*words, submit=True)
    assert not list((tmp_path / 'eval').glob('*.tar'))


def test_the_cityscapes_zip(tmp_path):
    ids = ('test/berlin/berlin_000000_000019', 'test/bonn/bonn_000001_000019')
    root = tmp_path / 'cityscapes'
    draw = np.random.default_rng(0)
    for name in ids:
        file = root / f'leftImg8bit/{name}_leftImg8bit.png'
        file.parent.mkdir(parents=True)
        Image.fromarray(draw.integers(0, 256, (30, 44, 3), np.uint8)).save(file)
    (root / 'ImageSets/Segmentation').mkdir(parents=True)
    (root / 'ImageSets/Segmentation/test.txt').write_text('\n'.join(ids))
    path = save_network(tmp_path / 'a.pth', 19)
    words = [*TINY, 'DATASET=cityscapes', f'DATA_ROOT={root}', f'CHECKPOINT={path}',
             f'LOG_DIR={tmp_path}', 'VAL_SPLIT=test']
    assert evaluate(*words, submit=True) == 0
    with zipfile.ZipFile(tmp_path / 'eval/cityscapes_test_a_submit.zip') as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        masks = [np.array(Image.open(io.BytesIO(archive.read(n)))) for n in names]
    # the server finds the frame by the beginning of the name
    assert [n.startswith(i.rpartition('/')[2]) and n.endswith('.png')
            for n, i in zip(names, ids, strict=True)] == [True, True]
    folder = dataset.Folder(str(root), 'test', dataset.DATASETS['cityscapes'],
                            needs_masks=False)
    runtime.override(words)
    (net,), _, _ = eval_script.load_networks([path], (), runtime.override(words))
    for index, mask in enumerate(masks):
        _, image, _ = dataset.EvalSet(folder)[index]
        with torch.no_grad():
            x = torch.nn.functional.pad(net.normalise(image[None]), (0, 5, 0, 3))
            classes = net(x)[0, :, :30, :44].argmax(0).numpy()
        assert mask.dtype == np.uint8 and mask.shape == (30, 44)
        assert set(np.unique(mask)) <= {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24,
                                        25, 26, 27, 28, 31, 32, 33}
        assert len(np.unique(mask)) > 1
        # label ids read back as the classes that were predicted
        assert np.array_equal(np.array([dataset.DATASETS['cityscapes']['map'][v]
                                        for v in mask.ravel()]).reshape(30, 44),
                              classes)


def test_a_part_or_a_name_twice_is_not_for_the_server(words, voc):
    assert 'set it to 0' in refuses(*words, 'EVAL_IMAGES=2', submit=True)
    (voc / 'ImageSets/Segmentation/val.txt').write_text('pic_6\npic_7\npic_6\n')
    assert 'twice' in refuses(*words, submit=True)


def test_each_network_keeps_its_own_stride(words, tmp_path, capsys):
    content = checkpoint.load(save_network(tmp_path / 'b.pth', seed=1))
    content['run'] = {'given': {'EVAL_STRIDE': 8, 'EVAL_FLIP': True, 'EVAL_IMAGES': 1}}
    checkpoint.save(content, tmp_path / 'b.pth')
    evaluate(*words, f'CHECKPOINT={tmp_path / "a.pth"},{tmp_path / "b.pth"}')
    text = capsys.readouterr().out
    assert 'a.pth, step 7, stride 16' in text and 'b.pth, step 7, stride 8' in text
    found = read_json(tmp_path, 'voc_val_b')
    assert found['settings']['EVAL_STRIDE'] == 8 and found['n_images'] == 3
    assert found['settings']['EVAL_FLIP'] is False  # as all were seen


def test_other_data_have_no_server(words):
    assert 'voc and cityscapes have one' in refuses(*words, 'DATASET=coco_voc',
                                                    submit=True)


# -- while training --------------------------------------------------------------------

def test_validation_is_logged(tiny, tmp_path):
    done = run_script('train.py', *tiny, 'ITER_MAX=4', 'EVAL_EVERY=2', 'EVAL_IMAGES=2',
                      'IMAGE_EVERY=2', 'N_BASES=5')
    assert done.returncode == 0, done.stderr
    log = tmp_path / 'log'
    rows = [json.loads(line) for line in (log / 'log.jsonl').read_text().splitlines()]
    found = {row['step']: row for row in rows if row['kind'] == 'validation'}
    assert list(found) == [2, 4]
    assert all(row['n_images'] == 2 and len(row['IoU']) == 21 for row in found.values())
    best = checkpoint.load(log / 'best.pth')
    assert best['run']['best'] == max(row['mIoU'] for row in found.values())
    assert best['run']['classes'] == list(recipes.VOC)

    # eval.py finds the same with the same weights
    evaluate(*tiny, f'CHECKPOINT={log / "final.pth"}', 'EVAL_IMAGES=2')
    assert abs(read_json(log, 'voc_val_final_first2')['mIoU']
               - found[4]['mIoU']) < 1e-9

    board = EventAccumulator(str(log), size_guidance=dict.fromkeys(
        ('scalars', 'histograms', 'images', 'tensors'), 0)).Reload()
    scalars = board.Tags()['scalars']
    assert {'train/loss', 'validation/mIoU', 'validation/pAcc', 'bases/unused',
            'validation_IoU/background'} <= set(scalars)
    assert [e.step for e in board.Scalars('validation/mIoU')] == [2, 4]
    assert abs(board.Scalars('validation/mIoU')[1].value - found[4]['mIoU']) < 1e-6
    (tag,) = board.Tags()['histograms']
    values = board.Histograms(tag)[0].histogram_value
    assert values.num == 5 and abs(values.sum - 5) < 1e-3  # shares of 5 bases times 5
    assert 'settings/text_summary' in board.Tags()['tensors']
    data = b''.join(p.read_bytes() for p in log.glob('events.out.tfevents.*'))
    assert b'_hparams_/session_start_info' in data and b'EM_LAMBDA' in data


def test_usage_is_the_mean_responsibility():
    torch.manual_seed(0)
    unit = network.EMAU(6, bases=4, stages=2).double()
    x = torch.randn(3, 6, 5, 7).double()
    unit.auto_update = False
    _, zs = unit(x, return_z=True)
    unit(x[:1])  # a second part of the batch
    unit.update_bases()
    each = zs[-1].mean(1)  # (3, k)
    assert torch.allclose(unit.usage, (each.sum(0) + each[0]) / 4, atol=1e-12)
    assert abs(unit.usage.sum() - 1) < 1e-9 and unit.usage_sum.abs().max() == 0
    before = unit.usage.clone()
    unit(x)
    unit.update_bases(False)
    assert torch.equal(unit.usage, before)


def test_clean_takes_what_eval_wrote(words, tmp_path):
    evaluate(*words, submit=True, worst=1)
    (tmp_path / 'eval/mine.txt').write_text('mine')
    subprocess.run(['sh', str(HERE / 'clean.sh'), '--yes', str(tmp_path)], check=True,
                   capture_output=True)
    assert [p.name for p in (tmp_path / 'eval').iterdir()] == ['mine.txt']
