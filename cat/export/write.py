"""Writes the file: an `ExportedProgram` (.pt2) or ONNX, whole and checked or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as symbolic
from torch import Tensor
from torch.export import Dim, ExportedProgram

from cat.export.check import QUICK_ROWS, Difference, compare
from cat.export.graph import Graph, with_kernels
from cat.export.model import Exportable
from cat.files import replacing
from cat.model.encoder import MAX_ROWS
from cat.outputs import OutputError
from cat_kernels._ops import ops
from cat_kernels.gather.reference import gather_tokens_reference

SUFFIXES = (".onnx", ".pt2")
EXTRA = "ONNX needs onnx, onnxscript and onnxruntime: pip install 'cat-kernels[export]'"
METADATA = "cat.json"  # the file inside a .pt2 with what ONNX has in its metadata_props
OPSET = 20  # the first with GELU
LIMIT = 1e-3  # of a difference, as a share of the largest output; measured: 1e-5 (spectrograms), 1e-4 (waveforms)
PROTOBUF = 2**31 - 2**24  # bytes of tensors that an ONNX file can hold

# Dense convolutions run in onnxruntime in 0.8 of the time of the patches' rows (tiny, one thread). In `torch.export`
# they would fix the batch: what it asks for a convolution's memory format differs between one clip and several.
KERNELS = {".onnx": "dense", ".pt2": "reference"}


def check_suffix(path: Path, *, quantise: bool = False) -> None:
    """Raises: ValueError where no file of that name, or not a quantised one, is written; ImportError without the extra
    that it needs."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if path.suffix == ".onnx":
        _import_onnx()
    elif quantise:
        raise ValueError(f"{path}: what is quantised is an ONNX file; expected a name that ends in .onnx")


def export(
    exportable: Exportable,
    path: str | Path,
    *,
    waveform: bool = False,
    spectrogram: bool = False,
    quantise: bool = False,
    rows: Sequence[int] = QUICK_ROWS,
) -> Difference:
    """Write ``path``, .onnx or .pt2, and compare it with the model on ``rows`` of patches (`CHECK_ROWS` for all).

    Batch and length are free: (B, 1, T, F) spectrograms, T a multiple of the patch size, or with ``waveform`` (B, n)
    samples from one frame on; two minutes at the most (``most_frames``). ``spectrogram``: what the model sees is one
    more output. ``quantise``: weights of the matrix products as int8, activations quantised as they come (onnxruntime's
    dynamic quantisation); ONNX alone.

    Raises: `OutputError` where the file differs by more than a thousandth from the model (of a quantised one only NaN
        is refused); then, as on any exception, ``path`` stays as it was.
    """
    path = Path(path)
    check_suffix(path, quantise=quantise)
    model = with_kernels(exportable.model, KERNELS[path.suffix])
    graph = exportable.graph(model, waveform=waveform, spectrogram=spectrogram)
    about = {
        **exportable.about,
        "input": graph.input,
        "outputs": list(graph.outputs),
        "quantised": "int8, dynamic" if quantise else "no",
    }
    held = sum(t.numel() * t.element_size() for t in (*graph.parameters(), *graph.buffers()))
    if path.suffix == ".onnx" and held > PROTOBUF:
        raise ValueError(f"the model takes {held >> 20} MiB, an ONNX file holds {PROTOBUF >> 20}; export it to .pt2")
    with replacing(path) as temporary, _quiet():
        program = trace(graph)
        if path.suffix == ".pt2":
            content = io.BytesIO()  # on a full disk PyTorch's own writer ends the process (2.13)
            torch.export.save(program, content, extra_files={METADATA: json.dumps(about)})
            temporary.write_bytes(content.getbuffer())
        else:
            _write_onnx(program, graph, temporary, about, quantise=quantise)
        found = compare(temporary, exportable, graph, rows)
        if not found.relative < (float("inf") if quantise else LIMIT):
            raise OutputError(
                f"{path} is not written: the exported graph differs from the model by {found.largest:.3g}, outputs are "
                f"up to {found.scale:.3g}; please report this, with the versions that cat-audio doctor prints"
            )
    return found


def trace(graph: Graph) -> ExportedProgram:
    """The graph as PyTorch's operations, whatever the batch and the length; none of `cat_kernels`' own."""
    audio = torch.zeros(2, *graph.sizes(3), device=next(graph.parameters()).device)
    shapes = dynamic_shapes(graph)
    # Without it, sizes of one would be a case of their own, and refused.
    with torch.no_grad(), symbolic.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(graph, (audio,), dynamic_shapes=shapes, strict=False)
        return program.run_decompositions({ops.gather_tokens.default: _gather_tokens})


def dynamic_shapes(graph: Graph) -> dict[str, dict[int, Any]]:
    batch = Dim("batch", min=1, max=1 << 20)
    if graph.log_mel is not None:
        least, most = graph.log_mel.features.frame_length, graph.most_samples
        return {"audio": {0: batch, 1: Dim("samples", min=least, max=most)}}
    return {"audio": {0: batch, 2: graph.encoder_config.patch_size * Dim("rows", min=1, max=MAX_ROWS)}}


def _gather_tokens(
    tokens: Tensor,
    visible: Tensor | None,
    positions: Tensor | None,
    cls_token: Tensor | None,
    select: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    return gather_tokens_reference(tokens, visible, positions, cls_token, select=select)


# --------------------------------------------------------------------------------------------------------------- ONNX


def _import_onnx() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ImportError(f"{EXTRA} ({error})") from error
    del onnx, onnxruntime, onnxscript


def _write_onnx(program: ExportedProgram, graph: Graph, path: Path, about: dict[str, Any], *, quantise: bool) -> None:
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = torch.onnx.export(
        program,
        input_names=[graph.input],
        output_names=list(graph.outputs),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    if made is None:
        raise RuntimeError("torch.onnx.export made no program")
    model = made.model
    for value, shape in zip((*model.graph.inputs, *model.graph.outputs), _shapes(graph), strict=True):
        value.shape = onnx_ir.Shape(shape)
    model.producer_name, model.producer_version = "cat-kernels", about["cat_version"]
    model.metadata_props.clear()
    model.metadata_props.update({name: _text(value) for name, value in about.items()})
    if not quantise:
        made.save(path, external_data=False)
        return
    proto = made.model_proto
    # The features stay exact: a power spectrum of eight bits holds nothing but the loudest bins (0.45 off, relatively,
    # where the encoder's matrices cost 0.003). So do convolutions: onnxruntime's integer ones are slower.
    features = [n.name for n in proto.graph.node if any(name.startswith("log_mel.") for name in n.input)]
    quantize_dynamic(
        proto,
        path,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=features,
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def _shapes(graph: Graph) -> list[list[str | int]]:
    """Of the input, then of the outputs: names for what is free."""
    c = graph.encoder_config
    shapes: dict[str, list[str | int]] = {
        "spectrogram": ["batch", 1, "frames", c.mel_bins],
        "waveform": ["batch", "samples"],
        "clip": ["batch", c.embed_dim],
        "cls": ["batch", c.embed_dim],
        "frames": ["batch", "rows", c.embed_dim],
        "patches": ["batch", "patches", c.embed_dim],
    }
    classes = getattr(graph.model, "classes", 0)
    shapes |= {"scores": ["batch", classes], "frame_scores": ["batch", "rows", classes]}
    return [shapes[name] for name in (graph.input, *graph.outputs)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of each other's deprecations, and of operators that are not used."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ----------------------------------------------------------------------------------------------------------- metadata


def metadata_of(path: str | Path) -> dict[str, Any]:
    """What an exported file tells of its model: kind, input, outputs, sample_rate, features, patch_size, classes, ...

    Raises: ValueError for a file that `export` did not write; ImportError for ONNX without the extra.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith(f"/{METADATA}")]
            found = json.loads(archive.read(inside[0])) if inside else {}
    else:
        _import_onnx()
        import onnx

        props = {p.key: p.value for p in onnx.load(str(path), load_external_data=False).metadata_props}
        found = {name: _value(text) for name, text in props.items()}
    if "cat_version" not in found:
        raise ValueError(f"{path} is not written by cat-audio export")
    return dict(found)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
