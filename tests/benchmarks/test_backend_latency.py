"""`benchmarks/backend_latency.py` on other backends than TensorFlow, and without it."""

import json

import pytest

from tests.support.programs import run_without_tensorflow as run

pytestmark = pytest.mark.slow

FLAGS = ("--models=MobileNet", "--size=32", "--batch_sizes=1", "--repeats=2", "--seconds=0")


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        pytest.param("jax", "float32", 2e-4, marks=pytest.mark.thorough),
        ("torch", "mixed_bfloat16", 1),
    ],
)
def test_variants_are_compared_and_timed(backend, dtype, tolerance, tmp_path):
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    report = tmp_path / "latency.json"
    done = run(
        backend, "backend_latency.py", *FLAGS, f"--dtype={dtype}", "--device=CPU",
        f"--json={report}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(report.read_text())
    assert (kept["backend"], "tensorflow" in kept) == (backend, False)
    (row,) = kept["rows"]
    left = {name: facts["left"] for name, facts in row["variants"].items()}
    assert left == {"original": 27, "fold": 0, "depthwise": 0, "floor": 0}
    for name in ("fold", "depthwise"):
        assert 0 < row["variants"][name]["error"] < tolerance
        assert row["variants"][name]["x original"]["median"] > 0
    assert "MobileNet" in done.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--variants=auto", "unknown variant 'auto'"),
        ("--device=GPU", "torch sees no GPU"),
    ],
)
def test_what_is_not_known_is_one_line(flag, message):
    pytest.importorskip("torch", reason="torch is not installed")
    done = run("torch", "backend_latency.py", flag)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
