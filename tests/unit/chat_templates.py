"""Chat templates in the form of those that public models carry, and byte-level tokenizers that know their markers."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class ChatModel(NamedTuple):
    template: str
    eos: str  # as the tokenizer names it, which is not always what ends a turn
    markers: tuple[str, ...]  # special tokens
    words: tuple[str, ...] = ()  # added tokens that are not special
    bos: str | None = None


# A base model: the template ends a turn with <|im_end|>, the tokenizer's eos is <|endoftext|>.
QWEN25 = ChatModel(
    template="""\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{{- messages[0]['content'] if messages[0]['role'] == 'system' else 'You are helpful.' }}
{{- '\\n\\n# Tools' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and loop.first and tools %}
{%- elif message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>' }}{{- call.function | tojson }}{{- '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    eos="<|endoftext|>",
    markers=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
)

# The last assistant turn is written with its reasoning, empty where it has none; enable_thinking=False opens it so.
QWEN3 = ChatModel(
    template="""\
{%- for message in messages %}
{%- if message.role != 'assistant' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- else %}
{%- set content = message.content %}
{%- set reasoning = '' %}
{%- if message.reasoning_content is defined and message.reasoning_content is not none %}
{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}
{{- '<|im_start|>assistant\\n' + content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    eos="<|im_end|>",
    markers=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    words=("<think>", "</think>"),
)

# Asks `'tool_calls' in message`; contents are trimmed. Early Llama-3-Instruct files name <|end_of_text|> as eos.
LLAMA31 = ChatModel(
    template="""\
{{- bos_token }}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one tool call at a time') }}{%- endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + message.tool_calls[0].function.name + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    eos="<|end_of_text|>",
    markers=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
)

# The system message goes into the last question; roles must alternate; an answer follows a space.
MISTRAL = ChatModel(
    template="""\
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if message.role == 'user' and loop.index0 >= turns | length - 2 and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
{%- elif message.role == 'user' %}{{- '[INST] ' + message.content + '[/INST]' }}
{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}
""",
    eos="</s>",
    markers=("<s>", "</s>", "[INST]", "[/INST]"),
    bos="<s>",
)

# Opens the model's turn with <think>; reasoning is left out of the turns that are over.
R1_DISTILL = ChatModel(
    template="""\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{- message.content }}
{%- elif message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- else %}
{%- set content = message.content %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}
""",
    eos="<｜end▁of▁sentence｜>",
    markers=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    words=("<think>", "</think>"),
    bos="<｜begin▁of▁sentence｜>",
)

# Writes nothing behind an answer: the role of the next turn ends it.
GLM4 = ChatModel(
    template="""\
{{- '[gMASK]<sop>' }}
{%- for message in messages %}{{- '<|' + message.role + '|>\\n' + message.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
""",
    eos="<|endoftext|>",
    markers=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)

# Writes neither tools nor the messages of a developer; joins a tool call's arguments, which must be text for that.
DEEPSEEK_V3 = ChatModel(
    template="""\
{{- bos_token }}
{%- for message in messages %}{%- if message.role == 'system' %}{{- message.content }}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜>' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{- '<call>' + call.function.name + call.function.arguments }}{%- endfor %}
{{- '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}
""",
    eos="<｜end▁of▁sentence｜>",
    markers=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    bos="<｜begin▁of▁sentence｜>",
)


def tokenizer_of(model: ChatModel) -> PreTrainedTokenizerFast:
    """One token a byte, and one a marker, so that tokens and text say the same."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(model.markers))
    backend.add_tokens(list(model.words))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=model.bos,
        eos_token=model.eos,
        chat_template=model.template,
        clean_up_tokenization_spaces=False,
    )
