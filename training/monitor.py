"""What a run reports: progress, validation, pictures, bases, steps that fail.

    tail -f logdir/log.jsonl
"""
import math
import time

import numpy as np
import torch
from tensorboardX import SummaryWriter
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import config
import distributed
import drawing
import inference
import loader
import metrics
import network
import settings
from config import UserError
from dataset import SegmentationDataset, n_eval_images, open_split
from emau import EMAU
from logger import Logger, NullLogger

MAX_WITHHELD = 50  # steps in a row that fp16's gradient scaler may withhold


class Progress:
    """The progress bar, the clock of training, and the log line of some steps.

    The clock stops for validation and saving; `session.seconds` counts training alone.

    Args:
        session: a train.Session.
        log: of this rank.
    """

    def __init__(self, session, log: Logger | NullLogger):
        self.session, self.log = session, log
        self.bar = tqdm(total=settings.ITER_MAX, initial=session.step, unit='step',
                        disable=None if session.group.is_main else True,
                        dynamic_ncols=True)
        self.logged_step, self.logged_seconds = session.step, session.seconds
        self.started = self.step_ended = time.perf_counter()
        self.waited, self.is_paused = 0.0, False

    def batch_is_ready(self) -> None:
        """Count the time since the last step as waiting for data."""
        self.waited += time.perf_counter() - self.step_ended

    def pause_clock(self) -> None:
        """Add the time since the last pause to session.seconds."""
        self.session.seconds += time.perf_counter() - self.started
        self.is_paused = True

    def step_is_done(self) -> None:
        """Advance the bar; start the clock again."""
        self.bar.update()
        self.step_ended = time.perf_counter()
        if self.is_paused:
            self.started, self.is_paused = self.step_ended, False

    def report(self, lr: float) -> None:
        """Write the means since the last log line to the bar and all logs."""
        session, s = self.session, settings
        loss = session.loss_sum.item() / session.n_losses
        session.loss_sum.zero_()
        session.n_losses = 0
        n_steps = session.step - self.logged_step
        seconds = session.seconds - self.logged_seconds
        images_per_s = n_steps * s.BATCH_SIZE / seconds
        minutes_left = (s.ITER_MAX - session.step) * seconds / n_steps / 60
        self.bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)
        self.log.info(f'step {session.step}/{s.ITER_MAX}  loss {loss:.4f}  '
                      f'lr {lr:.2e}  {images_per_s:.1f} images/s  '
                      f'{minutes_left:.0f} min left', is_shown=self.bar.disable)
        self.log.log_metrics(
            kind='train', step=session.step, loss=loss, lr=lr,
            gradient_norm=session.norm.item(), images_per_s=images_per_s,
            waiting_for_data=self.waited / seconds)
        self.logged_step, self.logged_seconds = session.step, session.seconds
        self.waited = 0.0


def check_finite(session, batches: DataLoader, data: SegmentationDataset) -> None:
    """Stop if a step since the last check was not finite.

    Args:
        session: a train.Session.
        batches: its loader.
        data: its training images.

    Raises:
        UserError: names the step and its images.
    """
    step = int(session.first_nonfinite_step)
    if step:
        indices = batches.batch_sampler.sample_indices(step - 1, is_whole=True)
        names = ', '.join(data.ids[i] for _, i in indices)
        raise UserError(
            f'the loss or its gradient was not finite at step {step}, so that step '
            f'was not taken and nothing was saved since (images: {names}): look at '
            'these, lower LR, set CLIP_GRAD=1 or PRECISION=fp32; the last checkpoint '
            f'is in {settings.LOG_DIR}')
    n_withheld = int(session.n_withheld)
    if n_withheld >= MAX_WITHHELD:
        raise UserError(
            f'the gradients overflowed in fp16 at every step since step '
            f'{session.step - n_withheld + 1}, so {n_withheld} steps were withheld '
            f'(the loss scale is {session.scaler.get_scale():.3g} now): set PRECISION='
            'bf16 or fp32, or lower LR; the last checkpoint is in '
            f'{settings.LOG_DIR}')


def validate(session, info: dict, log: Logger | NullLogger) -> bool:
    """Score the validation split.

    Args:
        session: a train.Session.
        info: of the data set.
        log: of this rank.

    Returns:
        Whether the mIoU is the best of the run so far.
    """
    group, device = session.group, session.device
    data = open_split('val')
    n_images = n_eval_images(data)
    net = network.build(session.n_classes, is_eval=True)
    net.load_state_dict(session.model.state_dict())
    options = {**config.eval_options(), 'is_compiled': False}  # compiling takes longer
    predictor = inference.Predictor([net], device, session.precision, **options)
    batches = loader.eval_loader(data, n_images, device.type, group.rank,
                                 group.world_size)
    meter = metrics.ConfusionMeter(1, n_images, session.n_classes, device)
    is_benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # images have many sizes
    with tqdm(total=n_images, desc='validation', leave=False, unit='image',
              disable=None if group.is_main else True) as bar:
        with distributed.explain_out_of_memory(
                device, 'the validation', 'lower EVAL_BATCH or set EVAL_WINDOW; the '
                'same command goes on from the last latest.pth'):
            metrics.evaluate(predictor.predict_labels, batches, meter,
                             lambda *_: bar.update(group.world_size))
    torch.backends.cudnn.benchmark = is_benchmark
    group.barrier()  # NCCL does not wait long for slower ranks
    matrix = group.all_reduce_sum(meter.matrices)[0].cpu()
    scores = metrics.compute_scores(matrix)
    log.info(f'step {session.step}: validation mIoU {100 * scores["mIoU"]:.2f} on '
             f'{n_images} images')
    log.log_metrics(kind='validation', step=session.step, n_images=n_images, **scores)
    for name, iou in zip(info['classes'], scores['IoU'], strict=True):
        if math.isfinite(iou):
            log.writer.add_scalar(f'validation_IoU/{name}', iou, session.step)
    is_best = scores['mIoU'] > session.best
    if is_best:
        session.best = scores['mIoU']
    return is_best


def draw_bases(session, writer: SummaryWriter) -> None:
    """Write to TensorBoard how much each basis was used in the last batch.

    The histogram is of the bases' shares of the pixels times K: 1 is an even share, a
    basis near 0 is dead. `unused` counts those with less than a hundredth of it.
    """
    for name, module in session.model.named_modules():
        if isinstance(module, EMAU):
            shares = (module.usage * len(module.usage)).cpu()      # (k,)
            writer.add_histogram(f'bases/{name}: share of the pixels, 1 is even',
                                 shares.numpy(), session.step, bins=30)
            writer.add_scalar('bases/unused', int((shares < 0.01).sum()), session.step)
            writer.add_scalar('bases/largest share', shares.max().item(), session.step)


def draw_samples(session, writer: SummaryWriter, info: dict, images: Tensor,
                 labels: Tensor, logits: Tensor) -> None:
    """Write input, truth and prediction of up to three samples to TensorBoard."""
    upsampled = network.upsample(logits[:3], images.shape[2:],
                                 session.model.align_corners)
    for i, prediction in enumerate(upsampled.argmax(1).byte().cpu()):
        row = np.concatenate([
            images[i].permute(1, 2, 0).numpy(),
            drawing.paint(labels[i].numpy(), info['palette']),
            drawing.paint(prediction.numpy(), info['palette'])], 1)
        writer.add_image(f'input, truth, prediction/{i}', row, session.step,
                         dataformats='HWC')
