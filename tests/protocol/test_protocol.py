"""The protocol, its id and its checks."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from diffusers import DDPMScheduler

from stages.models.params import CLIPPING, SamplerParams, SchedulerName
from stages.protocol.extractors import Extractor
from stages.protocol.params import ExtractorParams
from stages.protocol.protocol import Protocol, bias_warning, check_same
from stages.protocol.resolve import check_current, make_protocol
from stages.runtime.errors import InputError

REAL = np.zeros((600, 1, 16, 16), np.uint8)


@pytest.fixture
def extractor(params):
    """The default extractor."""
    return Extractor(params.reference.extractor, 100)


def test_the_id_changes_with_every_setting_but_the_batch_size(params, scheduler, extractor):
    """Every setting that affects a measurement changes the id."""
    base = make_protocol(params.reference, 0, scheduler, REAL, extractor)
    batch = params.reference.model_copy(update={"batch_size": 3})
    assert make_protocol(batch, 0, scheduler, REAL, extractor).id == base.id
    assert len(base.id) == 12

    changes = [
        {"sampler": SamplerParams(steps=25)},
        {"sampler": params.reference.sampler.model_copy(update={"clip": False})},
        {"precision": "bfloat16"},
        {"precision": "tf32"},
        {"num_images": 400},
        {"sets": 2},
        {"kid_subsets": 7},
        {"kid_subset_size": 100},
        {"neighbours": 5},
        {"guidance": 2.0},
    ]
    others = [
        make_protocol(params.reference.model_copy(update=change), 0, scheduler, REAL, extractor) for change in changes
    ]
    steeper = DDPMScheduler(beta_end=0.03)
    others.append(make_protocol(params.reference, 0, steeper, REAL, extractor))
    others.append(make_protocol(params.reference, 1, scheduler, REAL, extractor))
    others.append(make_protocol(params.reference, 0, scheduler, REAL + 1, extractor))
    others.append(make_protocol(params.reference, 0, scheduler, REAL[:-1], extractor))
    thumbnail = params.reference.model_copy(update={"extractor": ExtractorParams(name="thumbnail")})
    others.append(make_protocol(thumbnail, 0, scheduler, REAL, Extractor(thumbnail.extractor, 100)))
    others += [base.model_copy(update=change) for change in ({"extractor_sha256": "e" * 64}, {"layer": "last"})]
    changed = {
        name for other in others for name in Protocol.model_fields if getattr(other, name) != getattr(base, name)
    }
    assert len({protocol.id for protocol in [base, *others]}) == len(others) + 1
    assert changed == Protocol.model_fields.keys() - {"weights"}  # which has one value


def test_a_scale_of_1_is_no_guidance(params):
    """Both draw the same images, so they are one protocol."""
    given = params.reference.model_dump() | {"guidance": 1}

    assert type(params.reference).model_validate(given) == params.reference


def test_a_protocol_keeps_its_id(protocol):
    """A new option leaves the ids of protocols without it as they were, so that old and new numbers compare."""
    assert protocol.id == "b6cba6f27bef"


def test_comparing_across_protocols_is_refused(protocol):
    """The error has one line with both ids and both values of every field that differs."""
    other = protocol.model_copy(update={"num_images": 5, "sampler": SamplerParams(steps=2, clip=False)})

    with pytest.raises(InputError) as caught:
        check_same(protocol, other, ("a", "b"))
    assert f"a and b were measured under protocols {protocol.id} and {other.id}" in caught.value.message
    assert "num_images is 4 and 5" in caught.value.message
    assert "sampler.clip is True and False" in caught.value.message
    assert "\n" not in caught.value.message
    check_same(protocol, protocol.model_copy(), ("a", "b"))


def test_a_reference_of_another_protocol_is_refused(params, scheduler, extractor):
    """The error names the field that differs; equal params pass, with clip null too."""
    protocol = make_protocol(params.reference, 0, scheduler, REAL, extractor)
    check_current(protocol, params.reference, 0, scheduler, extractor, Path("reference"))

    with pytest.raises(InputError, match="seed is 0 and 1"):
        check_current(protocol, params.reference, 1, scheduler, extractor, Path("reference"))
    with pytest.raises(InputError, match="schedule_sha256 is"):
        check_current(protocol, params.reference, 0, DDPMScheduler(beta_end=0.03), extractor, Path("reference"))


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_the_protocol_of_every_sampler_survives_json(params, scheduler, extractor, name):
    """Clip is true only for samplers that can clip."""
    sampler = SamplerParams(scheduler=name, steps=10)
    protocol = make_protocol(params.reference.model_copy(update={"sampler": sampler}), 0, scheduler, REAL, extractor)

    assert protocol.sampler.clip is (name in CLIPPING)
    assert Protocol.model_validate_json(protocol.model_dump_json()) == protocol


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_no_clipping_is_one_protocol_for_a_sampler_that_cannot_clip(params, extractor, name):
    """Whether params or nobody says so; the images are equal."""
    scheduler, ids = DDPMScheduler(clip_sample=True), set()
    for clip in (None, False):
        sampler = SamplerParams(scheduler=name, steps=10, clip=clip)
        changed = params.reference.model_copy(update={"sampler": sampler})
        ids.add(make_protocol(changed, 0, scheduler, REAL, extractor).id)

    assert len(ids) == (2 if name in CLIPPING else 1)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (200, 1, 16, 16), r"kid_subset_size 250 needs 250 real images, there are 200"),
        ({"kid_subset_size": 2, "neighbours": 9}, (9, 1, 16, 16), r"neighbours 9 needs 10 real images, there are 9"),
        ({}, (600, 1, 8, 8), r"SSIM needs images of at least 11×11, the models generate 8×8"),
        ({"sampler": SamplerParams(steps=600)}, (600, 1, 16, 16), r"steps 600 does not divide the 1000 timesteps"),
        ({"sampler": SamplerParams(steps=1)}, (600, 1, 16, 16), r"1 leading steps of DDIM begin at 0 of 1000"),
        (
            {"sampler": SamplerParams(scheduler="PNDM", steps=2)},
            (600, 1, 16, 16),
            r"2 leading steps of PNDM do not work with this model's schedule",
        ),
        ({}, (3, 1, 16, 16), r"there are 3 real images, at least 4 are needed"),
    ],
)
def test_params_that_do_not_fit_model_or_data_are_refused(params, scheduler, extractor, changes, shape, message):
    """They are refused before anything is drawn; the error gives the numbers."""
    with pytest.raises(InputError, match=message):
        make_protocol(params.reference.model_copy(update=changes), 0, scheduler, np.zeros(shape, np.uint8), extractor)


def test_few_images_cause_a_warning(protocol):
    """FID is biased upwards if there are few images per feature."""
    many = protocol.model_copy(update={"num_images": 50_000, "num_real_images": 50_000})
    assert bias_warning(many, 2048) is None
    warning = bias_warning(many.model_copy(update={"num_images": 1000}), 2048)
    assert warning.startswith("FID on 1000 images with 2048 features is biased upwards")
    warning = bias_warning(many.model_copy(update={"num_real_images": 40}), 2048)
    assert warning.startswith("FID on 40 real images with 2048 features is biased upwards")
