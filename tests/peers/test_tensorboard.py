"""gpuback.tensorboard: what TensorBoard itself reads back, in one go and resumed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpuback
from gpuback import SGD, History
from gpuback._training import checkpoint
from gpuback.errors import OptionError
from gpuback.schedules import cosine
from gpuback.tensorboard import logger


def train(folder: Path, epochs: int, file: Path | None = None, **options: object) -> History:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3))
    y = (x[:, 0] > 0).astype(int)
    net = gpuback.MLP([3, 4, 2], seed=0)
    callbacks = [logger(folder, metrics={"accuracy": lambda net: (net.forward(x).argmax(axis=1) == y).mean()})]
    options = {"validation": 0.25, "schedule": cosine(0.5, steps=24), "callbacks": callbacks} | options
    resume = file is not None
    return gpuback.fit(
        net, x, y, optimizer=SGD(0.1), epochs=epochs, batch_size=8, seed=0, checkpoint=file, resume=resume, **options
    )


def curves(folder: Path) -> dict[str, list[tuple[int, np.float32]]]:
    """Per curve its points, as TensorBoard shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def points(values: list[float]) -> list[tuple[int, np.float32]]:
    return [(epoch, np.float32(value)) for epoch, value in enumerate(values, start=1)]


def test_tensorboard_shows_the_history(tmp_path):
    history = train(tmp_path, 4)
    shown = curves(tmp_path)
    assert shown["loss/training"] == points(history.loss)
    assert shown["loss/validation"] == points(history.validation_loss)
    assert shown["learning_rate"] == points(history.learning_rate)
    assert [step for step, _ in shown["accuracy"]] == [1, 2, 3, 4]
    assert all(0 <= value <= 1 for _, value in shown["accuracy"])


def test_a_folder_that_cannot_be_made_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / ("n" * 300)):
        with pytest.raises(OSError):
            logger(folder)


def test_without_validation_there_is_no_such_curve(tmp_path):
    train(tmp_path, 2, validation=None)
    assert set(curves(tmp_path)) == {"loss/training", "learning_rate", "accuracy"}


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path, monkeypatch):
    """The first process has logged two epochs more than its checkpoint holds."""
    file = tmp_path / "run.safetensors"
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 0)
    train(tmp_path / "log", 2, file)
    saved = file.read_bytes()
    train(tmp_path / "log", 4, file)
    file.write_bytes(saved)
    history = train(tmp_path / "log", 6, file)
    assert history.epochs == 6
    assert curves(tmp_path / "log")["loss/training"] == points(history.loss)


def test_a_metric_that_is_no_function_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"metrics\['accuracy'\]: expected a function of the network, got 0.9"):
        logger(tmp_path, metrics={"accuracy": 0.9})
    assert not list(tmp_path.iterdir())


def test_the_training_page_runs_with_tensorboards_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[2] / "docs" / "training.md"
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    exec(compile(code, page, "exec"), {"__name__": "example"})
    assert set(curves(tmp_path / "runs/first")) == {"loss/training", "loss/validation", "learning_rate", "accuracy"}
