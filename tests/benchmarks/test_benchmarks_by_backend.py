"""The benchmarks of training on other backends of Keras than TensorFlow, and without it."""

import json

import pytest

from benchmarks.training.hlo import instructions
from tests.support.programs import run_without_tensorflow as run

pytestmark = pytest.mark.slow


def test_layers_on_torch(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    flags = ("--shapes=16x16x8", "--batch=4", "--strides=1,2", "--repeats=2", "--device=CPU")
    done = run("torch", "layer.py", *flags, f"--json={tmp_path}/a.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["backend"] == "torch"
    ops = {row["label"]: row["ops"] for row in report["rows"]}
    assert "aten::native_batch_norm" not in ops["keras_3 BN"]
    assert ops["keras_3 Strided 1"]["aten::native_batch_norm_backward"] == 1
    assert ops["keras_3 Strided 2"] != ops["keras_3 Strided 1"]
    assert all(row["error"] < 1e-4 and row["both_milliseconds"] for row in report["rows"])


def test_steps_on_torch(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    flags = [
        *("--models=ResNet9", "--variants=strided1,strided2,none", "--width=0.0625"),
        *("--size=32", "--batch=4", "--repeats=2", "--profiled_steps=2", "--nomemory"),
        *("--device=CPU", f"--json={tmp_path}/a.json"),
    ]
    done = run("torch", "train_step.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["variant"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    for name in ("original", "strided1", "strided2"):
        assert len(rows[name]["ops"]) == 8
        assert all(kinds["forward"] and kinds["backward"] for kinds in rows[name]["ops"].values())
    kinds = rows["strided1"]["ops"]["prep_bn"]
    assert "aten::native_batch_norm" in kinds["forward"]
    assert "aten::native_batch_norm_backward" in kinds["backward"]
    assert rows["strided1"]["loss_errors"]
    assert rows["none"]["ops"] == {}


@pytest.mark.parametrize(
    ("backend", "program", "flags", "message"),
    [
        ("numpy", "layer.py", (), "KERAS_BACKEND is numpy; these benchmarks run on tensorflow"),
        ("torch", "layer.py", ("--keras=tf_keras",), "unknown Keras on torch 'tf_keras'"),
        ("torch", "layer.py", ("--xla",), "--xla is for tensorflow, not torch"),
        ("jax", "layer.py", ("--device=GPU",), "JAX sees no GPU; --device=CPU runs without"),
        ("jax", "train_step.py", ("--profile=p",), "no --profile on JAX"),
    ],
)
def test_what_a_backend_does_not_have(backend, program, flags, message):
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    done = run(backend, program, *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_operations_of_a_module_belong_to_their_layers():
    pytest.importorskip("jax", reason="jax is not installed")
    from benchmarks.training.jax.room import by_layer

    paths = [
        "jit(train)/jvp(net)/bn/reduce_sum",
        "jit(train)/transpose(jvp(net))/bn/slice",
        "jit(train)/jvp(net)/bn_1/mul",
        "jit(train)/jvp(net)/conv/conv_general_dilated",
    ]
    module = "\n".join(f'  %x = f32[2] add(), metadata={{op_name="{path}"}}' for path in paths)
    found = by_layer(module, ["bn", "bn_1"])
    assert [op.op for op in found["bn"].forward] == ["reduce_sum"]
    assert [op.op for op in found["bn"].backward] == ["slice"]
    assert [(op.op, op.listed) for op in found["bn_1"].forward] == [("mul", False)]
    assert [op.op for op in found.elsewhere] == ["conv_general_dilated"]


def test_instructions_of_a_module():
    module = """
%fused { ROOT %mul.1 = f32[2]{0} multiply(a, b) }
ENTRY %main {
  %p = f32[2]{0} parameter(0)
  %add_fusion.2 = f32[2]{0} fusion(%p), kind=kLoop
  %add_fusion.3 = (f32[2]{0}, f32[2]{0}) fusion(%p), kind=kLoop
  ROOT %t = (f32[2]{0}) tuple(%add_fusion.2)
}"""
    assert instructions(module) == {"add_fusion": 2}
