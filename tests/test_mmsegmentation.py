"""Checkpoints of mmsegmentation: its own numbers, and small files in its layout."""
import importlib.util

import numpy as np
import pytest
import test_inference
import torch
from conftest import HERE, run_script
from test_checkpoint import forget_architecture, load_built
from test_eval import evaluate, read_json, refuses
from torch import nn

import checkpoint
import config
import eval as eval_script
import inference
import network
import recipes
import settings
from conversion import mmsegmentation

REFERENCE = HERE.parent / 'shared' / 'reference'
SMALL = dict(N_LAYERS=18, STEM='v1c', HEAD='ema_mmseg', HEAD_CHANNELS=16,
             FC1_CHANNELS=16, N_BASES=4, PSA_GRID=(3, 3), MULTI_GRID=(1, 1, 1),
             STRIDE=8, AUX_WEIGHT=0.4, ALIGN_CORNERS=False)
DEFAULTS = config.snapshot()
# A config as mmcv writes it into `meta`, as far as it matters.
CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(
        type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), norm_eval=False, style='pytorch',
        contract_dilation=True),
    decode_head=dict(
        type='EMAHead', in_channels=2048, in_index=3, channels=256, ema_channels=512,
        num_bases=64, num_stages=3, momentum=0.1, dropout_ratio=0.1, num_classes=19,
        align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
    auxiliary_head=dict(
        type='FCNHead', in_channels=1024, in_index=2, channels=256, num_convs=1,
        concat_input=False, num_classes=19, align_corners=False))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""


def make_net(n_classes=5, seed=0, **values):
    """A small network that predicts different classes."""
    net = test_inference.make_net(n_classes, seed, **{**SMALL, **values})
    last = net.head.classifier
    with torch.no_grad():
        logits = inference.predict_logits(net, draw(40, 56)).flatten(1)
        last.weight.div_(logits.std(1).view(-1, 1, 1, 1))
        last.bias.sub_(logits.mean(1)).div_(logits.std(1))
    return net


def make_state(**values):
    """The tensors of a small network, without memory."""
    for name, value in {**SMALL, **values}.items():
        setattr(settings, name, value)
    with torch.device('meta'):
        return network.build(5).state_dict()


def draw(h, w, seed=0):
    """A picture (3, h, w) of coloured blocks."""
    values = np.random.default_rng(seed).integers(0, 256, (3, h // 8 + 1, w // 8 + 1))
    return torch.from_numpy(values.repeat(8, 1).repeat(8, 2)[:, :h, :w].astype('uint8'))


def as_mmseg(state, start=''):
    """Our keys in mmsegmentation's names, by FACTS section 5."""
    keys = {
        'backbone.conv1': 'backbone.stem', 'backbone.bn1': 'backbone.stem.7',
        'head.fc0': 'decode_head.ema_in_conv',
        'head.emau.mu': 'decode_head.ema_module.bases',
        'head.emau.conv1': 'decode_head.ema_mid_conv.conv',
        'head.emau.conv2.0': 'decode_head.ema_out_conv.conv',
        'head.emau.conv2.1': 'decode_head.ema_out_conv.bn',
        'head.fc1': 'decode_head.bottleneck', 'head.conv_cat': 'decode_head.conv_cat',
        'head.classifier': 'decode_head.conv_seg',
        'aux.conv': 'auxiliary_head.convs.0',
        'aux.classifier': 'auxiliary_head.conv_seg'}
    if 'backbone.conv1.weight' in state:  # its ResNetV1, with the plain stem
        del keys['backbone.conv1'], keys['backbone.bn1']
    renamed = {}
    for key, value in state.items():
        old = next((k for k in keys if key == k or key.startswith(k + '.')), '')
        renamed[start + keys.get(old, '') + key[len(old):]] = value
    assert len(renamed) == len(state)
    return renamed


def save_mmseg(net, path, start='', **meta):
    """Write a network as mmcv does."""
    torch.save({'meta': {'epoch': 1, 'iter': 80000, 'env_info': 'Linux', **meta},
                'state_dict': as_mmseg(net.state_dict(), start),
                'optimizer': {'state': {}, 'param_groups': []}}, path)
    return path


# -- the numbers of mmsegmentation -----------------------------------------------------

@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """The path of mmsegmentation's EMANet-50, and what it computes."""
    if not REFERENCE.is_dir():
        pytest.skip(f'no reference numbers in {REFERENCE}')
    spec = importlib.util.spec_from_file_location('make_weights',
                                                  REFERENCE / 'make_weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp('mmseg') / 'mmseg50.pth'
    torch.save({'state_dict': module.make('mmseg50'), 'meta': {}}, path)
    return path, np.load(REFERENCE / 'expected_mmseg.npz')


def test_reference_logits(reference):
    path, expected = reference
    net, content = load_built(path)
    assert net.align_corners is False and net.stride == 8
    file = torch.load(path, weights_only=True)['state_dict']
    own = net.state_dict()
    assert len(file) == len(content['net']) == len(own)
    assert sum(v.double().sum() for v in file.values()) == pytest.approx(
        float(sum(v.double().sum() for v in own.values())), abs=1e-6)  # each was used

    image = torch.from_numpy(expected['image']).permute(2, 0, 1)[None]
    grids = [m.dilation for m in net.backbone.layer4.modules()
             if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert grids == [(2, 2), (4, 4), (4, 4)]

    def difference(logits, name):
        theirs = expected[name]
        assert logits.shape[1:] == theirs.shape
        return np.abs(logits[0].numpy() - theirs).max() / np.ptp(theirs)

    with torch.inference_mode():
        feats = net.backbone(net.normalise(image))
        assert difference(net.head(feats), 'logits') < 2e-5
        assert difference(net.aux(feats), 'auxiliary') < 2e-5
        # nearly right networks differ
        net.set_stages(1)
        assert difference(net.head(feats), 'logits') > 2e-4
        net.set_stages(3)
        for m, rate in zip((b.conv2 for b in net.backbone.layer4), (4, 8, 16),
                           strict=True):
            m.dilation = m.padding = (rate, rate)
        feats[3] = net.backbone.layer4(feats[2])
        assert difference(net.head(feats), 'logits') > 2e-3


# -- the layout, with small networks ---------------------------------------------------

MMCV = {'config': CONFIG, 'CLASSES': ['a', 'b', 'c', 'd', 'e'],
        'PALETTE': [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14, 15]]}
MMENGINE = {'cfg': CONFIG, 'seed': 3, 'dataset_meta': {
    'classes': tuple(MMCV['CLASSES']), 'palette': MMCV['PALETTE'],
    'reduce_zero_label': False, 'label_map': None}}


@pytest.mark.parametrize('start', ['', 'module.'])
@pytest.mark.parametrize('meta', [MMCV, MMENGINE, {}])
def test_a_file_of_mmsegmentation_loads(start, meta, tmp_path):
    net = make_net()
    expected = {name: getattr(settings, name) for name in checkpoint.ARCHITECTURE}
    path = save_mmseg(net, tmp_path / 'x.pth', start, **meta)
    forget_architecture(DEFAULTS)
    settings.EM_LAMBDA = 2.0  # as an experiment's folder may have it
    other, content = load_built(path)
    assert {name: getattr(settings, name) for name in checkpoint.ARCHITECTURE
            } == {**expected, 'PSA_GRID': (33, 33)}
    assert content['step'] == 80000 and 'optimizer' not in content
    assert set(other.state_dict()) == set(net.state_dict()) == set(content['net'])
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in content['net'].items())
    image = draw(50, 71)
    assert torch.equal(inference.predict_logits(other, image),
                       inference.predict_logits(net, image))
    classes, palette = checkpoint.get_classes(content)
    assert len(palette) == 768
    if meta:
        assert classes == MMCV['CLASSES'] and palette[:18] == [*range(1, 16), 0, 0, 0]
    else:
        assert classes == [f'class {i}' for i in range(5)]
    assert content['run'].get('given', {}) == {}


def test_normalisation_is_the_same():
    net = make_net()
    assert net.mean.flatten().tolist() == np.float32([123.675, 116.28, 103.53]).tolist()
    assert net.std.flatten().tolist() == np.float32([58.395, 57.12, 57.375]).tolist()
    content = mmsegmentation.convert({'state_dict': as_mmseg(net.state_dict())}, 'x')
    for name in ('MEAN', 'STD'):
        assert content['settings'][name] == DEFAULTS[name]


@pytest.mark.parametrize('values', [
    dict(STEM='plain'), dict(STEM='deep'), dict(AUX_WEIGHT=0.0), dict(HEAD='ema'),
    dict(STRIDE=16), dict(N_LAYERS=34), dict(N_LAYERS=101)])
def test_variants_are_read_off_the_file(values):
    state, text = make_state(**values), CONFIG
    if settings.STRIDE == 16:
        text = text.replace('dilations=(1, 1, 2, 4)', 'dilations=(1, 1, 1, 2)')
    content = mmsegmentation.convert(
        {'state_dict': as_mmseg(state), 'meta': {'config': text}}, 'x.pth')
    assert list(content['net']) == list(state)
    expected = {**SMALL, **values}
    del expected['PSA_GRID']
    assert {name: content['settings'][name] for name in expected} == expected


@pytest.mark.parametrize('text, expected', [
    ('', dict(ALIGN_CORNERS=False, STRIDE=8, STAGE_NUM=3)),
    (CONFIG, dict(ALIGN_CORNERS=False, STRIDE=8, STAGE_NUM=3)),
    ('align_corners=True', dict(ALIGN_CORNERS=True, STRIDE=8, STAGE_NUM=3)),
    (CONFIG.replace('align_corners=False', 'align_corners=True', 1),  # the first head's
     dict(ALIGN_CORNERS=True, STRIDE=8, STAGE_NUM=3)),
    (CONFIG.replace('backbone=dict(', 'neck=dict(align_corners=True), backbone=dict('),
     dict(ALIGN_CORNERS=False)),
    (CONFIG.replace('num_stages=3', 'num_stages=5'), dict(STAGE_NUM=5)),
    # as newer versions lay it out, and as a dictionary prints
    ('dilations=(\n    1,\n    1,\n    1,\n    2,\n),\ndecode_head=dict(\n'
     '    align_corners=True,\n    num_stages=2)',
     dict(ALIGN_CORNERS=True, STRIDE=16, STAGE_NUM=2)),
    (repr({'decode_head': {'num_stages': 4, 'align_corners': True}}),
     dict(ALIGN_CORNERS=True, STAGE_NUM=4))])
@pytest.mark.parametrize('key', ['config', 'cfg'])
def test_what_the_config_says(text, expected, key):
    state = as_mmseg(make_state())
    content = mmsegmentation.convert({'state_dict': state, 'meta': {key: text}}, 'x')
    assert {name: content['settings'][name] for name in expected} == expected


@pytest.mark.parametrize('change, part', [
    (lambda s: s.pop('decode_head.ema_module.bases'), 'with another head than EMAHead'),
    (lambda s: s.pop('decode_head.ema_in_conv.conv.weight'), 'is incomplete'),
    (lambda s: s.update({'backbone.bn1.bias': s['backbone.stem.7.bias']}),
     'two tensors for one place'),
    ("style='caffe'", "with style='caffe"), ('dilations=(1, 1, 2, 2)', '(1, 1, 2, 2)'),
    ('contract_dilation=False', 'with contract_dilation=False'),
    ('multi_grid=(1, 2, 4)', 'with multi_grid=(1'),
    ('bgr_to_rgb=False', 'with to_rgb=False'),
    ('mean=[103.53, 116.28, 123.675]', 'with mean=[103.53')])
def test_other_networks_are_refused(change, part, tmp_path):
    state = as_mmseg(make_net(AUX_WEIGHT=0.0).state_dict())
    meta = {'config': change} if isinstance(change, str) else {}
    if callable(change):
        change(state)
    torch.save({'state_dict': state, 'meta': meta}, tmp_path / 'x.pth')
    with pytest.raises(ValueError) as caught:
        checkpoint.load(tmp_path / 'x.pth')
    sentence = str(caught.value)
    assert part in sentence and 'x.pth' in sentence and '\n' not in sentence


def test_mmengines_message_hub_is_refused(tmp_path):
    content = {'state_dict': {}, 'meta': {}, 'message_hub': {'loss': np.float64(1.0)}}
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='save its state_dict and meta by themselves'):
        checkpoint.load(tmp_path / 'x.pth')


# -- the order of the classes ----------------------------------------------------------

def words_of(voc, tmp_path, path):
    return ['DATASET=voc', f'DATA_ROOT={voc}', f'LOG_DIR={tmp_path}', 'DEVICE=cpu',
            'PRECISION=fp32', 'N_WORKERS=0', f'CHECKPOINT={path}']


def test_eval_reorders_the_classes(voc, tmp_path, capsys):
    """Classes in another order and of other spelling score the same."""
    net = make_net(21)
    order = np.random.default_rng(1).permutation(21).tolist()
    names = [recipes.VOC[i].upper().replace('DININGTABLE', 'Dining_Table').replace(
        'TVMONITOR', 'tv / monitor') for i in order]
    plain = save_mmseg(net, tmp_path / 'plain.pth', config=CONFIG,
                       CLASSES=list(recipes.VOC))
    expected = inference.predict_logits(net, draw(30, 45))
    for last in (net.head.classifier, net.aux.classifier):
        for tensor in (last.weight, last.bias):
            tensor.data = tensor.data[order]
    mixed = save_mmseg(net, tmp_path / 'mixed.pth', 'module.', config=CONFIG,
                       CLASSES=names)
    forget_architecture(DEFAULTS)
    assert evaluate(*words_of(voc, tmp_path, plain)) == 0
    text = capsys.readouterr().out
    assert 'put into' not in text and "HEAD = 'ema_mmseg' as in the checkpoint" in text
    assert 'plain.pth, step 80000, stride 8, T = 3' in text
    evaluate(*words_of(voc, tmp_path, mixed))
    assert f'{mixed}: its classes are put into the order of voc' in (
        capsys.readouterr().out)
    plain, mixed_up = (read_json(tmp_path, f'voc_val_{name}')
                       for name in ('plain', 'mixed'))
    assert plain['confusion'] == mixed_up['confusion']
    assert np.count_nonzero(np.sum(plain['confusion'], 0)) > 4  # classes predicted
    assert plain['settings']['ALIGN_CORNERS'] is False

    (net,), _, _ = eval_script.load_networks([mixed], (), {'DATASET': 'voc'})
    assert torch.equal(inference.predict_logits(net, draw(30, 45)), expected)
    assert 'give the DATASET' in refuses(
        *words_of(voc, tmp_path, mixed), 'DATASET=cityscapes')


def test_training_may_start_from_it(voc, tmp_path):
    """Its classes are put into the order of the data set."""
    net = make_net(21)
    order = np.random.default_rng(1).permutation(21).tolist()
    expected = net.head.classifier.weight.detach().clone()
    for last in (net.head.classifier, net.aux.classifier):
        for tensor in (last.weight, last.bias):
            tensor.data = tensor.data[order]
    words = [f'{name}={config.format_value(value)}' for name, value in SMALL.items()]
    words += ['DATASET=voc', f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train', 'CROP_SIZE=32',
              'BATCH_SIZE=2', 'ITER_MAX=1', 'LR=0', 'N_WORKERS=0', 'IMAGE_EVERY=0',
              'DEVICE=cpu', 'PRECISION=fp32']
    path = save_mmseg(net, tmp_path / 'mmseg.pth', config=CONFIG,
                      CLASSES=[recipes.VOC[i] for i in order])
    done = run_script('train.py', *words, f'LOG_DIR={tmp_path}', f'INIT_FROM={path}')
    assert done.returncode == 0, done.stderr
    assert 'put into the order of voc' in done.stdout
    state = torch.load(tmp_path / 'final.pth', weights_only=True)['net']
    assert torch.equal(state['head.classifier.weight'], expected)


def make_content(names, **values):
    rows = torch.arange(len(names))
    return {'net': {'head.classifier.weight': rows, 'head.classifier.bias': -rows,
                    'aux.classifier.bias': rows, 'head.fc0.weight': rows},
            'run': {'classes': names}, 'settings': values, 'step': 0}


def test_the_order_of_context():
    """mmsegmentation has its classes in alphabetical order, and spells three otherwise.
    """
    theirs = {'bedcloth': 'bedclothes', 'clothes': 'cloth', 'diningtable': 'table'}
    ours = {theirs.get(name, name): i for i, name in enumerate(recipes.CONTEXT)}
    names = ['background', *sorted(set(ours) - {'background'})]
    assert names[1:6] == ['aeroplane', 'bag', 'bed', 'bedclothes', 'bench']
    for skip, classes in ((0, recipes.CONTEXT), (1, recipes.CONTEXT[1:])):
        content = make_content(names[skip:])
        settings.DATASET = 'context59' if skip else 'context'
        line, = checkpoint.reorder_classes(content, classes, 'x.pth')
        assert f'order of {settings.DATASET}' in line
        rows = content['net']['head.classifier.weight'].tolist()
        assert [ours[names[skip:][i]] - skip for i in rows] == list(range(60 - skip))
        assert content['net']['head.classifier.bias'].tolist() == [-i for i in rows]
        assert content['net']['aux.classifier.bias'].tolist() == rows
        assert content['net']['head.fc0.weight'].tolist() == list(range(60 - skip))


def test_names_that_differ():
    settings.DATASET = 'coco_voc'
    names = [*recipes.VOC[:-1], 'zebra']
    for own, told in ((names, 'zebra'), ([*recipes.VOC[:-1], 'sofa'], 'background, '),
                      ([f'class {i}' for i in range(21)], 'class0, class1, class2')):
        with pytest.raises(ValueError) as caught:
            checkpoint.reorder_classes(make_content(own, DATASET='folder'), recipes.VOC,
                                       'x.pth')
        assert f'than those of the data set coco_voc, {told}' in str(caught.value)
        # of the data set that it was trained on: someone has renamed a class
        content = make_content(own, DATASET='coco_voc')
        assert checkpoint.reorder_classes(content, recipes.VOC, 'x.pth') == []
        assert content['net']['head.classifier.weight'].tolist() == list(range(21))
    for own in ((), recipes.VOC):
        content = make_content(own)
        assert checkpoint.reorder_classes(content, recipes.VOC, 'x.pth') == []
