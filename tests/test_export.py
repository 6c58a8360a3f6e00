"""Exported programs predict what the network does, at every size."""
import json

import pytest
import test_inference
import torch

import config
import inference
import network
from prediction import deploy

CLASSES = ['background', 'ship', 'sky', 'sea', 'sand']
METADATA = {'classes': CLASSES, 'palette': [0, 0, 0, 255, 0, 0],
            'settings': {'N_LAYERS': 18, 'MULTI_GRID': (1, 2, 4)}}
# (b, h, w): exact multiples plus 1, one more, one less, a single row
SIZES = [(1, 33, 47), (2, 33, 33), (3, 34, 32), (2, 1, 20), (1, 2, 2)]


def make_net(**values) -> network.Segmenter:
    """Return a tiny network that is sure of its classes."""
    net = test_inference.make_net(**{**dict(N_LAYERS=18, STEM='plain', STRIDE=16),
                                     **values})
    net.head.classifier.weight.data *= 60
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
        expected, found = predict_plainly(net, images), run(images)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-4, (b, h, w)
    assert predict_plainly(net, draw(1, 3, 65, 66)).std() > 0.1  # tells them apart


@pytest.mark.parametrize('values', [
    {'STRIDE': 8, 'STEM': 'deep', 'FC1_CHANNELS': 0},
    {'EM_KERNEL': 'dot', 'EM_NORM': 'layer_norm', 'EM_CONV1': 'absent'},
    {'HEAD': 'ema_mmseg', 'STEM': 'v1c', 'ALIGN_CORNERS': False}])
def test_the_exported_network_is_the_network(values):
    net = make_net(**values)
    with torch.no_grad():
        same_at_all_sizes(net, deploy.ExportedNet(net))
        images = draw(2, 3, 30, 41)
        labels = deploy.ExportedNet(net, is_labels=True)(images)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), predict_plainly(net, images).argmax(1))


def test_pt2(tmp_path):
    net = test_inference.make_tiny().float()
    net.aux = torch.nn.Conv2d(12, 5, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lines = deploy.export(net, tmp_path / 'model.pt2', draw(3, 50, 61), METADATA)
    assert len(lines) == 3 and 'largest difference' in lines[2]
    assert [p.name for p in tmp_path.iterdir()] == ['model.pt2']
    after = net.state_dict()  # the network is left alone
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)

    extra = {'metadata.json': ''}
    program = torch.export.load(str(tmp_path / 'model.pt2'), extra_files=extra)
    extra = json.loads(extra['metadata.json'])
    assert extra['classes'] == CLASSES and extra['stride'] == 8
    assert extra['settings']['MULTI_GRID'] == [1, 2, 4]
    assert not any('aux' in name for name in program.state_dict)
    same_at_all_sizes(net, program.module(), least=2)


@pytest.mark.slow
def test_onnx(tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    net = make_net(STRIDE=8, EM_KERNEL='euclidean', EM_NORM='layer_norm')
    path = tmp_path / 'model.onnx'
    assert len(deploy.export(net, path, draw(3, 50, 61), METADATA)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']
    same_at_all_sizes(net, deploy.load_onnx(path))
    model = onnx.load(path)
    metadata = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert metadata['classes'] == CLASSES and metadata['output'] == 'probabilities'
    for value, name in ((model.graph.input[0], 'images'),
                        (model.graph.output[0], 'probabilities')):
        sides = value.type.tensor_type.shape.dim
        assert value.name == name
        assert [sides[i].dim_param for i in (0, 2, 3)] == ['batch', 'height', 'width']


def test_failures_leave_nothing(tmp_path, monkeypatch):
    net, path = make_net(), tmp_path / 'model.pt2'
    path.write_text('old')

    def fails_with(file, *words):
        with pytest.raises(config.UserError) as caught:
            deploy.export(net, file, draw(3, 20, 30), METADATA)
        text = str(caught.value)
        assert all(word in text for word in words) and '\n' not in text, text
        assert [p.name for p in tmp_path.iterdir()] == ['model.pt2']
        assert path.read_text() == 'old'

    fails_with(tmp_path / 'model.pth', '.pt2', '.onnx')
    fails_with(tmp_path / 'nowhere' / 'model.pt2', 'no folder')
    net.set_stages((1, 3))
    fails_with(path, 'EM iterations', '2')
    net.set_stages((3,))
    with monkeypatch.context() as patch:
        patch.setattr(deploy.importlib.util, 'find_spec', lambda name: None)
        fails_with(tmp_path / 'model.onnx', 'pip install onnx')
    with monkeypatch.context() as patch:
        patch.setattr(deploy, 'trace', lambda _: 1 / 0)
        fails_with(path, 'ZeroDivisionError', '.onnx')
    monkeypatch.setattr(deploy, 'make_program', lambda *_: b'anything')
    for outputs, message in (  # programs that predict something else
            (torch.full((1, 5, 20, 30), float('nan')), 'difference to the network nan'),
            (torch.full((1, 5, 20, 30), 0.2), 'its own to float64'),
            (torch.full((1, 20, 30), 5, dtype=torch.uint8), '100.00% of the labels'),
            (torch.zeros(1, 5, 20, 29), 'it returns')):
        monkeypatch.setattr(deploy, 'load_program', lambda _, y=outputs: lambda x: y)
        fails_with(path, message)

    def is_full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(deploy.Path, 'write_bytes', is_full)
    fails_with(path, 'No space left', 'make room')
