"""The one place where the model libraries are told to be quiet: no bars, no advice, errors still raised.

What they would log and we need to know (tensors missing or left over, wrong shapes) is checked by parts.py
before loading, and is an error there.
"""

from __future__ import annotations

import logging
import warnings


def hush() -> None:
    """Silence bars and log lines below ERROR of diffusers and transformers. Call before using them."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    # torch's, once a process: FLUX.2 in bf16 with float32 weights has no fused norm on a CPU, and needs none
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
