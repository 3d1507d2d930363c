"""A released model -> whether a version of the registry draws the images that this project draws."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image

from stages.fetch.class_embedding import read_class_embedding
from stages.models.autoencoder import read_autoencoder
from stages.models.pipeline import CPU, read_scheduler, read_unet
from stages.models.sampling import SamplingContext, draw
from stages.models.trust import trusting
from stages.register import package
from stages.register.draw import Draw
from stages.storage.files import write_json


def check_version(released, protocol, evidence, labels):
    """Draw one image of each label by the version's code and by this project's, and compare them.

    Args:
        released: Folder of the released model.
        protocol: The protocol that the version draws under.
        evidence: Folder of the version's evidence, which gets the settings of the sampler.
        labels: Class of each image.
    """
    seeds = list(range(1, len(labels) + 1))
    context = package._describe_context(released)
    settings = {**package._describe_sampler(protocol.sampler, released), "guidance": protocol.guidance, **context}
    write_json(evidence / "sampler.json", settings)
    version = Draw()
    version.load_context(SimpleNamespace(artifacts={"model": str(released), "evidence": str(evidence)}))
    drawn = version.predict(None, pd.DataFrame({"seed": seeds, "label": labels}))
    with trusting(is_trusted=True):
        unet = read_unet(released)
    table = read_class_embedding(unet, released)
    expected = draw(
        unet,
        read_scheduler(released),
        seeds,
        protocol.sampler,
        batch_size=len(seeds),
        label="version",
        context=SamplingContext(read_autoencoder(released, CPU), table, protocol.guidance),
        labels=labels,
    )
    for row, image in zip(drawn, expected, strict=True):
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))).astype(int)
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        assert np.abs(found - pixels).max() <= 1  # another layout in memory rounds otherwise
