"""teach/figures.py: the numbers that the figures show, the files, and that no texts overlap."""

import math
import pkgutil
import re
import struct
import sys
from itertools import combinations

import pytest
import torch

from support.report import pyplot
from teach import figures

FOLDER = figures.Path(figures.__file__).with_name("figures")
NAMES = ("pipeline", "clip", "kl", "group")


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib")
    plt = pyplot()
    with plt.style.context(["default", figures.STYLE]):
        yield plt
    plt.close("all")


def numbers(svg: str) -> tuple[list[str], list[float]]:
    """The text of a picture without ids, made of hashes, and its numbers."""
    parts = re.split(r"(-?\d+\.?\d*)", re.sub(r"\b[a-z][0-9a-f]{10}\b", "id", svg))
    return parts[::2], [*map(float, parts[1::2])]


def test_the_committed_figures_are_up_to_date(tmp_path):
    """To two points, where matplotlib is of the version that drew them: python -m teach.figures"""
    matplotlib = pytest.importorskip("matplotlib")
    assert figures.main(tmp_path) == 0
    wanted = {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")}
    assert {p.name for p in tmp_path.iterdir()} == wanted == {p.name for p in FOLDER.iterdir()}
    for path in tmp_path.glob("*.png"):
        data = path.read_bytes()
        assert struct.unpack(">I", data[16:20]) == (1000,) and len(data) < 150_000
    for path in tmp_path.glob("*.svg"):
        (text, new), kept = numbers(path.read_text()), (FOLDER / path.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," in kept:
            then, old = numbers(kept)
            assert text == then and new == pytest.approx(old, abs=2), f"{path.name} is stale"


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_large_and_do_not_overlap(plt, name):
    fig = getattr(figures, name)(plt)
    fig.canvas.draw()
    beyond = set()  # labels of ticks that are not drawn
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
    texts = [t for t in fig.findobj(plt.Text) if t.get_text().strip() and t.get_visible()]
    texts = [t for t in texts if t not in beyond]
    found = [(t.get_text(), t.get_window_extent()) for t in texts]
    assert len(found) > 20 and min(t.get_fontsize() for t in texts) >= 9
    for (a, box), (b, other) in combinations(found, 2):
        assert not box.overlaps(other), f"{a!r} and {b!r}"
    assert fig.get_figwidth() == figures.WIDE


def test_the_functions_of_the_pipeline_exist():
    codes = [line.split("|")[3] for line in figures.BOXES.split("\n")]
    found = [name for code in codes for name in code.split(", ") if name]
    assert len(found) == 12
    for name in found:
        assert callable(pkgutil.resolve_name(name if "." in name else f"grpo_s.{name}"))


def test_clip(plt):
    """By hand at rho .7, 1 and 1.3, for the paper and the recipe: J, and its gradient."""
    axes = figures.clip(plt).axes
    shown = []
    for ax in axes:  # J and then the gradients, A > 0 on the left
        for line in ax.lines:
            at = [min(line.get_xdata(), key=lambda r: abs(r - rho)) for rho in (0.7, 1, 1.3)]
            shown.append([dict(zip(*line.get_data()))[r] for r in at])
    bad, slope = [-0.8, -1, -1.3], [0, -1, -1.3]
    wanted = [[0.7, 1, 1.2], [1, 1, 1], bad, bad, [0.7, 1, 0], [1, 1, 1], slope, slope]
    assert (torch.tensor(shown) - torch.tensor(wanted)).abs().max() < 1e-6
    spans = [ax.patches[0].get_x() + torch.tensor([0, ax.patches[0].get_width()]) for ax in axes]
    ends = torch.tensor([[1.2, 1.6], [0.4, 0.8]] * 2)
    assert (torch.stack(spans) - ends).abs().max() < 0.006  # a step of rho


def test_kl(plt):
    left, right = figures.kl(plt).axes
    at = [list(line.get_xdata()).index(1) for line in left.lines[:3]]
    shown = [line.get_ydata()[i].item() for line, i in zip(left.lines, at)]
    assert shown == pytest.approx([-1, 0.5, math.e - 2])
    p = [math.exp(i / 4) for i in range(10)]
    q = [x**2.1 for x in p]
    d = [math.log(x / sum(p) * sum(q) / y) for x, y in zip(p, q)]
    hand = -sum(y / sum(q) * x for x, y in zip(d, q))
    true, (k1, k2, k3) = figures.spread(2.1)
    assert (true, k1[0], k3[0]) == pytest.approx((hand, hand, hand))
    half = sum(y / sum(q) * x * x / 2 for x, y in zip(d, q))
    assert k2[0] == pytest.approx(half) and half < hand
    assert k1[1] < k3[1] < hand < k3[2]
    means = [c.lines[0].get_ydata()[3] for c in right.containers]
    assert means == pytest.approx([k1[0], k2[0], k3[0]], rel=1e-6)
    _, (k1, _, k3) = figures.spread(1.25)
    assert k1[1] < 0 < k3[1] and 5 * (k3[2] - k3[1]) < k1[2] - k1[1]


def test_group(plt):
    """By hand: deviations 1.15, .55, -.15, -1.55 from the mean .45."""
    shown = [[bar.get_width() for bar in ax.patches] for ax in figures.group(plt).axes]
    away, sigma = [1.15, 0.55, -0.15, -1.55], lambda x: 1 / (1 + math.exp(-x))
    std = math.sqrt(sum(a * a for a in away) / 4)
    # 1 - W is .575 and the gaps' mean 1.55; the running means .4 and 1 go halfway there
    alpha = sigma(0.575) / sigma(0.4875) * sigma(1.55) / sigma(1.275)
    recipe = [alpha * a / (std + 0.5) for a in away]
    best, worst = recipe[0] / 2, recipe[3] / 2  # a mean over two sequences
    logits = [(i == 0) * best + (i == 3) * worst - 0.2 * (best + worst) for i in range(5)]
    total = sum(map(math.exp, logits))
    change = [100 * (5 * math.exp(z) / total - 1) for z in logits]
    assert shown[0] == pytest.approx([1.6, 1.0, 0.3, -1.1, 2.0])
    assert shown[1] == pytest.approx([alpha * a / (std + 1e-4) for a in away], rel=1e-4)
    assert shown[2] == pytest.approx(recipe, rel=1e-4)
    assert shown[3] == pytest.approx(change, rel=1e-3)


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figures.main(tmp_path) == 1
    assert capsys.readouterr().out.count("\n") == 1 and not list(tmp_path.iterdir())
