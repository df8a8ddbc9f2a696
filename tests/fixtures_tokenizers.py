"""Small tokenizers trained on the spot, in the manners of the LLMs that people bring."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 99  # of tests/conftest.py
SENTENCES = (
    "What is being said? Translate the speech. Describe the sounds.",
    "USER: user ASSISTANT: assistant system: <> [] / | _ . , ! {question} 0123456789",
    "Which emotion does the speaker show? Do both recordings come from the same speaker?",
    "the quick brown fox jumps over the lazy dog JKVXYZ BGHLMNOPQ",
)

LLAMA_3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start|>' + message['role'] + '<|end|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] | trim + '<|eot|>' }}"
    "{% endgeneration %}"
    "{%- else %}{{- message['content'] | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}"
)
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- 'nothink\n' }}{%- endif %}{%- endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@lru_cache
def _trained(size: int, extra: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    specials = ["<pad>", "<s>", "</s>", "<unk>", *extra]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"trained {tokenizer.get_vocab_size()} tokens, not {size}")
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer.to_str()


def build_tokenizer(
    size: int = VOCABULARY,
    extra: tuple[str, ...] = (),
    template: str | None = None,
    pad_token: str | None = "<pad>",
) -> PreTrainedTokenizerBase:
    """A BPE tokenizer of exactly `size` tokens that writes BOS: `<pad>` 0, `<s>` 1, `</s>` 2, then `extra`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(size, tuple(extra))),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad_token,
    )
    tokenizer.chat_template = template
    return tokenizer
