"""Train the network of settings.py; the same command resumes a run that was stopped.

    python train.py                                  # the released recipe
    python train.py N_LAYERS=50 STRIDE=16 LOG_DIR=runs/r50

Everything a run writes is in LOG_DIR: latest.pth, step_N.pth, best.pth, final.pth,
settings.txt, log.txt, log.jsonl and TensorBoard's events. How a run begins is in
training/setup.py, what it reports in training/monitor.py.
"""
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import checkpoint
import config
import distributed
import loader
import network
import settings
from config import UserError
from dataset import IGNORED, SegmentationDataset, get_dataset_info, open_split
from logger import Logger, NullLogger, lock_folder
from training import monitor, setup

# -- the recipe ------------------------------------------------------------------------

def poly_lr(step: int) -> float:
    """Return the learning rate of a step, 1 .. ITER_MAX, as settings say.

    LR_END + (LR - LR_END) * (1 - step / ITER_MAX) ** LR_POWER, refreshed every LR_EVERY
    steps.
    """
    refreshed = step - step % settings.LR_EVERY
    decay = (1 - refreshed / settings.ITER_MAX) ** settings.LR_POWER
    return settings.LR_END + (settings.LR - settings.LR_END) * decay


def group_parameters(net: nn.Module) -> list[dict]:
    """Sort the trained parameters into the recipe's three groups.

    Returns:
        Groups for the optimizer: the weights of convolutions, with decay; other
        weights (of batch norm, and bases that are trained), without unless DECAY_ALL;
        all biases, likewise. `lr_mult` is the factor of their learning rate.
    """
    conv_weights, others, biases = [], [], []
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            if name == 'bias':
                biases.append(p)
            elif isinstance(module, nn.Conv2d):
                conv_weights.append(p)
            else:
                others.append(p)
    decay = settings.WEIGHT_DECAY if settings.DECAY_ALL else 0.0
    return [{'params': conv_weights, 'weight_decay': settings.WEIGHT_DECAY,
             'lr_mult': 1.0},
            {'params': others, 'weight_decay': decay, 'lr_mult': 1.0},
            {'params': biases, 'weight_decay': decay, 'lr_mult': settings.BIAS_LR}]


# -- one step --------------------------------------------------------------------------

class Session:
    """One run: the network, its optimizer, and the number of steps done.

    Args:
        n_classes: of the data set.
        device: where to compute.
        group: the ranks that share the work.

    Raises:
        UserError: for settings that do not go together.
    """

    def __init__(self, n_classes: int, device: torch.device,
                 group: distributed.ProcessGroup | None = None):
        self.group = group or distributed.ProcessGroup()
        config.check_train_settings(self.group.world_size)
        self.step, self.device, self.n_classes = 0, device, n_classes
        self.precision = distributed.pick_precision(device, self.group)
        distributed.set_seed(settings.SEED)
        self.model = network.build(n_classes)
        if self.group.world_size > 1:
            self.model = distributed.convert_sync_batchnorm(self.model, device.type)
        self.model.to(device)
        if settings.CHANNELS_LAST:
            self.model.to(memory_format=torch.channels_last)
        self.ddp_model = self.model
        if self.group.world_size > 1:  # averages the gradients over the ranks
            self.ddp_model = distributed.wrap_ddp(self.model)
        if settings.COMPILE:
            self.ddp_model = torch.compile(self.ddp_model)
        # Fused kernels, of CPU and CUDA, skip a step by found_inf; elsewhere the host.
        self.is_fused = device.type in ('cpu', 'cuda')
        self.optimizer = torch.optim.SGD(
            group_parameters(self.model), lr=settings.LR, momentum=settings.LR_MOM,
            fused=self.is_fused)
        self.scaler = torch.amp.GradScaler(device.type,
                                           enabled=self.precision == 'fp16')
        self.first_nonfinite_step = torch.zeros((), dtype=torch.int64, device=device)
        self.n_withheld = torch.zeros((), dtype=torch.int64, device=device)  # in a row
        # Recorded in the checkpoint: best validation mIoU, duration, origin of the
        # weights, command line, versions, names and colours of the classes.
        self.best, self.seconds, self.weights = 0.0, 0.0, ''
        self.overrides, self.environment = {}, {}
        self.classes, self.palette = [], []
        # The losses since the last log line: a resumed run logs the same means.
        self.loss_sum, self.n_losses = torch.zeros((), device=device), 0

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step on a batch.

        Args:
            images: (b, 3, h, w) uint8, this rank's share of the batch.
            labels: (b, h, w) uint8.

        Returns:
            The loss of each image (b,), whose mean over all ranks, `self.loss`, is
            the loss that was minimised, and the logits (b, classes, h/os, w/os), both
            detached.
        """
        self.step += 1
        for param_group in self.optimizer.param_groups:
            param_group['lr'] = param_group['lr_mult'] * poly_lr(self.step)
        distributed.set_seed(settings.SEED, self.step, self.group.rank)  # of dropout
        is_pinned = self.device.type == 'cuda'
        images = images.to(self.device, non_blocking=is_pinned)
        labels = labels.to(self.device, non_blocking=is_pinned)
        losses, logits = self.forward_backward(images, labels)
        # The mean over all ranks: not finite on all of them if it is not on one.
        self.loss = self.group.all_reduce_sum(losses.mean()) / self.group.world_size
        is_finite = self.apply_gradients()
        self.optimizer.zero_grad()
        self.model.update_bases(is_finite)
        self.loss_sum += self.loss
        self.n_losses += 1
        return losses, logits

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute losses and gradients, in ACCUMULATE parts of the batch.

        Returns:
            Losses (b,) and logits (b, classes, h/os, w/os), detached.
        """
        n_pixels = labels.numel()  # the mean over the ranks
        if settings.LOSS_NORM == 'valid':
            n_valid = self.group.all_reduce_sum((labels != IGNORED).sum())
            n_pixels = n_valid.clamp(min=1) / self.group.world_size
        losses, logits = [], []
        parts = list(zip(images.chunk(settings.ACCUMULATE),
                         labels.chunk(settings.ACCUMULATE), strict=True))
        for i, (x, y) in enumerate(parts):
            context = contextlib.nullcontext()
            if i < len(parts) - 1 and self.group.world_size > 1:
                context = self.ddp_model.no_sync()  # the last part averages gradients
            with context:
                with distributed.autocast(self.device, self.precision):
                    part, small = self.ddp_model(x, y)     # (b,), (b, classes, h, w)
                self.scaler.scale(part.sum() / n_pixels).backward()
            losses.append(part.detach() * (len(images) / n_pixels))
            logits.append(small.detach())
        return torch.cat(losses), torch.cat(logits)

    def apply_gradients(self) -> Tensor:
        """Update the weights, unless the loss or a gradient is not finite.

        After the first step that is not finite nothing is updated any more; in fp16
        the gradient scaler withholds single steps and lowers its scale.

        Returns:
            A bool on the device: whether this step was finite.
        """
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters()
                                            if p.grad is not None)
        if settings.CLIP_GRAD:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), settings.CLIP_GRAD,
                                           self.norm)
        is_finite = self.loss.isfinite() & (self.first_nonfinite_step == 0)
        if not self.scaler.is_enabled():
            is_finite &= self.norm.isfinite()
        if self.is_fused and not self.scaler.is_enabled():
            self.optimizer.found_inf = (~is_finite).float()
        is_first = ~is_finite & (self.first_nonfinite_step == 0)
        self.first_nonfinite_step += torch.where(is_first, self.step, 0)
        is_applied = is_finite & self.norm.isfinite()
        self.n_withheld = torch.where(is_applied, 0, self.n_withheld + 1)
        if not self.optimizer.state:  # a first step that is withheld makes none
            for p in self.model.parameters():
                if p.grad is not None:
                    self.optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
        if self.is_fused or bool(is_finite):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return is_applied

    # -- checkpoints -------------------------------------------------------------------

    def state_dict(self, is_final: bool = False) -> dict:
        """Return the content of a checkpoint; the final one has no optimizer."""
        run = {'n_classes': self.n_classes, 'best': self.best, 'seconds': self.seconds,
               'precision': self.precision, 'weights': self.weights,
               'loss_sum': self.loss_sum.item(), 'n_losses': self.n_losses,
               'given': self.overrides, 'environment': self.environment,
               'classes': list(self.classes), 'palette': list(self.palette)}
        content = {'net': self.model.state_dict(), 'step': self.step,
                   'settings': config.snapshot(), 'run': run}
        if not is_final:
            content['optimizer'] = self.optimizer.state_dict()
            content['scaler'] = self.scaler.state_dict()
        return content

    def load_state_dict(self, content: dict, path: Path) -> None:
        """Resume from a checkpoint of this project.

        Raises:
            UserError: for a checkpoint without an optimizer.
        """
        if 'optimizer' not in content:
            raise UserError(f'{path} holds no optimizer, so training cannot go on '
                            'from it: give a latest.pth or step_N.pth')
        checkpoint.load_net(self.model, content['net'], path)
        for group in content['optimizer']['param_groups']:
            group.setdefault('lr_mult', group.pop('times', None))  # the earlier name
            group['fused'] = self.is_fused  # of this device, not the checkpoint's
        self.optimizer.load_state_dict(content['optimizer'])
        for p, state in self.optimizer.state.items():  # in the memory order of p
            state['momentum_buffer'] = torch.empty_like(p).copy_(
                state['momentum_buffer'])
        if content['scaler']:  # empty if the run was not in fp16
            self.scaler.load_state_dict(content['scaler'])
        self.step, run = content['step'], content['run']
        self.best, self.seconds = run['best'], run['seconds']
        self.weights = run['weights']
        self.loss_sum.fill_(run['loss_sum'])
        self.n_losses = run['n_losses']

    def save(self, path: Path, is_final: bool = False) -> None:
        """Write a checkpoint, on the first rank.

        Raises:
            RuntimeError: if the ranks do not hold the same tensors.
        """
        content = self.state_dict(is_final)
        if not self.group.is_identical(content['net'].values()):
            raise RuntimeError(f'the ranks hold different tensors after step '
                               f'{self.step}, nothing was saved: please report this')
        if self.group.is_main:
            checkpoint.save(content, path)


# -- the run ---------------------------------------------------------------------------

def until_stopped(batches: DataLoader, signals: distributed.StopSignals
                  ) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches; end if the loaders died of the signal that stops this run."""
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError):
        if not signals.exit_status:
            raise


def train(session: Session, data: SegmentationDataset, info: dict,
          log: Logger | NullLogger) -> int:
    """Train until ITER_MAX or a signal; return the exit status of the signal, or 0."""
    signals, group, status = distributed.StopSignals(), session.group, 0
    batches = loader.train_loader(data, session.step, settings.ITER_MAX,
                                  session.device.type, group.rank, group.world_size)
    # Crops have one size, so cuDNN's search for the fastest kernels pays.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    progress = monitor.Progress(session, log)
    for images, labels in until_stopped(batches, signals):
        # Train on one batch.
        progress.batch_is_ready()
        with distributed.explain_out_of_memory(
                session.device, 'a step', 'raise ACCUMULATE, set RECOMPUTE=true or '
                'PRECISION=bf16, or lower BATCH_SIZE or CROP_SIZE'):
            _, logits = session.train_step(images, labels)
        # All ranks stop after the same step.
        status = group.all_reduce_max(signals.exit_status)
        due = list_due(session.step, status)
        if due:  # the host waits for the device here only
            monitor.check_finite(session, batches, data)
            progress.pause_clock()
        if 'log' in due:
            progress.report(poly_lr(session.step))
        if 'images' in due and group.is_main:
            monitor.draw_samples(session, log.writer, info, images, labels, logits)
            monitor.draw_bases(session, log.writer)
        if 'validation' in due and monitor.validate(session, info, log):
            session.save(log.folder / 'best.pth', is_final=True)
        if 'latest' in due:
            session.save(log.folder / 'latest.pth')
        if 'step' in due:
            session.save(log.folder / f'step_{session.step}.pth')
            checkpoint.remove_old(log.folder, settings.KEEP)
        progress.step_is_done()
        if status:
            break
    progress.bar.close()
    if not status and session.step < settings.ITER_MAX:  # the loaders were stopped too
        status = signals.exit_status
        monitor.check_finite(session, batches, data)
        progress.pause_clock()
        session.save(log.folder / 'latest.pth')
    return status


def list_due(step: int, status: int) -> set[str]:
    """Return what is to be done after a step.

    Args:
        step: that is done.
        status: not 0 if the run stops after this step.
    """
    every = {'log': settings.LOG_EVERY, 'images': settings.IMAGE_EVERY,
             'validation': settings.EVAL_EVERY, 'step': settings.ITER_SAVE,
             'latest': max(settings.ITER_SAVE // 10, 1)}
    due = {name for name, n_steps in every.items() if n_steps and step % n_steps == 0}
    if step == settings.ITER_MAX:
        due |= {'log', 'latest'}
    if status:  # stop soon, but save
        due = due - {'validation'} | {'latest'}
    return due


def prepare(overrides: dict) -> tuple[Session, SegmentationDataset, dict,
                                      Logger | NullLogger]:
    """Build a run, new or resumed, and open its log.

    Args:
        overrides: values of the command line.

    Returns:
        (session, data, info, log): info is the data set's.
    """
    device = distributed.pick_device()
    distributed.prepare_cpu(device)
    group = distributed.ProcessGroup(device)
    config.check_train_settings(group.world_size)
    info, data = get_dataset_info(), open_split('train')
    if settings.EVAL_EVERY:  # find errors now, not at the first validation
        open_split('val')
        config.eval_options()
    lock = None  # a new folder is made and locked later, if nothing is wrong
    if group.is_main and Path(settings.LOG_DIR).is_dir():
        lock = lock_folder(settings.LOG_DIR)
    start = setup.find_start()
    setup.check_same_start(start, group)
    settings.STEM = start.stem  # the one that 'auto' stands for
    session = Session(len(info['classes']), device, group)
    lines = start.lines + setup.load_start(session, start, info)
    session.overrides = overrides
    session.classes, session.palette = info['classes'], info['palette']
    lines += setup.describe_ranks(session, start)
    if not group.is_main:
        return session, data, info, NullLogger(settings.LOG_DIR)
    log = Logger(settings.LOG_DIR, session.step)
    log.lock = lock or lock_folder(settings.LOG_DIR)  # held as long as the log is
    setup.write_head(session, data, log, lines)
    return session, data, info, log


def main() -> int:
    """Train, save the final weights, and return the exit status."""
    args = config.parse_args(__doc__)
    status = distributed.launch()
    if status is not None:
        return status
    session, data, info, log = prepare(args.overrides)
    final = log.folder / 'final.pth'
    if session.step >= settings.ITER_MAX and final.exists():
        log.info(f'this run is finished (step {session.step}): evaluate it with python '
                 f'eval.py LOG_DIR={settings.LOG_DIR}, or start over after `sh '
                 f'clean.sh {settings.LOG_DIR}`')
        session.group.destroy()
        return 0
    status = 0
    if session.step < settings.ITER_MAX:
        status = train(session, data, info, log)
    if session.step < settings.ITER_MAX:
        log.info(f'stopped after step {session.step}; the same command goes on')
    else:
        status = 0
        session.save(final, is_final=True)
        log.info(f'finished after {session.seconds / 60:.1f} minutes: {final}')
    session.group.destroy()
    return status


if __name__ == '__main__':
    config.run(main)
