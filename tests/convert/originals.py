"""The tensors that the original networks have, name by name: what A1111, ComfyUI and others build and fill.

Written down from the papers' own code, not from our tables: level by level, as those modules are built. Nothing here
knows a name of diffusers. Shapes: out before in, kernels behind.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPENCLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."


def linear(name: str, num_in: int, num_out: int, *, bias: bool = True) -> Shapes:
    """A matrix and its bias."""
    return {f"{name}.weight": (num_out, num_in)} | ({f"{name}.bias": (num_out,)} if bias else {})


def conv(name: str, num_in: int, num_out: int, kernel: int = 3) -> Shapes:
    """A convolution and its bias."""
    return {f"{name}.weight": (num_out, num_in, kernel, kernel), f"{name}.bias": (num_out,)}


def norm(name: str, width: int) -> Shapes:
    """A group or layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    """The same behind a prefix."""
    return {prefix + name: shape for name, shape in shapes.items()}


def unet(*, channels: int = 4, context: int = 768, linear_proj: bool = False, width: int = 320) -> Shapes:
    """The UNet of Stable Diffusion 1.x (or 2.x: context 1024, `linear_proj`): widths 1, 2, 4, 4, two blocks a level."""
    widths, time = [width, 2 * width, 4 * width, 4 * width], 4 * width
    found = linear("time_embed.0", width, time) | linear("time_embed.2", time, time)
    found |= conv("input_blocks.0.0", channels, width)
    number, at, kept = 1, width, [width]
    for level, wide in enumerate(widths):
        for _ in range(2):
            found |= _res(f"input_blocks.{number}.0", at, wide, time)
            if level < 3:
                found |= _attention(f"input_blocks.{number}.1", wide, context, linear_proj)
            number, at = number + 1, wide
            kept.append(wide)
        if level < 3:
            found |= conv(f"input_blocks.{number}.0.op", wide, wide)
            number += 1
            kept.append(wide)
    found |= _res("middle_block.0", at, at, time) | _res("middle_block.2", at, at, time)
    found |= _attention("middle_block.1", at, context, linear_proj)
    for number in range(12):
        level = 3 - number // 3
        found |= _res(f"output_blocks.{number}.0", at + kept.pop(), widths[level], time)
        at = widths[level]
        if level < 3:
            found |= _attention(f"output_blocks.{number}.1", at, context, linear_proj)
        if number % 3 == 2 and level > 0:
            found |= conv(f"output_blocks.{number}.{2 if level < 3 else 1}.conv", at, at)
    return found | norm("out.0", width) | conv("out.2", width, 4)


def _res(name: str, num_in: int, num_out: int, time: int) -> Shapes:
    found = norm(f"{name}.in_layers.0", num_in) | conv(f"{name}.in_layers.2", num_in, num_out)
    found |= linear(f"{name}.emb_layers.1", time, num_out)
    found |= norm(f"{name}.out_layers.0", num_out) | conv(f"{name}.out_layers.3", num_out, num_out)
    return found | (conv(f"{name}.skip_connection", num_in, num_out, 1) if num_in != num_out else {})


def _attention(name: str, width: int, context: int, linear_proj: bool) -> Shapes:
    found = norm(f"{name}.norm", width)
    for proj in ("proj_in", "proj_out"):
        found |= (
            linear(f"{name}.{proj}", width, width) if linear_proj else conv(f"{name}.{proj}", width, width, 1)
        )
    block = f"{name}.transformer_blocks.0"
    for attention, read in (("attn1", width), ("attn2", context)):
        found |= linear(f"{block}.{attention}.to_q", width, width, bias=False)
        found |= linear(f"{block}.{attention}.to_k", read, width, bias=False)
        found |= linear(f"{block}.{attention}.to_v", read, width, bias=False)
        found |= linear(f"{block}.{attention}.to_out.0", width, width)
    found |= linear(f"{block}.ff.net.0.proj", width, 8 * width) | linear(
        f"{block}.ff.net.2", 4 * width, width
    )
    return (
        found | norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width) | norm(f"{block}.norm3", width)
    )


def vae(*, latent: int = 4, width: int = 128) -> Shapes:
    """The autoencoder of Stable Diffusion: widths 1, 2, 4, 4; the decoder's level 0 is the one next to the picture."""
    widths = [width, 2 * width, 4 * width, 4 * width]
    found, at = conv("encoder.conv_in", 3, width), width
    for level, wide in enumerate(widths):
        for block in range(2):
            found |= _vae_res(f"encoder.down.{level}.block.{block}", at, wide)
            at = wide
        if level < 3:
            found |= conv(f"encoder.down.{level}.downsample.conv", wide, wide)
    found |= _vae_mid("encoder", at) | norm("encoder.norm_out", at) | conv("encoder.conv_out", at, 2 * latent)
    found |= conv("decoder.conv_in", latent, at) | _vae_mid("decoder", at)
    for level in (3, 2, 1, 0):
        for block in range(3):
            found |= _vae_res(f"decoder.up.{level}.block.{block}", at, widths[level])
            at = widths[level]
        if level > 0:
            found |= conv(f"decoder.up.{level}.upsample.conv", at, at)
    found |= norm("decoder.norm_out", width) | conv("decoder.conv_out", width, 3)
    return found | conv("quant_conv", 2 * latent, 2 * latent, 1) | conv("post_quant_conv", latent, latent, 1)


def _vae_res(name: str, num_in: int, num_out: int) -> Shapes:
    found = norm(f"{name}.norm1", num_in) | conv(f"{name}.conv1", num_in, num_out)
    found |= norm(f"{name}.norm2", num_out) | conv(f"{name}.conv2", num_out, num_out)
    return found | (conv(f"{name}.nin_shortcut", num_in, num_out, 1) if num_in != num_out else {})


def _vae_mid(side: str, width: int) -> Shapes:
    found = norm(f"{side}.mid.attn_1.norm", width)
    for block in ("block_1", "block_2"):
        found |= _vae_res(f"{side}.mid.{block}", width, width)
    for layer in ("q", "k", "v", "proj_out"):
        found |= conv(f"{side}.mid.attn_1.{layer}", width, width, 1)
    return found


def clip(*, layers: int = 12, width: int = 768) -> Shapes:
    """CLIP's text encoder as transformers had it for years, behind ``text_model.``."""
    found = {
        "embeddings.token_embedding.weight": (49408, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for number in range(layers):
        layer = f"encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}.self_attn.{name}", width, width)
        found |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        found |= linear(f"{layer}.mlp.fc1", width, 4 * width) | linear(f"{layer}.mlp.fc2", 4 * width, width)
    return found | norm("final_layer_norm", width)


def openclip(*, layers: int = 23, width: int = 1024) -> Shapes:
    """OpenCLIP's text encoder up to the layer that Stable Diffusion 2.x reads, the last but one of 24."""
    found: Shapes = {"token_embedding.weight": (49408, width), "positional_embedding": (77, width)}
    for number in range(layers):
        layer = f"transformer.resblocks.{number}"
        found |= {
            f"{layer}.attn.in_proj_weight": (3 * width, width),
            f"{layer}.attn.in_proj_bias": (3 * width,),
        }
        found |= linear(f"{layer}.attn.out_proj", width, width)
        found |= norm(f"{layer}.ln_1", width) | norm(f"{layer}.ln_2", width)
        found |= linear(f"{layer}.mlp.c_fc", width, 4 * width) | linear(
            f"{layer}.mlp.c_proj", 4 * width, width
        )
    return found | norm("ln_final", width)


def flux2(*, width: int, doubles: int, singles: int, context: int, guidance: bool = False) -> Shapes:
    """Black Forest Labs' FLUX.2 transformer: heads of 128, gated MLPs 3 times as wide, modulation shared by blocks."""
    found: Shapes = {"img_in.weight": (width, 128), "txt_in.weight": (width, context)}
    for embedder in ("time_in", "guidance_in") if guidance else ("time_in",):
        found |= linear(f"{embedder}.in_layer", 256, width, bias=False)
        found |= linear(f"{embedder}.out_layer", width, width, bias=False)
    for number in range(doubles):
        for side in ("img", "txt"):
            block = f"double_blocks.{number}.{side}"
            found |= {
                f"{block}_attn.norm.query_norm.scale": (128,),
                f"{block}_attn.norm.key_norm.scale": (128,),
            }
            found |= {
                f"{block}_attn.qkv.weight": (3 * width, width),
                f"{block}_attn.proj.weight": (width, width),
            }
            found |= {
                f"{block}_mlp.0.weight": (6 * width, width),
                f"{block}_mlp.2.weight": (width, 3 * width),
            }
    for number in range(singles):
        block = f"single_blocks.{number}"
        found |= {f"{block}.norm.query_norm.scale": (128,), f"{block}.norm.key_norm.scale": (128,)}
        found |= {
            f"{block}.linear1.weight": (9 * width, width),
            f"{block}.linear2.weight": (width, 4 * width),
        }
    for side in ("img", "txt"):
        found[f"double_stream_modulation_{side}.lin.weight"] = (6 * width, width)
    found["single_stream_modulation.lin.weight"] = (3 * width, width)
    return found | {
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.linear.weight": (128, width),
    }


def flux2_vae() -> Shapes:
    """Black Forest Labs' FLUX.2 autoencoder: 32 channels, its last convolutions within its halves, and a batch norm."""
    moved = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    found = {moved.get(n.rsplit(".", 1)[0], n.rsplit(".", 1)[0]) + "." + n.rsplit(".", 1)[1]: s
             for n, s in vae(latent=32).items()}  # fmt: skip
    return found | {"bn.running_mean": (128,), "bn.running_var": (128,), "bn.num_batches_tracked": ()}
