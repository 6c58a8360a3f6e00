r"""Where the files of a data set come from, and how new ones are written.

    sources = Sources(['VOCtrainval.tar', 'SBD'], Path('data/voc'))
    images = sources.find(r'JPEGImages/([^/]+)\.jpg$')         # id -> path

Archives are unpacked once into ROOT/unpacked, downloads lie in ROOT/archives. A file
appears under its final name when it is whole, and one that is there is kept.
"""
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPException
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

import runtime
from preparation import masks

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError,
          RuntimeError, NotImplementedError)  # the last two of encrypted zips
OURS = ('unpacked', 'archives')  # folders in the root that hold no data set
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


# -- archives --------------------------------------------------------------------------

def members(archive: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Yield (name, function that opens it) of each file in a tar or zip."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for member in tqdm(opened.infolist(), f'unpacking {archive.name}',
                               unit='file', leave=False, disable=None):
                if not member.is_dir():
                    yield member.filename, functools.partial(opened.open, member)
        return
    with (open(archive, 'rb') as raw, tarfile.open(fileobj=raw) as opened,
          tqdm(total=archive.stat().st_size, desc=f'unpacking {archive.name}', unit='B',
               unit_scale=True, leave=False, disable=None) as bar):
        for member in opened:
            bar.update(raw.tell() - bar.n)
            if member.isfile():
                yield member.name, functools.partial(opened.extractfile, member)
        opened.fileobj.seek(opened.offset)  # a sound end is a block of zeros
        if opened.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError('it ends in the middle')


def unpack(archive: Path, where: Path) -> Path:
    """Unpack an archive into a folder of its name, unless it is there already.

    Raises:
        ValueError, OSError: in a sentence, where the archive is damaged, cut off, or
            has a member that would land outside, or the disk does not take it; nothing
            is left of it then.
    """
    target, mark = where / archive.name, where / f'{archive.name}.json'
    state = [archive.stat().st_size, archive.stat().st_mtime_ns]
    if target.is_dir() and mark.exists() and json.loads(mark.read_text()) == state:
        return target
    print(f'unpacking {archive} into {target}', flush=True)
    part = where / f'{archive.name}.tmp'
    try:
        for old in (part, target):
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
        for name, opener in members(archive):
            parts = PurePosixPath(name.replace('\\', '/')).parts
            if '..' in parts or '/' in parts or any(':' in p for p in parts):
                raise ValueError(f'{archive} is refused: its member {name} would land '
                                 'outside of the folder it is unpacked into')
            file = part.joinpath(*parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            with opener() as source, open(file, 'wb') as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        os.replace(part, target)
        runtime.write_text(mark, json.dumps(state))
    except BROKEN as error:
        if getattr(error, 'errno', None) in OF_THE_DISK:
            raise OSError(f'cannot unpack {archive} into {where} ({error}): make room, '
                          'or give another --root') from error
        raise ValueError(f'{archive} is cut off or no sound archive ({error}; '
                         f'{archive.stat().st_size} bytes): get it again') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def download(url: str, file: Path, kind: str, digest: str, otherwise: str) -> Path:
    """Fetch a file unless it is there; it gets its name when its content is right.

    Args:
        kind: of the digest, md5 or sha256.
        digest: of the content, or how it begins.
        otherwise: what to do where it cannot be had.

    Raises:
        OSError: in a sentence, where it cannot be fetched or is not what it should be.
    """
    from torch.hub import download_url_to_file
    if file.exists():
        print(f'{file} is there and kept')
        return file
    print(f'fetching {url} to {file}', flush=True)
    part = file.with_name(f'{file.name}.part')
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        found, size = hashlib.new(kind), part.stat().st_size
        with open(part, 'rb') as content:
            while chunk := content.read(1 << 20):
                found.update(chunk)
        if not found.hexdigest().startswith(digest):
            raise OSError(f'{size} bytes came, of {kind} {found.hexdigest()}, expected '
                          f'{digest}')
        os.replace(part, file)
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f'could not fetch {url} ({error}): {otherwise}') from error
    finally:
        part.unlink(missing_ok=True)
    return file


def addresses() -> dict[str, tuple[str, str]]:
    """Return file name -> (address, md5) of the archives that torchvision knows."""
    from torchvision.datasets import SBDataset, voc
    known = {SBDataset.filename: (SBDataset.url, SBDataset.md5)}
    for year in ('2012', '2010'):
        facts = voc.DATASET_YEAR_DICT[year]
        known[facts['filename']] = facts['url'], facts['md5']
    return known


class Sources:
    """The files that a data set is made from.

    First what was given, then what was unpacked before, then what is in the root. A
    file's name begins with that of the folder that was given.

    Args:
        given: archives, folders and lists.
        root: folder of the data set.
        fetch: names of archives to download, unless they were given.
        not_from: pattern of names that are another data set's.
    """

    def __init__(self, given: Iterable[str | Path], root: Path,
                 fetch: Iterable[str] = (), not_from: str = '$^'):
        given, where = [Path(path) for path in given], root / 'unpacked'
        for path in given:
            if not path.exists():
                raise FileNotFoundError(f'--archive {path} is not there: give an '
                                        'archive, or the folder it was unpacked into')
        self.lock = runtime.lock(root, '--root')
        have, known = {path.name for path in given}, addresses() if fetch else {}
        given += [download(known[name][0], root / 'archives' / name, 'md5',
                           known[name][1], 'try again, or get it by other means and '
                           'give it with --archive')
                  for name in fetch if name not in have]
        given = [unpack(path, where) if is_archive(path) else path for path in given]
        given += sorted({p for p in where.glob('*') if p.is_dir()} - {*given})
        is_other = re.compile(not_from)
        self.files = [(name, path) for folder in (*given, root)
                      for name, path in list_files(folder) if not is_other.search(name)]

    def find(self, pattern: str) -> dict[str, Path]:
        """Return, for each text of the pattern's group, the first file that fits."""
        found, regex = {}, re.compile(pattern)
        for name, path in self.files:
            if match := regex.search(name):
                found.setdefault(match[1], path)
        return found

    def lists(self, pattern: str, *needed: str) -> dict[str, list[str]]:
        """Return the ids of each list whose file fits; none if a needed one lacks."""
        found = {name: path.read_text(errors='replace').split()
                 for name, path in self.find(pattern).items()}
        return found if set(needed) <= set(found) else {}


def list_files(given: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of each file below a folder, or of a file itself."""
    if given.is_file():
        yield given.name, given
    for folder, folders, files in os.walk(given, followlinks=True):
        here, ends = os.path.realpath(folder) + os.sep, {}
        for name in folders:
            ends[name] = os.path.realpath(os.path.join(folder, name)) + os.sep
        folders[:] = sorted(name for name in folders  # less what leads in a circle
                            if name not in OURS and not here.startswith(ends[name]))
        inner = Path(given.resolve().name, Path(folder).relative_to(given))
        for name in sorted(files):
            yield (inner / name).as_posix(), Path(folder, name)


def is_archive(path: Path) -> bool:
    """Tell whether to unpack a file.

    Raises:
        ValueError: for one that is called an archive and is none.
    """
    if path.is_dir() or path.suffix.lower() in ('.txt', '.json'):
        return False
    with contextlib.suppress(*BROKEN):
        if tarfile.is_tarfile(path) or zipfile.is_zipfile(path):
            return True
    raise ValueError(f'{path} is cut off or no sound archive ({path.stat().st_size} '
                     'bytes): a tar, tgz or zip is expected, a folder, or a .txt list')


# -- writing ---------------------------------------------------------------------------

def write_one(job: tuple) -> str:
    """Make one file of (source, target, convert), under its name when it is whole.

    Without `convert` the source is linked, or copied where that cannot be; else it
    turns the source, a file's bytes or a value, into a mask, or none if it is left out.

    Returns:
        What was wrong, in a sentence; '' if nothing was.
    """
    source, target, convert = job
    part, mask = target.with_name(f'{target.name}.tmp'), None
    if convert:
        is_file = isinstance(source, Path)
        try:
            mask = convert(source.read_bytes() if is_file else source)
        except Exception as error:  # scipy, Pillow, pycocotools: a dozen kinds
            return (f'{source if is_file else target} cannot be made into a mask '
                    f'({error}): get it again or mend it')
        if mask is None:
            return ''
    try:
        part.unlink(missing_ok=True)
        if convert:
            with open(part, 'wb') as file:
                masks.paint(mask).save(file, 'PNG')
        else:
            try:
                os.link(os.path.realpath(source), part)
            except OSError:
                shutil.copyfile(source, part)
        os.replace(part, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return f'cannot write {target} ({error}): make room, or give another --root'
    return ''


def start_pool() -> ProcessPoolExecutor:
    """Return processes for all cores that this one may use; they leave Ctrl-C to it."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None
    return ProcessPoolExecutor(n, get_context('spawn'), signal.signal,
                               (signal.SIGINT, signal.SIG_IGN))


def make_files(root: Path, wanted: dict[Path, tuple], get: str) -> None:
    """Say what will be written, and write what is not there yet, on all cores.

    Args:
        root: folder of the data set.
        wanted: path below root -> (source or none where there is none, convert).
        get: what to do where a source is missing.

    Raises:
        ValueError: in a sentence, where a source is missing (nothing is written then)
            or cannot be converted (what is written stays).
    """
    todo = {path: job for path, job in wanted.items() if not (root / path).exists()}
    lost = [path.as_posix() for path, (source, _) in todo.items() if source is None]
    if lost:
        raise ValueError(f'{len(lost)} of {len(wanted)} files cannot be made from what '
                         f'was given, the first is {lost[0]}: {get}')
    counts = {path.parts[0]: 0 for path in wanted}
    for path in todo:
        counts[path.parts[0]] += 1
    print(f'writing into {root}: '
          + ', '.join(f'{n} files of {folder}' for folder, n in counts.items())
          + f' (unchanged ones as links), then the lists; {len(wanted) - len(todo)} '
          'files are there and kept', flush=True)
    for folder in {(root / path).parent for path in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(source, root / path, convert) for path, (source, convert) in todo.items()]
    links = [job for job in jobs if job[2] is None]
    others = [job for job in jobs if job[2] is not None]
    with (start_pool() as pool,
          tqdm(total=len(jobs), desc=root.name, unit='file', disable=None) as bar):
        try:
            done = pool.map(write_one, others, chunksize=8) if others else ()
            for results in (map(write_one, links), done):
                for problem in results:
                    if problem:
                        raise ValueError(problem)
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_list(root: Path, split: str, entries: Iterable[str],
               counts: dict[str, int] | None = None, ours: str = '') -> str:
    """Write a list, and say so if the published one has another length.

    A list that is there is kept, unless it is a part of the new one or as we wrote it.

    Args:
        ours: digest of the list as it was written last.

    Returns:
        The digest of the new list.
    """
    entries, expected = list(dict.fromkeys(entries)), (counts or {}).get(split, 0)
    file = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    text = ''.join(f'{entry}\n' for entry in entries)
    old = file.read_text() if file.exists() else ''
    digest = hashlib.sha256(text.encode()).hexdigest()
    is_ours = ours == hashlib.sha256(old.encode()).hexdigest()
    note = f'{len(entries)} in the list'
    if expected and len(entries) != expected:
        note += f'; the published one has {expected}'
    if set(old.split('\n')) - {*entries, ''} and not is_ours:
        note += (f'; KEPT as it was, with {len(old.splitlines())} others: remove it to '
                 'have it written')
    elif set(old.splitlines()) != set(entries):
        note += f'; it had {len(old.splitlines())} before' if old else ''
        file.parent.mkdir(parents=True, exist_ok=True)
        runtime.write_text(file, text)
    print(f'{file}: {note}')
    return digest
