"""The shipped table of tensors is what the libraries build."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from recipes.tensor_tables import described

from sdlab.models.parts import build_module, expected
from sdlab.models.tables import known_tensors


def test_every_network_that_we_know_is_as_the_libraries_build_it() -> None:
    for class_name, config in described():
        assert known_tensors(class_name, config) == expected(
            build_module(class_name, config, Path("configs"))
        )


def test_a_network_of_another_shape_is_not_found() -> None:
    for class_name, config in described():
        other = "vocab_size" if class_name == "CLIPTextModel" else "out_channels"
        assert known_tensors(class_name, {**config, other: 77}) is None


def test_a_setting_that_the_table_does_not_know_is_never_passed_over() -> None:
    for class_name, config in described():
        if class_name != "CLIPTextModel":
            assert known_tensors(class_name, {**config, "use_something_new": True}) is None


def test_looking_at_a_known_model_imports_no_model_library() -> None:
    code = (
        "import sys\n"
        "from sdlab.models.bases import builtin_folder\n"
        "from sdlab.models.pieces import read_pieces\n"
        "assert set(read_pieces(builtin_folder('mini-sd')).networks) == {'unet', 'vae', 'text_encoder'}\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
