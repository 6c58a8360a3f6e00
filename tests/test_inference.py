"""Folding batch norms changes the network's speed and nothing else."""
import copy

import pytest
import torch
from torch import nn

import inference
import network
import runtime
import settings


def make_net(monkeypatch, **values):
    """A small network whose batch norms have lived: random statistics and weights."""
    for name, value in {**dict(HEAD_CHANNELS=16, FC1_CHANNELS=8, N_BASES=4, STRIDE=8),
                        **values}.items():
        monkeypatch.setattr(settings, name, value)
    torch.manual_seed(0)
    net = network.build(5, is_eval=True)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.3, 0.7)
            nn.init.normal_(m.bias, 0, 0.1)
    return net


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('stem', ['deep', 'plain'])
@pytest.mark.parametrize('fc1', [0, 8])
def test_folded_network_is_the_same(depth, stem, fc1, monkeypatch):
    net = make_net(monkeypatch, N_LAYERS=depth, STEM=stem, FC1_CHANNELS=fc1).double()
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    before = inference.predict_logits(net, image)
    folded = inference.fold(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    after = inference.predict_logits(folded, image)
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    assert torch.equal(before, inference.predict_logits(net, image))  # left alone


def test_folded_in_bf16(monkeypatch):
    net = make_net(monkeypatch, N_LAYERS=18, STEM='plain')
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    before = inference.predict_logits(net, image)
    folded = inference.fold(copy.deepcopy(net), 'bf16')
    convs = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.dtype == torch.bfloat16 for m in convs)
    assert folded.head.emau.mu.dtype == torch.float32
    with runtime.autocast(torch.device('cpu'), 'bf16'):
        after = inference.predict_logits(folded, image)
    assert after.dtype == torch.float32
    assert (after - before).abs().max() < 0.05 * (before.max() - before.min())


def test_normalising_leaves_the_picture_alone(monkeypatch):
    net = make_net(monkeypatch, N_LAYERS=18, STEM='plain')
    for images in (torch.randint(256, (2, 3, 9, 9), dtype=torch.uint8),
                   torch.randint(256, (2, 3, 9, 9)).float()):
        kept = images.clone()
        found = net.normalise(images)
        assert torch.equal(images, kept)
        expected = (kept.double() / 255 - torch.tensor(settings.MEAN).view(3, 1, 1)
                    ) / torch.tensor(settings.STD).view(3, 1, 1)
        assert torch.allclose(found.double(), expected, atol=1e-5)
