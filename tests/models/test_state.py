"""A module's state as weight files take it, and its digest."""

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from advmoe.models.state import count, digest, read_shapes, require_fitting, savable, write_tensors


def test_tied_tensors_are_saved_under_each_of_their_names_and_apart(tmp_path):
    tied = torch.rand(2, 3)
    state = savable({"a": tied, "b": tied, "view": tied.t()})
    assert torch.equal(state["a"], state["b"]) and state["view"].is_contiguous()
    assert len({each.untyped_storage().data_ptr() for each in state.values()}) == 3
    write_tensors(tmp_path / "w.safetensors", state, {"key": "value"})
    assert read_shapes(tmp_path / "w.safetensors") == {"a": (2, 3), "b": (2, 3), "view": (3, 2)}


def test_a_digest_follows_names_and_values_but_no_memory_format():
    torch.manual_seed(0)
    one, other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    assert digest(one) != digest(other)
    other.load_state_dict(one.state_dict())
    assert digest(one) == digest(other.to(memory_format=torch.channels_last))
    with torch.no_grad():
        other.bias[0] += 1
    assert digest(one) != digest(other) != digest(nn.Sequential(one))


def test_parameters_are_counted_by_shape():
    assert count({"a": (2, 3), "b": (), "c": (0, 5)}) == 7


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (2,)}, "no b"),
        ({"a": (2,), "b": (3, 1), "c": ()}, "unexpected c"),
        ({"a": (2,), "b": (1, 3)}, r"other shapes: b \(1, 3\) for \(3, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(shapes, message):
    state = {"a": torch.empty(2, device="meta"), "b": torch.empty(3, 1, device="meta")}
    require_fitting(state, {"a": (2,), "b": (3, 1)})
    with pytest.raises(ValueError, match=f"^{message}$"):
        require_fitting(state, shapes)


def test_a_header_that_claims_too_much_is_not_read(tmp_path):
    (tmp_path / "w.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(SafetensorError, match="a header of 1099511627776 bytes"):
        read_shapes(tmp_path / "w.safetensors")
