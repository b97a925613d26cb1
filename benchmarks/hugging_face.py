"""Hugging Face models of the prior's size, drawing with a static cache: what people would use otherwise.

Needs `transformers`, in an environment of its own that also sees this project; see `benchmarks/decoding.py`.
Both have one vocabulary for text and codes, since they know no other way.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stage2_prior.config import PriorConfig


def gpt2(config: PriorConfig) -> Any:
    """A GPT-2 of the same depth, width, heads and sequence."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config.text_vocab + config.image_vocab, n_positions=config.length, n_embd=config.width,
        n_layer=config.depth, n_head=config.heads, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(shape).eval()


def llama(config: PriorConfig) -> Any:
    """A Llama of the same depth, width, heads and parameters per layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.text_vocab + config.image_vocab, hidden_size=config.width,
        intermediate_size=8 * config.width // 3, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, num_key_value_heads=config.heads,
        max_position_embeddings=config.length, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


@torch.inference_mode()
def draw(model: Any, config: PriorConfig, text: Tensor, pictures: int) -> Iterator[Tensor]:
    """Codes cell by cell, temperature 1, with a static cache; `text` is one row of text tokens."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=config.length)
    tokens = text.expand(pictures, -1)
    for _ in range(config.cells):
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens = torch.multinomial(torch.softmax(logits, -1), 1)
        yield tokens[:, 0]
