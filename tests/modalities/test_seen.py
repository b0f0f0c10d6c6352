"""Pictures that are looked at: what a token is made of, where it stands, and that answers depend on what is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from modality_cases import digits
from torch import Tensor

from resilin.config import parse_settings
from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.keys import Keys
from resilin.modalities.model import GroupDecoder, GroupDecoderSettings, Kinds
from resilin.modalities.objective import NextGroup
from resilin.modalities.sample import sample_text
from resilin.modalities.seen import SeenPart, SeenPartSettings, SeenPictures, bundles
from resilin.modalities.sequence import SEEN, TEXT, Seen, Words, row_of
from resilin.modalities.together import Together
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.groups import Groups, ends_of
from resilin.models.settings import ModelContext
from resilin.nouns import Batch

SMALL: dict[str, Any] = {
    "size": 8, "channels": 1, "patch": 2, "side": 2, "frames": 4, "width": 16, "layers": 1, "heads": 2, "filters": 8,
}  # fmt: skip


def part(**changes: Any) -> SeenPart:
    torch.manual_seed(0)
    made = SeenPart(SeenPartSettings(**{**SMALL, **changes}), DecoderSettings(hidden_size=12, heads=2)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3)
    return made


def by_hand(made: SeenPart, frames_FCHW: Tensor) -> Tensor:
    """One bundle's tokens, patch by patch."""
    vit, cnn = made.patch_features(frames_FCHW)
    side, rows, columns = made.own.side, vit.shape[2] // made.own.side, vit.shape[3] // made.own.side
    tokens = []
    for row in range(rows):
        for column in range(columns):
            vectors = []
            for which, features in enumerate((vit, cnn)):
                for frame in range(len(frames_FCHW)):
                    for place in range(side**2):
                        y, x = row * side + place // side, column * side + place % side
                        vectors.append(features[frame, :, y, x] + made.place[which, frame, place])
            assert len(vectors) == 2 * len(frames_FCHW) * side**2  # 2K, K = 4 of a picture, 16 of four frames
            tokens.append(made.leave(made.block(torch.stack(vectors)[None], None).mean(1))[0])
    return torch.stack(tokens)


def test_frames_of_a_video_share_tokens_and_what_is_left_has_its_own() -> None:
    numbers = torch.tensor([0, 0, 1, 2, 3, 4, 5, 0, 1])
    assert bundles(numbers, 4) == [range(1), range(1, 5), range(5, 7), range(7, 9)]
    assert bundles(numbers, 1) == [range(at, at + 1) for at in range(9)]


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"side": 1}, {"side": 4}, {"frames": 1}])
def test_a_token_is_made_of_its_own_patches(changes: dict[str, Any]) -> None:
    made = part(**changes)
    pixels = torch.rand(9, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numbers = torch.tensor([0, 0, 1, 2, 3, 4, 5, 0, 1])
    found = made.embedded(SeenPictures(pixels, numbers))
    expected = torch.cat([by_hand(made, pixels[list(each)]) for each in bundles(numbers, made.own.frames)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wide = torch.rand(1, 1, 8, 16, dtype=torch.float64)  # position embeddings are resampled
    assert len(made.embedded(SeenPictures(wide, torch.tensor([0])))) == 2 * (8 // made.cell) ** 2
    assert made.embedded(SeenPictures(pixels[:0], numbers[:0])).shape == (0, 12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.seen takes 1 channels and sides of multiples of 4 pixels"):
        part().embedded(SeenPictures(torch.zeros(1, 3, 8, 8), torch.tensor([0])))
    with pytest.raises(ValueError, match="no multiple of a token's 8 pixels"):
        SeenPartSettings(**{**SMALL, "size": 12, "side": 4})


def test_where_it_stands_in_a_row() -> None:
    row = row_of([[Words([5, 6]), Seen(5, (1, 2), 4), Words([7, 8])], [Words([9])]], 12)
    assert row["modality"].tolist() == [TEXT] * 2 + [SEEN] * 4 + [TEXT] * 6
    assert row["groups"].tolist()[:8] == [0, 1, 2, 2, 3, 3, 4, 5]  # four frames, then the fifth
    assert row["labels"].tolist() == [6, -100, -100, -100, -100, -100, 8, -100, -100, -100, -100, -100]
    t, y, x = row["positions"].T.tolist()
    assert t[2:8] == [2, 2, 6, 6, 7, 8]  # the frame that is the first of a token; text goes on behind all frames
    assert y[2:6] == [2] * 4
    assert x[2:4] == [1.5, 2.5]


def decoder(**changes: Any) -> GroupDecoder:
    own = DecoderSettings(vocab_size=20, hidden_size=32, layers=2, heads=4, mlp_size=64)
    seen = SeenPartSettings(**{**SMALL, "width": 32, "heads": 4, **changes})
    return GroupDecoderSettings(decoder=own, seen=seen).build(ModelContext(0, None))


def rows(first: int, count: int) -> tuple[Batch, Tensor]:
    """A digit, then a token that asks, then its class."""
    from resilin.vision.digits import digit_pixels

    labels = torch.from_numpy(digit_pixels()[1])[first : first + count].long()
    laid = [row_of([[Seen(1, (2, 2), 4), Words([10, int(label)])]], 6) for label in labels]
    fields = {name: torch.stack([row[name] for row in laid]) for name in laid[0]}
    fields |= {"seen": digits()[first : first + count, None], "seen_numbers": torch.zeros(count, 1, dtype=torch.int64)}
    return Batch(torch.arange(count), fields), labels


def test_how_a_batch_is_split_changes_nothing() -> None:
    batch, _ = rows(0, 6)
    sums, gradients = [], []
    for size in (6, 1):
        model, total = decoder().double(), 0.0
        for at in range(0, 6, size):
            small = batch.rows(at, at + size)
            found = NextGroup().build()(model, small, Keys(0, 0, small.slots_B))
            found.sum.backward()
            total += float(found.sum.detach())
        sums.append(total)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert sums[0] == pytest.approx(sums[1], rel=1e-9)
    for name, gradient in gradients[0].items():
        assert gradient is not None, name  # all of it is trained
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-10)


def test_it_learns_to_name_what_it_sees() -> None:
    """Digits that it was not trained on: most are named, and none by what stands beside them."""
    model = decoder()
    objective, optimizer = NextGroup().build(), torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(180):
        batch, _ = rows(step * 48 % 1400, 48)
        loss = objective(model, batch, Keys(0, step, batch.slots_B))
        optimizer.zero_grad()
        (loss.sum / loss.units).backward()
        optimizer.step()
    model.eval()
    batch, labels = rows(1500, 200)
    with torch.no_grad():
        held_out = objective(model, batch, None)
        mixed = Batch(batch.slots_B, {**batch.fields, "seen": batch["seen"].roll(7, 0)})
        accuracy = [float(one.logs["accuracy"].sum / one.units) for one in (held_out, objective(model, mixed, None))]
    assert accuracy[0] > 0.5
    assert accuracy[1] < 0.3
    named = [sample_text(model, batch["seen"][row], [], [10], max_new_tokens=1) for row in range(20)]
    assert sum(said == [int(label)] for said, label in zip(named, labels, strict=False)) > 8


def test_what_is_behind_a_picture_sees_all_of_it_and_what_is_before_nothing() -> None:
    model = decoder().double().eval()
    row = row_of([[Words([3, 4]), Seen(1, (2, 2), 4), Words([10, 5])]], 8)
    fields = {name: value[None] for name, value in row.items()}
    picture = torch.rand(1, 1, 8, 8, dtype=torch.float64).requires_grad_()
    kinds = Kinds(fields["modality"], Groups(ends_of(fields["groups"])), seen=SeenPictures(picture, torch.tensor([0])))
    hidden = model(fields["tokens"], fields["positions"], fields["documents"], kinds=kinds).hidden_BTD[0]
    for place, sees in ((1, False), (2, True), (6, True)):
        (gradient,) = torch.autograd.grad(hidden[place].square().sum(), picture, retain_graph=True, allow_unused=True)
        assert bool(gradient.abs().min() > 0) == sees
        assert sees or not gradient.any()


SETTINGS = """
name = "looking"
[source]
use = "resilin.modalities.together:Together"
sequence_length = 64
[source.text]
source = { paths = ["text"], sequence_length = 48, tokenizer.kind = "bytes", held_out = { by = "tail" } }
[source.seen]
cell = 4
streams = [{ source = { use = "resilin.vision.digits:Digits" }, after = "={class}", weight = 3 }]
[model]
use = "resilin.modalities.model:GroupDecoderSettings"
seen = { size = 8, channels = 1, patch = 2, width = 16, layers = 1, heads = 2, filters = 8 }
decoder = { hidden_size = 32, layers = 2, heads = 4, mlp_size = 64, max_positions = 128 }
[objective]
use = "resilin.modalities.objective:NextGroup"
[optimizer]
lr = 0.01
[train]
steps = 6
batch_size = 8
threads = 1
device = "cpu"
[evaluation]
every = 6
batches = 2
[checkpoint]
every = 6
[log]
tensorboard = false
live = false
"""


def test_a_run_that_looks_at_pictures(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    (tmp_path / "looking.toml").write_text(SETTINGS)
    done = run_command(tmp_path, ("train", "looking.toml"))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/looking/events.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if "lr" in event]
    assert steps[-1]["logs"]["text"] < steps[0]["logs"]["text"]
    exported = run_command(tmp_path, ("export", "runs/looking", "plain"))
    assert exported.returncode == 0, exported.stderr  # the decoder alone


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cell": 3}, "are not divided by tokens of 3"),
        ({"cell": 1}, "64\\s+positions, and the text beside them, take"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat. " * 200)
    stream = {"source": {"use": "resilin.vision.digits:Digits"}, "after": "={class}"}
    tree = {
        "sequence_length": 64,
        "text": {
            "source": {
                "paths": ["text"],
                "sequence_length": 48,
                "tokenizer": {"kind": "bytes"},
                "held_out": {"by": "tail"},
            }
        },
        "seen": {"streams": [stream], **changes},
    }
    settings = parse_settings(Together, tree, "a test")
    with pytest.raises(DataError, match=says):
        settings.build(SourceContext(0, "train", 4))


def test_a_model_without_a_part_for_it_is_refused() -> None:
    batch, _ = rows(0, 2)
    own = DecoderSettings(vocab_size=20, hidden_size=16, layers=1, heads=2)
    model = GroupDecoderSettings(decoder=own).build(ModelContext(0, None))
    with pytest.raises(ValueError, match=r"set source.seen and model.seen together"):
        NextGroup().build()(model, batch, None)
    with pytest.raises(ValueError, match="positions for 16 tokens"):
        NextGroup().build()(decoder(side=1), batch.rows(0, 1), None)
