"""Train and evaluate the folders of a study, and collect the results.

    python ablate.py run runs/study --jobs 2

All state is in files, so the same command resumes: plan.json lists the folders,
result.json is written when one is finished, results.json has all of them.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import config
import logger
from ablation import folders

RESULT, RESULTS = 'result.json', 'results.json'
STAGES = range(1, 9)  # EM iterations at evaluation
N_POINTS = 60  # of a loss curve in the results, about
MISSING = 'the folder is missing: run the same `python ablate.py make` again'
STOPPED = 'stopped: the same command resumes'
LOST_RANK = 'error: another rank has ended'  # printed by ranks that did not fail first


def read_scores(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the newest scores of the final weights: EM iterations -> scores."""
    files, found = (folder / 'logdir' / 'eval').glob('*.json'), {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        scores = json.loads(file.read_text(encoding='utf-8'))
        if Path(scores['checkpoint']).name == 'final.pth':
            found[scores['stages']] = scores
    return dict(sorted(found.items()))


def read_rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of a kind in the log.jsonl of a folder."""
    path = folder / 'logdir' / 'log.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    # A script that was killed may have left half a line at the end.
    rows = [json.loads(line) for line in lines if line.endswith('}')]
    return [row for row in rows if row['kind'] == kind]


def collect(folder: Path, error: str = '') -> dict[str, Any]:
    """Collect the result of a folder from its logs and scores, or after an error."""
    values = folders.read_settings(folder)
    scores = {} if error else read_scores(folder)
    own = scores.get(folders.usual_stages(values), {})
    if not own and not error:
        error = 'there are no scores of the final weights'
    rows, seconds, step = read_rows(folder, 'train'), 0.0, 0
    for row in rows:
        seconds += (row['step'] - step) * values['BATCH_SIZE'] / row['images_per_s']
        step = row['step']
    shown = rows[::max(len(rows) // N_POINTS, 1)]
    environment = {**own.get('environment', {}), 'precision': own.get('precision')}
    return {
        'error': error or None, 'step': step, 'stages': folders.usual_stages(values),
        'mIoU': {str(t): round(s['mIoU'], 5) for t, s in scores.items()},
        'pAcc': {str(t): round(s['pAcc'], 5) for t, s in scores.items()},
        'IoU': [None if x is None else round(x, 4) for x in own.get('IoU', [])],
        'n_images': own.get('n_images', 0),
        'loss': [[row['step'], float(f'{row["loss"]:.4g}')] for row in shown
                 if row['loss'] is not None],
        'validation': [[row['step'], round(row['mIoU'], 5)]
                       for row in read_rows(folder, 'validation')],
        'seconds': round(seconds, 1),
        'environment': {key: environment.get(key)
                        for key in ('device', 'torch', 'python', 'precision')}}


def read_result(folder: Path) -> dict[str, Any]:
    """Return the result of a folder; it is empty before its end."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def write_results(root: Path, plan: dict[str, Any]) -> None:
    """Write the results of all folders into DIR/results.json, one on each line."""
    runs = []
    for name, entry in plan['folders'].items():
        result = read_result(root / name)
        if result:
            changed = folders.differences(folders.read_settings(root / name),
                                          {**plan['base'], 'SEED': entry['seed']})
            runs.append({'name': name, 'seed': entry['seed'], 'serves': entry['serves'],
                         'settings': changed, 'source': entry.get('source', ''),
                         **result})
    head = logger.to_json({
        'scale': plan['scale'], 'recipe': plan['recipe'],
        'base': {name: plan['base'][name] for name in plan['differs']
                 if name not in ('DATA_ROOT', 'MODEL_DIR')},  # of this machine
        'n_planned': len(plan['folders'])})
    lines = ',\n'.join(logger.to_json(run) for run in runs)
    logger.write_text(root / RESULTS, f'{head[:-1]},\n"runs": [\n{lines}\n]}}\n')


class Job:
    """train.py or eval.py at work in a folder; its output is appended to run.log."""

    def __init__(self, folder: Path, script: str, device: str, environment: dict):
        self.folder, self.script, self.device = folder, script, device
        words = [script]
        n_stages = folders.usual_stages(folders.read_settings(folder))
        if script == 'eval.py' and n_stages:
            words += ['--stages', ','.join(map(str, sorted({n_stages, *STAGES})))]
        if device:
            words.append(f'DEVICE={device}')
        with open(folder / 'run.log', 'ab') as log:
            log.write(f'$ python {" ".join(words)}\n'.encode())
            log.flush()
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True)  # Ctrl-C reaches `run` only, which passes it on

    def has_trained(self) -> bool:
        """Return whether this was a training that has finished."""
        return (self.script == 'train.py' and self.process.returncode == 0
                and (self.folder / 'settings.py').is_file())

    def find_error(self) -> str:
        """Return how the script failed: its first `error: ` or its last line; or ''."""
        status = self.process.returncode
        if status == 0:
            return ''
        if status < 0 or status in (config.EXIT_STOPPED, config.EXIT_CTRL_C):
            return STOPPED
        output = (self.folder / 'run.log').read_bytes()[self.log_start:]
        lines = [line for line in output.decode(errors='replace').splitlines()
                 if line.strip() and line != LOST_RANK]
        for line in lines:
            if line.startswith('error: '):
                return line.removeprefix('error: ')
        return lines[-1] if lines else 'it ended without a message'


def start_job(folder: Path, device: str, environment: dict) -> Job:
    """Start train.py in a folder, or eval.py if the training has finished.

    Raises:
        UserError: if a train.py still works there, as after a `run` that was killed, or
            the folder was removed.
    """
    if (folder / 'logdir' / 'final.pth').exists():
        return Job(folder, 'eval.py', device, environment)
    folders.read_settings(folder)
    logger.lock_folder(folder / 'logdir').close()
    return Job(folder, 'train.py', device, environment)


def end_job(job: Job) -> tuple[str, str]:
    """Write the result of a folder, and return its outcome and its error.

    If it was stopped, or failed before the training began (as without data), there is
    no result: the next `run` tries again.
    """
    if not (job.folder / 'settings.py').is_file():
        return MISSING, MISSING
    error = job.find_error()
    has_begun = (job.folder / 'logdir' / 'log.txt').exists()
    if error and (error == STOPPED or not has_begun):
        return error, error
    result = collect(job.folder, error)
    logger.write_text(job.folder / RESULT, logger.to_json(result) + '\n')
    if result['error']:
        return f'failed: {result["error"]}', result['error']
    return f'mIoU {100 * result["mIoU"][str(result["stages"])]:.2f}', ''


def run(root: Path, n_jobs: int, devices: list[str], is_again: bool) -> int:
    """Train and evaluate every folder of a study that is not finished.

    Args:
        n_jobs: folders at a time.
        devices: the jobs take them in turn; none: that of settings.py.
        is_again: retry the folders that failed.

    Returns:
        The exit status: 1 if a folder is not finished.

    Raises:
        UserError: if the study cannot be read, or another process runs it.
    """
    plan = folders.read_plan(root)
    lock = logger.lock_folder(root, 'DIR')
    todo, failed = select_folders(root, plan, is_again)
    print(f'{root}: {len(plan["folders"])} folders, {len(todo)} to do, {n_jobs} at a '
          'time; their output goes to run.log in each', flush=True)
    devices = devices or ['']
    devices = [devices[i % len(devices)] for i in range(n_jobs)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(config.EXIT_STOPPED))
    try:
        failed |= run_folders(root, plan, todo, devices)
    finally:
        write_results(root, plan)
        lock.close()
    print(f'results: {root / RESULTS}')
    if failed:
        print(f'{len(failed)} of {len(plan["folders"])} folders are not finished; '
              '--again retries those that failed:', file=sys.stderr)
    for name, error in failed.items():
        print(f'  {name}: {error}', file=sys.stderr)
    return 1 if failed else 0


def select_folders(root: Path, plan: dict[str, Any], is_again: bool
                   ) -> tuple[list[str], dict[str, str]]:
    """Return the folders to run, and the errors of those that are left out."""
    todo, failed = [], {}
    for name in plan['folders']:
        result = read_result(root / name)
        if not (root / name).exists():
            failed[name] = MISSING
        elif not result or (result['error'] and is_again):
            todo.append(name)
        elif result['error']:
            failed[name] = result['error']
    return todo, failed


def run_folders(root: Path, plan: dict[str, Any], todo: list[str], devices: list[str]
                ) -> dict[str, str]:
    """Run folders, one on each device at a time, and return the errors by name."""
    jobs, failed, start, n_all = [], {}, time.monotonic(), len(todo)
    environment = dict(os.environ)
    if len(devices) > 1:  # they share the cores
        n_threads = max((os.cpu_count() or 1) // len(devices), 1)
        environment.setdefault('OMP_NUM_THREADS', str(n_threads))
    try:
        while todo or jobs:
            while todo and devices:
                folder, device = root / todo.pop(0), devices.pop(0)
                try:
                    jobs.append(start_job(folder, device, environment))
                except config.UserError as error:
                    failed[folder.name] = str(error)
                    devices.append(device)
            time.sleep(0.1)
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                if job.has_trained():
                    jobs.append(Job(job.folder, 'eval.py', job.device, environment))
                    continue
                devices.append(job.device)
                outcome, error = end_job(job)
                if error:
                    failed[job.folder.name] = error
                write_results(root, plan)
                n_left = len(todo) + len(jobs)
                minutes = (time.monotonic() - start) / 60 * n_left / (n_all - n_left)
                print(f'{job.folder.name}: {outcome} ({n_left} left, about '
                      f'{minutes:.0f} min)', flush=True)
    finally:
        stop_jobs(jobs)
    return failed


def stop_jobs(jobs: list[Job]) -> None:
    """Let the scripts that still run save and end, as after Ctrl-C."""
    for job in jobs:
        print(f'{job.folder.name}: stopping {job.script}', flush=True)
        job.process.terminate()
    for job in jobs:
        job.process.wait()
