"""Statistics of all replicas together: equal to those of one device with the whole batch.

Replicas live in processes of their own, since devices cannot be added to a running TensorFlow.
Run as a program, this file is such a process: it writes what it found to the path it is given.
"""

import functools
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

pytestmark = pytest.mark.slow

STRIDES = {"StridedBatchNormalization": 2, "ModifiedBatchNormalization": 1}
KERASES = ["tf_keras", "keras"]
FRONTENDS = {"tf_keras": "tf_keras", "keras": "keras3"}
CHANNELS = 3
MOMENTUM = 0.75
# Replicas have parts of different sizes, so that a mean of means is wrong.
PARTS = [slice(0, 6), slice(6, 8)]
TIMEOUT = 120


def load(name):
    """One Keras, and the module of its training layers."""
    from importlib import import_module

    layers = import_module(f"mbn_rewrite.frontends.{FRONTENDS[name]}.training_layers")
    return import_module(name), layers


def numbers(seed):
    return np.random.default_rng(seed).standard_normal((8, 8, 8, CHANNELS)).astype("float32") + 1


def as_dict(**arrays):
    return {name: np.asarray(array) for name, array in arrays.items()}


def trainable(layer):
    return [getattr(w, "value", w) if hasattr(w, "path") else w for w in layer.trainable_weights]


def moving(layer):
    return [layer.moving_mean.numpy(), layer.moving_variance.numpy()]


# ---------------------------------------------------------------------------- the two trainings


def step(keras_name, class_name, stride, strategy, parts):
    """One step of a loop of one's own: of every part the output and the gradient, and sums."""
    _, layers = load(keras_name)
    with strategy.scope():
        layer = getattr(layers, class_name)(stride, synchronized=True, momentum=MOMENTUM)
        layer.build((None, 8, 8, CHANNELS))
    tensors = [
        strategy.experimental_distribute_values_from_function(pick(s, parts)) for s in (0, 1)
    ]

    @tf.function
    def run(x, dy):
        def replica(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return y, *tape.gradient(y, [x, *trainable(layer)], dy)

        return strategy.run(replica, (x, dy))

    calls = count_all_reduces()
    y, dx, *gradients = run(*tensors)
    results = [strategy.experimental_local_results(t) for t in (y, dx)]
    y, dx = (np.concatenate([part.numpy() for part in parts]) for parts in results)
    gradients = [strategy.reduce("SUM", g, axis=None).numpy().ravel() for g in gradients]
    return as_dict(y=y, dx=dx, gradients=gradients, statistics=moving(layer), calls=sorted(calls))


def pick(seed, parts):
    """What gives each replica its part."""
    return lambda context: tf.constant(numbers(seed)[parts[context.replica_id_in_sync_group]])


def count_all_reduces():
    """A list that grows by the size of every tensor that a layer sums over replicas."""
    calls = []
    plain = getattr(tf.distribute.ReplicaContext.all_reduce, "__wrapped__", None)
    plain = plain or tf.distribute.ReplicaContext.all_reduce

    @functools.wraps(plain)
    def counted(self, reduce_op, value, *args, **kwargs):
        calls.append([t.shape.num_elements() for t in tf.nest.flatten(value)])
        return plain(self, reduce_op, value, *args, **kwargs)

    tf.distribute.ReplicaContext.all_reduce = counted
    return calls


def fit(keras_name, strategy):
    """Three steps of fit, each with the whole batch."""
    keras, layers = load(keras_name)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((8, 8, CHANNELS)),
                layers.StridedBatchNormalization(2, synchronized=True, momentum=MOMENTUM),
            ]
        )
        model.compile(keras.optimizers.SGD(1.0), "mse")
    data = tf.data.Dataset.from_tensor_slices((numbers(0), numbers(1))).batch(8)
    losses = model.fit(data, epochs=3, verbose=0).history["loss"]
    layer = model.layers[-1]
    weights = [np.ravel(weight) for weight in model.get_weights()[:2]]
    return as_dict(losses=losses, weights=weights, statistics=moving(layer))


CASES = {
    f"{keras}-{name}": functools.partial(step, keras, name, stride)
    for keras in KERASES
    for name, stride in STRIDES.items()
}
FITS = {f"{keras}-fit": functools.partial(fit, keras) for keras in KERASES}
# fit of Keras 3 does not unpack what a strategy of several workers gives it, whatever the layers.
FITS_OF_WORKERS = ["tf_keras-fit"]


def everything(strategy, fits):
    """The results of all cases; for what fails, why."""

    def outcome(work, *args):
        try:
            return work(strategy, *args)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    steps = {name: outcome(work, PARTS) for name, work in CASES.items()}
    return steps | {name: outcome(FITS[name]) for name in fits}


# -------------------------------------------------------------------------------- the processes


def mirrored():
    """Two replicas in one process."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return everything(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), FITS)


def worker():
    """One of two replicas, each with a process; TF_CONFIG says which."""
    return everything(tf.distribute.MultiWorkerMirroredStrategy(), FITS_OF_WORKERS)


PROGRAMS = {"mirrored": mirrored, "worker": worker}


def started(program, path, **environment):
    # One thread for operations that wait for each other would wait for ever.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TF_NUM_")}
    return subprocess.Popen(
        [sys.executable, __file__, program, str(path)],
        env=inherited | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )


def results(processes, paths):
    """What processes wrote; none of them outlives this."""
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), errors[-1]
    return [pickle.loads(path.read_bytes()) for path in paths]


@pytest.fixture(scope="module")
def of_two_devices(tmp_path_factory):
    path = tmp_path_factory.mktemp("mirrored") / "results"
    return results([started("mirrored", path)], [path])[0]


@pytest.fixture(scope="module")
def of_two_workers(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("workers") / f"results_{i}" for i in range(2)]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in paths]
    cluster = {"worker": [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]}
    for taken in sockets:
        taken.close()
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in range(2)]
    processes = [
        started("worker", path, TF_CONFIG=json.dumps(task))
        for path, task in zip(paths, tasks, strict=True)
    ]
    return results(processes, paths)


@functools.cache
def alone(name):
    """What one device makes of the whole batch."""
    strategy = tf.distribute.get_strategy()
    return FITS[name](strategy) if name in FITS else CASES[name](strategy, [slice(None)])


def check(found, name):
    assert "error" not in found, found["error"]
    expected = alone(name)
    for part in expected.keys() - {"calls"}:
        np.testing.assert_allclose(
            found[part], expected[part], rtol=1e-4, atol=1e-4, err_msg=part, strict=True
        )


# ------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", [*CASES, *FITS])
def test_two_devices(of_two_devices, name):
    check(of_two_devices[name], name)


@pytest.mark.parametrize("name", CASES)
def test_two_workers(of_two_workers, name):
    first, second = (of_one[name] for of_one in of_two_workers)
    assert "error" not in first | second, first | second
    whole = {part: np.concatenate([first[part], second[part]]) for part in ("y", "dx")}
    check(first | whole, name)
    np.testing.assert_array_equal(first["statistics"], second["statistics"])


@pytest.mark.parametrize("name", FITS_OF_WORKERS)
@pytest.mark.parametrize("worker", [0, 1])
def test_fit_by_two_workers(of_two_workers, worker, name):
    check(of_two_workers[worker][name], name)


# Of sums, sums of squares and a count forward; of the two gradients backward.
ONE_REPLICA_SUMS = [[2 * CHANNELS], [2 * CHANNELS + 1]]


@pytest.mark.parametrize("name", CASES)
def test_one_sum_over_replicas_each_way(of_two_devices, name):
    assert of_two_devices[name]["calls"].tolist() == sorted(2 * ONE_REPLICA_SUMS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("worker", [0, 1])
def test_one_sum_over_workers_each_way(of_two_workers, worker, name):
    assert of_two_workers[worker][name]["calls"].tolist() == ONE_REPLICA_SUMS


@pytest.mark.parametrize("name", CASES)
def test_one_device_sums_nothing(name):
    assert not alone(name)["calls"].size


@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_the_replicas_is_another(name):
    """What is compared above shows whether replicas meet."""
    whole = alone(name)["statistics"]
    parts = [CASES[name](tf.distribute.get_strategy(), [part])["statistics"] for part in PARTS]
    assert np.max(np.abs(np.mean(parts, axis=0) - whole)) > 1e-3


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(pickle.dumps(PROGRAMS[sys.argv[1]]()))
