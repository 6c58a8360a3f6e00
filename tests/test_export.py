"""Exported programs predict what the network does, at every size."""
import json

import pytest
import test_inference
import torch

import inference
import network
from prediction import deploy

CLASSES = ['background', 'ship', 'sky', 'sea', 'sand']
METADATA = {'classes': CLASSES, 'palette': [0, 0, 0, 255, 0, 0],
            'settings': {'N_LAYERS': 18, 'MULTI_GRID': (1, 2, 4)}}
# (b, h, w): of exact multiples plus 1, one more, one less, of a single row
SIZES = [(1, 33, 47), (2, 33, 33), (3, 34, 32), (1, 65, 66), (2, 1, 20), (1, 2, 2)]
needs_onnx = pytest.mark.skipif(
    not (deploy.has('onnx') and deploy.has('onnxruntime')
         and (deploy.has('onnxscript') or not deploy.IS_NEW_ONNX)),
    reason='needs onnx, onnxscript and onnxruntime')


def make_net(**values) -> network.Segmenter:
    """A tiny network with batch norms that have lived, and sure of its classes."""
    net = test_inference.make_net(**{**dict(N_LAYERS=18, STEM='plain', STRIDE=16),
                                     **values})
    (net.head.fc2 if hasattr(net.head, 'fc2') else net.head.classify).weight.data *= 60
    return net


def draw(*size: int) -> torch.Tensor:
    return torch.randint(256, size, dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(sum(size)))


def predict_plainly(net, images) -> torch.Tensor:
    return torch.stack([inference.predict_logits(net, image).softmax(0)
                        for image in images])


def same_at_all_sizes(net, run, least: int = 1) -> None:
    for b, h, w in (size for size in SIZES if min(size[1:]) >= least):
        images = draw(b, 3, h, w)
        wanted, found = predict_plainly(net, images), run(images)
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-4, (b, h, w)
    assert predict_plainly(net, draw(1, 3, 65, 66)).std() > 0.1  # tells them apart


@pytest.mark.parametrize('values', [
    {}, {'STRIDE': 8, 'STEM': 'deep', 'FC1_CHANNELS': 0},
    {'EM_KERNEL': 'dot', 'EM_NORM': 'layer_norm', 'EM_CONV1': 'absent'},
    {'HEAD': 'ema_mmseg', 'STEM': 'v1c', 'ALIGN_CORNERS': False},
    {'N_LAYERS': 50, 'EM_UPDATE': 'back_propagation', 'EM_GRADIENT': 'full'}])
def test_deployed_is_the_predictor(values):
    net = make_net(**values)
    with torch.no_grad():
        same_at_all_sizes(net, deploy.Deployed(net))
        images = draw(2, 3, 30, 41)
        labels = deploy.Deployed(net, labels=True)(images)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), predict_plainly(net, images).argmax(1))


def test_program(tmp_path):
    net = make_net(AUX_WEIGHT=0.4, HEAD='ema_mmseg', ALIGN_CORNERS=False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lines = deploy.export(net, tmp_path / 'model.pt2', draw(3, 50, 61), METADATA)
    assert len(lines) == 3 and 'largest difference' in lines[2]
    assert [p.name for p in tmp_path.iterdir()] == ['model.pt2']
    after = net.state_dict()  # the network is left alone
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)

    notes = {'metadata.json': ''}
    program = torch.export.load(str(tmp_path / 'model.pt2'), extra_files=notes)
    notes = json.loads(notes['metadata.json'])
    assert notes['classes'] == CLASSES and notes['stride'] == 16
    assert notes['settings']['MULTI_GRID'] == [1, 2, 4]
    called = {node.target for node in program.graph.nodes
              if node.op == 'call_function'}
    assert not any(isinstance(f, torch._ops.HigherOrderOperator) for f in called)
    assert not any('aux' in name for name in program.state_dict)
    same_at_all_sizes(net, program.module(), least=17)


@needs_onnx
def test_onnx(tmp_path, monkeypatch):
    import onnx
    net = make_net(STRIDE=8, EM_KERNEL='euclidean', EM_NORM='layer_norm')
    path = tmp_path / 'model.onnx'
    lines = deploy.export(net, path, draw(3, 50, 61), METADATA)
    assert 'onnxruntime' in lines[1]
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']
    same_at_all_sizes(net, deploy.read_onnx(path)[0])
    model = onnx.load(path)
    notes = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert notes['classes'] == CLASSES and notes['output'] == 'probabilities'
    for value, name in ((model.graph.input[0], 'images'),
                        (model.graph.output[0], 'probabilities')):
        sides = value.type.tensor_type.shape.dim
        assert value.name == name
        assert [sides[i].dim_param for i in (0, 2, 3)] == ['batch', 'height', 'width']

    found = deploy.has  # without onnxruntime
    monkeypatch.setattr(deploy, 'has', lambda name: name != 'onnxruntime'
                        and found(name))
    run, how, most = deploy.read_onnx(path)
    assert 'reference' in how
    images = draw(1, 3, 9, most - 8)
    assert (run(images) - predict_plainly(net, images)).abs().max() < 1e-4


def test_failures_leave_nothing(tmp_path, monkeypatch):
    net, picture = make_net(), draw(3, 20, 30)

    def fails_with(kind, path, *words):
        with pytest.raises(kind) as caught:
            deploy.export(net, path, picture, METADATA)
        text = str(caught.value)
        assert all(word in text for word in words) and '\n' not in text, text
        assert [p.name for p in tmp_path.iterdir()] == ['model.pt2']
        assert (tmp_path / 'model.pt2').read_text() == 'old'

    path = tmp_path / 'model.pt2'
    path.write_text('old')
    fails_with(ValueError, tmp_path / 'model.pth', '.pt2', '.onnx')
    fails_with(OSError, tmp_path / 'nowhere' / 'model.pt2', 'no folder')
    net.set_stages((1, 3))
    fails_with(ValueError, path, 'EM iterations', '2')
    net.set_stages((3,))
    with monkeypatch.context() as patch:
        patch.setattr(deploy, 'has', lambda name: False)
        fails_with(ValueError, tmp_path / 'model.onnx', 'pip install onnx')
    with monkeypatch.context() as patch:
        patch.setattr(deploy, 'trace', lambda _: 1 / 0)
        fails_with(ValueError, path, 'ZeroDivisionError', '.onnx')
    with monkeypatch.context() as patch:  # a program that predicts otherwise
        patch.setattr(deploy, 'make_program', lambda *_: b'anything')
        patch.setattr(deploy, 'read_program',
                      lambda _: (lambda x: torch.full((len(x), 5, *x.shape[2:]),
                                                      float('nan')), 'nothing', 99))
        fails_with(ValueError, path, 'largest difference to the network nan')
    with monkeypatch.context() as patch:
        patch.setattr(deploy, 'make_program', lambda *_: b'anything')
        patch.setattr(deploy.os, 'fsync', lambda _: (_ for _ in ()).throw(
            OSError(28, 'No space left on device')))
        fails_with(OSError, path, 'No space left', 'make room')


def test_a_small_difference_is_told():
    net, images = make_net(), draw(2, 3, 17, 20)
    wanted = predict_plainly(net, images)
    assert '0.0e+00' in deploy.compare(net, images, wanted)
    with pytest.raises(ValueError, match='its own to float64'):
        deploy.compare(net, images, wanted + 1e-3)
    with pytest.raises(ValueError, match='% of the labels'):
        deploy.compare(net, images, 4 - wanted.argmax(1).to(torch.uint8))
    with pytest.raises(ValueError, match='it returns'):
        deploy.compare(net, images, wanted[..., 1:])


def test_autocast_still_ends_at_the_unit():
    net = make_net()
    emau, x = net.head.emau, torch.randn(1, 16, 5, 6)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert emau(x, return_z=True)[1][0].dtype == torch.float32
