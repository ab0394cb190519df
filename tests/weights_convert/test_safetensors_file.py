import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from weights_convert.safetensors_file import FLOATS, read_header

GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "I8", "shape": [], "data_offsets": [8, 9]},
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)
small = st.integers(-1, 9) | st.sampled_from([True, 2**31, 2**64, 1.0, "1"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "U8", "X", 3]) | json_values,
        "shape": st.lists(small, max_size=3) | json_values,
        "data_offsets": st.lists(small, min_size=1, max_size=3) | json_values,
    }
)
headers = json_values | st.dictionaries(st.text(max_size=3), entries | json_values, max_size=4)
any_file = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def packed(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def read(folder, content):
    """What `read_header` finds; every tensor that it vouches for lies in the file. ValueError is the only error."""
    file = folder / "file.safetensors"
    file.write_bytes(content)
    try:
        tensors = read_header(file)
    except ValueError:
        return None
    for tensor in tensors.values():
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content)
        if tensor.dtype in FLOATS and tensor.nbytes:
            assert tensor.read().nbytes == tensor.nbytes
    return tensors


@any_file
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path, content):
    read(tmp_path, content)


@any_file
@given(header=headers, data=st.binary(max_size=20))
def test_random_headers_are_refused_or_right(tmp_path, header, data):
    read(tmp_path, packed(header, data))


@any_file
@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_still_right(tmp_path, position, byte):
    content = bytearray(packed(GOOD, bytes(9)))
    content[position % len(content)] = byte
    read(tmp_path, bytes(content))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_reads_what_the_library_wrote(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {f"t{n}": rng.standard_normal((n, 3)).astype(dtype) for n in (1, 2, 5)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = read_header(tmp_path / "x.safetensors")
    assert sorted(tensors) == sorted(arrays)
    for name, array in arrays.items():
        read_array = tensors[name].read()
        assert (read_array.dtype, read_array.shape) == (array.dtype, array.shape)
        assert read_array.tobytes() == array.tobytes()


def test_a_header_may_be_padded_and_tensors_may_be_empty(tmp_path):
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [8, 8]}
    raw = json.dumps(GOOD | {"empty": empty, "__metadata__": {"format": "pt"}}).encode() + b"    "
    tensors = read(tmp_path, packed(raw, bytes(9)))
    assert {name: tensor.nbytes for name, tensor in tensors.items()} == {"a": 8, "b": 1, "empty": 0}


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (packed(GOOD, bytes(10)), "has .* bytes; it should have"),
        (packed(GOOD, bytes(9), length=2**40), "says its header has 1099511627776 bytes"),
        (packed(b"[" * 100_000, length=100_000), "not JSON"),
        (packed(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "not JSON"),
        (packed(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
        (packed([]), "is a list; it should be a JSON object"),
        (packed({"a": GOOD["a"], "c": GOOD["a"]}, bytes(8)), "tensor c begins at byte 0; it should be 8"),
        (packed({"b": GOOD["b"]}, bytes(9)), "tensor b begins at byte 8; it should be 0"),
        (packed({"a": GOOD["a"] | {"shape": [-2]}}, bytes(8)), "it should have dtype, shape and data_offsets"),
        (packed({"a": GOOD["a"] | {"shape": [True, 2]}}, bytes(8)), "it should have dtype, shape and data_offsets"),
        (packed({"a": GOOD["a"] | {"shape": [2**62, 2**62]}}, bytes(8)), "bytes apart"),
        (packed({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"."), "bytes apart"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, content, pattern):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=pattern) as error:
        read_header(file)
    assert "\n" not in str(error.value)
