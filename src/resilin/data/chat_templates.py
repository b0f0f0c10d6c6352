"""Chat templates by name, for tokenizers that bring none or are to be trained in another form."""

from __future__ import annotations

from pathlib import Path

from resilin.data.errors import DataError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of tokenizers that bring none."""

TULU = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% elif message['role'] in ('system', 'user') %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% else %}{{ raise_exception('tulu has no role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Tülu 3 (Lambert et al., 2024, appendix B): role lines in plain text, the end-of-text token after each answer and a
line end after it only where more follows."""

TEMPLATES = {"chatml": CHATML, "tulu": TULU}


def find_template(name: str) -> str:
    """The template called `tulu` or `chatml`, or the one in a file.

    Raises:
        DataError: there is neither such a name nor such a file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{name}: no such chat template file, and the known names are {', '.join(TEMPLATES)}")
    return path.read_text(encoding="utf-8")
