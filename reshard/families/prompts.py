"""How Meta's instruct models are prompted: special tokens in the order of their ids, and templates.

The templates are in Jinja, as transformers renders them with `messages`, `bos_token`, `eos_token`
and `add_generation_prompt`. Each renders the format that Meta documents for its models.
"""


def _reserved(start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"<|reserved_special_token_{number}|>" for number in range(start, stop))


_ENDS = ("<|begin_of_text|>", "<|end_of_text|>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
# 256 of each, behind the 128000 tokens of the file.
SPECIALS_3 = (
    *_ENDS,
    *_reserved(0, 4),
    *_HEADERS,
    *_reserved(4, 5),
    "<|eot_id|>",
    *_reserved(5, 251),
)
SPECIALS_3_1 = (
    *_ENDS,
    *_reserved(0, 2),
    "<|finetune_right_pad_id|>",
    *_reserved(2, 3),
    *_HEADERS,
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *_reserved(3, 248),
)

# A header with the role, a blank line, the text, and the end of the turn. Results of tools have the
# role ipython.
LLAMA_3 = (
    "{%- if tools -%}{{- raise_exception('this template has no place for tools: "
    "put them into a message, as the documentation of the model says') -}}{%- endif -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)
# Each pair of turns is a text of its own, from bos to eos; the system's words stand in the first.
LLAMA_2 = (
    "{%- set system, turns = '', messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}"
    "{%- set turns = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for turn in turns -%}"
    "{%- if turn['role'] != ('user', 'assistant')[loop.index0 % 2] -%}"
    "{{- raise_exception('turns must alternate: user, assistant, user, ...') -}}"
    "{%- endif -%}"
    "{%- if turn['role'] == 'user' -%}"
    "{%- set text = (system if loop.first else '') + turn['content'] -%}"
    "{{- bos_token + '[INST] ' + text | trim + ' [/INST]' -}}"
    "{%- else -%}"
    "{{- ' ' + turn['content'] | trim + ' ' + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
