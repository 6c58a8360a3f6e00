r"""Where the files of a data set come from: archives, folders and downloads.

    sources = Sources('voc', ['VOCtrainval.tar', 'SBD'], Path('data/voc'))
    images = sources.find(r'JPEGImages/([^/]+)\.jpg$')         # id -> path

Archives are unpacked once into ROOT/unpacked, downloads lie in ROOT/archives. Both get
their names when they are complete.
"""
import json
import os
import re
import shutil
import socket
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path

from config import UserError
from logger import lock_folder, write_text

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError,
          RuntimeError, NotImplementedError)  # the last two of encrypted zips
OURS = ('unpacked', 'archives')  # folders in the root that hold no data set


def unpack(archive: Path, where: Path) -> Path:
    """Unpack a tar or zip into where/<its name>, unless that was done before.

    Raises:
        UserError: if the archive is damaged, has a member outside of its folder, or
            the disk is full; nothing of it is left then.
    """
    target, mark = where / archive.name, where / f'{archive.name}.json'
    state = json.dumps([archive.stat().st_size, archive.stat().st_mtime_ns])
    if target.is_dir() and mark.exists() and mark.read_text() == state:
        return target
    print(f'unpacking {archive} into {target}', flush=True)
    part = where / f'{archive.name}.tmp'
    try:
        for old in (part, target):
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(part)  # zipfile keeps all members inside of `part`
        else:
            unpack_tar(archive, part)
        os.replace(part, target)
        write_text(mark, state)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f'cannot unpack {archive} into {where} ({error}): make '
                            'room, or give another --root') from error
        raise UserError(f'{archive} is cut off or no sound archive ({error}; '
                        f'{archive.stat().st_size} bytes): get it again') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def unpack_tar(archive: Path, folder: Path) -> None:
    """Unpack the plain files of a tar, compressed or not; links are left out."""
    def keep_plain_files(member, path):
        return tarfile.data_filter(member, path) if member.isfile() else None

    if not hasattr(tarfile, 'data_filter'):
        raise UserError('this Python cannot unpack archives safely: Python 3.10.12 or '
                        f'later is expected, or unpack {archive} by hand')
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter=keep_plain_files)
        opened.fileobj.seek(opened.offset)
        if opened.fileobj.read(512) != bytes(512):  # tarfile does not look for the end
            raise tarfile.ReadError('it ends in the middle')


def download(file: Path) -> None:
    """Fetch an archive that torchvision knows, unless it exists."""
    from torchvision.datasets import SBDataset, utils, voc  # as slow as torch itself
    known = {SBDataset.filename: (SBDataset.url, SBDataset.md5)}
    for year in ('2010', '2012'):
        entry = voc.DATASET_YEAR_DICT[year]
        known[entry['filename']] = entry['url'], entry['md5']
    if file.exists():
        return
    url, md5 = known[file.name]
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        utils.download_url(url, file.parent, f'{file.name}.part', md5)
    except (OSError, HTTPException, ValueError, RuntimeError) as error:
        raise UserError(f'could not fetch {url} ({error}): try again, or get it by '
                        'other means and give it with --archive') from error
    os.replace(f'{file}.part', file)


class Sources:
    """The files that a data set is made from; the root is locked.

    Files of what was given come first, then of what was unpacked before, then of the
    root. The name of a file begins with that of the folder that was given.

    Args:
        name: of the data set, for the messages.
        given: archives, folders and lists.
        root: folder of the data set.
        fetch: names of archives to download, unless they were given.
        skip: pattern of names that belong to another data set.
    """

    def __init__(self, name: str, given: Iterable[str], root: Path,
                 fetch: Iterable[str] = (), skip: str = '$^'):
        self.advice = (f'give with --archive what `python prepare.py {name} --help` '
                       'lists')
        paths, where = [Path(path) for path in given], root / 'unpacked'
        for path in paths:
            if not path.exists():
                raise UserError(f'--archive {path} does not exist: give an archive, or '
                                'the folder it was unpacked into')
        self.lock = lock_folder(root, '--root')
        for file in sorted({*fetch} - {path.name for path in paths}):
            paths.append(root / 'archives' / file)
            download(paths[-1])
        for i, path in enumerate(paths):
            if path.is_file() and path.suffix.lower() not in ('.txt', '.json'):
                paths[i] = unpack(path, where)
        paths += [path for path in sorted(where.glob('*'))
                  if path.is_dir() and path.suffix != '.tmp' and path not in paths]
        self.files = [(name, path) for folder in (*paths, root)
                      for name, path in list_files(folder) if not re.search(skip, name)]

    def find(self, pattern: str) -> dict[str, Path]:
        """Return group 1 of the pattern -> the first file whose name fits."""
        found = {}
        for name, path in self.files:
            if match := re.search(pattern, name):
                found.setdefault(match[1], path)
        return found

    def read_lists(self, pattern: str, *needed: str) -> dict[str, list[str]]:
        """Return name -> ids of each list whose file fits the pattern."""
        lists = {name: path.read_text(encoding='utf-8-sig', errors='replace').split()
                 for name, path in self.find(pattern).items()}
        if not set(needed) <= set(lists):
            raise UserError(f'there are no lists {".txt and ".join(needed)}.txt in '
                            f'what was given: {self.advice}')
        return lists


def list_files(given: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of each file below a folder, or of a file itself."""
    if given.is_file():
        yield given.name, given
    for folder, folders, files in os.walk(given, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = [name for name in sorted(folders)  # without links in a circle
                      if name not in OURS
                      and not here.is_relative_to(Path(folder, name).resolve())]
        inner = Path(given.resolve().name, Path(folder).relative_to(given))
        for name in sorted(files):
            yield (inner / name).as_posix(), Path(folder, name)
