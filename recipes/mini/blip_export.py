"""Puts mini-blip together: a folder that BlipForConditionalGeneration and BlipProcessor load, in fp16 safetensors.

python recipes/mini/blip_export.py WORK_FOLDER MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from blip_model import NUM_POSITIONS, PROCESSOR, small_blip, tokenizer, vocabulary
from blip_train import LENGTH, ForMuon
from master import put
from torch import Tensor


def export(work: Path, target: Path, *, name: str) -> int:
    """Writes the model with the averaged weights, file over file, and gives its size in bytes."""
    trained, model = small_blip(), small_blip(NUM_POSITIONS)
    put(torch.load(work / f"{name}.pt", weights_only=True)["averaged"], [ForMuon(trained)])
    model.load_state_dict(_with_room(trained.state_dict()))
    made = target.with_name(target.name + ".new")
    shutil.rmtree(made, ignore_errors=True)
    model.half().save_pretrained(made)
    tokenizer().save_pretrained(made)
    (made / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    (made / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n", encoding="utf-8")
    for path in made.glob("*.json"):
        _tidy(path)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(made.iterdir()):
        path.chmod(0o644)
        path.replace(target / path.name)
    made.rmdir()
    return sum(path.stat().st_size for path in target.iterdir())


def _with_room(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with NUM_POSITIONS places for words; those after the trained ones are as the last of these."""
    name = "text_decoder.bert.embeddings.position_embeddings.weight"
    trained = state[name][:LENGTH]
    return {**state, name: torch.cat([trained, trained[-1:].expand(NUM_POSITIONS - LENGTH, -1)])}


def _tidy(path: Path) -> None:
    """Takes out where a part was loaded from, and a tokenizer's blanks."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("_name_or_path", "is_local", "local_files_only"):
        content.pop(name, None)
    indent = None if path.name == "tokenizer.json" else 2
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--name", default="blip")
    args = parser.parse_args()
    print(f"{args.target}: {export(args.work, args.target, name=args.name):,} bytes")
