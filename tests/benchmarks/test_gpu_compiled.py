"""`benchmarks/gpu_compiled.py`: compiled programs read, and compiled where the plugin is there."""

import json
from functools import partial
from importlib import metadata

import pytest

from benchmarks.gpu_compiler import compiler, hlo
from benchmarks.gpu_compiler.targets import TARGETS
from tests.support.programs import run_program

run = partial(run_program, "gpu_compiled")

# A convolution, the sum of every fourth row and column of its output, and that scaled by the sum.
# x is data (2 KiB a channel at most), the kernel and gamma are weights.
PROGRAM = """\
HloModule a_step, is_scheduled=true, entry_computation_layout={(f32[4,8,8,3]{3,2,1,0})->f32[16]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%transposed (p: f32[3,3,3,16]) -> f32[16,3,3,3] {
  %p = f32[3,3,3,16]{3,2,1,0} parameter(0)
  ROOT %transpose = f32[16,3,3,3]{3,2,1,0} transpose(%p), dimensions={3,0,1,2}
}

%sampled (p.1: f32[4,8,8,16]) -> f32[16] {
  %p.1 = f32[4,8,8,16]{3,2,1,0} parameter(0)
  %slice = f32[4,2,2,16]{3,2,1,0} slice(%p.1), slice={[0:4], [0:8:4], [0:8:4], [0:16]}
  %zero = f32[] constant(0)
  ROOT %reduce = f32[16]{0} reduce(%slice, %zero), dimensions={0,1,2}, to_apply=%add
}

%scaled (p.2: f32[4,8,8,16], p.3: f32[16], p.4: f32[16]) -> (f32[4,8,8,16], pred[4,8,8,16]) {
  %p.2 = f32[4,8,8,16]{3,2,1,0} parameter(0)
  %p.3 = f32[16]{0} parameter(1)
  %p.4 = f32[16]{0} parameter(2)
  %product = f32[16]{0} multiply(%p.3, %p.4)
  %wide = f32[4,8,8,16]{3,2,1,0} broadcast(%product), dimensions={3}
  %y = f32[4,8,8,16]{3,2,1,0} multiply(%p.2, %wide)
  %more = pred[4,8,8,16]{3,2,1,0} compare(%y, %p.2), direction=GT
  ROOT %both = (f32[4,8,8,16]{3,2,1,0}, pred[4,8,8,16]{3,2,1,0}) tuple(%y, %more)
}

%recorded (q: f32[4,8,8,16], q.1: f32[16], q.2: f32[16]) -> f32[4,8,8,16] {
  %q = f32[4,8,8,16]{3,2,1,0} parameter(0)
  %q.1 = f32[16]{0} parameter(1)
  %q.2 = f32[16]{0} parameter(2)
  %loop = (f32[4,8,8,16]{3,2,1,0}, pred[4,8,8,16]{3,2,1,0}) fusion(%q, %q.1, /*index=2*/%q.2), \
kind=kLoop, calls=%scaled, backend_config={"reification_cost":[{"end_to_end_cycles":1,\
"exec_time_us":1.5e-1,"name":""},{"exec_time_us":9,"name":"sol"}]}
  ROOT %y.1 = f32[4,8,8,16]{3,2,1,0} get-tuple-element(%loop), index=0
}

ENTRY %main (x: f32[4,8,8,3], kernel: f32[3,3,3,16], gamma: f32[16]) -> f32[4,8,8,16] {
  %x = f32[4,8,8,3]{3,2,1,0} parameter(0)
  %kernel = f32[3,3,3,16]{3,2,1,0} parameter(1)
  %gamma = f32[16]{0} parameter(2)
  %moved = f32[16,3,3,3]{3,2,1,0} fusion(%kernel), kind=kInput, calls=%transposed, \
backend_config={"reification_cost":[{"exec_time_us":0.25,"name":""}]}
  %conv = (f32[4,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %moved), window={size=3x3 \
pad=1_1x1_1}, custom_call_target="__cudnn$convForward", backend_config={"reification_cost":[]}
  %z = f32[4,8,8,16]{3,2,1,0} get-tuple-element(%conv), index=0
  %sums = f32[16]{0} fusion(%z), kind=kInput, calls=%sampled, \
backend_config={"reification_cost":[{"exec_time_us":0.5,"name":""}]}
  ROOT %out = f32[4,8,8,16]{3,2,1,0} call(%z, %sums, %gamma), to_apply=%recorded
}
"""
ACTIVATION = 4 * 8 * 8 * 16 * 4  # bytes
KERNEL = 3 * 3 * 3 * 16 * 4
VECTOR = 16 * 4


def by_name(text=PROGRAM, inputs=1):
    return {kernel.name: kernel for kernel in hlo.kernels(text, inputs)}


def test_kernels_are_what_runs_in_order_with_what_is_called():
    kinds = {name: kernel.kind for name, kernel in by_name().items()}
    assert list(kinds.items()) == [
        ("moved", "other fusion"),
        ("conv", "convolution"),
        ("sums", "other fusion"),
        ("loop", "loop fusion"),
    ]


def test_bytes_of_a_sample_are_those_of_what_it_takes():
    sums = by_name()["sums"]
    assert (sums.read, sums.written) == (ACTIVATION // 16, VECTOR)


def test_bytes_of_a_kernel_are_its_operands_once_and_all_that_it_writes():
    kernels = by_name()
    conv, loop = kernels["conv"], kernels["loop"]
    assert (conv.read, conv.written) == (4 * 8 * 8 * 3 * 4 + KERNEL, ACTIVATION)
    # The comparison is written too, in a byte for each element.
    assert (loop.read, loop.written) == (ACTIVATION + 2 * VECTOR, ACTIVATION + ACTIVATION // 4)


@pytest.mark.parametrize(("step", "charged"), [(4, 4), (16, 8)])
def test_a_sample_along_contiguous_elements_costs_whole_sectors(step, charged):
    """A 4th of all elements lies in the same sectors of 32 bytes as the others, a 16th in half."""
    text = PROGRAM.replace("f32[4,2,2,16]", f"f32[4,8,8,{16 // step}]").replace(
        "slice={[0:4], [0:8:4], [0:8:4], [0:16]}", f"slice={{[0:4], [0:8], [0:8], [0:16:{step}]}}"
    )
    sums = by_name(text)["sums"]
    assert sums.read == ACTIVATION * charged // step


def test_a_value_that_is_read_whole_too_is_charged_once():
    text = PROGRAM.replace("reduce(%slice, %zero)", "reduce(%p.1, %zero, %slice)")
    assert by_name(text)["sums"].read == ACTIVATION


def test_two_samples_of_a_value_are_charged_both():
    twice = (
        "  %other = f32[4,2,2,16]{3,2,1,0} slice(%p.1), slice={[0:4], [1:8:4], [0:8:4], [0:16]}\n"
    )
    text = PROGRAM.replace("  %zero", f"{twice}  %zero").replace("(%slice, ", "(%slice, %other, ")
    assert by_name(text)["sums"].read == ACTIVATION // 8


def test_a_kernel_of_weights_alone_is_one_that_no_data_reach():
    assert [one.name for one in hlo.kernels(PROGRAM, 1) if one.of_weights] == ["moved"]
    assert [one.name for one in hlo.kernels(PROGRAM, 2) if one.of_weights] == []
    assert all(one.of_weights for one in hlo.kernels(PROGRAM, 0))


def test_what_kernels_come_to():
    made = compiler.summary(hlo.kernels(PROGRAM, 1), temporary=5)
    assert (made.kernels, made.convolutions, made.loop_fusions, made.of_weights) == (4, 1, 1, 1)
    assert made.microseconds == pytest.approx(0.25 + 0.5 + 0.15)
    assert (made.unestimated, made.temporary) == (0, 5)
    without = hlo.kernels(PROGRAM.replace('"exec_time_us":0.5,', ""), 1)
    assert compiler.summary(without, 0).unestimated == 1


def test_loops_are_refused_since_nobody_knows_how_often_they_run():
    text = PROGRAM.replace("call(%z, %sums, %gamma), to_apply", "while(%z), body")
    with pytest.raises(ValueError, match="there is a while, which runs nobody knows how often"):
        hlo.kernels(text, 1)


@pytest.mark.parametrize("text", ["", "HloModule nothing"])
def test_what_is_no_program_is_refused(text):
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.kernels(text, 1)


# ----------------------------------------------------------------------------- the plugin


def installed(found):
    def version(package):
        if package not in found:
            raise metadata.PackageNotFoundError(package)
        return found[package]

    return version


ALL = dict.fromkeys(("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt"), "0.10.2")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, "jax-cuda13-plugin is not installed; pip install"),
        (ALL | {"jax-cuda13-plugin": "0.10.1"}, "jax-cuda13-plugin is 0.10.1.* of one version"),
    ],
)
def test_a_plugin_that_is_missing_or_another_is_said_with_what_brings_it(monkeypatch, found, said):
    monkeypatch.setattr(compiler.metadata, "version", installed(found))
    with pytest.raises(ValueError, match=said) as refused:
        compiler.versions()
    assert "pip install '.[gpu-compiler]'" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_version_is_that_of_all_packages(monkeypatch):
    monkeypatch.setattr(compiler.metadata, "version", installed(ALL))
    assert compiler.versions() == "0.10.2"


def test_targets_have_the_names_of_gpus():
    assert all(target.name in target.text() for target in TARGETS.values())


# ---------------------------------------------------------------------------- the program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--target=h1000", "unknown target 'h1000'; known are h100, a100"),
        ("--batch_sizes=0", "--batch_sizes: '0' is no whole number from 1 up"),
    ],
)
def test_flags_that_are_wrong_are_one_line(flag, said):
    code, out, err = run(flag)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"error: {said}"


def missing():
    """Why nothing can be compiled here, or ""."""
    try:
        compiler.versions()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_training_steps_are_lowered():
    """They hold the gradients of convolutions, as is seen without the compiler."""
    import keras

    from benchmarks.gpu_compiler import lowered
    from benchmarks.models.training_networks import NETWORKS

    step = lowered.training("ResNet9", "keras_3", "strided2", "float32", batch=2)
    forward = lowered.inference(NETWORKS["ResNet9"](keras, "original"), "original", batch=2)
    assert step.inputs == 2
    assert step.program.count(b"convolution") > 2 * forward.program.count(b"convolution")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_small_networks_are_compiled_for_a_gpu_that_is_not_there(tmp_path):
    report = tmp_path / "compiled.json"
    code, out, err = run(
        "--models=MobileNet,ResNet50", "--size=32", "--keras=keras_3", "--batch_sizes=2",
        "--variants=fold,frozen,floor,clip", "--training=", f"--json={report}",
        f"--chart={tmp_path / 'compiled.png'}",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(report.read_text())
    assert found["what"] == "compiler output, not a measurement"
    assert found["what"] in out
    # ReLU6 is a kernel of its own behind cuDNN's convolutions, and does BatchNormalization's work;
    # ReLU is part of the convolution once BatchNormalization is gone.
    for row, convolutions, spared in zip(found["rows"], (28, 53), (0, 39), strict=True):
        variants = row["variants"]
        assert variants["clip"] == {"none": "everything folds"}
        original, fold, frozen, floor = (
            variants[name] for name in ("original", "fold", "frozen", "floor")
        )
        assert fold["left"] == frozen["left"] == 0 < original["left"]
        assert original["convolutions"] == fold["convolutions"] == convolutions
        assert fold["kernels"] == original["kernels"] - spared
        assert frozen["kernels"] == fold["kernels"] - fold["of_weights"] + frozen["of_weights"]
        assert frozen["of_weights"] < fold["of_weights"] // 4
        assert floor["kernels"] == fold["kernels"]
        moved = [facts["read"] + facts["written"] for facts in (original, fold, frozen)]
        assert moved == sorted(moved, reverse=True)
        assert fold["elsewhere"] < original["elsewhere"] < moved[0]
        assert 0 < fold["microseconds"] < original["microseconds"]
        assert original["unestimated"] == fold["unestimated"] == 0
    assert (tmp_path / "compiled.png").read_bytes().startswith(b"\x89PNG")
