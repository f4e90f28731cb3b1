"""Nothing that is decided changes unless it is meant: plans as kept in tests/golden/plans."""

import pytest

from tests.golden import plans

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("keras", plans.KERASES)
@pytest.mark.parametrize("name", plans.NETWORKS)
def test_networks(name, keras):
    assert plans.network_plans(name, keras) == plans.kept_plans(f"{name}-{keras}")


@pytest.mark.parametrize("name", plans.SAVED_MODELS)
def test_saved_models(name, tmp_path):
    made = plans.saved_model_plans(name, tmp_path / "model")
    assert made == plans.kept_plans(f"saved_model-{name}")


def test_what_is_kept_is_what_is_tried():
    names = {path.stem for path in plans.KEPT.iterdir()}
    assert names == {f"{name}-{keras}" for name in plans.NETWORKS for keras in plans.KERASES} | {
        f"saved_model-{name}" for name in plans.SAVED_MODELS
    }


def test_another_map_is_seen():
    """Plans with the same decisions, but other maps, are not equal."""
    kept = plans.kept_plans("random_44-tf_keras")
    made = plans.network_plans("random_44", "tf_keras")
    assert made == kept
    edit = made["fold"]["edits"][0]
    edit["sha256"] = edit["sha256"][::-1]
    assert made != kept


def test_maps_are_kept_by_what_they_do():
    plan = plans.kept_plans("random_44-tf_keras")["depthwise"]
    assert len({edit["sha256"] for edit in plan["edits"]}) == len(plan["edits"]) > 3
