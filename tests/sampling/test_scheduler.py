"""Schedulers by name: the timesteps of few-step models, and one line for what cannot be."""

import json
from pathlib import Path

import pytest

from diffalign.errors import ConfigError
from diffalign.sampling.scheduler import make_scheduler

OWN = json.loads((Path(__file__).parents[2] / "assets/tiny-sdxl/scheduler/scheduler_config.json").read_text())
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", None])
def test_trailing_takes_the_distilled_timesteps(name):
    scheduler = make_scheduler(OWN, name, "trailing", 4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.config.beta_end == OWN["beta_end"] == 0.02  # the model's noise, not the class's default


def test_without_a_spacing_schedulers_keep_their_own():
    assert make_scheduler(OWN, "LCMScheduler", None, 4).timesteps.tolist() == [999, 759, 499, 259]
    assert make_scheduler(OWN, None, None, 4).timesteps.tolist() == [751, 501, 251, 1]
    assert type(make_scheduler(OWN)).__name__ == "EulerDiscreteScheduler"


def test_flow_models_have_their_own():
    assert type(make_scheduler(FLOW, "FlowMatchHeunDiscreteScheduler", None, 4)).__name__ == "FlowMatchHeunDiscreteScheduler"
    with pytest.raises(ConfigError, match="is not for this model, whose own is FlowMatchEulerDiscreteScheduler"):
        make_scheduler(FLOW, "LCMScheduler")


@pytest.mark.parametrize("name, near", [
    ("LCM", "LCMScheduler"), ("lcmscheduler", "LCMScheduler"), ("EulerAncestral", "EulerAncestralDiscreteScheduler"),
    ("DDIMSchedular", "DDIMScheduler"), ("SchedulerMixin", "Scheduler"), ("StableDiffusionPipeline", "Scheduler")])
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f'evaluate.scheduler: diffusers has no scheduler "{name}". Did you mean ".*{near}"'):
        make_scheduler(OWN, name)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DDIMInverseScheduler", "RePaintScheduler",
                                  "ScoreSdeVeScheduler", "VQDiffusionScheduler"])
def test_schedulers_that_a_stock_pipeline_cannot_use(name):
    with pytest.raises(ConfigError, match="is not for this model"):
        make_scheduler(OWN, name)


@pytest.mark.parametrize("name, spacing, steps, words", [
    ("LCMScheduler", "leading", None, "knows trailing only"), ("DPMSolverSinglestepScheduler", "trailing", None, "no spacing"),
    ("LCMScheduler", None, 51, "LCMScheduler cannot be used so"), ("EulerDiscreteScheduler", None, 2000, None)])
def test_what_a_scheduler_does_not_know(name, spacing, steps, words):
    if words is None:
        make_scheduler(OWN, name, spacing, steps)
        return
    with pytest.raises(ConfigError, match=words) as raised:
        make_scheduler(OWN, name, spacing, steps)
    assert "\n" not in str(raised.value)


def test_the_prediction_must_be_known():
    assert make_scheduler({**OWN, "prediction_type": "v_prediction"}, "LCMScheduler").config.prediction_type == "v_prediction"
