"""Draw the figures of docs/backprop.md from `MLP.trace`: `python docs/make_figures.py` (needs matplotlib)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # draw what this checkout computes, whatever is installed

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gpuback

FIGURES = Path(__file__).resolve().parent / "figures"

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (  # Okabe and Ito's colours, told apart by colour-blind readers
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
SIGNED = "PuOr"  # orange below 0, purple above, white at 0

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.facecolor": "white",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "mathtext.fontset": "dejavusans",
    }
)


def classifier() -> tuple[gpuback.MLP, np.ndarray, np.ndarray]:
    """Make the small network and the batch of section 2."""
    rng = np.random.default_rng(0)
    net = gpuback.MLP([4, 6, 5, 3], activation="tanh", dtype="float64", seed=1)
    return net, rng.normal(size=(6, 4)), np.array([0, 2, 1, 1, 0, 2])


def thin_chain() -> None:
    """Draw |∇a_k| along 50 layers of one neuron each, from ∇a_50 = 1 down."""
    depth = 50
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    chains = (
        ("relu", 1.2, VERMILION, "relu, $w$ = 1.2"),
        ("relu", 1.0, BLACK, "relu, $w$ = 1"),
        ("tanh", 1.0, BLUE, "tanh, $w$ = 1"),
        ("silu", 1.0, GREEN, "silu, $w$ = 1"),
        ("sigmoid", 1.0, PURPLE, "sigmoid, $w$ = 1"),
    )
    layers = np.arange(depth, 0, -1)
    for activation, weight, colour, label in chains:
        net = gpuback.MLP([1] * (depth + 1), activation=activation, loss="squared_error", dtype="float64")
        for w, b in zip(net.weights, net.biases, strict=True):
            w[...], b[...] = weight, 0.0
        target = net.forward([[1.0]]) - 1.0  # so that ∇a_50 = 1
        trace = net.trace([[1.0]], target)
        sizes = [abs(trace.da[k].item()) for k in layers]
        axes.semilogy(layers, sizes, color=colour, linewidth=2)
        axes.annotate(
            label, (1, sizes[-1]), xytext=(8, 0), textcoords="offset points", va="center", color=colour,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(depth, 1)  # read from left to right as the gradient travels: from the loss down
    axes.set_xticks([50, 40, 30, 20, 10, 1])
    axes.set_ylim(1e-34, 1e7)
    axes.set_yticks([1e-30, 1e-20, 1e-10, 1])
    axes.grid(axis="y", color="0.9")
    axes.set_xlabel("layer $k$ (the loss is on the left)")
    axes.set_ylabel(r"$|\nabla a_k|$")
    axes.set_title("What reaches layer $k$ of 50 from the loss", loc="left")
    save(figure, "thin_chain")


def tangent() -> None:
    """Draw the loss against W_2[2, 3], and the line whose slope is the computed gradient."""
    net, x, y = classifier()
    trace = net.trace(x, y)
    slope, weight = trace.dW[2][2, 3], net.weights[1]
    here = weight[2, 3]
    reach = 4.0
    values = np.linspace(here - reach, here + reach, 161)
    losses = []
    for value in values:
        weight[2, 3] = value
        losses.append(float(net.loss(x, y)))

    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    axes.plot(values, losses, color=BLUE, linewidth=2)
    near = np.array([here - 0.45 * reach, here + 0.45 * reach])
    axes.plot(near, trace.loss + slope * (near - here), color=VERMILION, linewidth=2)
    axes.plot(here, trace.loss, "o", color=BLACK, zorder=3)
    axes.text(1.7, 1.33, "loss, by forward passes", ha="right", color=BLUE)
    axes.text(
        near[1], trace.loss + slope * (near[1] - here) - 0.01, va="top", color=VERMILION,
        s=f"slope $\\nabla W_2[2, 3]$ = {slope:.3f},\nby one backward pass",
    )  # fmt: skip
    axes.set_xlabel("$W_2[2, 3]$")
    axes.set_ylabel("loss")
    save(figure, "tangent")


def heat_map(axes: Axes, matrix: np.ndarray, title: str, largest: float | None = None) -> None:
    """Draw a matrix as coloured cells with their values; `largest` sets the colour scale, symmetric about 0."""
    largest = float(np.abs(matrix).max()) if largest is None else largest
    axes.pcolormesh(matrix, cmap=SIGNED, vmin=-largest, vmax=largest, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (i, j), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.66 * largest else "black"
        text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8, color=colour)


def outer_product() -> None:
    """One sample: ∇W_2 (5, 6) = ∇a_2 (column) times h_1 (row)."""
    net, x, y = classifier()
    trace = net.trace(x[:1], y[:1])
    figure, grid = plt.subplots(
        2, 2, figsize=(5.6, 4.6), layout="constrained", width_ratios=[1, 6], height_ratios=[1, 5]
    )
    grid[0, 0].axis("off")
    heat_map(grid[0, 1], trace.h[1], r"$h_1^\top$")
    heat_map(grid[1, 0], trace.da[2].T, r"$\nabla a_2$")
    heat_map(grid[1, 1], trace.dW[2], r"$\nabla W_2 = \nabla a_2\,h_1^\top$")
    save(figure, "outer_product")


def batch_sum() -> None:
    """Three samples: their outer products add up to ∇W_3 (3, 5), and so does one matrix product."""
    net, x, y = classifier()
    trace = net.trace(x[:3], y[:3])
    da, h, dW = trace.da[3], trace.h[2], trace.dW[3]
    products = [np.outer(da[b], h[b]) for b in range(3)]
    largest = max(float(np.abs(matrix).max()) for matrix in (*products, dW))

    cell, gap, top = 0.42, 0.36, 0.32  # inches: a matrix element, the room for a sign, the room for a title
    figure = plt.figure(figsize=(20 * cell + 3 * gap + 0.2, 2 * (3 * cell + top) + 0.4))
    width, height = figure.get_size_inches()

    def place(matrix: np.ndarray, right: float, row: int, title: str, scale: float | None, sign: str) -> float:
        """Draws a matrix that ends at `right`, and the sign before it; returns where the sign's room begins."""
        rows, columns = matrix.shape
        bottom = 0.1 + (1 - row) * (3 * cell + top + 0.2)
        left = right - columns * cell
        axes = figure.add_axes((left / width, bottom / height, columns * cell / width, rows * cell / height))
        heat_map(axes, matrix, title, scale)
        middle = (left - gap / 2) / width, (bottom + rows * cell / 2) / height
        figure.text(*middle, sign, ha="center", va="center", fontsize=14)
        return float(left - gap)

    edge = place(dW, width - 0.1, 0, r"$\nabla W_3$", largest, "=")
    for b in (2, 1, 0):
        title = f"sample {b}: $\\nabla a_3^{{({b})}}\\,h_2^{{({b})\\top}}$"
        edge = place(products[b], edge, 0, title, largest, "+" if b else "")
    edge = place(dW, width - 0.1, 1, r"$\nabla W_3$", largest, "=")
    edge = place(h, edge, 1, r"$H_2$, a row a sample", None, "\N{MULTIPLICATION SIGN}")
    place(da.T, edge, 1, r"$\nabla A_3^\top$, a column a sample", None, "")
    save(figure, "batch_sum")


def save(figure: Figure, name: str) -> None:
    """Write figures/name.png, the same bytes for the same numbers and matplotlib."""
    path = FIGURES / f"{name}.png"
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for draw in (thin_chain, tangent, outer_product, batch_sum):
        draw()
