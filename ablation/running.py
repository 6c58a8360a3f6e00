"""Train and evaluate the folders of a study, and collect what came out.

    python ablate.py run runs/study --jobs 2

All state is in files: DIR/plan.json says what there is to do, DIR/NAME/result.json that
a folder is finished, DIR/results.json holds all results. train.py resumes by itself.
"""
import ast
import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import runtime

PLAN, RESULT, RESULTS = 'plan.json', 'result.json', 'results.json'
# Folders of the project that a copy shares or does without.
NOT_COPIED = ('data', 'models', 'docs', 'logdir', 'runs', 'predictions')
LOST = 'error: another rank has ended'  # what ranks say that did not fail themselves
GONE = 'the folder is gone: run the same `python ablate.py make` again'
ITERATE = ('ema', 'ema_mmseg')      # heads with EM iterations
STAGES = range(1, 9)                # their numbers at evaluation
PLACES = ('DATA_ROOT', 'MODEL_DIR', 'CACHE')  # say where files lie
N_POINTS = 60                       # of a curve of the loss, at most
STOPPED = (runtime.EXIT_STOPPED, runtime.EXIT_CTRL_C)
# How images are seen: scores that were got otherwise are not the folder's result.
SEEN = ('VAL_SPLIT', 'EVAL_STRIDE', 'EVAL_MODE', 'EVAL_SCALES', 'EVAL_SCALES_WIDE',
        'EVAL_FLIP', 'EVAL_WINDOW', 'EVAL_STEP', 'EVAL_IMAGES')


# -- files -----------------------------------------------------------------------------

def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in the settings.py of a folder, which is not executed.

    Raises:
        ValueError: in a sentence, where it holds more than literals.
    """
    file = folder / 'settings.py'
    try:
        body = ast.parse(file.read_text(encoding='utf-8')).body
        return {node.targets[0].id: ast.literal_eval(node.value) for node in body
                if isinstance(node, ast.Assign)}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f'{file} cannot be read ({error}): a NAME = literal a line is '
                         'expected, so put it right') from None


def differences(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not as in the base."""
    return {name: value for name, value in values.items() if base.get(name) != value}


def as_read(value: Any) -> Any:
    """Return a value as it is when it has been JSON."""
    return json.loads(json.dumps(value))


def read_plan(root: Path) -> dict[str, Any]:
    """Read what `make` wrote.

    Raises:
        FileNotFoundError, ValueError: in a sentence.
    """
    if not (root / PLAN).is_file():
        raise FileNotFoundError(f'{root} has no {PLAN}: give a folder that `python '
                                'ablate.py make` has made')
    plan = json.loads((root / PLAN).read_text(encoding='utf-8'))
    if 'sources' not in plan:
        raise ValueError(f'{root / PLAN} is of an older ablate.py: go on with that '
                         'one, or make the folders anew in another folder')
    return plan


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON, the entries of the last value a line each, so that it can be diffed.
    """
    *names, last = value
    rows = value[last]
    lines = ([f'{json.dumps(key)}: {runtime.as_json(row)}' for key, row in rows.items()]
             if isinstance(rows, dict) else [runtime.as_json(row) for row in rows])
    head = ''.join(f'{json.dumps(name)}: {runtime.as_json(value[name])},\n'
                   for name in names)
    left, right = '{}' if isinstance(rows, dict) else '[]'
    text = ',\n'.join(lines)
    runtime.write_text(path, f'{{\n{head}"{last}": {left}\n{text}\n{right}\n}}\n')


def is_there(folder: Path) -> bool:
    """Tell whether a folder that was made has not been removed."""
    return (folder / 'settings.py').is_file()


def hash_source(folder: Path) -> str:
    """Return a hash of the .py files of a folder that a copy has too.

    settings.py is left out, so folders of one source have the same hash.
    """
    files = [path for path in folder.glob('*.py') if path.name != 'settings.py']
    for path in folder.iterdir():
        if path.is_dir() and path.name not in NOT_COPIED and any(path.glob('*.py')):
            files += path.rglob('*.py')
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path)
                             for path in files):
        if not re.search(r'(^|/)[.]|__pycache__/', name):
            digest.update(f'{name}\0{path.stat().st_size}\0'.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_rows(folder: Path, kind: str = 'train') -> Iterator[dict[str, Any]]:
    """Yield the rows of a kind of a folder's log.jsonl; one half written is left out.
    """
    with contextlib.suppress(FileNotFoundError), open(
            folder / 'logdir' / 'log.jsonl', encoding='utf-8') as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row.get('kind') == kind:
                    yield row


def last_step(folder: Path) -> int:
    """Return the last step that a folder has logged, from the end of log.jsonl."""
    with contextlib.suppress(FileNotFoundError), open(
            folder / 'logdir' / 'log.jsonl', 'rb') as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
        for line in reversed(log.read().decode(errors='replace').splitlines()):
            with contextlib.suppress(ValueError):
                row = json.loads(line)  # half a line is none, or a number
                if isinstance(row, dict):
                    return row['step']
    return 0


# -- results ---------------------------------------------------------------------------

def wanted_stages(values: dict[str, Any]) -> list[int]:
    """Return the numbers of iterations to evaluate; none for a head without any."""
    if values['HEAD'] not in ITERATE:
        return []
    return sorted({*STAGES, usual_stages(values)})


def usual_stages(values: dict[str, Any]) -> int:
    """Return the number of iterations at evaluation; 0 for a head without any."""
    return (values['EVAL_STAGE_NUM'] or values['STAGE_NUM']
            if values['HEAD'] in ITERATE else 0)


def read_scores(folder: Path, values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return what eval.py wrote of the final weights, for each number of iterations."""
    found, seen = {}, as_read({name: values[name] for name in SEEN})
    for path in sorted((folder / 'logdir' / 'eval').glob('*.json')):
        scores = json.loads(path.read_text(encoding='utf-8'))
        if (Path(scores['checkpoint']).name == 'final.pth' and not scores['averaged']
                and scores['step'] == values['ITER_MAX']
                and {name: scores['settings'].get(name) for name in SEEN} == seen):
            has_stages = values['HEAD'] in ITERATE  # older folders say 3 all the same
            found[scores['stages'] if has_stages else 0] = scores
    return found


def collect(folder: Path, error: str = '') -> dict[str, Any]:
    """Return the result of a folder, small enough to be kept.

    Args:
        folder: with its logs and scores.
        error: the sentence that it failed with.
    """
    values = read_settings(folder)
    scores = {} if error else read_scores(folder, values)
    usual = scores.get(usual_stages(values), {})
    rows, seconds, before = list(read_rows(folder)), 0.0, 0
    for row in rows:
        seconds += (row['step'] - before) * values['BATCH_SIZE'] / row['images_per_s']
        before = row['step']
    environment = usual.get('environment', {})
    return {
        'source': hash_source(folder), 'error': error or None, 'step': before,
        'stages': usual_stages(values),
        'mIoU': {str(t): round(s['mIoU'], 5) for t, s in sorted(scores.items())},
        'pAcc': {str(t): round(s['pAcc'], 5) for t, s in sorted(scores.items())},
        'IoU': [x if x is None else round(x, 4) for x in usual.get('IoU', [])],
        'n_images': usual.get('n_images', 0),
        'loss': thin([(row['step'], row['loss']) for row in rows
                      if row['loss'] is not None]),
        'validation': [[row['step'], round(row['mIoU'], 5)]
                       for row in read_rows(folder, 'validation')],
        'seconds': round(seconds, 1),
        'environment': {name: environment[name] for name in
                        ('device', 'torch', 'python') if name in environment}
        | ({'precision': usual['precision']} if usual else {})}


def thin(points: list[tuple[int, float]]) -> list[list[float]]:
    """Return a curve with at most N_POINTS points, each the mean since the last one."""
    n, thinned = min(len(points), N_POINTS), []
    for i in range(n):
        part = points[i * len(points) // n:(i + 1) * len(points) // n]
        mean = sum(value for _, value in part) / len(part)
        thinned.append([part[-1][0], float(f'{mean:.4g}')])
    return thinned


def write_results(root: Path, plan: dict[str, Any]) -> None:
    """Put the results of all folders that have one into DIR/results.json.

    Where files lie on this machine is left out: the results are there to be shown.
    """
    runs = []
    for name, entry in plan['folders'].items():
        result = read_result(root / name)
        if result and is_there(root / name):
            values = as_read(read_settings(root / name))
            values = {name: value for name, value in values.items()
                      if name not in ('SEED', *PLACES)}
            source, commit = (f'files {result["source"]}',
                              plan['sources'].get(result['source']))
            runs.append({'name': name, 'seed': entry['seed'], 'serves': entry['serves'],
                         'settings': differences(values, plan['base']), **result,
                         'source': f'{commit} ({source})' if commit else source})
    write_json(root / RESULTS, {
        'scale': plan['scale'], 'recipe': plan['recipe'],
        'base': {name: plan['base'][name] for name in plan['differs']
                 if name not in PLACES},
        'n_planned': len(plan['folders']), 'runs': runs})


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a folder, none where it is not finished."""
    try:
        return json.loads((folder / RESULT).read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None


# -- one folder at work ----------------------------------------------------------------

class Job:
    """A folder that is worked on: train.py, then eval.py, each a process of its own.

    Args:
        folder: that `make` made.
        device: for DEVICE; '' leaves it to the folder's settings.py.
        n_threads: of each process, unless the environment says.
    """

    def __init__(self, folder: Path, device: str, n_threads: int):
        self.folder, self.device = folder, device
        self.values = read_settings(folder)
        self.environment = dict(os.environ)
        if n_threads:
            self.environment.setdefault('OMP_NUM_THREADS', str(n_threads))
        self.process, self.began_at = None, 0
        self.is_evaluated = self.is_waiting = self.is_told = False
        self.is_done, self.is_stopped, self.is_gone = False, False, False
        self.error = ''

    def advance(self, is_stopping: bool) -> bool:
        """Start what comes next if nothing runs; tell whether the folder is settled.

        Then `is_done`, or there is an `error`, or `is_stopped`: not finished, and not
        by a fault of its own; or `is_gone`.

        Args:
            is_stopping: start nothing more.
        """
        if not is_there(self.folder) and not self.is_gone:  # removed, or moved away
            self.is_gone = True
            self.send(signal.SIGTERM)
        if self.process is not None:
            status = self.process.poll()
            if status is None:
                return False
            self.process = None
            if status and not self.is_gone:
                self.is_stopped = is_stopping or status in STOPPED or status < 0
                self.error = '' if self.is_stopped else self.last_words()
                return True
        if self.is_gone:
            return True
        if is_stopping:
            self.is_stopped = True
            return True
        stages = wanted_stages(self.values) or [usual_stages(self.values)]
        if not (self.folder / 'logdir' / 'final.pth').exists():
            if is_free(self.folder / 'logdir'):
                self.start('train.py')
            elif not self.is_waiting:  # one whose `run` was killed is saving
                self.is_waiting = True
                say(f'{self.folder.name}: waits for the train.py that writes there')
        elif set(stages) <= set(read_scores(self.folder, self.values)):
            self.is_done = True
        elif self.is_evaluated:
            self.error = 'eval.py has written no scores of the final weights'
        else:
            self.is_evaluated = True
            several = ','.join(map(str, wanted_stages(self.values)))
            self.start('eval.py', *(['--stages', several] if several else []))
        return self.is_done or bool(self.error)

    def start(self, script: str, *words: str) -> None:
        """Start a script of the folder; what it prints goes to run.log."""
        words = [script, *words, *([f'DEVICE={self.device}'] if self.device else [])]
        with open(self.folder / 'run.log', 'ab') as log:
            log.write(f'$ python {" ".join(words)}\n'.encode())
            log.flush()
            self.began_at = log.tell()
            # A session of its own: Ctrl-C reaches it once, from us.
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=self.folder, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=follow_parent())

    def last_words(self) -> str:
        """Return the sentence of the error that ended a process: the first one."""
        with open(self.folder / 'run.log', 'rb') as log:
            log.seek(self.began_at)
            lines = log.read().decode(errors='replace').strip().splitlines()
        lines = [line for line in lines if line.strip() and line != LOST]
        said = [line[7:] for line in lines if line.startswith('error: ')]
        return [*said, *lines[-1:], 'it ended without a word'][0]

    def send(self, number: int) -> None:
        """Pass a signal on."""
        if self.process is not None:
            self.process.send_signal(number)


def follow_parent():
    """Return what a child does first, so that it is stopped when this process dies.

    Linux only: there train.py gets SIGTERM, saves and ends, even after our kill -9.
    """
    if not sys.platform.startswith('linux'):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def follow():
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(runtime.EXIT_STOPPED)
    return follow


def is_free(folder: Path) -> bool:
    """Tell whether no train.py writes into a LOG_DIR."""
    if not (folder / 'lock').exists():
        return True
    try:
        runtime.lock(folder).close()
    except ValueError:
        return False
    return True


# -- all of them -----------------------------------------------------------------------

class Study:
    """What has been done in a folder of folders, and what can be done next.

    Args:
        root: folder with a plan; folders that `make` adds meanwhile are taken too.
        is_again: try again what has failed.
    """

    def __init__(self, root: Path, is_again: bool):
        self.root, self.is_again = root, is_again
        self.tried, self.failed = set(), {}  # names; name -> sentence
        self.names, self.gone = [], []  # of the folders, and of those that are gone
        self.lengths = {}  # name -> ITER_MAX
        self.read()

    def read(self) -> None:
        """Read the plan anew, and see which folders are there."""
        self.plan, before = read_plan(self.root), self.gone
        self.names, self.gone = [], []
        for name in self.plan['folders']:
            if not is_there(self.root / name):
                self.gone.append(name)
                if name not in before:
                    say(f'{name}: skipped, {GONE}')
                continue
            self.names.append(name)
            if name not in self.lengths:
                self.lengths[name] = read_settings(self.root / name)['ITER_MAX']

    def is_done(self, name: str) -> bool:
        """Tell whether a folder is finished."""
        result = read_result(self.root / name)
        return bool(result) and not result['error']

    def next(self, busy: set[str]) -> str:
        """Return a folder that can be started; '' where there is none now.

        A folder that failed before its training began, which is when train.py opens its
        log, is tried each time: what it was made with was wrong, not what it computed.
        """
        self.read()
        for name in self.names:
            if name in self.tried or name in busy or self.is_done(name):
                continue
            result = read_result(self.root / name)
            has_begun = (self.root / name / 'logdir' / 'log.txt').exists()
            if result and has_begun and not self.is_again:
                self.failed[name] = result['error']
                self.tried.add(name)
                continue
            after = self.plan['folders'][name]['after']
            if after and not self.is_done(after):
                continue
            return name
        return ''

    def settle(self, job: Job) -> None:
        """Write down how a folder ended."""
        name = job.folder.name
        if not job.is_gone:  # it may be made again
            self.tried.add(name)
        if job.is_gone:
            pass  # `read` tells
        elif job.is_stopped:
            self.failed[name] = 'it was stopped; the same command goes on'
        else:
            result = collect(job.folder, job.error)
            runtime.write_text(job.folder / RESULT, runtime.as_json(result) + '\n')
            if job.error:
                self.failed[name] = job.error
        write_results(self.root, self.plan)

    def count(self) -> tuple[int, int, int]:
        """Return how many folders are settled, the steps done, and all steps to do."""
        n_settled = n_steps = n_all = 0
        for name in self.names:
            is_settled = name in self.tried or self.is_done(name)
            done = last_step(self.root / name)
            n_settled += is_settled
            n_steps += done
            n_all += done if is_settled else self.lengths[name]
        return n_settled, n_steps, n_all


def run(root: Path, n_jobs: int, devices: list[str], is_again: bool) -> int:
    """Train and evaluate every folder that is not finished.

    Args:
        root: folder of `make`.
        n_jobs: folders at a time.
        devices: they are dealt out to the jobs in turn; none leaves it to settings.py.
        is_again: try again what has failed.

    Returns:
        The exit status: 1 where a folder failed, that of the signal if one came.

    Raises:
        ValueError, OSError: in a sentence.
    """
    study, signals = Study(root, is_again), runtime.Signals()
    lock = runtime.lock(root, 'DIR')
    n_cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else
               os.cpu_count() or 1)
    n_threads = max(n_cores // n_jobs, 1) if n_jobs > 1 else 0
    free = [devices[i % len(devices)] if devices else '' for i in range(n_jobs)]
    tqdm.monitor_interval = 0  # no thread: the children are forked
    n_settled, n_steps, n_all = study.count()
    bar = tqdm(total=n_all, initial=n_steps, unit='step', disable=None,
               dynamic_ncols=True, smoothing=0)
    say(f'{root}: {len(study.names)} folders, {n_settled} finished; {n_jobs} at a time')
    jobs, looked_at, began, before = [], 0.0, time.time(), n_steps
    try:
        while True:
            is_stopping = bool(signals.exit_status)
            for job in list(jobs):
                if job.advance(is_stopping):
                    jobs.remove(job)
                    free.append(job.device)
                    study.settle(job)
                    n_settled, n_steps, n_all = study.count()
                    rate = (n_steps - before) / (time.time() - began)
                    left = (n_all - n_steps) / rate if rate > 0 else 0
                    say(f'{job.folder.name}: {tell(job)} ({n_settled} of '
                        f'{len(study.names)}, about {left / 60:.0f} min left)')
                    looked_at = 0.0
                elif is_stopping and not job.is_told:
                    job.is_told = True
                    job.send(signal.SIGINT if signals.exit_status ==
                             runtime.EXIT_CTRL_C else signal.SIGTERM)
            if time.time() - looked_at > 2:
                while free and not is_stopping and (
                        name := study.next({job.folder.name for job in jobs})):
                    jobs.append(Job(root / name, free.pop(0), n_threads))
                n_settled, n_steps, n_all = study.count()
                bar.total = n_all
                bar.set_description(f'{n_settled} of {len(study.names)} folders', False)
                bar.update(n_steps - bar.n)
                looked_at = time.time()
            if not jobs:
                break
            time.sleep(0.1)
    finally:
        for job in jobs:
            job.send(signal.SIGTERM)
        for job in jobs:
            if job.process:
                job.process.wait()
        bar.close()
    write_results(root, study.plan)
    lock.close()
    if signals.exit_status:
        say('stopped; the same command goes on')
        return signals.exit_status
    study.failed |= dict.fromkeys(study.gone, GONE)
    blocked = [name for name in study.names
               if name not in study.tried and not study.is_done(name)]
    for name in blocked:
        after = study.plan['folders'][name]['after']
        study.failed[name] = f'it starts from {after}, which is not finished'
    say(f'results: {root / RESULTS}')
    if study.failed:
        print(f'{len(study.failed)} of {len(study.plan["folders"])} folders are not '
              'finished; '
              '`--again` tries again those that failed on their way:', file=sys.stderr)
        for sentence in dict.fromkeys(study.failed.values()):
            print(f'  {sentence}:', *(f'    {name}' for name, its in
                                      study.failed.items() if its == sentence),
                  sep='\n', file=sys.stderr)
    return int(bool(study.failed))


def tell(job: Job) -> str:
    """Return how a folder ended, in a few words."""
    if job.is_gone or job.is_stopped:
        return 'gone' if job.is_gone else 'stopped'
    if job.error:
        return f'failed: {job.error}'
    scores = read_scores(job.folder, job.values)[usual_stages(job.values)]
    return f'mIoU {100 * scores["mIoU"]:.2f}'


def say(line: str) -> None:
    """Print a line above the bar."""
    tqdm.write(line)
    sys.stdout.flush()
