"""Estimate the peak memory of a training run, part by part, from the model's shapes alone.

When: PER RUN, in the preflight; works on a model without weights (torch's `meta` device).

    part                 bytes
    weights              numbers held whole x bytes of their type; what trains is float32 (`precision.keep_exact`)
    quantised weights    numbers / 2
    quantised constants  numbers x (8 / 64 + 32 / (64 x 256)) bits: double quantisation in blocks of 64 and 256
                         (Dettmers et al. 2023, QLoRA, section 3)
    gradients            as the trainable weights; twice with several processes (DDP's buckets hold a copy)
    optimiser moments    AdamW 2 x the trainable weights (Kingma & Ba 2015); Muon 1 x for matrices
    activations          what autograd keeps of each block, `_decoder_numbers` and `_vision_numbers`; with checkpointing the input
                         of each block, and one block in full while it is computed again (Chen et al. 2016)
    logits               scored positions x a tile of the vocabulary of at most 32,768 (TRL's kernel) x 12 bytes: the logits in
                         float32, their probabilities and their gradient
    libraries            interpreter and libraries, or a CUDA context

The parts are added up as if all peaked at once, at the start of the last backward pass of a step. Fragmentation of a GPU's memory
(5 to 15 % as a rule) and pictures in loader workers come on top. Held to the resident size of real runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmdet.models.families import area_of, is_quantised, numbers_of

LIBRARIES = {"cpu": 950 * 2**20, "cuda": 600 * 2**20}
"""Bytes without any model: an interpreter that has imported everything; a CUDA context with its kernels."""

VOCABULARY_TILE = 32_768
QUANTISED_CONSTANT = (8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class Batch:
    """The largest batch of one process: rows, tokens of the longest row, image tokens of the largest picture, scored tokens."""

    rows: int
    tokens: int
    image_tokens: int
    scored: int


def estimate_memory(
    model: Any,
    *,
    compute_bytes: int,
    optimizer: str,
    checkpointing: bool,
    batch: Batch | None,
    processes: int = 1,
    device: str = "cpu",
) -> dict[str, int]:
    """Estimate the peak memory of one process.

    When: once per plan.

    Input: `model`, plain or with its adapter, on any device; `compute_bytes`, 2 for bfloat16 and float16, else 4; `optimizer`,
    `adamw` or `muon`; `checkpointing` of activations; the largest `batch`, None where there are no rows: then there are no
    activations and no logits; `device`, `cpu` or `cuda`.
    Output: bytes by part, in the order of the module's docstring.
    """
    weights = quantised = trained = matrices = 0.0
    for one in model.parameters():
        numbers = numbers_of(one)
        if is_quantised(one):
            quantised += numbers
            continue
        each = 4 if one.requires_grad else compute_bytes
        if one.requires_grad:
            trained += numbers * each
            matrices += numbers * each * (one.ndim == 2)
        weights += numbers * each
    moments = 2 * trained - (matrices if optimizer == "muon" else 0)
    activations = logits = 0.0
    if batch is not None:
        activations = _activations(model, batch, compute_bytes, checkpointing=checkpointing, device=device)
        vocabulary = model.config.get_text_config().vocab_size
        logits = batch.rows * batch.scored * min(vocabulary, VOCABULARY_TILE) * 12
    parts = {
        "weights": weights,
        "quantised_weights": quantised / 2,
        "quantised_constants": quantised * QUANTISED_CONSTANT,
        "gradients": trained * (2 if processes > 1 else 1),
        "optimiser_moments": moments,
        "activations": activations,
        "logits": logits,
        "libraries": LIBRARIES[device],
    }
    return {part: round(value) for part, value in parts.items()}


def _activations(model: Any, batch: Batch, compute_bytes: int, *, checkpointing: bool, device: str) -> float:
    """Return the bytes that autograd keeps of a batch.

    Of the language model always, since the loss lies behind it; of the vision tower where something in it trains. Of an
    encoder-decoder (Florence-2) every layer is taken to see all tokens, and its tower of convolutions is not counted.
    """
    areas = {area_of(name) for name, one in model.named_parameters() if one.requires_grad}
    if not areas:
        return 0.0
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    adapters = _adapter_bytes(model, mask_bytes=1 if device == "cuda" else 4)
    tokens = batch.rows * batch.tokens
    each = _decoder_numbers(text, trains="language" in areas and not adapters["language"]) * compute_bytes
    layers = text.num_hidden_layers + (text.decoder_layers if model.config.is_encoder_decoder else 0)
    blocks = [  # count, places, bytes of a place's input, bytes of a place in full
        (
            layers,
            tokens,
            text.hidden_size * compute_bytes,
            each + adapters["language"] / layers,
        )
    ]
    if vision is not None and "vision" in areas and not hasattr(vision, "depths"):
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        width = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL's hidden_size is that of its merger
        patches = batch.rows * batch.image_tokens * getattr(vision, "spatial_merge_size", 1) ** 2
        each = _vision_numbers(vision, width, trains=not adapters["vision"]) * compute_bytes
        blocks.append((depth, patches, width * compute_bytes, each + adapters["vision"] / depth))
    if checkpointing:
        return sum(count * places * kept for count, places, kept, _ in blocks) + max(
            places * full for _, places, _, full in blocks
        )
    return sum(count * places * full for count, places, _, full in blocks)


def _decoder_numbers(text: Any, *, trains: bool) -> int:
    """Count the numbers that one decoder layer of the Qwen kind keeps of each token.

    Always: the input of both norms, the turned queries and keys, values and output of the attention, and of the gated MLP the
    gate, its activation and up. Where the layer itself trains: the normalised inputs (for the norms' weights) and the inputs of
    the linear layers.
    """
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or text.decoder_ffn_dim  # BART's name, in Florence-2
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries = text.num_attention_heads * head
    keys = getattr(text, "num_key_value_heads", text.num_attention_heads) * head
    always = 2 * width + 2 * queries + 2 * keys + 3 * inner
    return always + (4 * width + queries + inner if trains else 0)


def _vision_numbers(vision: Any, width: int, *, trains: bool) -> int:
    """Count the numbers that one vision block keeps of each patch, likewise.

    Norms, queries, keys and values before and after their rotation (in float32), the attention's output, and the MLP before
    and after its activation; where the block itself trains, the inputs of its four linear layers.
    """
    inner = getattr(vision, "intermediate_size", None) or round(width * vision.mlp_ratio)
    return 11 * width + 2 * inner + (3 * width + inner if trains else 0)


def _adapter_bytes(model: Any, *, mask_bytes: int) -> dict[str, float]:
    """Add up what adapters keep of each token (or patch), over all layers of an area.

    Each keeps its own input in float32, where dropout makes one of it, with the mask (a byte on CUDA, a float32 on a CPU), and
    the `rank` numbers between its matrices. Without dropout neighbours share their input: 65 % of the numbers are counted
    (1,408 of 2,176 in a layer of the embedded base).
    """
    kept = {"language": 0.0, "vision": 0.0}
    for name, module in model.named_modules():
        if not getattr(module, "lora_A", None):
            continue
        place = "vision" if area_of(f"{name}.weight") in ("vision", "merger", "deepstack") else "language"
        drops = any(getattr(one, "p", 0.0) for one in module.lora_dropout.values())
        own = module.in_features * (4 + mask_bytes if drops else 2.6)
        kept[place] += own + 4 * sum(module.r.values())
    return kept
