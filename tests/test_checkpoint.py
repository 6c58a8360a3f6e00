"""Checkpoints: read whole or refused, nothing in them executed, of every head."""
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import test_inference
import torch
from PIL import Image
from test_eval import evaluate, read_json, refuses

import checkpoint
import config
import inference
import network
import predict
import settings
from config import UserError


def make(step=7):
    return {'net': {'w': torch.arange(1000.) + step}, 'step': step,
            'settings': {'LR': 0.1, 'SCALES': (0.5, 1.0)}, 'run': {'best': 0.5},
            'optimizer': {'state': {0: {'momentum_buffer': torch.ones(3)}}},
            'scaler': {}}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    return a == b and type(a) is type(b)


# -- writing ---------------------------------------------------------------------------

def test_round_trip(tmp_path):
    path = tmp_path / 'latest.pth'
    for content in (make(), make(8)):  # the second over the first
        checkpoint.save(content, path)
        # settings that it does not record have their legacy defaults
        content['settings'] = {**checkpoint.LEGACY_DEFAULTS, **content['settings']}
        assert same(checkpoint.load(str(path)), content)
    assert os.listdir(tmp_path) == ['latest.pth']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),
                                   RuntimeError('[enforce fail at inline_container]')])
def test_a_failing_write_leaves_the_old_file(error, tmp_path, monkeypatch):
    path = tmp_path / 'latest.pth'
    checkpoint.save(make(), path)
    before = path.read_bytes()

    def fail(content, file):
        file.write(before[:len(before) // 2])
        raise error

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(UserError) as caught:
        checkpoint.save(make(8), path)
    for part in (str(path), str(error), 'the last checkpoint is as it was'):
        assert part in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['latest.pth']


def test_the_new_file_takes_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda f: (order.append('fsync'), fsync(f)))
    monkeypatch.setattr(os, 'replace',
                        lambda *names: (order.append('replace'), replace(*names)))
    checkpoint.save(make(), tmp_path / 'a.pth')
    assert order[:2] == ['fsync', 'replace']


def test_no_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match='could not write .*nowhere'):
        checkpoint.save(make(), tmp_path / 'nowhere' / 'a.pth')


@pytest.mark.parametrize('keep, left', [(2, {3, 20, 100}), (1, {3, 100}),
                                        (9, {3, 5, 20, 100}), (0, {3}), (-1, {3})])
def test_remove_old(keep, left, tmp_path):
    for n in (5, 100, 20):
        (tmp_path / f'step_{n}.pth').touch()
    others = {'latest.pth', 'final.pth', 'step_best.pth', 'step_3.pth.tmp'}
    for name in others:
        (tmp_path / name).touch()
    checkpoint.remove_old(tmp_path, keep)
    assert set(os.listdir(tmp_path)) == others | {f'step_{n}.pth' for n in left - {3}}


# -- reading ---------------------------------------------------------------------------

def refuse(path, message):
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tmp_path):
    refuse(tmp_path / 'no.pth', 'there is no checkpoint')
    refuse(tmp_path, 'there is no checkpoint')


@pytest.mark.parametrize('share', [0, 0.01, 0.5, 0.99, 0.9999])
def test_an_empty_or_truncated_file(share, tmp_path):
    path = tmp_path / 'a.pth'
    checkpoint.save(make(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * share)])
    refuse(path, rf'is damaged or no checkpoint \({int(len(whole) * share)} bytes')


def test_a_flipped_bit(tmp_path):
    path = tmp_path / 'a.pth'
    checkpoint.save(make(), path)
    data = bytearray(path.read_bytes())
    tensor = make()['net']['w'].numpy().tobytes()
    start = data.find(tensor)
    assert start > 0
    data[start + len(tensor) // 2] ^= 4
    path.write_bytes(data)
    assert zipfile.is_zipfile(path)
    loaded = torch.load(path, weights_only=True)['net']['w']  # torch does not notice
    assert (loaded != make()['net']['w']).sum() == 1
    refuse(path, 'is damaged')


@pytest.mark.parametrize('text', [
    '<html>not found</html>', 'hello world\n', 'version 1\n', '(1, 2)', '\x80\x02',
    'PK\x03\x04 and so on'])
def test_a_text_file(text, tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(text.encode('latin1'))
    refuse(path, 'is damaged or no checkpoint|holds more than tensors')


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f'touch {self.trace}',)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize('where', ['net', 'run'])
def test_code_in_a_file_is_not_run(form, where, tmp_path):
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    content = {**make(), where: {'w': Evil(trace)}}
    if form == 'pickle':
        path.write_bytes(pickle.dumps({where: Evil(trace)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    refuse(path, 'could run code|is damaged')
    assert not trace.exists()
    if form == 'pickle':  # an ordinary load does run it
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize('content, what', [
    ({'state_dict': {}, 'meta': 1}, 'state_dict, meta'), ([1, 2], 'list'),
    ({'net': [1]}, 'net'), (torch.zeros(2), 'Tensor'), ({}, '.*empty.*')])
def test_other_files_are_refused(content, what, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    message = refuse(tmp_path / 'a.pth', 'is no EMANet checkpoint')
    assert re.search(f'found {what}$', message)


def test_absent_parts_are_empty(tmp_path):
    torch.save({'net': {'w': torch.ones(1)}}, tmp_path / 'a.pth')
    content = checkpoint.load(tmp_path / 'a.pth')
    assert (content['step'], content['settings'], content['run']) == (0, {}, {})
    assert 'optimizer' not in content


# -- the newest sound one --------------------------------------------------------------

def test_load_newest(tmp_path):
    assert checkpoint.load_newest(tmp_path) == (None, None, [])
    assert checkpoint.load_newest(tmp_path / 'nowhere') == (None, None, [])
    for step in (9, 10):
        checkpoint.save(make(step), tmp_path / f'step_{step}.pth')
    checkpoint.save(make(99), tmp_path / 'final.pth')  # a run does not resume from it
    content, path, warnings = checkpoint.load_newest(tmp_path)
    assert content['step'] == 10 and path.name == 'step_10.pth' and not warnings
    checkpoint.save(make(11), tmp_path / 'latest.pth')
    content, path, warnings = checkpoint.load_newest(tmp_path)
    assert content['step'] == 11 and path.name == 'latest.pth' and not warnings


def test_load_newest_falls_back_and_says_so(tmp_path):
    for step in (80, 90, 100):
        checkpoint.save(make(step), tmp_path / f'step_{step}.pth')
    for name in ('latest.pth', 'step_100.pth'):
        (tmp_path / name).write_bytes(b'half')
    content, path, warnings = checkpoint.load_newest(tmp_path)
    assert content['step'] == 90 and path == tmp_path / 'step_90.pth'
    assert len(warnings) == 2
    assert re.search('latest.pth is damaged', warnings[0])
    assert re.search('step_100.pth is damaged', warnings[1])


def test_load_newest_without_a_sound_one(tmp_path):
    for name in ('latest.pth', 'step_5.pth'):
        (tmp_path / name).write_bytes(b'half')
    with pytest.raises(UserError, match='none of the 2 checkpoints') as caught:
        checkpoint.load_newest(tmp_path)
    assert 'latest.pth' in str(caught.value) and 'clean.sh' in str(caught.value)


# -- into a network --------------------------------------------------------------------

def linear():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def test_load_net():
    net, other = linear(), linear()
    other[1].running_mean.normal_()
    checkpoint.load_net(net, other.state_dict(), 'a.pth')
    assert same(net.state_dict(), other.state_dict())


def test_load_net_names_what_differs():
    for change, parts in [
            (lambda s: s.pop('0.bias'), ['1 missing (0.bias)']),
            (lambda s: s.update({'2.w': torch.ones(1)}), ['1 unexpected (2.w)']),
            (lambda s: s.update({'0.weight': torch.ones(4, 2)}),
             ['1 tensors of another shape (0.weight: (4, 2), expected (3, 2))']),
            (lambda s: (s.pop('1.running_mean'), s.update({'x': torch.ones(1)})),
             ['1 missing (1.running_mean)', '1 unexpected (x)'])]:
        net, state = linear(), linear().state_dict()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        change(state)
        with pytest.raises(UserError) as caught:
            checkpoint.load_net(net, state, 'logdir/a.pth')
        for part in ['logdir/a.pth is of another architecture', *parts]:
            assert part in str(caught.value)
        assert same(net.state_dict(), before)  # nothing is loaded


def test_load_net_keeps_the_counters_that_a_file_lacks():
    net, state = linear(), linear().state_dict()
    net[1].num_batches_tracked += 5
    del state['1.num_batches_tracked']
    checkpoint.load_net(net, state, 'a.pth')
    assert net[1].num_batches_tracked == 5
    assert torch.equal(net[0].weight, state['0.weight'])


def test_use_checkpoint_architecture():
    settings.N_LAYERS, settings.STEM, settings.LR = 101, 'auto', 0.009
    settings.N_BASES = 64
    lines = checkpoint.use_checkpoint_architecture({
        'N_LAYERS': 18, 'STEM': 'deep', 'N_BASES': 64, 'LR': 1.0, 'GONE': 3})
    assert len(lines) == 1
    assert re.fullmatch('N_LAYERS = 18 .* the checkpoint, not 101', lines[0])
    assert (settings.N_LAYERS, settings.STEM, settings.LR) == (18, 'deep', 0.009)
    assert not hasattr(settings, 'GONE')
    lines = checkpoint.use_checkpoint_architecture({'STEM': 'plain'})
    assert len(lines) == 1
    assert re.fullmatch("STEM = '?plain'? .* the checkpoint, not '?deep'?", lines[0])
    assert checkpoint.use_checkpoint_architecture({'STEM': 'plain'}) == []


def test_architecture_names_are_settings():
    assert set(checkpoint.ARCHITECTURE) <= set(config.snapshot())


# -- of every head ---------------------------------------------------------------------

HEADS = ('ema', 'ema_mmseg', 'fcn', 'deeplabv3', 'deeplabv3plus', 'psanet', 'nonlocal',
         'a2')


def make_net(head, n_classes=21, **values):
    """A small network in evaluation mode, and its settings."""
    return test_inference.make_net(n_classes, **{**dict(
        N_LAYERS=18, STEM='plain', HEAD=head, PSA_GRID=(3, 3), STRIDE=16,
        FC1_CHANNELS=16, ALIGN_CORNERS=head != 'ema_mmseg'), **values})


def forget_architecture(default):
    """Set the architecture to that of settings.py."""
    for name in checkpoint.ARCHITECTURE:
        setattr(settings, name, default[name])


def load_built(path):
    """Load a checkpoint into the network that its settings describe."""
    content = checkpoint.load(path)
    checkpoint.use_checkpoint_architecture(content['settings'])
    net = network.build(checkpoint.count_classes(content['net']), is_eval=True)
    checkpoint.load_net(net, content['net'], path)
    return net, content


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('is_old', [False, True])
def test_checkpoints_of_every_head(head, is_old, tmp_path):
    default = config.snapshot()
    net = make_net(head, AUX_WEIGHT=0.4)
    state = net.state_dict()
    if is_old:  # as versions with other names of the last convolution saved it
        new = ('head.classifier.', 'aux.classifier.')
        old = ('head.fc2.' if head.startswith('ema') else 'head.classify.',
               'aux.classify.')
        state = {key.replace(new[0], old[0]).replace(new[1], old[1]): value
                 for key, value in state.items()}
        assert len([key for key in state if key.startswith(old)]) == 4
    path = tmp_path / 'x.pth'
    checkpoint.save({'net': state, 'step': 7, 'settings': config.snapshot()}, path)
    forget_architecture(default)
    other, content = load_built(path)
    assert checkpoint.count_classes(content['net']) == 21
    assert same(other.state_dict(), net.state_dict())
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    logits = inference.predict_logits(net.double(), image)
    fused = inference.fuse_batch_norms(other.double())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    error = (inference.predict_logits(fused, image) - logits).abs().max()
    assert error < 1e-9 * logits.abs().max()


@pytest.mark.parametrize('head', ['fcn', 'ema_mmseg'])
def test_scripts_take_every_head(head, voc, tmp_path, capsys, monkeypatch):
    """Those with EM iterations, and those without."""
    default = config.snapshot()
    net = make_net(head)
    path, out = tmp_path / 'x.pth', tmp_path / 'out'
    checkpoint.save({'net': net.state_dict(), 'step': 7, 'settings': config.snapshot(),
                     'run': {}}, path)
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    logits = inference.predict_logits(net, image)
    forget_architecture(default)
    words = [f'CHECKPOINT={path}', 'DEVICE=cpu', 'PRECISION=fp32', 'DATASET=voc']
    data = [f'DATA_ROOT={voc}', f'LOG_DIR={tmp_path}', 'N_WORKERS=0']
    assert evaluate(*words, *data) == 0
    has_em = head.startswith('ema')
    assert (', T = 3' in capsys.readouterr().out) == has_em
    assert read_json(tmp_path, 'voc_val_x')['stages'] == 3 * has_em

    picture = tmp_path / 'a.png'
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(picture)
    argv = ['predict.py', *words, str(picture), '--out', str(out), '--no-overlays']
    monkeypatch.setattr('sys.argv', argv)
    assert predict.main() == 0
    with Image.open(out / 'masks/a.png') as mask:
        assert (np.asarray(mask) == logits.argmax(0).numpy()).mean() > 0.999
    if not has_em:
        assert 'leave --stages out' in refuses(*words, *data, stages='1,2')
        monkeypatch.setattr('sys.argv', [*argv, '--responsibilities'])
        with pytest.raises(UserError, match='no EM attention unit'):
            predict.main()
