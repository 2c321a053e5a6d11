"""A tiny case of each family on a GPU."""

from benchmarks.cases import Network, selection

NET = Network("n", (16, 8, 5), 32)
TINY = {
    "layer": selection.layer((40, 8, 24), "bfloat16"),
    "step": selection.training(NET, "step", dtype="bfloat16"),
    "host": selection.host("one bound launch"),
    "loss": selection.loss(NET),
    "device-memory": selection.memory(NET, "device-memory"),
    "reproducible": selection.training(NET, "reproducible"),
}
