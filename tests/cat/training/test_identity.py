"""Whether a run goes on with the embeddings that it began with, and why not."""

from __future__ import annotations

import pytest

from cat.training.identity import other_embeddings

OLD = {
    "encoder": "clap:a.pt",
    "identity": "1" * 64,
    "count": 8,
    "dim": 5,
    "sha256": "aa",
    "sample": "bb",
    "rows": "cc",
    "audio": "dd",
    "made_with": {"batch_size": 16, "versions": {"torch": "2.12"}},
}
EARLIER = {key: OLD[key] for key in ("encoder", "count", "dim", "sha256", "sample", "rows")}  # version 0.1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"encoder": "clap:elsewhere/a.pt"},  # the same weights
        {"identity": "2" * 64},  # another description of what gives the same rows, as by another version
        {"made_with": {"batch_size": 8}, "audio": "ee"},
    ],
)
def test_equal_rows_of_the_same_encoder_go_on(change):
    assert other_embeddings(OLD, {**OLD, **change}) == []


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            {"encoder": "beats:b.pt", "identity": "2" * 64, "dim": 7, "sha256": "x"},
            ["the encoder was clap:a.pt (111111111111), now beats:b.pt (222222222222)", "the rows are others"],
        ),
        (
            {"encoder": "untrained:clap:a.pt", "identity": "2" * 64},
            ["the encoder was clap:a.pt (111111111111), now untrained:clap:a.pt (222222222222)"],
        ),
        (
            {"identity": "2" * 64, "sha256": "x"},
            [
                "the encoder's weights or settings are others: it was clap:a.pt (111111111111), now clap:a.pt "
                "(222222222222)",
                "the rows are others",
            ],
        ),
        ({"audio": "x", "sample": "y"}, ["the audio files were others", "the rows are others"]),
        (
            {"made_with": {"batch_size": 8, "versions": {"torch": "2.13"}}, "sha256": "x"},
            [
                "made with batch_size=16, now 8",
                "made with versions.torch=2.12, now 2.13",
                "the rows are others",
            ],
        ),
        ({"rows": "x"}, ["its clips have other rows"]),
    ],
)
def test_others_are_refused_with_the_reason(change, reasons):
    assert other_embeddings(OLD, {**OLD, **change}) == reasons


def test_checkpoints_of_earlier_versions():
    assert other_embeddings(EARLIER, OLD) == []
    assert other_embeddings(EARLIER, {**OLD, "sha256": "x"}) == ["the rows are others"]
    renamed = {**OLD, "encoder": "clap:b.pt"}
    assert other_embeddings(EARLIER, renamed) == ["the encoder was clap:a.pt, now clap:b.pt (111111111111)"]


def test_with_and_without():
    assert other_embeddings(None, None) == []
    assert other_embeddings(None, OLD) == other_embeddings(OLD, None) == ["one of the two is none"]
