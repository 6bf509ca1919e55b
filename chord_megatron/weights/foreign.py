"""What a folder or its tensors are where they are not those of a Hugging Face model, and how to go on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from chord_megatron.weights.families.common import HF_EMBEDDING

_ADAPTER = "adapter_config.json"
# The first row of which a pattern is in the folder says what it is; {} is the first file that matches.
_FOLDERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (_ADAPTER, "adapter_model.*"),
        "is a PEFT adapter, not a model; load it with its base model, merge_and_unload(), and save that by "
        "save_pretrained",
    ),
    (
        ("latest_checkpointed_iteration.txt", "mp_rank_*", "iter_*", ".metadata"),
        "is a folder of Megatron-LM; run `chord-megatron convert megatron-to-hf` on it",
    ),
    (
        ("*.gguf",),
        "has GGUF weights ({}), which are for inference; give the Hugging Face folder that they were made from",
    ),
    (
        ("consolidated*",),
        "has weights in their author's own format ({}); give the Hugging Face folder of the model",
    ),
    (
        ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
        "has pickled weights ({}), which could run code; load it with transformers and save it by save_pretrained, "
        "which writes safetensors",
    ),
    (
        ("model-*-of-*.safetensors",),
        "has shards without model.safetensors.index.json; download that file, too",
    ),
    (
        ("*.safetensors",),
        "has safetensors under other names ({}); save the model with save_pretrained",
    ),
    (("snapshots",), "is the cache of a download; give the folder below its snapshots/"),
    (("hf/step_*",), "is the folder of a run; give one of its exports, hf/step_N"),
    (("checkpoint-*", "step_*"), "holds folders of checkpoints ({}); give one of them"),
)

_MERGE = "merge the adapter with merge_and_unload() and save that model by save_pretrained"
_UNQUANTIZED = "they are a quantized model's; use the unquantized checkpoint"
_INSIDE = "this is the language model inside of another; save it alone"
_WRAPPER = "every name of the model begins with `{}`, a wrapper's; save the model in it"
# The first row whose pattern is found in a name says what the tensors are.
_NAMES = (
    (r"^base_model\.model\.|\.base_layer\.|\.lora_[AB]\b|\blora_embedding_", _MERGE),
    (r"\.(qweight|qzeros|g_idx|SCB|weight_packed|weight_scale\w*|absmax|quant_map)$|\.quant_state\.", _UNQUANTIZED),
    (r"^model\.language_model\.", f"the names begin with `model.language_model.`: {_INSIDE}"),
    (r"^language_model\.", f"the names begin with `language_model.`: {_INSIDE}"),
    (
        r"^tok_embeddings\.|^layers\.\d+\.attention\.w[qkvo]\.",
        "these are Meta's or Mistral's own names; give the Hugging Face folder of the model",
    ),
    (
        r"^embedding\.word_embeddings\.|^decoder\.layers\.",
        "these are Megatron's names; export the model as a Hugging Face folder",
    ),
    (
        r"^embed_tokens\.|^layers\.\d+\.self_attn\.",
        "the names lack `model.`: it was saved without its head; save AutoModelForCausalLM, not AutoModel",
    ),
)


def describe_folder(directory: Path) -> str | None:
    """The rest of a sentence about a folder without a model: what is there and the remedy; None where that is open."""
    for patterns, meaning in _FOLDERS:
        for pattern in patterns:
            if found := min(directory.glob(pattern), default=None):
                return meaning.format(found.name)
    return None


def describe_adapter(model_dir: Path) -> str | None:
    """The same of an adapter, also beside a whole model: transformers would apply it."""
    return _FOLDERS[0][1] if (model_dir / _ADAPTER).is_file() else None


def remedy_for_names(found: Iterable[str], expected: set[str]) -> str | None:
    """What names of tensors that a model lacks, or has beside its own, point to; None where nothing does."""
    found = sorted(found)
    for pattern, meaning in _NAMES:
        if any(re.search(pattern, name) for name in found):
            return meaning
    prefix = next((name.removesuffix(HF_EMBEDDING) for name in found if name.endswith(f".{HF_EMBEDDING}")), None)
    if prefix and any(prefix + name in found for name in expected):
        return _WRAPPER.format(prefix)
    return None
