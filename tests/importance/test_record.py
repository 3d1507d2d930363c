"""A damaged record of the importance stage."""

import pytest

from stages.models.saliency import read_importance, write_importance
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json


@pytest.mark.parametrize(
    ("change", "message"),
    [({"criterion": "best"}, "criterion: "), ({"timesteps": "all"}, "timesteps: "), ({"extra": 1}, "extra")],
)
def test_a_wrong_key_is_named_without_the_saliencies(tmp_path, magnitude, change, message):
    """The line names what does not fit, not everything that the record holds."""
    write_importance(tmp_path, magnitude)
    write_json(tmp_path / "importance.json", {**read_json(tmp_path / "importance.json"), **change})

    with pytest.raises(InputError) as caught:
        read_importance(tmp_path)
    assert caught.value.message.startswith(f"{tmp_path}/importance.json does not fit (")
    assert message in caught.value.message
    assert caught.value.message.endswith("; run the importance stage again")
    assert "tensor" not in caught.value.message
    assert len(caught.value.message) < len(str(tmp_path)) + 200
