"""Devices, precision, seeds, stop signals, and the number of ranks."""
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import distributed
import settings
from config import UserError

CPU = torch.device('cpu')


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setattr(settings, name, value)


# -- devices ---------------------------------------------------------------------------

@pytest.mark.parametrize('name, n_gpus, has_mps, wanted', [
    ('auto', 2, False, ['cuda:0', 'cuda:1']), ('auto', 0, True, ['mps']),
    ('auto', 0, False, ['cpu']), ('cuda', 0, False, ['cuda']),
    ('cpu', 2, True, ['cpu']),
    ('cuda:1', 2, False, ['cuda:1']), ('cuda:0,2', 3, False, ['cuda:0', 'cuda:2'])])
def test_devices_that_a_setting_names(name, n_gpus, has_mps, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: n_gpus)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has_mps)
    set_all(monkeypatch, DEVICE=name)
    assert distributed.list_devices() == wanted


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    set_all(monkeypatch, DEVICE='cuda:0,1', RANKS=3)
    with pytest.raises(UserError, match='RANKS=3, but there are 2 GPUs'):
        distributed.count_ranks()
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')  # torchrun's
    with pytest.raises(UserError, match='3 ranks were started .* 2 GPUs'):
        distributed.pick_device()


@pytest.mark.parametrize('device, ranks, wanted', [
    ('cpu', 0, 1), ('cpu', 3, 3), ('cuda:0,1', 1, 1), ('mps', 0, 1)])
def test_number_of_ranks(device, ranks, wanted, monkeypatch):
    set_all(monkeypatch, DEVICE=device, RANKS=ranks)
    assert distributed.count_ranks() == wanted


@pytest.mark.parametrize('device, ranks', [('cpu', -1), ('mps', 2)])
def test_numbers_of_ranks_that_are_refused(device, ranks, monkeypatch):
    set_all(monkeypatch, DEVICE=device, RANKS=ranks)
    with pytest.raises(UserError, match=f'RANKS={ranks}'):
        distributed.count_ranks()


def test_a_rank_does_not_launch_more(monkeypatch):
    set_all(monkeypatch, DEVICE='cpu', RANKS=2)
    monkeypatch.setenv('RANK', '0')
    assert distributed.launch() is None
    monkeypatch.delenv('RANK')
    set_all(monkeypatch, RANKS=1)
    assert distributed.launch() is None


def test_denormal_numbers_are_flushed():
    number = torch.tensor([1e-30])
    assert (number * 1e-10).item() > 0
    distributed.prepare_cpu(CPU)
    assert (number * 1e-10).item() == 0


def test_out_of_memory_is_a_sentence():
    for error in (torch.OutOfMemoryError('no room\nmore'), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(UserError, match='cpu does not hold a step .*: lower it'):
            with distributed.explain_out_of_memory(CPU, 'a step', 'lower it'):
                raise error
    with pytest.raises(RuntimeError, match='^other$'):
        with distributed.explain_out_of_memory(CPU, 'a step', 'lower it'):
            raise RuntimeError('other')


# -- precision and seeds ---------------------------------------------------------------

@pytest.mark.parametrize('device, has_bf16, precision, wanted', [
    ('cpu', True, 'auto', 'bf16'), ('cpu', False, 'auto', 'fp32'),
    ('cuda', True, 'auto', 'bf16'), ('cuda', False, 'auto', 'fp16'),
    ('mps', False, 'auto', 'fp32'), ('cuda', True, 'fp32', 'fp32'),
    ('cpu', False, 'fp16', 'fp16')])
def test_precision_of_a_device(device, has_bf16, precision, wanted, monkeypatch):
    monkeypatch.setattr(distributed, 'has_native_bf16', lambda device: has_bf16)
    set_all(monkeypatch, PRECISION=precision)
    assert distributed.pick_precision(torch.device(device)) == wanted


@pytest.mark.parametrize('device, names, wanted', [
    ('cuda', ['bf16', 'fp16'], 'fp16'), ('cuda', ['fp16', 'fp16'], 'fp16'),
    ('cuda', ['bf16', 'fp32'], 'fp32'), ('cpu', ['bf16', 'fp32'], 'fp32'),
    ('cpu', ['fp16', 'bf16'], 'fp32')])
def test_unlike_ranks_agree_on_a_precision(device, names, wanted, monkeypatch):
    """See test_ranks.py too."""
    group = SimpleNamespace(all_gather_text=lambda text: names)
    for name in names:
        set_all(monkeypatch, PRECISION=name)
        assert distributed.pick_precision(torch.device(device), group) == wanted


@pytest.mark.parametrize('device, precision', [('cpu', 'fp8'), ('mps', 'fp16')])
def test_precisions_that_are_refused(device, precision, monkeypatch):
    set_all(monkeypatch, PRECISION=precision)
    with pytest.raises(UserError, match=f'PRECISION={precision}'):
        distributed.pick_precision(torch.device(device))


def test_a_seed_depends_on_all_its_numbers():
    found = []
    for numbers in ((1,), (1, 2, 0), (1, 2, 1), (2, 1, 0), (1,)):
        distributed.set_seed(*numbers)
        found.append(torch.rand(1).item())
    assert len(set(found)) == 4 and found[0] == found[-1]


# -- one process, and the end ----------------------------------------------------------

def test_a_group_of_one_does_nothing():
    group, tensor = distributed.ProcessGroup(), torch.ones(2)
    assert (group.rank, group.world_size) == (0, 1)
    assert group.is_main and group.is_local_main
    assert group.all_reduce_sum(tensor) is tensor and group.all_reduce_max(-3) == -3
    assert group.all_gather_text('a') == ['a'] and group.is_identical([tensor])
    with group.local_main_first():
        group.barrier()
    group.destroy()


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stop_signals(number, status):
    before = signal.getsignal(signal.SIGCHLD)
    signals = distributed.StopSignals()
    assert signals.exit_status == 0
    os.kill(os.getpid(), number)
    assert signals.exit_status == status
    if number == signal.SIGINT:  # the second one does not wait
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    signal.signal(signal.SIGCHLD, before)
