"""Networks in ONNX and TFLite files, behind one call: an array in, the tensor of a name out.

Neither format holds code that is run. A name may be that of any tensor inside: the embedding of a classifier is seldom
among its outputs.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

Shape = tuple[int | None, ...]  # None: any number


class Graph(Protocol):
    shape: Shape
    """Of its one input."""
    sha256: str
    """Of the network and its weights."""

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """float32 in and out."""
        ...


class GraphError(ValueError):
    """A file that holds no network that can be used, or not the tensor that is asked for."""


class OnnxGraph:
    """Through onnxruntime; on the GPU where the installed one can and ``device`` is one."""

    def __init__(self, path: Path, output: str | None, device: torch.device) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"{path}: ONNX files need onnx and onnxruntime ({error}); pip install 'cat-kernels[export]'"
            ) from error
        _check_file(path)
        try:
            model = onnx.load(path)  # with the weights that lie in files beside it
            self.sha256 = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        except Exception as error:  # protobuf's, onnx's, of the files beside it: no class in common
            raise GraphError(f"{path}: not a readable ONNX file ({_first_line(error)})") from error
        initial = {weights.name for weights in model.graph.initializer}
        inputs = [value.name for value in model.graph.input if value.name not in initial]
        outputs = [value.name for value in model.graph.output]
        inside = [name for node in model.graph.node for name in node.output]
        self._input, self._output = _only_input(path, inputs), _pick(path, output, outputs, inside)
        if self._output not in outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=self._output))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        except Exception as error:  # onnxruntime's have no class in common
            raise GraphError(f"{path}: onnxruntime cannot run it ({_first_line(error)})") from error
        (value,) = (each for each in self._session.get_inputs() if each.name == self._input)
        _check_type(path, self._input, value.type, "tensor(float)")
        self.shape: Shape = tuple(n if isinstance(n, int) else None for n in value.shape)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        (found,) = self._session.run([self._output], {self._input: array})
        return np.asarray(found, dtype=np.float32)


class TfliteGraph:
    """Through ai-edge-litert, on the CPU."""

    def __init__(self, path: Path, output: str | None) -> None:
        try:
            from ai_edge_litert import schema_py_generated as schema
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError(
                f"{path}: TFLite files need ai-edge-litert ({error}); pip install 'cat-kernels[tflite]'"
            ) from error
        _check_file(path)
        content = bytearray(path.read_bytes())
        if content[4:8] != b"TFL3":
            raise GraphError(f"{path}: not a TFLite file; those have TFL3 at byte 4, this one {bytes(content[4:8])!r}")
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            interpreter = Interpreter(model_content=bytes(content))
            outputs = {each["name"]: each["index"] for each in interpreter.get_output_details()}
            inside = {each["name"]: each["index"] for each in interpreter.get_tensor_details() if each["name"]}
            self._index = (inside | outputs)[_pick(path, output, list(outputs), list(inside))]
            # What is inside is kept only if it is an output. (Or without XNNPACK, which makes BirdNET 20 times slower.)
            schema.Model.GetRootAs(content, 0).Subgraphs(0).OutputsAsNumpy()[0] = self._index
            interpreter = Interpreter(model_content=bytes(content), num_threads=torch.get_num_threads())
        except (ValueError, RuntimeError, struct.error) as error:
            if isinstance(error, GraphError):
                raise
            raise GraphError(f"{path}: ai-edge-litert cannot run it ({_first_line(error)})") from error
        details = {each["name"]: each for each in interpreter.get_input_details()}
        value = details[_only_input(path, list(details))]
        _check_type(path, value["name"], np.dtype(value["dtype"]).name, "float32")
        signature = value["shape_signature"] if len(value["shape_signature"]) else value["shape"]
        self.shape: Shape = tuple(None if n < 0 else int(n) for n in signature)
        self._interpreter, self._input = interpreter, value["index"]
        self._ready: tuple[int, ...] = ()  # shape that it is laid out for

    def __call__(self, array: np.ndarray) -> np.ndarray:
        if array.shape != self._ready:
            self._interpreter.resize_tensor_input(self._input, array.shape)
            self._interpreter.allocate_tensors()
            self._ready = array.shape
        self._interpreter.set_tensor(self._input, array)
        self._interpreter.invoke()
        return np.asarray(self._interpreter.get_tensor(self._index), dtype=np.float32)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the network itself")


def _only_input(path: Path, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise GraphError(f"{path}: has the inputs {', '.join(names)}; expected one, of audio")
    return names[0]


def _pick(path: Path, wanted: str | None, outputs: Sequence[str], inside: Sequence[str]) -> str:
    if wanted is None and len(outputs) == 1:
        return outputs[0]
    if wanted in outputs or wanted in inside:
        return str(wanted)
    asked = "several outputs" if wanted is None else f"no tensor {wanted!r}"
    raise GraphError(
        f"{path}: has {asked}; expected output=NAME, one of its outputs ({', '.join(outputs)}) or what is inside, such "
        f"as the last: {', '.join([name for name in inside if name not in outputs][-5:])}"
    )


def _check_type(path: Path, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise GraphError(
            f"{path}: its input {name} is {found}; expected {expected}: of a network that was quantised whole take the "
            "original"
        )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
