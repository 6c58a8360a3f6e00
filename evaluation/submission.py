"""The archive that the test server of a data set takes: predictions as PNGs.

    python eval.py VAL_SPLIT=test --submit
"""
import io
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

import config
import dataset
import settings


class Submission:
    """Writes predictions as PNGs and packs them into an archive.

    Args:
        data: the split that is predicted, all of it.
        file: the archive is FILE_submit.tar or .zip, and FILE_submit a folder for
            the PNGs.

    Raises:
        UserError: if no test server is known for the data set, or an image is listed
            twice.
    """

    def __init__(self, data: dataset.SegmentationDataset, file: Path):
        info = dataset.get_dataset_info()
        self.kind, pattern = info['server']
        if not self.kind:
            raise config.UserError('--submit: no test server is known for DATASET='
                                   f'{settings.DATASET}; voc and cityscapes have one')
        self.folder, self.images = Path(f'{file}_submit'), data.images
        self.names = [pattern.replace('{}', id.rpartition('/')[2]) for id in data.ids]
        repeated = [name for name, n in Counter(self.names).items() if n > 1]
        if repeated:
            raise config.UserError(f'--submit: {len(repeated)} names are twice in '
                                   f'{data.file}, the first is {repeated[0]}: list '
                                   'each image once')
        # The server wants the values of the masks, where they are not the classes.
        self.values = np.arange(256, dtype=np.uint8)
        for value, label in info['map'].items():
            self.values[label] = value
        self.palette = None if info['map'] else info['palette']
        self.n_classes = len(info['classes'])

    def write(self, index: int, prediction: Tensor) -> None:
        """Write the PNG of image `index` of the split: prediction (h, w), classes."""
        image = Image.fromarray(self.values[prediction.cpu().numpy()])
        if self.palette:
            image.putpalette(self.palette)
        path = self.folder / self.names[index]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        except OSError as error:
            raise config.UserError(f'cannot write into {self.folder} ({error}): make '
                                   'room or set another LOG_DIR') from error

    def pack(self) -> Path:
        """Put the PNGs of all ranks into the archive, check it and return its path."""
        path = Path(f'{self.folder}.{self.kind}')
        temporary = Path(f'{path}.tmp')
        if self.kind == 'tar':
            with tarfile.open(temporary, 'w') as archive:
                for name in self.names:
                    archive.add(self.folder / name, name)
        else:
            with zipfile.ZipFile(temporary, 'w') as archive:
                for name in self.names:
                    archive.write(self.folder / name, name)
        self.check(temporary)
        os.replace(temporary, path)
        return path

    def check(self, path: Path) -> None:
        """Read the archive as the server does: the names, sizes, modes and values.

        Raises:
            RuntimeError: for a file that the server would refuse.
        """
        files = read_archive(path, self.kind)
        if sorted(files) != sorted(self.names):
            raise RuntimeError(f'{path} has {len(files)} results for '
                               f'{len(self.names)} images')
        mode, values = 'P' if self.palette else 'L', self.values[:self.n_classes]
        for name, image_path in zip(self.names, self.images, strict=True):
            with (Image.open(io.BytesIO(files[name])) as result,
                  Image.open(image_path) as image):
                is_right = result.size == image.size and result.mode == mode
                if not (is_right and np.isin(np.asarray(result), values).all()):
                    raise RuntimeError(f'{name} in {path} has another size, mode or '
                                       'value than the server wants')


def read_archive(path: Path, kind: str) -> dict[str, bytes]:
    """Return the files in an archive, tar or zip, by their names."""
    if kind == 'tar':
        with tarfile.open(path) as archive:
            return {member.name: archive.extractfile(member).read()
                    for member in archive}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
