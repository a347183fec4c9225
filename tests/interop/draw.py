"""Draw one picture with stable-diffusion.cpp. Run by the interpreter that has it; its log goes to stdout.

    python draw.py '{"load": {"model_path": "x.safetensors", ...}, "draw": {"prompt": ..., ...}, "to": "x.png"}'

With "draw": null the model is loaded, no more. Exit code 3: it could not be loaded, and the log says why.
"""

import json
import os
import sys

from stable_diffusion_cpp import StableDiffusion

job = json.loads(sys.argv[1])
model = StableDiffusion(n_threads=1, rng_type="cpu", sampler_rng_type="cpu", verbose=True, **job["load"])
if job["draw"] is not None:
    try:
        model.generate_image(**job["draw"])[0].save(job["to"])
    except (RuntimeError, ValueError) as reason:  # a load that failed shows only here: a null pointer
        print(f"refused: {reason}", flush=True)  # noqa: T201
        os._exit(3)
sys.stdout.flush()
os._exit(0)  # tearing a null pointer down would crash
