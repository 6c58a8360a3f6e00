"""How a run begins: resumed, from another checkpoint, from ImageNet weights.

    python train.py INIT_FROM=runs/coco/final.pth LOG_DIR=runs/voc
"""
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import config
import distributed
import loader
import settings
from config import UserError
from dataset import SegmentationDataset
from logger import Logger, describe_environment, write_text
from training import memory, weights


class Start(NamedTuple):
    """Where a run begins."""
    stem: str                # of the backbone, 'auto' resolved
    lines: list[str]         # for the log
    resumed: dict | None     # content of the run's own checkpoint
    init_from: dict | None   # content of the checkpoint INIT_FROM
    source: str | Path       # file of that content, or ImageNet weights, '' for none


def find_start() -> Start:
    """Find where the run of settings begins, before the network is built.

    Raises:
        UserError: for missing or damaged files, or settings that differ from those of
            the run that would be resumed.
    """
    content, path, lines = checkpoint.load_newest(settings.LOG_DIR)
    if content:
        lines = lines + compare_settings(content['settings'], path)
        stem = content['settings'].get('STEM', settings.STEM)
        return Start(stem, lines, content, None, path)
    if settings.INIT_FROM:
        if not Path(settings.INIT_FROM).is_file():
            raise UserError(f'INIT_FROM={settings.INIT_FROM} is not there: train what '
                            'makes it, or give another file')
        content = checkpoint.load(settings.INIT_FROM)
        stem = settings.STEM
        if stem == 'auto':
            stem = content['settings'].get('STEM', 'auto')
        return Start(stem, lines, None, content, settings.INIT_FROM)
    stem, source, line = weights.choose_weights(
        settings.PRETRAINED, settings.STEM, settings.N_LAYERS, settings.MODEL_DIR)
    return Start(stem, [*lines, line], None, None, source)


def check_same_start(start: Start, group: distributed.ProcessGroup) -> None:
    """Check that all ranks begin at the same step.

    Raises:
        UserError: if they do not read the same checkpoints.
    """
    step = start.resumed['step'] if start.resumed else -1
    highest, lowest = group.all_reduce_max(step), -group.all_reduce_max(-step)
    if lowest != highest:
        raise UserError('the ranks do not read the same checkpoints in LOG_DIR='
                        f'{settings.LOG_DIR}: give a folder that all hosts share')


def compare_settings(recorded: dict[str, Any], path: Path) -> list[str]:
    """Return a line for each setting that differs from the run that is resumed.

    Raises:
        UserError: if there are any, unless RESUME=force.
    """
    lines = []
    for name, value in config.snapshot().items():
        if name not in recorded or recorded[name] == value:
            continue
        if name not in config.RESUME_IGNORED and (name, value) != ('STEM', 'auto'):
            lines.append(f'{name} = {recorded[name]!r} then, {value!r} now')
    if lines and settings.RESUME != 'force':
        raise UserError(f'{path} was trained with other settings ({"; ".join(lines)}): '
                        'set them back, go on all the same with RESUME=force, or start '
                        f'over after `sh clean.sh {settings.LOG_DIR}`')
    return lines


def load_start(session, start: Start, info: dict) -> list[str]:
    """Load the weights that a run begins with.

    Args:
        session: a train.Session.
        start: of find_start.
        info: of the data set.

    Returns:
        Lines for the log.
    """
    if start.resumed:
        return resume(session, start)
    if start.init_from:
        return load_network(session, start, info)
    session.weights = start.lines[-1]
    if start.source:
        with session.group.local_main_first():  # one rank of a host downloads
            return [weights.load_weights(session.model.backbone, start.source,
                                         settings.MODEL_DIR)]
    forgotten = 1 - (1 - settings.BN_MOM) ** settings.ITER_MAX
    if settings.BN_MOM < 0.1 and forgotten < 0.9:
        return [f'note: with BN_MOM={settings.BN_MOM} the running statistics forget '
                f'only {forgotten:.0%} of their initial values in ITER_MAX='
                f'{settings.ITER_MAX} steps: set BN_MOM=0.1 to train from scratch']
    return []


def resume(session, start: Start) -> list[str]:
    """Load weights, optimizer and step of a run's own checkpoint."""
    session.load_state_dict(start.resumed, start.source)
    lines = [f'resuming {start.source} after step {session.step}']
    precision = start.resumed['run']['precision']
    if precision != session.precision:
        lines.append(f'precision is {session.precision} now, it was {precision}')
    return lines


def load_network(session, start: Start, info: dict) -> list[str]:
    """Load all weights of the checkpoint INIT_FROM; return lines for the log."""
    content, lines = start.init_from, []
    try:
        lines += checkpoint.reorder_classes(content, info['classes'], start.source)
    except UserError:
        lines.append(f'note: {start.source} was trained on other classes, so its '
                     'classifier is no more than an initialisation')
    checkpoint.load_net(session.model, content['net'], start.source)
    for name in checkpoint.ARCHITECTURE:
        there, here = content['settings'].get(name), getattr(settings, name)
        if there is not None and there != here:
            lines.append(f'note: {name} was {there!r} there, it is {here!r} here')
    session.weights = f'network: all weights of {start.source}'
    return [*lines, session.weights]


# -- the head of the log ---------------------------------------------------------------

def describe_ranks(session, start: Start) -> list[str]:
    """Record the environment in the session; return lines for the log."""
    group, device, lines = session.group, session.device, []
    session.environment = describe_environment(device)
    if start.resumed:
        before = start.resumed['run']['environment'].get('source')
        now = session.environment['source']
        if before != now:
            lines.append(f'note: the source was {before} then, it is {now} now')
    # Every rank takes part in these exchanges.
    own = distributed.pick_precision(device)
    precisions = sorted(set(group.all_gather_text(own)))
    if len(precisions) > 1:
        lines.append(f'note: the ranks would take {" and ".join(precisions)}, so all '
                     f'of them compute in {session.precision}')
    devices = group.all_gather_text(f'{session.environment["host"]} {device} '
                                    f'({session.environment["device"]})')
    lines.append(f'ranks: {", ".join(devices)}')
    return lines


def write_head(session, data: SegmentationDataset, log: Logger, lines: list[str]
               ) -> None:
    """Write settings, environment, data and memory at the head of the log."""
    for leftover in log.folder.glob('*.pth.tmp'):
        leftover.unlink()
    text, s = config.settings_text(), settings
    write_text(log.folder / 'settings.txt', text)
    log.info(text, is_shown=False)
    log.log_settings(config.snapshot(), text)
    for name, value in session.environment.items():
        log.info(f'{name}: {value}')
    world_size = session.group.world_size
    h, w = loader.crop_size()
    gigabytes = memory.estimate_memory(session.n_classes, session.precision, world_size)
    log.info(f'data: {s.DATASET}, {len(data)} images of list {data.split} in '
             f'{data.root}, masks in {data.masks}')
    log.info(f'precision: {session.precision}; batch: {s.BATCH_SIZE} crops of {h}x{w}, '
             f'{s.BATCH_SIZE // world_size // s.ACCUMULATE} at a time on each of '
             f'{world_size} ranks; log: {s.LOG_DIR}')
    log.info(f'memory: a step takes about {gigabytes:.1f} GB on each rank')
    for line in lines:
        log.info(line)
