"""Rows whose length follows the run."""

from __future__ import annotations

import pytest
import torch

from resilin.data.lengths import Lengths
from resilin.data.settings import SourceContext


def settings(path, **more):
    return Lengths.model_validate(
        {
            "source": {
                "use": "resilin.data.text_source:TextSource",
                "paths": [str(path)],
                "tokenizer": {"kind": "bytes"},
                "held_out": {"by": "tail"},
                "cache": str(path.parent / "cache"),
            },
            "phases": [{"steps": 3, "sequence_length": 8}, {"sequence_length": 32, "batch_size": 2}],
            **more,
        }
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} of a text. " for n in range(400)))
    return path


def test_lengths_and_rows_change_at_their_step(text):
    source = settings(text).build(SourceContext(batch_size=5))
    shapes = [tuple(source.fetch(step, range(source.slots(step)))["tokens"].shape) for step in range(5)]
    assert shapes == [(5, 8)] * 3 + [(2, 32)] * 2
    again = settings(text).build(SourceContext(batch_size=5))
    again.load_state_dict(source.state_dict())
    assert torch.equal(again.fetch(4, [1])["tokens"], source.fetch(4, [0, 1])["tokens"][1:])
    assert source.vocab_size == again.vocab_size
    with pytest.raises(ValueError, match="2 phases, and the settings 1"):
        settings(text, phases=[{"sequence_length": 8}]).build(SourceContext()).load_state_dict(source.state_dict())


def test_held_out_text_is_read_with_the_last_length(text):
    held_out = settings(text).build(SourceContext(split="validation", batch_size=3))
    assert held_out.fetch(0, range(held_out.slots(0)))["tokens"].shape == (3, 32)


@pytest.mark.parametrize(
    "phases", [[{"sequence_length": 8}, {"sequence_length": 9}], [{"steps": 3, "sequence_length": 8}]], ids=str
)
def test_phases_end_but_the_last(text, phases):
    with pytest.raises(ValueError, match="each phase but the last"):
        settings(text, phases=phases)
