"""Tiny transformers, built in code: the published architecture, a handful of features.

A config's defaults are those of the published checkpoint. :func:`tiny` makes every size in it small
and leaves everything else, so activations, norms, gates, routing and ties are the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

BATCH, TOKENS, VOCABULARY, IMAGE, SAMPLES, FRAMES = 2, 12, 128, 64, 3200, 64
LAYERS = 4

# What a config may call its sizes, and what they become.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"),
            *("embedding_dim", "decoder_hidden_size", "encoder_hidden_size", "emb_dim"),
            *("attention_hidden_size", "decoder_hidden_dim", "encoder_hidden_dim", "d_embed"),
            *("projection_dim", "hidden_dim", "lru_width", "word_embed_proj_dim", "d_latents"),
        ),
        32,
    ),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
            *("decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"),
            *("decoder_num_hidden_layers", "num_decoder_hidden_layers", "encoder_num_layers"),
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
            *("decoder_attention_heads", "decoder_num_attention_heads", "num_key_value_heads"),
            *("encoder_ffn_heads", "n_kv_heads"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "d_inner"),
            *("decoder_ffn_dim", "ffn_hidden_size", "decoder_intermediate_size", "hidden_dim_ffn"),
            *("shared_expert_intermediate_size", "moe_intermediate_size", "expert_dim"),
            *("encoder_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"),
        ),
        48,
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_or_config_json_file"), VOCABULARY),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "image_size": IMAGE,
    "patch_size": 8,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": FRAMES,
    "max_target_positions": 64,
    "num_mel_bins": 16,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
    "return_dict": True,
}


def tiny(default: Any, changes: Mapping[str, Any]) -> Any:
    """A config of the class of ``default`` with the sizes of :data:`SIZES`, sub-configs too.

    Args:
        default: the published config; sizes that are lists there (hierarchical models) stay.
        changes: on top, by name; ``{"keep": [...]}`` names sizes that stay as published. Mappings
            go to sub-configs.
    """
    return type(default)(**_arguments(default, changes))


def _arguments(default: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    # Some configs call a size by a name of their own.
    called: dict[str, list[str]] = {}
    for alias, name in type(default).attribute_map.items():
        called.setdefault(name, []).append(alias)
    kept = changes.get("keep", ())
    arguments: dict[str, Any] = {}
    for name, value in default.__dict__.items():
        change = changes.get(name)
        if isinstance(change, Mapping) and "model_type" in change:
            arguments[name] = change
        elif isinstance(value, PreTrainedConfig):
            arguments[name] = _arguments(value, change or {}) | {"model_type": value.model_type}
        elif name not in kept and not isinstance(value, list | tuple):
            names = [known for known in (name, *called.get(name, ())) if known in SIZES]
            if names:
                arguments[name] = SIZES[names[0]]
    inside = {name for name, value in arguments.items() if isinstance(value, Mapping)}
    return arguments | {
        name: value for name, value in changes.items() if name not in {"keep", *inside}
    }


def _tokens(config: Any) -> Tensor:
    return torch.randint(3, VOCABULARY - 8, (BATCH, TOKENS))


def _image(config: Any) -> Tensor:
    return torch.randn(BATCH, 3, IMAGE, IMAGE)


def _sequence_to_sequence(config: Any) -> dict[str, Any]:
    return {"input_ids": _tokens(config), "decoder_input_ids": _tokens(config)}


def _with_image_tokens(config: Any, count: int) -> dict[str, Any]:
    """``count`` places for an image's features, where the config names their token."""
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    places = torch.full((BATCH, 0 if token is None else count), token or 0)
    return {"input_ids": torch.cat([places, _tokens(config)], 1)}


def _image_and_tokens(config: Any) -> dict[str, Any]:
    patches = (IMAGE // SIZES["patch_size"]) ** 2
    return {**_with_image_tokens(config, patches), "pixel_values": _image(config)}


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "tokens": lambda config: {"input_ids": _tokens(config)},
    "seq2seq": _sequence_to_sequence,
    "image": lambda config: {"pixel_values": _image(config)},
    "audio": lambda config: {"input_values": torch.randn(BATCH, SAMPLES)},
    "spectrogram": lambda config: {
        "input_values": torch.randn(BATCH, FRAMES, SIZES["num_mel_bins"])
    },
    "features": lambda config: {"input_features": torch.randn(BATCH, FRAMES, 16)},
    "speech2text": lambda config: {
        "input_features": torch.randn(BATCH, FRAMES, SIZES["num_mel_bins"]),
        "decoder_input_ids": _tokens(config),
    },
    "whisper": lambda config: {
        "input_features": torch.randn(BATCH, SIZES["num_mel_bins"], 2 * FRAMES),
        "decoder_input_ids": _tokens(config),
    },
    "moonshine": lambda config: {
        "input_values": torch.randn(BATCH, SAMPLES),
        "decoder_input_ids": _tokens(config),
    },
    "waveform": lambda config: {"input_values": torch.randn(BATCH, 1, SAMPLES)},
    "perceiver": lambda config: {
        "inputs": torch.randint(3, 100, (BATCH, config.max_position_embeddings))
    },
    "image+tokens": _image_and_tokens,
    "images+tokens": lambda config: {
        **_with_image_tokens(config, (IMAGE // SIZES["patch_size"] // config.scale_factor) ** 2),
        "pixel_values": torch.randn(BATCH, 1, 3, IMAGE, IMAGE),
    },
    "video+tokens": lambda config: {
        "input_ids": _tokens(config),
        "pixel_values": torch.randn(BATCH, 8, 3, IMAGE, IMAGE),
    },
    "codes": lambda config: {"input_ids": torch.randint(3, 100, (BATCH * 2, TOKENS))},
    "video": lambda config: {"pixel_values": torch.randn(BATCH, 4, 3, IMAGE, IMAGE)},
    "clip": lambda config: {"pixel_values_videos": torch.randn(BATCH, 4, 3, IMAGE, IMAGE)},
    "forecast": lambda config: {
        "past_values": torch.randn(BATCH, 35),
        "past_time_features": torch.randn(BATCH, 35, 1),
        "past_observed_mask": torch.ones(BATCH, 35),
        "future_values": torch.randn(BATCH, 8),
        "future_time_features": torch.randn(BATCH, 8, 1),
    },
    "series": lambda config: {"past_values": torch.randn(BATCH, 64, 3)},
}
