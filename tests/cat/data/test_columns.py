"""Arrays in a file: they come back as they were, or not at all."""

import pickle

import numpy as np
import pytest

from cat.data.columns import ColumnsError, open_columns, write_columns

ARRAYS = {
    "a": np.arange(5, dtype=np.uint8),
    "b": np.arange(6.0).reshape(2, 3),
    "none": np.zeros(0, dtype=np.int64),
    "big": np.arange(3)[::-1],
    "c": np.arange(3, dtype=np.int8),
}


@pytest.fixture
def file(tmp_path):
    write_columns(tmp_path / "x", ARRAYS, {"ä": [1, None]})
    return tmp_path / "x"


def test_what_is_written_is_read(file):
    columns = open_columns(file)
    for found in (columns, pickle.loads(pickle.dumps(columns))):
        assert set(found) == set(ARRAYS)
        for name, array in ARRAYS.items():
            assert (found[name].dtype, found[name].tolist()) == (array.dtype, array.tolist())
            assert found[name].flags.aligned
            assert not found[name].flags.writeable
        assert found.info == {"ä": [1, None]}


def test_a_file_that_is_not_what_was_written(file):
    content = file.read_bytes()
    for at in (*range(0, len(content), 7), len(content) - 1):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ColumnsError, match=str(file)):
            open_columns(file)
    for length in (0, 4, 8, 40, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ColumnsError, match=str(file)):
            open_columns(file, verify=False)


def test_another_process_does_not_take_another_file_for_it(file):
    pickled = pickle.dumps(open_columns(file))
    write_columns(file, ARRAYS, {})
    with pytest.raises(ColumnsError, match="was replaced by another file while it was in use"):
        pickle.loads(pickled)


def test_what_is_no_column(tmp_path):
    with pytest.raises(TypeError, match=r"the column text is <U1; expected one of uint8, .*float64"):
        write_columns(tmp_path / "x", {"text": np.array(["a"])})
    assert not list(tmp_path.iterdir())
