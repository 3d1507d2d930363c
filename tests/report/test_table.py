"""The column FID to dense of the results table."""

import pytest

from stages.protocol.evaluation import Metric
from stages.report.table import describe_protocol, protocol_to_text, shares_to_text, to_markdown
from tests.records import make_costs, make_evaluation, make_model


@pytest.fixture
def results(protocol):
    """Write the results of a dense and a finetuned model: the column FID to dense by model, and the whole text."""

    def write(sets=2, *, is_measured=True):
        def model(mean, unpaired):
            half_width = mean / 10 if sets > 1 else None
            given = {"fid_dense": mean, "fid_dense_unpaired": unpaired} if is_measured else {}
            found = {
                name: Metric(sets=[value] * sets, mean=value, half_width=half_width if name == "fid_dense" else None)
                for name, value in given.items()
                if name == "fid_dense" or sets > 1
            }
            alike = Metric(sets=[0.5] * sets, mean=0.5, half_width=None)
            return make_model(dict.fromkeys(("fid", "kid", "precision", "recall", "ssim", "mse"), alike) | found)

        models = {"dense": model(0.0, 0.25), "finetuned": model(0.04, 0.3)}
        record = make_evaluation(protocol.model_copy(update={"sets": sets}), models)
        text = to_markdown(record, make_costs(record))
        header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in text.splitlines()[:4])
        return {row[1]: row[header.index("FID to dense")] for row in rows}, text

    return write


def test_the_dense_row_has_the_floor(results):
    """Its own value, 0, tells nothing; the other rows have theirs with its interval, and the text explains both."""
    column, text = results()

    assert column == {"dense": "floor 0.250", "finetuned": "0.040 ± 0.004"}
    assert "against the dense model's from the same noise; floor: two dense sets from different noise." in text


def test_one_set_has_no_floor(results):
    """The text says so and what would give one."""
    column, text = results(sets=1)

    assert column == {"dense": "0.000", "finetuned": "0.040"}
    assert "from the same noise; no floor, which needs two sets or more." in text


@pytest.fixture
def shares(protocol):
    """Say what is said of a dense model with these precisions and a recall of .5, on so many images."""

    def say(precisions, **sizes):
        recall = Metric(sets=[0.5] * 2, mean=0.5, half_width=0.1)
        rest = dict.fromkeys(("fid", "kid", "recall", "ssim", "mse"), recall)
        precision = Metric(sets=precisions, mean=sum(precisions) / 2, half_width=0.0)
        models = {"dense": make_model(rest | {"precision": precision})}
        return shares_to_text(make_evaluation(protocol.model_copy(update={"sets": 2, **sizes}), models))

    return say


def test_shares_that_show_little_are_named(shares):
    """Of few images, and of 0 or 1 in every set; others are not spoken of."""
    enough = {"num_images": 100, "num_real_images": 100}

    assert shares([0.9, 1.0], **enough) == ""
    assert shares([1.0, 1.0], **enough).endswith("no certainty: precision of dense.")
    assert "Precision and recall of 20 images are coarse: one image counts 5.0%" in shares(
        [0.9, 0.8], num_images=100, num_real_images=20
    )


def test_an_evaluation_from_before_it_has_no_number(results):
    """The text says why."""
    column, text = results(is_measured=False)

    assert column == {"dense": "–", "finetuned": "–"}
    assert "FID to dense is missing (–) in evaluations from before it was measured." in text


def test_the_page_says_once_where_shares_show_little(protocol):
    """Beside the results, and not in the protocol below them again; a text without such a place has both in one."""
    alike = Metric(sets=[0.5] * 2, mean=0.5, half_width=0.1)
    models = {"dense": make_model(dict.fromkeys(("fid", "kid", "precision", "recall", "ssim", "mse"), alike))}
    record = make_evaluation(protocol.model_copy(update={"sets": 2}), models)
    shares = shares_to_text(record)

    assert shares
    assert shares not in describe_protocol(record)
    assert protocol_to_text(record) == f"{describe_protocol(record)} {shares}"
