"""The job for detectors of Ultralytics, on squares drawn on noise."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ |= {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}
ultralytics = pytest.importorskip("ultralytics", reason="pip install 'fppmo-ray[yolo]'")

from yolo import _detection, main, save_checkpoint  # noqa: E402

from fppmo_ray import Resources, SearchSettings  # noqa: E402
from fppmo_ray.pruning import extract, trace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ultralytics' own


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        images, labels = tmp_path / "images" / part, tmp_path / "labels" / part
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            x, y = rng.integers(4, 30, 2)
            pixels[y : y + 24, x : x + 24] = 230
            Image.fromarray(pixels).save(images / f"{number}.png")
            box = f"0 {(x + 12) / 64} {(y + 12) / 64} 0.375 0.375\n"
            (labels / f"{number}.txt").write_text(box)
    path = tmp_path / "data.yaml"
    path.write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: {{0: square}}\n"
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolov10n", "yolo11n"])
def test_a_pruned_detector_is_trained_scored_opened_and_exported_by_ultralytics(
    data: str, tmp_path: Path, name: str
) -> None:
    torch.manual_seed(0)
    task = _detection("detect", f"{name}.yaml", data, image_size=64, epochs=1)
    assert (len(task.train), len(task.held_out), len(task.test)) == (9, 1, 10)
    assert not set(task.train) & set(task.held_out)
    dense = task.untrained(ultralytics.YOLO(f"{name}.yaml").model.yaml).eval()
    assert dense.names == {0: "square"}
    tracing = trace(dense, torch.zeros(1, 3, 64, 64))
    space = tracing.space.with_limits(min_keep=0.1)
    assert space.min_macs < 0.1 * space.dense_macs
    keep = np.random.default_rng(0).random(space.num_filters) < 0.5
    keep[np.asarray(space.offsets)[: len(space.groups)]] = True
    network = extract(dense, tracing, keep)
    task.recalibrate(network)
    before = network.state_dict()["model.0.conv.weight"].clone()
    task.fine_tune(network.train())
    assert not torch.equal(network.state_dict()["model.0.conv.weight"], before)
    assert 0 <= task.score(network.eval(), 0) <= 1
    assert 0 <= task.last_look(network) <= 1
    save_checkpoint(network, tmp_path / "pruned.pt", "detect")
    opened = ultralytics.YOLO(tmp_path / "pruned.pt")
    assert _parameters(opened.model) == _parameters(network) < 0.7 * _parameters(dense)
    assert len(opened.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)) == 1
    exported = torch.jit.load(opened.export(format="torchscript", imgsz=64))
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(exported(image), network(image)[0], rtol=1e-3, atol=1e-3)


LABELS = {
    "segment": "0 {l} {t} {r} {t} {r} {b} {l} {b}\n",
    "pose": "0 {x} {y} 0.375 0.375 {l} {t} 2 {r} {b} 2\n",
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("segment", "yolov8n-seg"), ("pose", "yolov8n-pose")])
def test_pruned_networks_for_masks_and_poses_are_trained_scored_opened_and_exported(
    data: str, tmp_path: Path, kind: str, name: str
) -> None:
    for file in tmp_path.glob("labels/*/*.txt"):
        x, y = map(float, file.read_text().split()[1:3])
        places = {"x": x, "y": y, "l": x - 0.18, "r": x + 0.18, "t": y - 0.18, "b": y + 0.18}
        file.write_text(LABELS[kind].format(**places))
    with Path(data).open("a") as file:
        file.write("kpt_shape: [2, 3]\nflip_idx: [1, 0]\n" if kind == "pose" else "")
    torch.manual_seed(0)
    task = _detection(kind, f"{name}.yaml", data, image_size=64, epochs=1)
    dense = task.untrained(ultralytics.YOLO(f"{name}.yaml").model.yaml).eval()
    tracing = trace(dense, torch.zeros(1, 3, 64, 64))
    space = tracing.space.with_limits(min_keep=0.1)
    assert space.min_macs < 0.1 * space.dense_macs
    keep = np.random.default_rng(0).random(space.num_filters) < 0.5
    keep[np.asarray(space.offsets)[: len(space.groups)]] = True
    network = extract(dense, tracing, keep)
    task.recalibrate(network)
    task.fine_tune(network.train())
    assert 0 <= task.score(network.eval(), 0) <= 2  # boxes and masks, or boxes and poses
    save_checkpoint(network, tmp_path / "pruned.pt", kind)
    opened = ultralytics.YOLO(tmp_path / "pruned.pt")
    assert opened.task == kind
    assert _parameters(opened.model) == _parameters(network) < 0.7 * _parameters(dense)
    assert len(opened.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)) == 1
    path = opened.export(format="onnx", imgsz=64, simplify=False)
    image = torch.rand(1, 3, 64, 64)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    expected = network(image)[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    np.testing.assert_allclose(found, expected.numpy(force=True), rtol=1e-3, atol=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_job_trains_prunes_and_writes_a_file_for_ultralytics(data: str, tmp_path: Path) -> None:
    settings = SearchSettings(macs_cut=0.5).changed(proposals=4, population=4, rescore_seeds=1)
    run_dir = tmp_path / "run"
    main(
        *("yolov8n.yaml", data, run_dir, settings, Resources(workers=1)),
        image_size=64,
        epochs=1,
    )
    dense = ultralytics.YOLO(tmp_path / "run-dense.pt")
    pruned = ultralytics.YOLO(run_dir / "yolov8n-pruned.pt")
    assert pruned.names == dense.names == {0: "square"}
    assert trace(pruned.model, torch.zeros(1, 3, 64, 64)).space.dense_macs <= (
        0.5 * trace(dense.model, torch.zeros(1, 3, 64, 64)).space.dense_macs
    )
    assert 0 <= pruned.val(data=data, imgsz=64, plots=False, project=tmp_path).box.map <= 1
    again = tmp_path / "again"  # as if it had been killed after two scores
    shutil.copytree(run_dir, again, ignore=shutil.ignore_patterns("result.json", "*.p*t", "n*"))
    shutil.copy(tmp_path / "run-dense.pt", tmp_path / "again-dense.pt")
    lines = (run_dir / "journal.jsonl").read_text().splitlines(keepends=True)
    scored = [number for number, line in enumerate(lines) if '"fact":"Feedback"' in line]
    (again / "journal.jsonl").write_text("".join(lines[: scored[2]]) + lines[scored[2]][:40])
    main(
        *("yolov8n.yaml", data, again, settings, Resources(workers=1)),
        image_size=64,
        epochs=1,
        resume=True,
    )
    assert _scores(again) == _scores(run_dir)
    assert (again / "yolov8n-pruned.pt").exists()


def test_a_network_of_other_classes_is_refused(data: str, tmp_path: Path) -> None:
    save_checkpoint(ultralytics.YOLO("yolov8n.yaml").model, tmp_path / "80.pt", "detect")
    with pytest.raises(ValueError, match=r"80 classes and the data set 1; train the network on it"):
        main(
            *(str(tmp_path / "80.pt"), data, tmp_path / "run"),
            *(SearchSettings(macs_cut=0.5), Resources()),
            image_size=64,
        )


def _scores(run_dir: Path) -> list[tuple[int, float]]:
    facts = map(json.loads, (run_dir / "journal.jsonl").read_text().splitlines())
    scored = [fact for fact in facts if fact["fact"] == "Feedback"]
    return sorted((fact["proposal_id"], fact["val_loss"]) for fact in scored)


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
