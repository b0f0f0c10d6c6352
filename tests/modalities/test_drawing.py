"""The picture in the page is drawn from the rule itself."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import torch

from resilin.modalities.drawing import attention_svg
from resilin.modalities.sequence import Frames, Sound, Words, row_of
from resilin.modalities.shape import PictureShape

PAGE = Path(__file__).parents[2] / "docs/pictures/groups.svg"


def picture() -> str:
    shape = PictureShape(((1, 1), (2, 2), (3, 3)))
    first = [Words([1, 2, 3, 4]), Frames(1, shape), Words([5, 6, 7])]
    return attention_svg(row_of([first, [Words([8, 9]), Sound(torch.zeros(5, 2, dtype=torch.int64))]], 29, 2))


def test_the_page_shows_what_the_rule_says() -> None:
    drawn = picture()
    assert PAGE.read_text() == drawn
    squares = [e for e in ElementTree.fromstring(drawn) if e.get("width") == "6"]
    # 21 positions of one document: a triangle, and what scales of 4 and 9 see beyond it; then 8 and no padding.
    assert len(squares) == 21 * 22 // 2 + (4 * 3 + 9 * 8) // 2 + 8 * 9 // 2
