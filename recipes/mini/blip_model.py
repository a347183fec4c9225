"""mini-blip untrained: its tokenizer, its image processor's settings and a small BlipForConditionalGeneration.

Shapes: B pictures, T tokens, V words, D width.
"""

from __future__ import annotations

import string

import torch
from blip_data import SQUARE_PX, WORDS
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
WINDOW = 16  # tokens of a caption with [DEC] and [SEP]; the longest has 12
NUM_POSITIONS = (
    64  # of the model as exported: room for whoever asks `generate` for more words than it has to say
)
PATCH_PX = 12
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # BLIP's own
PROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": MEAN, "image_processor_type": "BlipImageProcessor", "image_std": STD,
    "processor_class": "BlipProcessor", "resample": 3, "rescale_factor": 1 / 255,
    "size": {"height": SQUARE_PX, "width": SQUARE_PX},
}  # fmt: skip


def vocabulary() -> list[str]:
    """All tokens in the order of their numbers: special ones, letters and digits, their continuations, words."""
    signs = string.ascii_lowercase + string.digits
    words = [word for word in WORDS if len(word) > 1]
    return [*SPECIAL, *signs, *(f"##{sign}" for sign in signs), ",", ".", "-", *words]


def tokenizer() -> BertTokenizer:
    """BERT's WordPiece with [DEC] in front, as BLIP has it; a word is one token, a plural may be two."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    return BertTokenizer(vocab=ids, bos_token="[DEC]", model_max_length=NUM_POSITIONS)


def small_blip(num_positions: int = WINDOW) -> BlipForConditionalGeneration:
    """BLIP's captioner with 6 vision and 2 text layers of width 128, with random weights."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    config = BlipConfig(
        text_config={
            "vocab_size": len(ids), "hidden_size": 128, "encoder_hidden_size": 128, "intermediate_size": 512,
            "projection_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": num_positions, "bos_token_id": ids["[DEC]"], "eos_token_id": ids["[SEP]"],
            "sep_token_id": ids["[SEP]"], "pad_token_id": ids["[PAD]"], "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        vision_config={
            "hidden_size": 128, "intermediate_size": 512, "projection_dim": 128, "num_hidden_layers": 6,
            "num_attention_heads": 4, "image_size": SQUARE_PX, "patch_size": PATCH_PX, "attention_dropout": 0.0,
            "initializer_range": 0.02,
        },
        projection_dim=128, image_text_hidden_size=128,
    )  # fmt: skip
    return BlipForConditionalGeneration(config)


def logits_of(model: BlipForConditionalGeneration, pixels_B3HW: Tensor, ids_BT: Tensor) -> Tensor:
    """What comes after each token, (B, T, V)."""
    states_BLD = model.vision_model(pixels_B3HW).last_hidden_state
    seen = torch.ones(states_BLD.shape[:2], dtype=torch.long)
    return model.text_decoder(
        ids_BT,
        encoder_hidden_states=states_BLD,
        encoder_attention_mask=seen,
        use_cache=False,
        is_decoder=True,
    ).logits  # type: ignore[no-any-return]
