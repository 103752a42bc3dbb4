import os

import torch
from safetensors.torch import save_file

from smi.files import replace_file


def test_written_files_have_the_permissions_of_the_user(tmp_path):
    (tmp_path / "plain").touch()
    replace_file(tmp_path / "weights", lambda path: save_file({"x": torch.ones(2)}, path))
    assert os.stat(tmp_path / "weights").st_mode == os.stat(tmp_path / "plain").st_mode
