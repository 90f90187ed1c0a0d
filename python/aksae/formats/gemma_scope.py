"""Gemma Scope: `params.npz`, and Gemma Scope 2: `params.safetensors` with `config.json`. Read, not written.

    z = JumpReLU(x W_enc + b_enc), x_hat = z W_dec + b_dec, plus x A with an affine skip connection A `[D, D_out]`

The first has no settings: the names of its repositories and folders tell the model, the hook, and whether it is a
transcoder, which have the same arrays.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import UserError
from .reading import Fields, Tensors, agree, assumed
from .stored import JumpReLU, StoredSAE

OPEN = ("transcoder",)
_CONFIG, _SKIP = "config.json", "affine_skip_connection"
_REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuning>pt|it)-(?P<site>res|mlp|att|transcoders)\b")
_SITE_OF_2 = re.compile(r"gemma-scope-2-[^/]+/(?:.*/)?(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/")
_LAYER = re.compile(r"\blayer_(\d+)")
# "att" reads the heads of a token side by side.
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def told(path: str) -> dict[str, Any]:
    """What the names in `path` say that the files do not: arguments of `unpack`."""
    repository, layer = _REPOSITORY.search(path), _LAYER.search(path)
    if repository is None:
        site = _SITE_OF_2.search(path)
        return {"transcoder": site[1] == "transcoder"} if site else {}
    says: dict[str, Any] = {"transcoder": repository["site"] == "transcoders"}
    says["model_name"] = f"gemma-2-{repository['size']}" + "-it" * (repository["tuning"] == "it")
    if layer and repository["site"] in _HOOKS:
        says["hook_name"] = f"blocks.{layer[1]}.{_HOOKS[repository['site']]}"
    return says


def unpack(
    files: dict[str, Any],
    *,
    transcoder: bool | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> StoredSAE:
    """`transcoder`: None for what the files say, or where they do not, for an SAE, with a note."""
    (name,) = files.keys() - {_CONFIG}
    fields, tensors = Fields(_CONFIG, files.get(_CONFIG, {})), Tensors(name, files[name])
    fields.expect("architecture", str, "jump_relu", "all of Gemma Scope are JumpReLU")
    kind = fields.take("type", str, None)
    if kind not in (None, "sae", "transcoder"):
        raise UserError(f"{_CONFIG}: type: got {kind}, whose latents write to several layers, needs sae or transcoder")
    W = "W" if "W_enc" in tensors else "w"
    W_enc = tensors.take(f"{W}_enc", None, None).T
    d_sae, d_in = W_enc.shape
    agree(_CONFIG, "width", fields.take("width", int, d_sae), d_sae)
    W_dec = tensors.take(f"{W}_dec", d_sae, None)
    d_out = W_dec.shape[1]
    takes_skip = fields.take("affine_connection", bool, _SKIP in tensors)
    A = tensors.take(_SKIP, d_in, d_out) if takes_skip else None
    hook_in, hook_out = (fields.take(f"hf_hook_point_{way}", str, None) for way in ("in", "out"))
    in_files = None
    if takes_skip or kind is not None or hook_out is not None:
        in_files = takes_skip or (kind == "transcoder" if kind is not None else hook_out != hook_in)
    if None not in (transcoder, in_files) and transcoder != in_files:
        raise UserError(f"transcoder: got {transcoder}, needs {in_files}, what the files say")
    known = in_files if transcoder is None else transcoder
    sae = StoredSAE(
        W_enc,
        tensors.take("b_enc", d_sae),
        W_dec,
        tensors.take("b_dec", d_out),
        activation=JumpReLU(tensors.take("threshold", d_sae, any_float=True)),
        subtract_b_dec=False,
        W_skip=None if A is None else A.T,
        transcoder=bool(known),
        model_name=fields.take("model_name", str, model_name),
        hook_name=hook_in or hook_name,
        hook_name_out=hook_out if known else None,
        notes=(assumed({"transcoder": False}),) if known is None else (),
    )
    tensors.finish()
    return sae
