"""Tiny random LLMs of many families, each with a tokenizer and a chat template in that family's manner.

The tokenizers are trained on the spot: byte-level or sentence-piece-like, with the family's special and reserved tokens
where that family keeps them, its BOS or none, its padding token or none. Templates write the same turns as the family's
own, in our words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from conftest import tiny_config, tiny_model
from fixtures_tokenizers import GEMMA_TEMPLATE, QWEN_TEMPLATE, SENTENCES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from listen.modeling_listen import ListenForConditionalGeneration
from listen.processing_listen import ListenProcessor

LLAMA_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GRANITE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How LLMs of one family are built and how they write.

    Attributes:
        model_type: Of transformers.
        config: What sets this family apart, in its config.
        vision: Config of the vision tower beside the LLM, where the model is composite.
        byte_level: Whether text is split into bytes, or into pieces with a mark for the blank.
        first: Special tokens at the beginning of the vocabulary.
        last: Special tokens behind the pieces.
        named: `bos_token` and the like.
        writes_bos: Whether the tokenizer puts BOS before a text.
        template: The chat template; `None` where the family has none.
        spare_rows: Rows of the embedding that no token uses.
        reserved: What the placeholders become; `None` where there are no reserved tokens.
    """

    model_type: str
    named: dict[str, str]
    config: dict[str, object] = field(default_factory=dict)
    vision: dict[str, object] | None = None
    byte_level: bool = True
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    writes_bos: bool = False
    template: str | None = None
    spare_rows: int = 0
    reserved: tuple[str, str] | None = None


SENTENCE_PIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {
    "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "last": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    "template": QWEN_TEMPLATE,
    "spare_rows": 9,
}
GEMMA = {
    "named": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "byte_level": False,
    "first": ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<unused0>", "<unused1>", "<unused2>"),
    "last": ("<start_of_turn>", "<end_of_turn>"),
    "writes_bos": True,
    "template": GEMMA_TEMPLATE,
    "reserved": ("<unused2>", "<unused1>"),
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
VISION_SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}

FAMILIES = {
    "llama": Family(
        "llama",
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        last=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
            *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_2|>", "<|eot_id|>"),
            *(f"<|reserved_special_token_{i}|>" for i in range(3, 12)),
        ),
        writes_bos=True,
        template=LLAMA_TEMPLATE,
        reserved=("<|reserved_special_token_11|>", "<|reserved_special_token_10|>"),
    ),
    "qwen3": Family("qwen3", config={"head_dim": 16}, **QWEN),
    "qwen3-moe": Family(
        "qwen3_moe", config={"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24, **EXPERTS}, **QWEN
    ),
    "mistral": Family(
        "mistral",
        named=SENTENCE_PIECE,
        config={"sliding_window": 16},  # shorter than one clip and its question
        byte_level=False,
        first=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"[control_{i}]" for i in range(8, 12))),
        writes_bos=True,
        template=MISTRAL_TEMPLATE,
        reserved=("[control_11]", "[control_10]"),
    ),
    "mixtral": Family(
        "mixtral",
        named=SENTENCE_PIECE,
        config={"num_local_experts": 4, **EXPERTS},
        byte_level=False,
        first=("<unk>", "<s>", "</s>"),
        writes_bos=True,
        template=MISTRAL_TEMPLATE,
    ),
    "gemma2": Family(
        "gemma2",
        config={"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 7, "final_logit_softcapping": 30.0},
        **GEMMA,
    ),
    "gemma3": Family(  # composite: an image model whose LLM has a config of its own inside
        "gemma3",
        config={"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 7, "layer_types": SLIDING_AND_FULL},
        vision={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **VISION_SIZES},
        **GEMMA,
    ),
    "gemma3n": Family(
        "gemma3n_text",
        config={
            "head_dim": 12,
            "sliding_window": 7,
            "layer_types": SLIDING_AND_FULL,
            "num_kv_shared_layers": 0,
            "intermediate_size": [64, 64],
            "activation_sparsity_pattern": [0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
        },
        **GEMMA,
    ),
    "phi3": Family(
        "phi3",
        named={"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"},
        byte_level=False,
        first=("<unk>", "<s>", "</s>"),
        last=(
            *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>"),
            *("<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
        ),
        template=PHI_TEMPLATE,
        reserved=("<|placeholder6|>", "<|placeholder5|>"),
    ),
    "granite": Family(
        "granite",
        named=dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|end_of_text|>"),
        config={
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
        first=("<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
        last=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        template=GRANITE_TEMPLATE,
    ),
    "gpt-neox": Family(
        "gpt_neox",
        named=dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        first=("<|endoftext|>", "<|padding|>"),
        spare_rows=27,
    ),
}


@lru_cache
def _trained(byte_level: bool, first: tuple[str, ...], last: tuple[str, ...]) -> str:
    """A trained tokenizer as JSON: a base vocabulary, then `last`."""
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        alphabet = list("\n<>|[]abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + len(alphabet) + 60,
        special_tokens=list(first),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens(list(last))
    return tokenizer.to_str()


def family_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fresh tokenizer in the manner of a family, as it would come from the Hub."""
    family = FAMILIES[name]
    tokenizer = Tokenizer.from_str(_trained(family.byte_level, family.first, family.last))
    if family.writes_bos:
        bos = family.named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **family.named)
    fast.chat_template = family.template
    return fast


def family_text_config(name: str) -> dict[str, object]:
    """The LLM's config; its special ids are its tokenizer's, and it names a padding only where that one does."""
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    base = tiny_config().text_config.to_dict()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = {
        "model_type": family.model_type,
        "vocab_size": len(tokenizer) + family.spare_rows,
        "max_position_embeddings": 512,
        **{size: base[size] for size in sizes},
        **ids,
        **family.config,
    }
    if family.model_type == "gemma3n_text":
        config["vocab_size_per_layer_input"] = config["vocab_size"]
    if family.vision is not None:
        inner = {**config, "model_type": f"{family.model_type}_text"}
        image = tokenizer.convert_tokens_to_ids("[multimodal]")
        tower = {"vision_config": family.vision, "mm_tokens_per_image": 4, "image_token_id": image}
        config = {"model_type": family.model_type, "text_config": inner, **tower, **ids}
    return config


@lru_cache
def family_model(name: str) -> tuple[ListenForConditionalGeneration, ListenProcessor]:
    """A random LiSTEN model over that LLM, and its processor. Shared by tests, none of which may change it."""
    text_config = family_text_config(name)
    config = tiny_config(text_config=text_config, audio_token_id=None, prompt_token_id=None)
    processor = ListenProcessor.from_backbones(config, tokenizer=family_tokenizer(name))
    ids = {"audio_token_id": processor.audio_token_id, "prompt_token_id": processor.prompt_token_id}
    model = tiny_model(text_config=text_config, **ids)
    if text_config["pad_token_id"] is not None:  # zero in a random LLM, never in a trained one; Gemma 3n divides by it
        torch.nn.init.normal_(model.get_input_embeddings().weight.data[text_config["pad_token_id"]])
    return model, processor
