"""Networks of `transformers`: from a directory, from the hub, or from tensors that came from elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def import_transformers(family: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{family} needs the package 'transformers': pip install 'cat-kernels[clap]'") from error
    return transformers


def load_pretrained(family: str, path: str, network: str, extractor: str) -> tuple[Any, Any]:
    """(network, feature extractor) of the classes of `transformers` that are named, in float32, frozen.

    ``path`` is a local directory as ``save_pretrained`` writes it, or a hub name. Weights are read from safetensors
    only; towers and heads in the file that ``network`` does not have are not built.

    Raises: ImportError without `transformers`, FileNotFoundError when there are no weights (offline, no safetensors),
    ValueError when they are those of something else, or do not fit.
    """
    transformers = import_transformers(family)
    try:
        features = transformers.AutoFeatureExtractor.from_pretrained(path)
        if isinstance(features, getattr(transformers, extractor)):
            model = _network(transformers, f"{family} {path!r}", network, path, use_safetensors=True)
    except _DoesNotFit as error:
        raise ValueError(f"{error}; expected the files that save_pretrained of a {network} writes") from None
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{family} {path!r} could not be loaded. Give a local directory with config.json, preprocessor_config.json "
            f"and model.safetensors ({family.lower()}:/path/to/directory), or a hub name with network access. Weights "
            "in pickles are refused: convert them once with model.save_pretrained(directory). transformers says: "
            + _first_line(error)
        ) from error
    if not isinstance(features, getattr(transformers, extractor)):
        raise ValueError(
            f"{family} {path!r} is something else: its preprocessor_config.json names a {type(features).__name__}; "
            f"expected a {extractor}"
        )
    return model, features


def from_tensors(family: str, path: str, network: str, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A network of `transformers` from all its tensors, under its names. Raises ImportError and ValueError as above."""
    transformers = import_transformers(family)
    state = dict(tensors)
    try:
        # Not load_state_dict: from_pretrained knows the names that earlier releases of transformers gave.
        return _network(transformers, f"{family} {path!r}", network, None, whole=True, config=config, state_dict=state)
    except _DoesNotFit as error:
        raise ValueError(f"{error}; it may be cut short, or of another architecture") from None


def _network(
    transformers: Any, what: str, network: str, path: str | None, *, whole: bool = False, **options: Any
) -> Any:
    with _quiet(transformers):
        model, found = getattr(transformers, network).from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # transformers would go on with random weights in the place of these.
    if missing := sorted(found["missing_keys"]):
        raise _DoesNotFit(f"{what} lacks {len(missing)} tensors of the {network} (first: {missing[0]})")
    if mismatched := sorted(map(str, found["mismatched_keys"])):
        raise _DoesNotFit(f"{what} has {len(mismatched)} tensors of other shapes (first: {mismatched[0]})")
    if whole and (unknown := sorted(found["unexpected_keys"])):
        raise _DoesNotFit(f"{what} has {len(unknown)} tensors without a place in a {network} (first: {unknown[0]})")
    return model.float().eval().requires_grad_(False)


class _DoesNotFit(Exception):
    pass


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """It would list every tensor of the towers that are not built as unexpected."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
