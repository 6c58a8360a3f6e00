"""Write a network for use without this folder: by torch.export, or as ONNX.

    python predict.py picture.jpg --export model.pt2 CHECKPOINT=logdir/final.pth

    program = torch.export.load('model.pt2').module()       # torch is all that it needs
    probabilities = program(images)     # (b, 3, h, w) uint8 -> (b, classes, h, w)
"""
import contextlib
import copy
import importlib.util
import io
import json
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inference

AXES = {0: 'batch', 2: 'height', 3: 'width'}  # of images, what may be of any size
# Before 2.9 the exporter of torch that is new there fixed the number of pixels.
IS_NEW_ONNX = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 9)


class Deployed(nn.Module):
    """A network as it is used elsewhere: the bytes of images in, their classes out.

    Sides are symbols where it is exported: it is written so that torch and ONNX need
    not know anything about them.

    Args:
        net: a Segmenter in evaluation mode, float32, its batch norms folded.
        labels: return the most probable classes instead of all probabilities.
    """

    def __init__(self, net: nn.Module, labels: bool = False):
        super().__init__()
        self.net, self.labels = net, labels
        self.eval()  # itself too: torch.onnx.export puts all back into its mode

    def forward(self, images: Tensor) -> Tensor:
        """Segment images of any one size, each as inference.Predictor does.

        Args:
            images: (b, 3, h, w) uint8.

        Returns:
            (b, classes, h, w) float32 probabilities, or (b, h, w) uint8 labels.
        """
        height, width = images.shape[2:]
        bottom, right = (
            inference.padded_size(n, self.net.stride, self.net.align_corners) - n
            for n in (height, width))
        # not net.normalise: torch 2.6 cannot turn its in-place steps into ONNX
        x = (images.to(self.net.mean.dtype) - self.net.mean) / self.net.std
        logits = self.net(F.pad(x, (0, right, 0, bottom)))
        y = logits.argmax(1).to(torch.uint8) if self.labels else logits.softmax(1)
        # not y[..., :height, :width]: torch asks whether a slice is all of it, and the
        # program would be for one answer only
        for dim, n in ((-2, height), (-1, width)):
            y = y.index_select(dim, torch.arange(n, device=y.device))
        return y


def export(net: nn.Module, path: str | Path, picture: Tensor, metadata: dict,
           labels: bool = False) -> list[str]:
    """Write a network as a program that needs nothing of this folder, and check it.

    The file is `model.pt2` for torch.export.load, or `model.onnx`; both take (b, 3, h,
    w) uint8 of any batch and size (but a .pt2 wants 2 pixels or more on a side, and
    more than the stride if the corners are not aligned). It appears under its name when
    it has been read back and has predicted what the network does.

    Args:
        net: a Segmenter in evaluation mode, float32; it is left as it is.
        path: of the file; its suffix chooses the format.
        picture: (3, h, w) uint8, at least 2 pixels wide, to check it on.
        metadata: written into the file as JSON: classes, palette, settings ...
        labels: write a program that returns labels (b, h, w) uint8 instead of
            probabilities (b, classes, h, w) float32.

    Returns:
        Lines for the log: the file, and the largest differences to the network.

    Raises:
        ValueError, OSError: in a sentence; no file is written, and one that was there
            is as it was.
    """
    path = Path(path)
    make, read = {'.pt2': (make_program, read_program),
                  '.onnx': (make_onnx, read_onnx)}.get(path.suffix, (None, None))
    if make is None:
        raise ValueError(f'{path} has to end in .pt2 (torch.export) or .onnx')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent} for {path.name}: '
                                'make it first')
    if path.suffix == '.onnx':
        missing = [name for name in ('onnx', 'onnxscript') if not has(name)]
        if 'onnx' in missing or missing and IS_NEW_ONNX:
            raise ValueError(f'{path} needs {" and ".join(missing)}, not installed '
                             f'here: `pip install {" ".join(missing)}`, or choose a '
                             'file that ends in .pt2')
    net = inference.fold(copy.deepcopy(net).cpu().float().to(
        memory_format=torch.contiguous_format))
    net.aux = None  # is not asked at inference
    with torch.no_grad():
        n = len(net(torch.zeros(1, 3, net.stride + 1, net.stride + 1)))
    if n > 1:
        raise ValueError(f'{path} can hold one number of EM iterations, but {n} are '
                         'asked for: give a single one')
    metadata = {**metadata, 'stride': net.stride, 'torch': torch.__version__,
                'output': 'labels' if labels else 'probabilities'}
    temporary = path.with_name(f'.{path.stem}.tmp{path.suffix}')
    try:
        content = make(Deployed(net, labels), metadata)
        with open(temporary, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        run, how, most = read(temporary)
        lines = [f'{path}: {metadata["output"]} of images (b, 3, h, w) uint8, '
                 f'{len(content) / 2**20:.1f} MiB']
        for view in make_views(picture.cpu(), most):
            lines.append(f'{compare(net, view, run(view))}, run by {how}')
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'could not write {path} ({error}): make room or choose another '
                      'folder') from error
    except Exception as error:  # a dozen kinds, of torch, onnx and onnxruntime
        reason = (str(error).strip() or 'no reason given').splitlines()[0]
        other = {'.pt2': '.onnx', '.onnx': '.pt2'}[path.suffix]
        raise ValueError(
            f'{path} could not be made with torch {torch.__version__} '
            f'({type(error).__name__}: {reason[:200]}): choose a file that ends in '
            f'{other}, or use another version of torch') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return lines


def make_views(picture: Tensor, most: int) -> list[Tensor]:
    """Return batches (1, 3, h, w) and (3, 3, h', w'), of another size, of a picture.

    Args:
        picture: (3, h, w) uint8.
        most: pixels of a side.
    """
    whole = picture[None, :, :most, :most]
    part = whole[:, :, ::2, :whole.shape[3] // 2 + 1]
    return [whole, torch.cat([part, part.flip(3), part.flip(2)])]


def compare(net: nn.Module, images: Tensor, found: Tensor) -> str:
    """Say how far a program is from the network; raise ValueError if it is too far.

    Too far is more than 1e-4, or where the network itself is as far from its result in
    float64, ten times that; and of labels more than 1 % others.

    Args:
        net: the Segmenter.
        images: (b, 3, h, w) uint8.
        found: of the program, (b, classes, h, w) probabilities or (b, h, w) labels.
    """
    def predict(net):
        return torch.stack([inference.predict_logits(net, image).softmax(0)
                            for image in images])

    wanted = predict(net)
    is_labels = found.dtype == torch.uint8
    shape = wanted[:, 0].shape if is_labels else wanted.shape
    if found.shape != shape:
        raise ValueError(f'it returns {tuple(found.shape)}, not {tuple(shape)}')
    if is_labels:
        far, most = (found != wanted.argmax(1)).double().mean().item(), 0.01
        text = f'{far:.2%} of the labels differ from the network'
    else:
        far, most = (found - wanted).abs().max().item(), 1e-4
        text = f'largest difference to the network {far:.1e}'
        if far > most:
            noise = (wanted - predict(copy.deepcopy(net).double())).abs().max().item()
            text += f' (its own to float64 is {noise:.1e})'
            most = max(most, min(10 * noise, 0.02))
    text += f' on {tuple(images.shape)}'
    if not far <= most:  # it may be not a number
        raise ValueError(text)
    return text


def has(name: str) -> bool:
    """Tell whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def make_example() -> Tensor:
    """Return images to trace a network with: three sides that are all different."""
    return torch.zeros(2, 3, 75, 90, dtype=torch.uint8)


def trace(deployed: Deployed) -> torch.export.ExportedProgram:
    """Return the program of a network, for any batch, height and width."""
    with torch.no_grad():  # or the program would switch gradients off
        return torch.export.export(
            deployed, (make_example(),), strict=False,
            dynamic_shapes=(dict.fromkeys(AXES, torch.export.Dim.DYNAMIC),))


def make_program(deployed: Deployed, metadata: dict) -> bytes:
    """Return what torch.export.load reads, with metadata.json inside."""
    file = io.BytesIO()
    torch.export.save(trace(deployed), file,
                      extra_files={'metadata.json': json.dumps(metadata)})
    return file.getvalue()


def read_program(path: Path) -> tuple:
    """Return a function of images, with what it runs, and the longest side for it."""
    program = torch.export.load(str(path)).module()

    def run(images):
        with torch.no_grad():
            return program(images)
    return run, f'torch {torch.__version__}', 10 ** 6


def make_onnx(deployed: Deployed, metadata: dict) -> bytes:
    """Return an ONNX model, the metadata as its properties, each in JSON."""
    import onnx
    output = metadata['output']
    names = {'input_names': ['images'], 'output_names': [output], 'opset_version': 18,
             'verbose': False}
    with torch.no_grad(), warnings.catch_warnings(), \
            contextlib.redirect_stdout(io.StringIO()):  # takes the graph in errors
        warnings.simplefilter('ignore')  # of what later versions will do
        if IS_NEW_ONNX:
            model = torch.onnx.export(trace(deployed), (), dynamo=True,
                                      **names).model_proto
        else:
            file = io.BytesIO()
            torch.onnx.export(deployed, (make_example(),), file, dynamo=False, **names,
                              dynamic_axes={'images': AXES, output: AXES})
            model = onnx.load_from_string(file.getvalue())
    del model.graph.value_info[:]  # sides by names that only torch knows
    for value in (*model.graph.input, *model.graph.output):
        sides = value.type.tensor_type.shape.dim
        for side, name in zip((sides[0], *sides[-2:]), AXES.values(), strict=True):
            side.dim_param = name
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in metadata.items()})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def read_onnx(path: Path) -> tuple:
    """Return a function of images, with what it runs, and the longest side for it."""
    if has('onnxruntime'):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised too
        session = onnxruntime.InferenceSession(str(path), options,
                                               providers=['CPUExecutionProvider'])
        how, most = f'onnxruntime {onnxruntime.__version__}', 10 ** 6
    else:
        import onnx.reference
        session = onnx.reference.ReferenceEvaluator(str(path))
        how, most = f'the slow reference of onnx {onnx.__version__}', 25

    def run(images):
        return torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    return run, how, most
