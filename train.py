"""Train the network of settings.py; the same command resumes a run that was stopped.

    python train.py                                  # the released recipe
    python train.py N_LAYERS=50 STRIDE=16 LOG_DIR=runs/r50

Everything a run writes is in LOG_DIR: latest.pth, step_N.pth, best.pth, final.pth,
settings.txt, log.txt, log.jsonl and TensorBoard's events.
"""
import runtime

if __name__ == '__main__':
    args = runtime.read_command_line(__doc__)  # before the slow imports

import argparse
import contextlib
import inspect
import math
import os
import time

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import backbone
import checkpoint
import dataset
import drawing
import heads
import inference
import metric
import network
import settings


def poly_rate(step: int) -> float:
    """Return the learning rate of a step, 1 .. ITER_MAX, as settings say.

    LR * (1 - step / ITER_MAX) ** LR_POWER, refreshed every LR_EVERY steps; with LR_END
    what is above it falls so.
    """
    refreshed = step - step % settings.LR_EVERY
    share = (1 - refreshed / settings.ITER_MAX) ** settings.LR_POWER
    return settings.LR_END + (settings.LR - settings.LR_END) * share


def group_parameters(net: nn.Module) -> list[dict]:
    """Sort the trained parameters into the recipe's three groups.

    Returns:
        Groups for the optimizer: the convolutions' weights, with decay; other weights
        (of batch norm, and bases that are trained), without unless DECAY_ALL; all
        biases, likewise and with `times`, the factor of their rate.
    """
    weights, others, biases = [], [], []
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                is_conv = isinstance(module, nn.Conv2d)
                (biases if name == 'bias' else weights if is_conv else others).append(p)
    decay = settings.WEIGHT_DECAY if settings.DECAY_ALL else 0.0
    return [{'params': weights, 'weight_decay': settings.WEIGHT_DECAY, 'times': 1.0},
            {'params': others, 'weight_decay': decay, 'times': 1.0},
            {'params': biases, 'weight_decay': decay, 'times': settings.BIAS_LR}]


class Session:
    """One run: the network, its optimizer, and the number of steps done.

    Args:
        n_classes: of the data set.
        device: where it is computed.
        team: the ranks that share the work.

    Raises:
        ValueError: in a sentence, for settings that do not go together.
    """

    def __init__(self, n_classes: int, device: torch.device,
                 team: runtime.Team | None = None):
        self.team = team or runtime.Team()
        check_settings(self.team.world)
        self.step, self.device, self.n_classes = 0, device, n_classes
        self.precision = runtime.pick_precision(device)
        runtime.seed(settings.SEED)
        self.raw = network.build(n_classes)
        if self.team.world > 1:
            self.raw = backbone.share_batch_norms(self.raw, device.type)
        self.raw.to(device)
        if settings.CHANNELS_LAST:
            self.raw.to(memory_format=torch.channels_last)
        self.net = self.raw
        if self.team.world > 1:  # averages the gradients over the ranks
            wrap = nn.parallel.DistributedDataParallel
            names = inspect.signature(wrap.__init__).parameters
            sync = ('forward_sync_buffers' if 'forward_sync_buffers' in names else
                    'broadcast_buffers')  # before torch 2.12 or so
            self.net = wrap(self.net, gradient_as_bucket_view=True, **{sync: False})
        if settings.COMPILE:
            self.net = torch.compile(self.net)
        # The fused kernels skip the update on the device where found_inf says so.
        self.optimizer = torch.optim.SGD(group_parameters(self.raw), lr=settings.LR,
                                         momentum=settings.LR_MOM, fused=True)
        self.scaler = torch.amp.GradScaler(device.type,
                                           enabled=self.precision == 'fp16')
        self.first_bad = torch.zeros((), dtype=torch.int64, device=device)
        # What the checkpoint tells of the run: the best validation mIoU, the time it
        # took, where the weights came from, the command line (for eval.py), versions.
        self.best, self.seconds, self.weights = 0.0, 0.0, ''
        self.given, self.environment = {}, {}
        self.classes, self.palette = [], []  # names and colours, for predict.py
        # The losses since the last log line, their sum and number: a resumed run logs
        # the same means.
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
        for group in self.optimizer.param_groups:
            group['lr'] = group['times'] * poly_rate(self.step)
        runtime.seed(settings.SEED, self.step, self.team.rank)  # of the dropout
        is_pinned = self.device.type == 'cuda'
        images = images.to(self.device, non_blocking=is_pinned)
        labels = labels.to(self.device, non_blocking=is_pinned)
        n_pixels = labels.numel()  # of this rank, on the average
        if settings.LOSS_NORM == 'valid':
            n_valid = self.team.add((labels != dataset.IGNORED).sum())
            n_pixels = n_valid.clamp(min=1) / self.team.world

        # Forward and backward, a part of the batch at a time; the ranks average their
        # gradients in the last one.
        losses, logits = [], []
        parts = list(zip(images.chunk(settings.ACCUMULATE),
                         labels.chunk(settings.ACCUMULATE), strict=True))
        for i, (x, y) in enumerate(parts):
            is_last = i == len(parts) - 1
            with (contextlib.nullcontext() if is_last or self.team.world == 1 else
                  self.net.no_sync()):
                with runtime.autocast(self.device, self.precision):
                    part, small = self.net(x, y)            # (b,), (b, classes, h, w)
                self.scaler.scale(part.sum() / n_pixels).backward()
            losses.append(part.detach() * (len(images) / n_pixels))
            logits.append(small.detach())
        losses, logits = torch.cat(losses), torch.cat(logits)
        self.loss = self.team.add(losses.mean()) / self.team.world  # not finite: on all

        # A step whose loss or gradient is not finite changes neither weights nor bases.
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(p.grad for p in self.raw.parameters()
                                       if p.grad is not None)
        if settings.CLIP_GRAD:
            nn.utils.clip_grads_with_norm_(self.raw.parameters(), settings.CLIP_GRAD,
                                           norm)
        is_sound = self.loss.isfinite() & (self.first_bad == 0)
        if not self.scaler.is_enabled():  # it is used to infinite gradients
            is_sound &= norm.isfinite()
            self.optimizer.found_inf = (~is_sound).float()
        self.first_bad += torch.where(is_sound | (self.first_bad > 0), 0, self.step)
        if not self.optimizer.state:  # a first step that is withheld makes none
            for p in self.raw.parameters():
                if p.grad is not None:
                    self.optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.raw.update_bases(is_sound & norm.isfinite())
        self.norm = norm
        return losses, logits

    def state(self, is_final: bool = False) -> dict:
        """Return what a checkpoint holds; the final one has no optimizer."""
        run = {'n_classes': self.n_classes, 'best': self.best, 'seconds': self.seconds,
               'precision': self.precision, 'weights': self.weights,
               'loss_sum': self.loss_sum.item(), 'n_losses': self.n_losses,
               'given': self.given, 'environment': self.environment,
               'classes': list(self.classes), 'palette': list(self.palette)}
        content = {'net': self.raw.state_dict(), 'step': self.step,
                   'settings': runtime.snapshot(), 'run': run}
        if not is_final:
            content['optimizer'] = self.optimizer.state_dict()
            content['scaler'] = self.scaler.state_dict()
        return content

    def restore(self, content: dict, path) -> None:
        """Go on from a checkpoint of this project."""
        if 'optimizer' not in content:
            raise ValueError(f'{path} holds no optimizer, so training cannot go on '
                             'from it: give a latest.pth or step_N.pth')
        checkpoint.load_net(self.raw, content['net'], path)
        self.optimizer.load_state_dict(content['optimizer'])
        for p, state in self.optimizer.state.items():  # in the layout that p has now
            state['momentum_buffer'] = torch.empty_like(p).copy_(
                state['momentum_buffer'])
        if content['scaler']:  # empty where the run was not in fp16
            self.scaler.load_state_dict(content['scaler'])
        self.step, run = content['step'], content['run']
        self.best, self.seconds = run['best'], run['seconds']
        self.weights = run['weights']
        self.loss_sum.fill_(run['loss_sum'])
        self.n_losses = run['n_losses']


def check_settings(world: int = 1) -> None:
    """Refuse settings that cannot be trained by so many ranks, each in a sentence."""
    s = settings
    for low, high, names in (
            (0, 1, 'BN_MOM EM_MOM LR_MOM DROPOUT OHEM_KEPT OHEM_BELOW'),
            (1, math.inf, 'BATCH_SIZE ACCUMULATE ITER_MAX LR_EVERY LOG_EVERY ITER_SAVE '
                          'CROP_SIZE HEAD_CHANNELS'),
            (0, math.inf, 'SEED FC1_CHANNELS EM_LAMBDA LR LR_POWER BIAS_LR CLIP_GRAD '
                          'WEIGHT_DECAY N_WORKERS IMAGE_EVERY EVAL_EVERY KEEP '
                          'CROP_WIDTH LR_END OHEM_MIN AUX_WEIGHT')):
        for name in names.split():
            if not low <= getattr(s, name) <= high:
                wanted = f'{low} or more' if high == math.inf else f'{low} to {high}'
                raise ValueError(f'{name}={getattr(s, name)}: {wanted} is expected')
    for name, n, low in (('MEAN', 3, 0), ('STD', 3, 1e-6), ('SCALES', 0, 1e-3),
                         ('MULTI_GRID', 0, 1), ('CLASS_WEIGHTS', 0, 0)):
        value = getattr(s, name)
        if min(value) < low or n and len(value) != n:
            raise ValueError(f'{name}={runtime.show_value(value)}: {n or "some"} '
                             f'numbers of at least {low} are expected')
    if s.RESUME not in ('', 'force'):
        raise ValueError(f"RESUME={s.RESUME} is unknown: 'force' or nothing is "
                         'expected')
    if s.BATCH_SIZE % (s.ACCUMULATE * world):
        n = world * s.ACCUMULATE
        raise ValueError(f'BATCH_SIZE={s.BATCH_SIZE}, of all ranks together, cannot be '
                         f'computed in equal parts by {world} ranks with ACCUMULATE='
                         f'{s.ACCUMULATE}: make it a multiple of {n}, or set RANKS')
    if s.LOSS_NORM not in ('all', 'valid'):
        raise ValueError(f'LOSS_NORM={s.LOSS_NORM} is none of all, valid')
    if s.OHEM_KEPT or s.OHEM_BELOW:
        n_pixels = math.prod(dataset.crop_size())
        if s.OHEM_KEPT and s.OHEM_BELOW:
            raise ValueError(f'OHEM_KEPT={s.OHEM_KEPT} and OHEM_BELOW={s.OHEM_BELOW}: '
                             'only one of the two is expected, set the other to 0')
        if s.LOSS_NORM != 'all':
            raise ValueError(f'LOSS_NORM={s.LOSS_NORM} has no effect with OHEM, which '
                             'takes the mean over the pixels it keeps: leave it at all')
        if s.OHEM_MIN >= n_pixels:
            raise ValueError(f'OHEM_MIN={s.OHEM_MIN}, but a crop has {n_pixels} pixels,'
                             f' so OHEM would keep them all: {n_pixels // 3} would do')


def compare_settings(recorded: dict, path) -> list[str]:
    """Return a line for each setting that a resumed run would silently change.

    Raises:
        ValueError: where there are such, unless RESUME=force.
    """
    lines = [f'{name} = {recorded[name]!r} then, {value!r} now'
             for name, value in runtime.snapshot().items()
             if name in recorded and recorded[name] != value
             and name not in runtime.FREE and (name, value) != ('STEM', 'auto')]
    if lines and settings.RESUME != 'force':
        raise ValueError(f'{path} was trained with other settings ({"; ".join(lines)}):'
                         ' set them back, go on all the same with RESUME=force, or '
                         f'start over after `sh clean.sh {settings.LOG_DIR}`')
    return lines


def estimate_memory(session: Session) -> float:
    """Return the GB that a step will need at its peak, roughly.

    Gradients and momentum, and what the forward pass keeps for the backward, weights
    among it; that is counted on torch's meta device, where nothing is computed.
    """
    n_ranks = session.team.world * settings.ACCUMULATE
    net = network.build(session.n_classes).to('meta')
    if session.team.world > 1:  # DeepLab's pooled pixels are normalised over the ranks
        for module in net.modules():
            if isinstance(module, heads.ASPP):
                module.pool.eval()
    kept = {}  # storage -> bytes

    def count(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    size = settings.BATCH_SIZE // n_ranks, *dataset.crop_size()
    images = torch.zeros(size[0], 3, *size[1:], device='meta')
    labels = torch.zeros(size, dtype=torch.uint8, device='meta')
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        net(images, labels)
    n_weights = sum(p.numel() for p in net.parameters())
    is_half = session.precision != 'fp32'
    return (sum(kept.values()) / (1 + is_half) + 8 * n_weights) / 1e9


def validate(session: Session, facts: dict, log: runtime.Log | runtime.Silence) -> None:
    """Score the validation split and keep the best weights in best.pth."""
    team, device = session.team, session.device
    folder = dataset.open_split('val')
    n_images = dataset.n_to_evaluate(folder)
    net = network.build(session.n_classes, is_eval=True)
    net.load_state_dict(session.raw.state_dict())
    options = {**runtime.eval_options(), 'is_compiled': False}  # it would take longer
    predictor = inference.Predictor([net], device, session.precision, **options)
    bar = tqdm(total=n_images, desc='validation', leave=False, unit='image',
               disable=None if team.is_first else True)
    tally = metric.evaluate(
        predictor.predict_labels,
        dataset.eval_loader(folder, n_images, device.type, team.rank, team.world),
        metric.Tally(1, n_images, session.n_classes, device),
        lambda *_: bar.update(team.world))
    bar.close()
    team.largest(0)  # wait here for slower ranks, NCCL has little patience
    scores = metric.score(team.add(tally.matrices)[0].cpu())
    log.line(f'step {session.step}: validation mIoU {100 * scores["mIoU"]:.2f} on '
             f'{n_images} images')
    log.row(kind='validation', step=session.step, n_images=n_images, **scores)
    for name, iou in zip(facts['classes'], scores['IoU'], strict=True):
        if math.isfinite(iou):
            log.board.add_scalar(f'validation_IoU/{name}', iou, session.step)
    if scores['mIoU'] > session.best:
        session.best = scores['mIoU']
        save(session, log.folder / 'best.pth', is_final=True)


def save(session: Session, path, is_final: bool = False) -> None:
    """Write a checkpoint, on the first rank.

    Raises:
        RuntimeError: where the ranks do not hold the same network.
    """
    content = session.state(is_final)
    sums = torch.stack([t.float().sum() for t in content['net'].values()])
    mu = next((t.float() for k, t in content['net'].items() if k.endswith('.mu')), sums)
    if not session.team.is_alike(torch.cat([sums, mu.flatten()])):
        raise RuntimeError('the ranks hold different weights, statistics or bases '
                           f'after step {session.step}, so nothing was saved: this is '
                           'a fault of the code or of a device, please report it')
    if session.team.is_first:
        checkpoint.save(content, path)


def draw_bases(session: Session, board) -> None:
    """Put into TensorBoard how much each basis was used in the last batch.

    The histogram is of the bases' shares of the pixels times K: 1 is an even share, a
    basis near 0 is dead. `unused` counts those with less than a hundredth of it.
    """
    for name, module in session.raw.named_modules():
        if isinstance(module, network.EMAU):
            shares = (module.usage * len(module.usage)).cpu()      # (k,)
            board.add_histogram(f'bases/{name}: share of the pixels, 1 is even',
                                shares.numpy(), session.step, bins=30)
            board.add_scalar('bases/unused', int((shares < 0.01).sum()), session.step)
            board.add_scalar('bases/largest share', shares.max().item(), session.step)


def draw_samples(session: Session, board, facts: dict, images: Tensor, labels: Tensor,
                 logits: Tensor) -> None:
    """Put input, truth and prediction of up to three samples into TensorBoard."""
    size = images.shape[2:]
    found = network.enlarge(logits[:3], size, session.raw.align_corners)
    found = found.argmax(1).byte().cpu()
    for i, prediction in enumerate(found):
        row = np.concatenate([images[i].permute(1, 2, 0), *(
            drawing.paint(label.numpy(), facts['palette'])
            for label in (labels[i], prediction))], 1)
        board.add_image(f'input, truth, prediction/{i}', row, session.step,
                        dataformats='HWC')


def check_sound(session: Session, sampler: dataset.StepSampler, folder: dataset.Folder
                ) -> None:
    """Raise where a step since the last check was not finite.

    Raises:
        ValueError: names the step and the pictures of it.
    """
    step = int(session.first_bad)
    if step:
        names = ', '.join(folder.ids[i] for _, i in sampler.places(step - 1, True))
        raise ValueError(
            f'the loss or its gradient was not finite at step {step}, so that step '
            f'was not taken and nothing was saved since (pictures: {names}): look at '
            'these, lower LR, set CLIP_GRAD=1 or PRECISION=fp32; the last checkpoint '
            f'is in {settings.LOG_DIR}')


def train(session: Session, folder: dataset.Folder, facts: dict,
          log: runtime.Log | runtime.Silence) -> int:
    """Train until ITER_MAX or a signal; return the exit status."""
    signals, team = runtime.Signals(), session.team
    loader = dataset.train_loader(folder, session.step, settings.ITER_MAX,
                                  session.device.type, team.rank, team.world)
    sampler = loader.batch_sampler
    bar = tqdm(total=settings.ITER_MAX, initial=session.step, unit='step',
               disable=None if team.is_first else True, dynamic_ncols=True)
    save_every = max(settings.ITER_SAVE // 10, 1)
    began = mark = time.perf_counter()
    waited, logged_at, status = 0.0, session.step, 0
    before = logged = session.seconds
    for images, labels in until_stopped(loader, signals):
        waited += time.perf_counter() - mark
        if session.step == sampler.first:
            log.line(f'first step begins {time.perf_counter() - runtime.BEGAN:.1f} s '
                     'after the start', is_shown=False)
        try:
            _, logits = session.train_step(images, labels)
        except RuntimeError as error:
            if not runtime.is_out_of_memory(error):
                raise
            raise ValueError(
                f'the memory of {session.device} does not hold a step ('
                f'{str(error).splitlines()[0]}): raise ACCUMULATE, set RECOMPUTE=true '
                'or PRECISION=bf16, or lower BATCH_SIZE or CROP_SIZE') from error
        step = session.step
        session.loss_sum += session.loss
        session.n_losses += 1
        status = team.largest(signals.exit_status)  # all ranks stop after the same step
        is_last = step == settings.ITER_MAX or status
        is_logged = step % settings.LOG_EVERY == 0 or step == settings.ITER_MAX
        is_saved = step % save_every == 0 or is_last
        is_validated = settings.EVAL_EVERY and (
            step % settings.EVAL_EVERY == 0) and not status
        if is_logged or is_saved or is_validated:
            check_sound(session, sampler, folder)  # here the host waits for the device
            session.seconds = before + time.perf_counter() - began
        if is_logged:
            report_step(session, log, bar, session.seconds - logged, waited,
                        step - logged_at)
            waited, logged_at, logged = 0.0, step, session.seconds
        if settings.IMAGE_EVERY and step % settings.IMAGE_EVERY == 0 and team.is_first:
            draw_samples(session, log.board, facts, images, labels, logits)
            draw_bases(session, log.board)
        if is_validated:
            try:
                validate(session, facts, log)
            except RuntimeError as error:
                if not runtime.is_out_of_memory(error):
                    raise
                raise ValueError(
                    f'the memory of {session.device} does not hold the validation ('
                    f'{str(error).splitlines()[0]}): lower EVAL_BATCH or set '
                    'EVAL_WINDOW; the same command goes on from the last latest.pth'
                ) from error
        if is_saved:
            save(session, log.folder / 'latest.pth')
            if step % settings.ITER_SAVE == 0:
                save(session, log.folder / f'step_{step}.pth')
                if team.is_first:
                    checkpoint.remove_old(log.folder, settings.KEEP)
        bar.update()
        mark = time.perf_counter()
        if is_logged or is_saved or is_validated:  # do not count what was not training
            before, began = session.seconds, mark
        if status:
            break
    bar.close()
    if not status and session.step < settings.ITER_MAX:  # the loaders were stopped too
        status = signals.exit_status
        check_sound(session, sampler, folder)
        save(session, log.folder / 'latest.pth')
    return status if session.step < settings.ITER_MAX else 0


def until_stopped(loader, signals: runtime.Signals):
    """Yield the batches; end where the loaders died of the signal that stops us."""
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError):
        if not signals.exit_status:
            raise


def report_step(session, log, bar, taken: float, waited: float, n: int) -> None:
    """Write the means since the last log line to bar, log.txt, log.jsonl, TensorBoard.

    Args:
        taken, waited: seconds of this process since then, and those without data.
        n: steps of this process since then.
    """
    loss = session.loss_sum.item() / session.n_losses
    session.loss_sum.zero_()
    session.n_losses = 0
    speed = n * settings.BATCH_SIZE / taken
    rate = poly_rate(session.step)
    bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)
    left = (settings.ITER_MAX - session.step) * taken / n
    log.line(f'step {session.step}/{settings.ITER_MAX}  loss {loss:.4f}  '
             f'rate {rate:.2e}  {speed:.1f} images/s  {left / 60:.0f} min left',
             is_shown=bar.disable)
    log.row(kind='train', step=session.step, loss=loss, rate=rate,
            gradient_norm=session.norm.item(), images_per_s=speed,
            waiting_for_data=waited / taken)


def start(given: dict) -> tuple[Session, dataset.Folder, dict, runtime.Log]:
    """Build a run, new or resumed, and open its log with all that describes it.

    Args:
        given: values of the command line.
    """
    device = runtime.pick_device()
    if device.type == 'cpu':
        runtime.keep_freed_memory()
    team = runtime.Team(device)
    check_settings(team.world)
    facts = dataset.get_facts()
    folder = dataset.open_split('train')
    if settings.EVAL_EVERY:  # better now than at the first validation
        dataset.open_split('val')
        runtime.eval_options()
    lock = None  # a new folder is made, and locked, when all is found to be well
    if team.is_first and os.path.isdir(settings.LOG_DIR):
        lock = runtime.lock(settings.LOG_DIR)
    content, path, lines = checkpoint.load_newest(settings.LOG_DIR)
    if content:
        lines += compare_settings(content['settings'], path)
        settings.STEM = content['settings']['STEM']
        session = Session(len(facts['classes']), device, team)
        session.restore(content, path)
        lines.append(f'resuming {path} after step {session.step}')
        if content['run']['precision'] != session.precision:
            lines.append(f'precision is {session.precision} now, it was '
                         f'{content["run"]["precision"]}')
    elif settings.INIT_FROM:
        if not os.path.isfile(settings.INIT_FROM):
            raise FileNotFoundError(f'INIT_FROM={settings.INIT_FROM} is not there: '
                                    'train what makes it, or give another file')
        found = checkpoint.load(settings.INIT_FROM)
        if settings.STEM == 'auto':
            settings.STEM = found['settings'].get('STEM', 'auto')
        session = Session(len(facts['classes']), device, team)
        try:
            lines += checkpoint.sort_classes(found, facts['classes'],
                                             settings.INIT_FROM)
        except ValueError:
            lines.append(f'note: {settings.INIT_FROM} was trained on other classes, so '
                         'its classifier is no more than a start')
        checkpoint.load_net(session.raw, found['net'], settings.INIT_FROM)
        for name in checkpoint.ARCHITECTURE:
            there, here = found['settings'].get(name), getattr(settings, name)
            if there not in (None, here):
                lines.append(f'note: {name} was {there!r} there, it is {here!r} here')
        session.weights = f'network: all weights of {settings.INIT_FROM}'
        lines.append(session.weights)
    else:
        settings.STEM, source, line = backbone.choose_weights(
            settings.PRETRAINED, settings.STEM, settings.N_LAYERS, settings.MODEL_DIR)
        session = Session(len(facts['classes']), device, team)
        lines.append(line)
        session.weights = line
        if source:
            lines.append(backbone.load_weights(session.raw.backbone, source,
                                               settings.MODEL_DIR))
        elif settings.BN_MOM < 0.1 and (
                seen := 1 - (1 - settings.BN_MOM) ** settings.ITER_MAX) < 0.9:
            lines.append(f'note: with BN_MOM={settings.BN_MOM} the running statistics '
                         f'forget only {seen:.0%} of their initial values in ITER_MAX='
                         f'{settings.ITER_MAX} steps: set BN_MOM=0.1 to train from '
                         'scratch')
    for is_turn in (team.is_local_first, not team.is_local_first):
        if settings.CACHE and is_turn:  # the first of each host writes it
            folder.pack = dataset.Pack(folder.images + folder.labels, settings.CACHE)
        team.largest(0)  # wait for it
    session.given = given
    session.classes, session.palette = facts['classes'], facts['palette']
    session.environment = runtime.describe_environment(device)
    if content:
        old = content['run']['environment'].get('source')
        new = session.environment['source']
        if old != new:
            lines.append(f'note: the source was {old} then, it is {new} now')
    devices = team.gather(f'{session.environment["host"]} {device} '
                          f'({session.environment["device"]})')
    if team.largest(session.step) != -team.largest(-session.step):
        raise ValueError(f'the ranks do not read the same checkpoints in LOG_DIR='
                         f'{settings.LOG_DIR}: give a folder that all hosts share')
    if not team.is_first:
        return session, folder, facts, runtime.Silence(settings.LOG_DIR)
    log = runtime.Log(settings.LOG_DIR, session.step)
    log.lock = lock or runtime.lock(settings.LOG_DIR)  # held as long as the log is
    for left_over in log.folder.glob('*.pth.tmp'):
        left_over.unlink()
    runtime.write_text(log.folder / 'settings.txt', runtime.settings_text())
    log.line(runtime.settings_text(), is_shown=False)
    log.describe(runtime.snapshot(), runtime.settings_text())
    log.line('\n'.join(f'{k}: {v}' for k, v in session.environment.items()))
    log.line(f'data: {settings.DATASET}, {len(folder)} images of list {folder.split} '
             f'in {folder.root}, masks in {folder.masks}')
    log.line(f'precision: {session.precision}; batch: {settings.BATCH_SIZE} crops of '
             f'{"x".join(map(str, dataset.crop_size()))}, '
             f'{settings.BATCH_SIZE // team.world // settings.ACCUMULATE} at a time on '
             f'each of {team.world} ranks; log: {settings.LOG_DIR}')
    log.line(f'ranks: {", ".join(devices)}; a step takes about '
             f'{estimate_memory(session):.1f} GB of memory on each')
    for line in lines:
        log.line(line)
    return session, folder, facts, log


def main(args: argparse.Namespace) -> int:
    """Train, save the final weights, and return the exit status."""
    status = runtime.launch()
    if status is not None:
        return status
    session, folder, facts, log = start(args.given)
    if session.step >= settings.ITER_MAX and (log.folder / 'final.pth').exists():
        log.line(f'this run is finished (step {session.step}): evaluate it with python '
                 f'eval.py LOG_DIR={settings.LOG_DIR}, or start over after '
                 f'`sh clean.sh {settings.LOG_DIR}`')
        session.team.leave()
        return 0
    status = 0
    if session.step < settings.ITER_MAX:
        status = train(session, folder, facts, log)
    if status:
        log.line(f'stopped after step {session.step}; the same command goes on')
    else:
        save(session, log.folder / 'final.pth', is_final=True)
        log.line(f'finished after {session.seconds / 60:.1f} minutes: '
                 f'{log.folder / "final.pth"}')
    session.team.leave()
    return status


if __name__ == '__main__':
    runtime.run(main, args)
