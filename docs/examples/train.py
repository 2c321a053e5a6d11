"""Train a classifier with validation, early stopping and a checkpoint; save it, load it, and predict.

Run: python docs/examples/train.py
A second run in the same folder continues from the checkpoint, so it has nothing left to do.
"""

import numpy as np

import gpuback

# Two noisy half circles, one class each
rng = np.random.default_rng(0)
y = rng.integers(2, size=2000)
angle = np.pi * (rng.random(2000) + y)
x = np.c_[np.cos(angle) + y, np.sin(angle) + y / 2] + rng.normal(scale=0.1, size=(2000, 2))
x_train, y_train, x_test, y_test = x[:1600], y[:1600], x[1600:], y[1600:]

net = gpuback.MLP([2, 32, 32, 2], activation="relu", seed=0)
history = gpuback.fit(
    net,
    x_train,
    y_train,
    optimizer=gpuback.AdamW(0.01),
    epochs=40,
    batch_size=64,
    validation=0.2,
    patience=5,  # stop after 5 epochs without a better validation loss, and keep the best θ
    checkpoint="moons.checkpoint.safetensors",
    resume=True,
    seed=0,
)
print(f"{history.epochs} epochs, validation loss {min(history.validation_loss):.3f}")

net.save("moons.safetensors")
loaded = gpuback.MLP.load("moons.safetensors")
labels = loaded.forward(x_test).argmax(axis=1).tolist()
accuracy = np.mean(labels == y_test)
print(f"accuracy {accuracy:.1%}")
assert accuracy > 0.98
