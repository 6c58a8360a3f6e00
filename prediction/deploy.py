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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inference
from config import UserError

AXES = {0: 'batch', 2: 'height', 3: 'width'}      # of images, can have any size
ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')


class ExportedNet(nn.Module):
    """A network with preprocessing and postprocessing.

    Heights and widths are symbols during the export, so there are no conditions on
    them here.

    Args:
        net: a Segmenter in evaluation mode, float32.
        is_labels: return the most probable classes instead of all probabilities.
    """

    def __init__(self, net: nn.Module, is_labels: bool = False):
        super().__init__()
        self.net, self.is_labels = net, is_labels
        self.eval()  # torch.onnx.export restores the mode of every module

    def forward(self, images: Tensor) -> Tensor:
        """Segment images of any one size, as inference.predict_logits does.

        Args:
            images: (b, 3, h, w) uint8.

        Returns:
            (b, classes, h, w) float32 probabilities, or (b, h, w) uint8 labels.
        """
        height, width = images.shape[2:]
        stride, align_corners = self.net.stride, self.net.align_corners
        bottom = inference.padded_size(height, stride, align_corners) - height
        right = inference.padded_size(width, stride, align_corners) - width
        x = F.pad(self.net.normalise(images), (0, right, 0, bottom))
        logits = self.net(x)
        y = logits.argmax(1).to(torch.uint8) if self.is_labels else logits.softmax(1)
        # A slice would specialise the program: torch asks whether it is the whole.
        y = y.index_select(-2, torch.arange(height, device=y.device))
        return y.index_select(-1, torch.arange(width, device=y.device))


def export(net: nn.Module, path: str | Path, image: Tensor, metadata: dict,
           is_labels: bool = False) -> list[str]:
    """Write a network as a program that needs nothing of this folder, and verify it.

    The file is `model.pt2` for torch.export.load, or `model.onnx`; both take (b, 3, h,
    w) uint8 of any batch and size (but a .pt2 wants 2 pixels or more on a side, and
    more than the stride if the corners are not aligned). It is renamed to its name
    after its predictions were compared with the network's.

    Args:
        net: a Segmenter in evaluation mode, float32; it is not changed.
        path: of the file; its suffix chooses the format.
        image: (3, h, w) uint8, at least 2 pixels wide, to verify it on.
        metadata: written into the file as JSON: classes, palette, settings ...
        is_labels: write a program that returns labels (b, h, w) uint8 instead of
            probabilities (b, classes, h, w) float32.

    Returns:
        Lines for the log: the file, and the largest differences to the network.

    Raises:
        UserError: if the program cannot be made, written or verified; an earlier file
            is then still there.
    """
    path = Path(path)
    check_path(path)
    net = copy.deepcopy(net).cpu().float().to(memory_format=torch.contiguous_format)
    inference.fuse_batch_norms(net)
    net.aux = None  # for training only
    with torch.no_grad():
        n = len(net(torch.zeros(1, 3, net.stride + 1, net.stride + 1)))
    if n > 1:
        raise UserError(f'{path} can hold one number of EM iterations, but {n} are '
                        'asked for: give a single one')
    metadata = {**metadata, 'stride': net.stride, 'torch': torch.__version__,
                'output': 'labels' if is_labels else 'probabilities'}
    temporary = path.with_name(f'.{path.stem}.tmp{path.suffix}')
    try:
        make = make_program if path.suffix == '.pt2' else make_onnx
        temporary.write_bytes(make(ExportedNet(net, is_labels), metadata))
        size = temporary.stat().st_size / 2 ** 20
        lines = [f'{path}: {metadata["output"]} of images (b, 3, h, w) uint8, '
                 f'{size:.1f} MiB', *verify(net, temporary, image.cpu())]
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'could not write {path} ({error}): make room or choose '
                        'another folder') from error
    except Exception as error:  # a dozen kinds, of torch, onnx and onnxruntime
        reason = (str(error).strip() or 'no reason given').splitlines()[0]
        raise UserError(f'{path} could not be made with torch {torch.__version__} '
                        f'({type(error).__name__}: {reason[:200]}): choose the other '
                        'of .pt2 and .onnx, which needs torch 2.9') from error
    finally:
        temporary.unlink(missing_ok=True)
    return lines


def check_path(path: Path) -> None:
    """Raise UserError for an unknown format, a missing folder or missing packages."""
    if path.suffix not in ('.pt2', '.onnx'):
        raise UserError(f'{path} has to end in .pt2 (torch.export) or .onnx')
    if not path.parent.is_dir():
        raise UserError(f'there is no folder {path.parent} for {path.name}: make it '
                        'first')
    if path.suffix == '.pt2':
        return
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{path} needs packages that are not installed: run `pip '
                        f'install {" ".join(missing)}`, or choose a .pt2 file')


# -- verifying -------------------------------------------------------------------------

def verify(net: nn.Module, path: Path, image: Tensor) -> list[str]:
    """Compare a program with the network on batches of two sizes made of an image.

    Returns:
        A line for each batch: see compare.
    """
    run = load_program(path) if path.suffix == '.pt2' else load_onnx(path)
    part = image[None, :, ::2, :image.shape[2] // 2 + 1]
    batches = image[None], torch.cat([part, part.flip(3), part.flip(2)])
    return [compare(net, images, run(images)) for images in batches]


def compare(net: nn.Module, images: Tensor, outputs: Tensor) -> str:
    """Describe how far a program is from the network.

    Args:
        net: the Segmenter.
        images: (b, 3, h, w) uint8.
        outputs: of the program, (b, classes, h, w) probabilities or (b, h, w) labels.

    Raises:
        ValueError: for 1 % other labels; for a difference of probabilities above 1e-4,
            or above ten times that of the network to itself in float64.
    """
    def predict(net):
        return torch.stack([inference.predict_logits(net, image).softmax(0)
                            for image in images])

    expected = predict(net)
    is_labels = outputs.dtype == torch.uint8
    shape = expected[:, 0].shape if is_labels else expected.shape
    if outputs.shape != shape:
        raise ValueError(f'it returns {tuple(outputs.shape)}, not {tuple(shape)}')
    if is_labels:
        difference, limit = (outputs != expected.argmax(1)).double().mean().item(), 0.01
        text = f'{difference:.2%} of the labels differ from the network'
    else:
        difference, limit = (outputs - expected).abs().max().item(), 1e-4
        text = f'largest difference to the network {difference:.1e}'
        if difference > limit:
            exact = predict(copy.deepcopy(net).double())
            noise = (expected - exact).abs().max().item()
            text += f' (its own to float64 is {noise:.1e})'
            limit = max(limit, min(10 * noise, 0.02))
    text += f' on {tuple(images.shape)}'
    if not difference <= limit:  # it may be not a number
        raise ValueError(text)
    return text


# -- torch.export ----------------------------------------------------------------------

def trace(net: ExportedNet) -> torch.export.ExportedProgram:
    """Return the program of a network, for any batch, height and width."""
    images = torch.zeros(2, 3, 75, 90, dtype=torch.uint8)  # all sides are different
    with torch.no_grad():  # or the program would switch gradients off
        return torch.export.export(
            net, (images,), strict=False,
            dynamic_shapes=(dict.fromkeys(AXES, torch.export.Dim.DYNAMIC),))


def make_program(net: ExportedNet, metadata: dict) -> bytes:
    """Return what torch.export.load reads, with metadata.json inside."""
    file = io.BytesIO()
    torch.export.save(trace(net), file,
                      extra_files={'metadata.json': json.dumps(metadata)})
    return file.getvalue()


def load_program(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a .pt2 file as a function of images."""
    program = torch.export.load(str(path)).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return program(images)
    return run


# -- ONNX ------------------------------------------------------------------------------

def make_onnx(net: ExportedNet, metadata: dict) -> bytes:
    """Return an ONNX model, the metadata as its properties, each in JSON."""
    import onnx
    with torch.no_grad(), warnings.catch_warnings(), \
            contextlib.redirect_stdout(io.StringIO()):  # where errors print the graph
        warnings.simplefilter('ignore')
        model = torch.onnx.export(
            trace(net), (), dynamo=True, input_names=['images'],
            output_names=[metadata['output']], opset_version=18, verbose=False
            ).model_proto
    del model.graph.value_info[:]  # sides by names that only torch knows
    for value in (*model.graph.input, *model.graph.output):
        sides = value.type.tensor_type.shape.dim
        for side, name in zip((sides[0], *sides[-2:]), AXES.values(), strict=True):
            side.dim_param = name
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in metadata.items()})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Return an .onnx file as a function of images, run by onnxruntime."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too
    session = onnxruntime.InferenceSession(str(path), options,
                                           providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(
        session.run(None, {'images': images.numpy()})[0])
