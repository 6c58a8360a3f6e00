"""What a step needs of memory: estimated, lowered without a change, or explained."""
import argparse

import pytest
import torch
from conftest import TINY

import runtime
import settings
import train

SMALL = dict(N_LAYERS=50, STEM='deep', STRIDE=8, HEAD_CHANNELS=16, FC1_CHANNELS=16,
             N_BASES=4, CROP_SIZE=49, BATCH_SIZE=4, PRECISION='fp32', BN_MOM=0.1,
             PRETRAINED='none', DROPOUT=0.1, LR=0.001)


def make_session(**values):
    for name, value in {**SMALL, 'RECOMPUTE': False, 'ACCUMULATE': 1, **values}.items():
        setattr(settings, name, value)
    return train.Session(5, torch.device('cpu'))


def make_batch():
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(256, (4, 49, 49, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(5, (4, 49, 49), dtype=torch.uint8, generator=draw)
    return images.permute(0, 3, 1, 2), labels


def test_recomputing_changes_nothing():
    """The same losses, gradients (so weights) and running statistics, to the bit."""
    sessions = [make_session(RECOMPUTE=value) for value in (False, True)]
    for _ in range(3):
        one, other = (s.train_step(*make_batch())[0] for s in sessions)
        assert torch.equal(one, other)
    states = [s.raw.state_dict() for s in sessions]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_memory_is_estimated():
    """What autograd keeps of a real forward pass, counted by address."""
    session, kept = make_session(), {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        losses, _ = session.raw(*make_batch())
    n_weights = sum(p.numel() for p in session.raw.parameters())
    found = train.estimate_memory(session)
    assert found == pytest.approx((sum(kept.values()) + 8 * n_weights) / 1e9, rel=0.05)
    assert train.estimate_memory(make_session(RECOMPUTE=True)) < 0.9 * found
    assert train.estimate_memory(make_session(ACCUMULATE=4)) < 0.9 * found


def test_out_of_memory_is_a_sentence(voc, tmp_path, monkeypatch):
    words = [*TINY, 'DATASET=voc', f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train',
             f'LOG_DIR={tmp_path / "log"}', 'ITER_MAX=2']
    given = runtime.override(words)

    def step(self, images, labels):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setattr(train.Session, 'train_step', step)
    with pytest.raises(ValueError) as caught:
        train.main(argparse.Namespace(given=given))
    sentence = runtime.explain(caught.value)
    assert all(word in sentence for word in ('ACCUMULATE', 'RECOMPUTE', 'CROP_SIZE'))


@pytest.mark.slow
def test_recomputing_compiled():
    """Both settings together: the losses of the plain network."""
    found = []
    for values in ({}, {'RECOMPUTE': True, 'COMPILE': True}):
        session = make_session(N_LAYERS=18, STEM='plain', **values)
        found.append(torch.stack([session.train_step(*make_batch())[0]
                                  for _ in range(3)]))
        settings.COMPILE = False
    assert torch.allclose(*found, rtol=1e-3)
