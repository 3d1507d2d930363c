"""Files as version control left them: pointers of Git LFS, and JSON with a byte order mark."""

import pytest

from stages.fetch.data import fetch_data
from stages.fetch.model import fetch_model
from stages.fetch.params import FolderData, FolderModel
from stages.models.layout import WEIGHTS
from stages.models.pipeline import read_scheduler
from stages.runtime.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n"


@pytest.mark.parametrize("name", [f"unet/{WEIGHTS}", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_pointer_in_a_model_folder_is_named(model_folder, tmp_path, name):
    """One line names the file and the command that downloads it."""
    (model_folder / name).write_bytes(POINTER)

    with pytest.raises(InputError, match=f"{name} is a pointer of Git LFS and not the file itself; run: git lfs pull"):
        fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pointer_in_place_of_an_image_is_named(tmp_path):
    """It counts as a corrupt image, and the reason names the command."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(POINTER)
    (tmp_path / "out").mkdir()
    data = FolderData(source="folder", path=tmp_path / "images")

    with pytest.raises(InputError, match="is a pointer of Git LFS and not the file itself; run: git lfs pull"):
        fetch_data(data, (1, 8, 8), 0.5, tmp_path / "out")


def test_a_byte_order_mark_is_read(model_folder):
    """Editors of Windows write one at the beginning of a JSON file."""
    path = model_folder / "scheduler" / "scheduler_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert read_scheduler(model_folder).config["num_train_timesteps"] == 1000
