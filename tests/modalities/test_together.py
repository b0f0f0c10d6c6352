"""One run over text, pictures, and sound, from one file of settings; and what can be drawn from it."""

from __future__ import annotations

import json
import math
import tomllib
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_command
from modality_cases import digits

from resilin.config import parse_settings
from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.modalities.model import GroupDecoder
from resilin.modalities.sample import sample_pictures, sample_sound
from resilin.modalities.scale_tokens import ScaleTokenizer
from resilin.modalities.sequence import PICTURE, SOUND, TEXT
from resilin.modalities.sound_codec import SoundCodec
from resilin.modalities.together import Together, TogetherSource
from resilin.run.open_model import open_trained
from resilin.run.settings import RunSettings

ROOT = Path(__file__).parents[2]
SETTINGS = """
name = "together"
[source]
use = "resilin.modalities.together:Together"
sequence_length = 96
[source.text]
source = { paths = ["text"], sequence_length = 48, tokenizer.kind = "bytes", held_out = { by = "tail" } }
[source.pictures]
scales = [1, 2, 4, 4]
streams = [{ source = { use = "resilin.vision.digits:Digits" }, before = "{class}:" }]
fitted_to = 500
[source.sound]
paths = ["sound"]
levels = 2
codes = 16
before = "{name}:"
[model]
use = "resilin.modalities.model:GroupDecoderSettings"
mtp = { depth = 1 }
pictures = { bits = 4 }
sound = { levels = 2, codes = 16 }
decoder = { hidden_size = 48, layers = 2, heads = 4, mlp_size = 96, max_positions = 128 }
[objective]
use = "resilin.modalities.objective:NextGroup"
balance = { decay = 0.9 }
flips = 0.2
early = 0.5
[optimizer]
lr = 0.01
[train]
steps = 24
batch_size = 9
threads = 1
device = "cpu"
[precision]
compute = "fp32"
[evaluation]
every = 24
batches = 6
[checkpoint]
every = 24
[log]
tensorboard = false
live = false
"""


def write_tone(path: Path, pitches: list[float], rate: int = 8000) -> None:
    """Half a second of each pitch."""
    time = np.arange(rate // 2) / rate
    values = np.concatenate([np.sin(2 * math.pi * pitch * time) * np.exp(-3 * time) for pitch in pitches])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((values * 30000).astype("<i2").tobytes())


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # tokens are kept there
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 80)
    (tmp_path / "sound").mkdir()
    for name, pitches in (("up", [300, 400, 500, 600]), ("down", [600, 500, 400, 300])):
        write_tone(tmp_path / "sound" / f"{name}.wav", [pitch * 1.0 for pitch in pitches * 4])
    (tmp_path / "together.toml").write_text(SETTINGS)
    return tmp_path


def source_of(workplace: Path, split: str = "train", **changes: object) -> TogetherSource:
    tree = {**tomllib.loads(SETTINGS)["source"], **changes}
    del tree["use"]
    tree["text"]["source"]["paths"] = [str(workplace / "text")]
    tree["sound"]["paths"] = [str(workplace / "sound")]
    settings = parse_settings(Together, tree, "test")
    return settings.build(SourceContext(0, split, 9))  # type: ignore[arg-type, return-value]


def test_rows_of_all_kinds_in_their_shares_the_same_for_everyone(workplace: Path) -> None:
    source = source_of(workplace)
    whole = source.fetch(3, range(9))
    kinds = [set(row.tolist()) for row in whole["modality"]]
    assert sum(PICTURE in kind for kind in kinds) == sum(SOUND in kind for kind in kinds) == 3
    assert sum(kind == {TEXT} for kind in kinds) == 3
    part = source.fetch(3, [7, 2])
    for name, tensor in whole.fields.items():
        assert torch.equal(part[name], tensor[[7, 2]]), name
    pictures = next(row for row, kind in enumerate(kinds) if PICTURE in kind)
    assert whole["documents"][pictures].max() == 1  # two pictures with their names fit into 96 positions
    assert whole["frame_numbers"][pictures].tolist() == [0, 0]
    assert whole["frame_numbers"].amax(1).tolist() == [0 if PICTURE in kind else -1 for kind in kinds]
    held_out = source_of(workplace, "validation")
    turns = [set(held_out.fetch(step, range(held_out.slots(step)))["modality"].flatten().tolist()) for step in range(3)]
    assert [PICTURE in kind for kind in turns] == [False, True, False]
    assert [SOUND in kind for kind in turns] == [False, False, True]
    ramp = source_of(workplace, batch_changes=[[2, 18]])
    assert [ramp.slots(step) for step in range(4)] == [9, 9, 18, 18]
    plain, grown = (torch.cat([s.fetch(step, range(s.slots(step)))["tokens"] for step in range(n)])
                    for s, n in ((source, 4), (ramp, 3)))  # fmt: skip
    assert torch.equal(plain, grown)  # the same rows in the same order, more of them a step
    with pytest.raises(DataError, match=r"raise source\.sequence_length"):
        source_of(workplace, sequence_length=48 - 10)


def test_one_run_learns_all_kinds_and_draws_from_them(workplace: Path) -> None:
    done = run_command(workplace, ("train", "together.toml"))
    assert done.returncode == 0, done.stderr
    run = workplace / "runs" / "together"
    steps = [event for line in (run / "events.jsonl").read_text().splitlines() if "lr" in (event := json.loads(line))]
    for kind in ("text", "pictures", "sound", "mtp_1"):
        first, last = (sum(event["logs"][kind] for event in part) / 5 for part in (steps[:5], steps[-5:]))
        assert last < first, kind
    weighed = steps[-1]["logs"]
    assert weighed["weight_pictures"] > weighed["weight_text"]  # bits have fewer nats than bytes
    model = open_trained(run)
    assert isinstance(model, GroupDecoder)
    tokens, codec = ScaleTokenizer.load(run / "pictures.safetensors"), SoundCodec.load(run / "sound.safetensors")
    pictures = sample_pictures(model, tokens, [list(b"3:"), list(b"7:")], seed=1)
    assert pictures.shape == (2, 1, 1, 8, 8)
    real = (digits() - 0.45) / 0.225
    assert float(real.min()) - 3 < float(pictures.min()) < float(pictures.max()) < float(real.max()) + 3
    sound = codec.decode(sample_sound(model, [list(b"up:")], 6)[0])
    assert len(sound) == 160 * (6 * 4 - 1)
    assert bool(sound.isfinite().all())


def test_the_codec_gains_with_every_level_and_keeps_pitches(workplace: Path) -> None:
    from resilin.modalities.sound_codec import fit, frames_of
    from resilin.modalities.sound_files import read_wave

    sounds = [read_wave(workplace / "sound" / f"{name}.wav", 8000) for name in ("up", "down")]
    codec = fit(sounds, 8000, 320, 4, 4, 16)
    assert codec.frames_a_second == 12.5
    codes = codec.encode(sounds[0])
    wanted = frames_of(sounds[0], 320, 4)
    errors = [float((codec.spectra(codes, level) - wanted).square().mean()) for level in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]
    back = codec.decode(codes)
    loudest = torch.fft.rfft(back[:3200]).abs().argmax() * 8000 / 3200
    assert abs(float(loudest) - 300) < 30
    (workplace / "bad.wav").write_bytes(b"RIFFno")
    with pytest.raises(DataError, match="not a readable wave"):
        read_wave(workplace / "bad.wav", 8000)


def test_the_example_is_read_whole() -> None:
    tree = tomllib.loads((ROOT / "examples/groups.toml").read_text())
    settings = parse_settings(RunSettings, tree, "examples/groups.toml")
    assert isinstance(settings.source, Together)
    assert settings.source.pictures is not None
    assert len(settings.source.pictures.streams) == 2
    assert settings.model.decoder.rope_theta == 1e6  # type: ignore[attr-defined]


@pytest.mark.slow
def test_video_and_pictures_share_a_tokenizer_and_text_behind_sees_them(workplace: Path) -> None:
    streams = [
        {"source": {"use": "resilin.vision.digits:Digits", "channels": 3}, "after": ": {class}"},
        {
            "source": {
                "use": "resilin.recipes.multigrid:PackagedClips", "frames": 3, "size": 8, "kept_side": 72,
                "views": {"flip": False},
            },
        },
    ]  # fmt: skip
    pictures = {"scales": [1, 2, 4, 4, 4], "bits": 6, "seen_whole": True, "streams": streams}
    source = source_of(workplace, sequence_length=220, pictures=pictures)
    batch = source.fetch(0, range(9))
    numbers = batch["frame_numbers"].tolist()
    assert [0, 1, 2] in [row[:3] for row in numbers]
    assert any(row[0] == row[1] == 0 for row in numbers)
    assert source.picture_tokenizer is not None
    there = batch["frame_numbers"] >= 0
    pixels = batch["pictures"][there]
    back = source.picture_tokenizer.pixels(source.picture_tokenizer.encode(pixels).made_Pdhw)
    assert float((back - pixels).square().mean()) < 0.4 * float(pixels.var())
    texts = batch["tokens"][(batch["modality"] == TEXT) & (batch["frames"] < 0) & (batch["documents"] >= 0)]
    assert ord(":") in texts.tolist()


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one(workplace: Path) -> None:
    short = ("train.steps=4", "train.batch_size=8", "train.micro_batch_size=2", "evaluation.every=4")
    for name, more in (("one", ()), ("two", ("--workers", "2"))):
        done = run_command(workplace, ("train", "together.toml", f"name={name}", *short, *more))
        assert done.returncode == 0, done.stderr
    one, two = (open_trained(workplace / "runs" / name).state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor), name
    refused = run_command(
        workplace, ("train", "together.toml", "name=no", *short, "--workers", "2", "parallel.tensor=2")
    )
    assert refused.returncode != 0
