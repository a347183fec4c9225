"""Prompts of any length, with weights, through CLIP's text encoder.

Each chunk of 75 tokens goes through the encoder alone, with the two marks around it, and the results are put one
behind the other. Alone, since a batch of another make-up changes the last digits.

Shapes: L the tokens of a chunk with its marks (77), D width of the text encoder, N vectors of textual inversions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdlab.inference.prompts.chunks import Chunk, ClipWords, check_clip_skip, filled
from sdlab.inference.prompts.embeddings import Embedding, num_vectors
from sdlab.inference.spec import Emphasis

LEAST_MEAN = 1e-4  # of the mean size; CLIP's own is 0.1


class ClipPrompts:
    """The text encoder of a Stable Diffusion pipeline; `encode` may be called by several threads at once.

    What an unweighted prompt of up to 75 tokens becomes is equal, bit for bit, to what the pipeline's own
    `encode_prompt` gives. Nothing is kept of a prompt.
    """

    def __init__(self, pipeline: Any, embeddings: Sequence[Embedding] = ()) -> None:
        self._encoder = pipeline.text_encoder
        self._words = ClipWords(pipeline.tokenizer, num_vectors(embeddings))
        self._vectors_ND = torch.cat([e.vectors_ND for e in embeddings]) if embeddings else None
        self._overlay = threading.local()
        if embeddings:
            self._encoder.get_input_embeddings().register_forward_hook(self._lay_over)

    def num_chunks(self, text: str, emphasis: Emphasis) -> int:
        """How many chunks the text fills, at least one."""
        return len(self._words.chunks(text, emphasis))

    @torch.no_grad()
    def encode(
        self, text: str, *, emphasis: Emphasis, clip_skip: int = 1, num_chunks: int = 1, long: bool = True
    ) -> Tensor:
        """(1, L * chunks, D) in the encoder's dtype and on its device: at least `num_chunks`, the last ones empty.

        `clip_skip` is the layer that is read, counted from the last. Not `long`: cut after the first chunk, as
        diffusers does. Raises SdlabError where the encoder has not so many layers.
        """
        check_clip_skip(clip_skip, int(self._encoder.config.num_hidden_layers))
        chunks = self._words.chunks(text, emphasis) if long else [self._words.cut(text, emphasis)]
        chunks += [Chunk()] * (num_chunks - len(chunks))
        return torch.cat([self._weighted(chunk, emphasis, clip_skip) for chunk in chunks], dim=1)

    def _weighted(self, chunk: Chunk, emphasis: Emphasis, clip_skip: int) -> Tensor:
        plain_1LD = self._hidden(chunk, clip_skip)
        if all(weight == 1.0 for weight in chunk.weights):
            return plain_1LD
        _, weights, _ = filled(chunk, self._words.marks)
        weights_L1 = torch.tensor(weights, dtype=torch.float32, device=plain_1LD.device)[:, None]
        if emphasis == "comfy":
            made_1LD = from_empty(plain_1LD.float(), self._hidden(Chunk(), clip_skip).float(), weights_L1)
        else:
            made_1LD = mean_kept(plain_1LD.float(), weights_L1)
        return made_1LD.to(plain_1LD.dtype)

    def _hidden(self, chunk: Chunk, clip_skip: int) -> Tensor:
        """What the encoder makes of a chunk, (1, L, D), as diffusers' `encode_prompt` calls it."""
        ids, _, mask = filled(chunk, self._words.marks)
        first, device = self._words.first_vector, next(self._encoder.parameters()).device
        known_1L = torch.tensor([[number if number < first else 0 for number in ids]]).to(device)
        masked = getattr(self._encoder.config, "use_attention_mask", False)
        mask_1L = torch.tensor([mask]).to(device) if masked else None
        with self._laid_over(
            [(place, number - first) for place, number in enumerate(ids) if number >= first]
        ):
            if clip_skip == 1:
                last_1LD: Tensor = self._encoder(known_1L, attention_mask=mask_1L)[0]
                return last_1LD
            made = self._encoder(known_1L, attention_mask=mask_1L, output_hidden_states=True)
        inner = getattr(
            self._encoder, "text_model", self._encoder
        )  # transformers 5.6 did away with the inner one
        layer_1LD: Tensor = inner.final_layer_norm(made.hidden_states[-clip_skip])
        return layer_1LD

    @contextmanager
    def _laid_over(self, rows: list[tuple[int, int]]) -> Iterator[None]:
        """While this lasts, and in this thread only: textual inversions, as (place, vector), in place of tokens."""
        self._overlay.rows = rows
        try:
            yield
        finally:
            self._overlay.rows = []

    def _lay_over(self, module: nn.Module, given: Any, made_1LD: Tensor) -> Tensor | None:
        """A hook on the table of tokens: what `_laid_over` says for this thread. Nothing is touched without it."""
        rows = getattr(self._overlay, "rows", None)
        if not rows:
            return None
        assert self._vectors_ND is not None
        places, vectors = zip(*rows, strict=True)
        laid_1LD = made_1LD.clone()
        laid_1LD[0, list(places)] = self._vectors_ND[list(vectors)].to(made_1LD)
        return laid_1LD


def mean_kept(plain_1LD: Tensor, weights_L1: Tensor) -> Tensor:
    """AUTOMATIC1111's emphasis: each token's vector times its weight, all scaled so that their mean is as before.

    Not scaled where either mean is nothing but rounding, as that of a layer norm without a bias: their ratio is noise.
    """
    weighted_1LD = plain_1LD * weights_L1
    before, after = plain_1LD.mean(), weighted_1LD.mean()
    least = LEAST_MEAN * plain_1LD.abs().mean()
    return weighted_1LD * (before / after) if min(before.abs(), after.abs()) > least else weighted_1LD


def from_empty(plain_1LD: Tensor, empty_1LD: Tensor, weights_L1: Tensor) -> Tensor:
    """ComfyUI's emphasis: each token's vector moved on the line from where the empty prompt has it, z0 + (z - z0) w."""
    moved_1LD = empty_1LD + (plain_1LD - empty_1LD) * weights_L1
    return torch.where(weights_L1 == 1.0, plain_1LD, moved_1LD)
