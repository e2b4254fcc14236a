"""Whatever is in a manifest, an audio file or a recipe: it is read, or there is an error of ours that says where.

`make test` does this for 20 seconds each, with inputs that are the same every time; `make fuzz MINUTES=60` for an hour,
with new ones. What fails is printed with the seed that makes it again: ``make fuzz SEED=...``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat.config import ConfigError, to_mapping
from cat.data import AudioError, Manifest, ManifestError, load_manifest, read_audio, write_manifest
from cat.model import GuideConfig
from cat.training.recipe import PretrainConfig, load_recipe

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("yaml")
hypothesis = pytest.importorskip("hypothesis")
st: Any = pytest.importorskip("hypothesis.strategies")

SECONDS = float(os.environ.get("CAT_FUZZ_SECONDS", "20"))
FIRST_SEED = int(os.environ.get("CAT_FUZZ_SEED", "0"))
REPOSITORY = Path(__file__).parents[1]
ROUND = hypothesis.settings(
    max_examples=100,
    deadline=None,
    database=None,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    suppress_health_check=list(hypothesis.HealthCheck),
)


def for_a_while(check: Callable[[], None]) -> None:
    """Rounds of 100 inputs, each round from a seed of its own, until the time is up."""
    number, end = FIRST_SEED, time.monotonic() + SECONDS
    while number == FIRST_SEED or time.monotonic() < end:
        try:
            hypothesis.seed(number)(check)()
        except BaseException as error:
            error.add_note(f"again: make fuzz SEED={number}")
            raise
        number += 1


@st.composite
def damaged(draw: Callable[[Any], Any], whole: Any) -> bytes:
    """Bytes with some of them changed, most often near the beginning, cut out, doubled or cut off."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 6))):
        if not data:
            break
        head = draw(st.booleans())
        place = draw(st.integers(0, min(len(data), 64 if head else len(data)) - 1))
        kind = draw(st.sampled_from(("set", "fill", "cut", "insert", "end")))
        if kind == "set":
            data[place] = draw(st.integers(0, 255))
        elif kind == "fill":  # a field of a header
            width = draw(st.sampled_from((2, 4, 8)))
            data[place : place + width] = bytes([draw(st.sampled_from((0, 0x7F, 0x80, 0xFF)))]) * width
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=16))
        else:
            del data[place:]
    return bytes(data)


# ---------------------------------------------------------------- manifests

WORDS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**40),
    st.floats(),
    st.sampled_from(("dog", " dog", "", "dog,cat", "a/../b.wav", "/", "x.wav", "\ud800", "\x00", "é", "e\u0301", "🐕")),
    st.text(max_size=12),
)
VALUES = st.recursive(
    WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("path", "labels", "x")), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = (
    *("path", "samples", "sample_rate", "labels", "embedding", "speaker", "format", "version", "embeddings"),
    *("embeddings_fingerprint", "label_names", "wav", "wav_path", "num_frame", "clap_path", "data", "label"),
)
CLIP = st.builds(
    lambda known, odd: known | odd,
    st.fixed_dictionaries({"path": st.sampled_from(("a.wav", "b/c.flac", "é.ogg")), "labels": st.just(["dog"])}),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
LINE_ENDS = st.sampled_from(("\n", "\r\n", "\n\n", "\r", "\u2028"))


def dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)


JSON_LINES = st.builds(lambda clips, end: end.join(map(dumped, clips)), st.lists(CLIP, max_size=4), LINE_ENDS)
AST_LIST = st.builds(
    lambda clips: dumped({"data": [{"wav": "a.wav", "labels": "dog, cat"} | clip for clip in clips]}),
    st.lists(CLIP, max_size=3),
)
CAT_LIST = st.builds(
    lambda clips: dumped([{"wav_path": "a.wav", "num_frame": 5, "clap_path": "a.npy"} | clip for clip in clips]),
    st.lists(CLIP, max_size=3),
)
TSV = st.builds(
    lambda rows, end: end.join([".", *("\t".join(row) for row in rows)]),
    st.lists(st.lists(st.sampled_from(("a.wav", "1600", "-1", "x y.wav", "", "1e3", "٣")), max_size=3), max_size=4),
    LINE_ENDS,
)
BOM = st.sampled_from((b"", b"\xef\xbb\xbf", b"\xff\xfe"))
MANIFESTS = st.one_of(
    *(
        st.tuples(st.just(suffix), st.builds(lambda bom, text: bom + text.encode(), BOM, texts))
        for suffix, texts in ((".jsonl", JSON_LINES), (".json", AST_LIST), (".json", CAT_LIST), (".tsv", TSV))
    )
)


@ROUND
@hypothesis.given(MANIFESTS.flatmap(lambda pair: st.tuples(st.just(pair[0]), damaged(st.just(pair[1])))))
def check_manifest(given_manifest: tuple[str, bytes]) -> None:
    suffix, content = given_manifest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"m{suffix}")
        path.write_bytes(content)
        try:
            manifest = load_manifest(path)
        except ManifestError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert path.name in refused
            refused.encode()  # can be printed
            return
        check_clips(manifest)
        if manifest.embedding_files is None:
            copy = Path(folder, "copy.jsonl")
            write_manifest(manifest, copy)
            again = load_manifest(copy)
            assert [(c.labels, c.samples, c.embedding) for c in again.clips] == [
                (c.labels, c.samples, c.embedding) for c in manifest.clips
            ]
            assert [os.path.realpath(again.path(i)) for i in range(len(again))] == [
                os.path.realpath(manifest.path(i)) for i in range(len(manifest))
            ]


def check_clips(manifest: Manifest) -> None:
    assert len(manifest) > 0
    assert len(manifest.fingerprint) == 64
    for clip in manifest.clips:
        assert clip.path
        assert all(label and label == label.strip() for label in clip.labels)
        assert len(set(clip.labels)) == len(clip.labels)


# ---------------------------------------------------------------- audio

KINDS = (
    *(
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("WAV", "GSM610"),
        ("WAV", "IMA_ADPCM"),
        ("RF64", "PCM_16"),
    ),
    *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AU", "PCM_16")),
    *(("W64", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16")),
)
RATE = 16_000


def audio_files() -> list[tuple[str, bytes]]:
    wave = 0.3 * np.sin(np.arange(RATE // 2) * 0.1)
    files = []
    for kind, subtype in KINDS:
        if kind in soundfile.available_formats() and soundfile.check_format(kind, subtype):
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, RATE, subtype, format=kind)
            files.append((f"x.{kind.lower()}", buffer.getvalue()))
    return files


AUDIO = audio_files()
SHARE = st.sampled_from((0.0, 0.37, 1.0))
MOST = st.sampled_from((None, 4000))


@ROUND
@hypothesis.given(
    st.sampled_from(AUDIO).flatmap(lambda f: st.tuples(st.just(f[0]), damaged(st.just(f[1])))),
    SHARE,
    MOST,
    st.booleans(),
)
def check_audio(given_file: tuple[str, bytes], start: float, most: int | None, stored: bool) -> None:
    name, content = given_file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            wave = read_audio(path, RATE, max_samples=most, start=start, allow_int16=stored)
        except AudioError as error:
            wave, refused = None, error
        if wave is None:
            assert refused.path == str(path)
            assert refused.reason
            return
        assert wave.dtype in (np.float32, np.int16)
        assert wave.ndim == 1
        assert 1 <= len(wave) <= (most or np.inf)
        assert np.isfinite(wave).all()


# ---------------------------------------------------------------- recipes

RECIPES = [path.read_bytes() for path in sorted((REPOSITORY / "recipes").glob("*.yaml"))]
KEYS = sorted(
    f"{section}.{key}"
    for section, fields in to_mapping(load_recipe(REPOSITORY / "recipes" / "tiny.yaml")).items()
    for key in fields
)
GUIDES = [
    "guides",
    "guides.g",
    *(f"guides.g.{field.name}" for field in dataclasses.fields(GuideConfig)),
    "guides.keys.layer",
]
OVERRIDES = st.lists(
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from([*KEYS, *GUIDES, "model.preset", "optim", "optim.lrr", "x.y.z"]),
        st.one_of(
            st.sampled_from(
                ("1", "-1", "0", "1e-3", "true", "null", "nan", "inf", "[1,2]", "[]", "{", "tiny", "auto", "1_0", "")
            ),
            st.integers().map(str),
            st.floats().map(str),
            st.text(max_size=8),
        ),
    ),
    max_size=3,
)


@ROUND
@hypothesis.given(st.sampled_from(RECIPES).flatmap(lambda recipe: damaged(st.just(recipe))), OVERRIDES)
def check_recipe(recipe: bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(recipe)
        try:
            config = load_recipe(path, overrides)
        except ConfigError as error:
            config, refused = None, str(error)
        if config is None:
            assert path.name in refused or "command line" in refused
            return
        assert isinstance(config, PretrainConfig)
        json.dumps(to_mapping(config), allow_nan=False)
        assert config.end >= 1
        assert all(side >= 1 for side in config.grid)


@pytest.mark.parametrize("check", [check_manifest, check_audio, check_recipe], ids=["manifest", "audio", "recipe"])
def test_is_read_or_refused_in_words(check: Callable[[], None]) -> None:
    for_a_while(check)
