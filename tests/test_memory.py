"""What a step needs of memory: estimated, lowered without a change, kept, explained."""
import multiprocessing
import platform
import resource

import pytest
import torch
from conftest import TINY

import config
import distributed
import train
from training.memory import estimate_memory

SMALL = dict(N_LAYERS=50, STEM='deep', STRIDE=16, HEAD_CHANNELS=16, FC1_CHANNELS=16,
             N_BASES=4, CROP_SIZE=33, BATCH_SIZE=4, PRECISION='fp32', BN_MOM=0.1,
             PRETRAINED='none', DROPOUT=0.1, LR=0.001)


def make_session(**values):
    config.apply_settings({**SMALL, 'RECOMPUTE': False, 'ACCUMULATE': 1, **values})
    return train.Session(5, torch.device('cpu'))


def make_batch():
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(256, (4, 3, 33, 33), dtype=torch.uint8, generator=draw)
    return images, torch.randint(5, (4, 33, 33), dtype=torch.uint8, generator=draw)


def test_recomputing_changes_nothing():
    """The same losses, gradients (so weights) and running statistics, to the bit."""
    sessions = [make_session(N_LAYERS=18, STEM='plain', RECOMPUTE=value)
                for value in (False, True)]
    for _ in range(2):
        one, other = (s.train_step(*make_batch())[0] for s in sessions)
        assert torch.equal(one, other)
    states = [s.model.state_dict() for s in sessions]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_memory_is_estimated():
    """What autograd keeps of a real forward pass, counted by address."""
    session, kept = make_session(), {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        losses, _ = session.model(*make_batch())
    n_weights = sum(p.numel() for p in session.model.parameters())
    found = estimate_memory(5, 'fp32')
    assert found == pytest.approx((sum(kept.values()) + 8 * n_weights) / 1e9, rel=0.05)
    for name, value in (('RECOMPUTE', True), ('ACCUMULATE', 4)):
        config.apply_settings({**SMALL, 'CROP_SIZE': 97, name: value})
        lower = estimate_memory(5, 'fp32')
        config.apply_settings({'RECOMPUTE': False, 'ACCUMULATE': 1})
        assert lower < 0.9 * estimate_memory(5, 'fp32'), name


def test_out_of_memory_is_a_sentence(voc, tmp_path, monkeypatch):
    words = [*TINY, 'DATASET=voc', f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train',
             f'LOG_DIR={tmp_path / "log"}', 'ITER_MAX=2']

    def step(self, images, labels):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setattr(train.Session, 'train_step', step)
    monkeypatch.setattr('sys.argv', ['train.py', *words])
    with pytest.raises(config.UserError, match='ACCUMULATE.*RECOMPUTE.*CROP_SIZE'):
        train.main()


def count_faults(is_kept: bool) -> int:
    """Return the pages that 16 tensors of 48 MB get from the system."""
    if is_kept:
        distributed.keep_freed_memory()
    for i in range(32):
        if i == 16:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver() < ('glibc', '2.35'), reason='no new glibc')
def test_freed_memory_is_kept():
    """Pages that are got from the system again: 11,719 a tensor, or none."""
    with multiprocessing.get_context('fork').Pool(1) as pool:
        found = pool.map(count_faults, [False, True], chunksize=2)
    assert found[1] < 0.25 * found[0], found  # a hole may be filled now and then
