"""Files are replaced whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from smi.files import replace_file, write_json, write_text


def test_written_files_have_the_permissions_of_the_user(tmp_path):
    (tmp_path / "plain").touch()
    replace_file(tmp_path / "weights", lambda path: save_file({"x": torch.ones(2)}, path))
    assert os.stat(tmp_path / "weights").st_mode == os.stat(tmp_path / "plain").st_mode


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_text(path, object())
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
