"""Where each picture lies in a grid, and what the page says by class."""

import numpy as np
import pytest
from PIL import Image

from stages.data.grid import write_grid
from stages.models.layer_order import in_run_order, module_name
from stages.protocol.evaluation import ClassChange
from stages.report.by_class import describe_classes
from stages.report.page import list_contents
from stages.report.pairs import find_cells
from stages.report.table_page import markdown_blocks
from stages.report.terms import TERMS, term
from tests.records import make_evaluation, make_model


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (64, 64)])
def test_every_picture_of_a_grid_is_found(tmp_path, shape):
    """Each box holds one picture and nothing of the lines between them, whatever the enlargement."""
    shades = np.arange(20, 92, 8, dtype=np.uint8)
    write_grid(np.broadcast_to(shades[:, None, None, None], (9, 1, *shape)), tmp_path / "grid.png", columns=4)
    boxes = find_cells(tmp_path / "grid.png", 4, 9)

    with Image.open(tmp_path / "grid.png") as image:
        found = [np.asarray(image.crop((left, top, left + width, top + height))) for left, top, width, height in boxes]
    assert [set(cell.flat) for cell in found] == [{shade} for shade in shades]
    assert {cell.shape for cell in found} == {(round(boxes[0][3]), round(boxes[0][2]))}


def make_record(protocol, changes, by, **fields):
    """Make an evaluation of a finetuned model with these classes."""
    models = {"dense": make_model(), "finetuned": make_model(classes=changes, visible_pairs=1, **fields)}
    three = protocol.model_copy(update={"sets": 3})
    return make_evaluation(three, models).model_copy(update={"classes_by": by})


def test_the_most_changed_class_comes_first(protocol):
    """By the share of pictures whose predicted class changed; its colour follows the share."""
    changes = [
        ClassChange(name="cat", images=10, visible=9, changed=1),
        ClassChange(name="dog", images=10, visible=0, changed=6),
    ]
    found = describe_classes(make_record(protocol, changes, "predictions"))

    assert [(row.name, row.share, row.tone) for row in found["rows"]] == [("dog", 0.6, "worse"), ("cat", 0.1, "good")]
    assert found["text"].startswith("In 7 of 20 pictures")


def test_without_a_classifier_visible_differences_are_counted(protocol):
    """By the labels of a conditional model."""
    changes = [ClassChange(name="class 0", images=10, visible=9, changed=None)]
    found = describe_classes(make_record(protocol, changes, "labels"))

    assert found["rows"][0].share == 0.9
    assert "9 of 10 pictures" in found["text"]
    assert found["title"] == "differ visibly"


def test_without_classes_the_page_has_no_section_of_them(protocol):
    """Neither in its list of contents: the extractor is no classifier, and the model has no classes."""
    classes = describe_classes(make_record(protocol, (), None))

    assert classes is None
    assert "classes" not in dict(list_contents({"classes": classes, "grid": None, "variants": []}))


def test_layers_stand_in_the_order_in_which_they_run():
    """The middle block between the others, where diffusers registers it last."""
    layers = [
        "conv_in",
        "down_blocks.0.resnets.1.conv1",
        "up_blocks.0.upsamplers.0.conv",
        "mid_block.attentions.0.to_q",
    ]

    assert in_run_order(layers) == [*layers[:2], layers[3], layers[2]]
    assert [module_name(layer) for layer in layers] == [
        "conv in",
        "down 0 · resnet 1",
        "up 0 · upsampler 0",
        "mid · attention 0",
    ]


def test_the_markdown_of_a_table_is_read_back():
    """Headings, tables and paragraphs."""
    heading, table, text = markdown_blocks("# A title\n\n| a | b |\n| --- | ---: |\n| 1 | |\n\nSome `code`.\n")

    assert (heading.kind, heading.text) == ("heading", "A title")
    assert (table.header, table.rows) == (["a", "b"], [["1", ""]])
    assert (text.kind, text.text) == ("text", "Some code.")


def test_a_term_brings_its_explanation_and_escapes_its_text():
    """A word that is no term stays as it is."""
    assert f'title="{TERMS["MACs"]}"' in term("MACs")
    assert str(term("<b>")) == "&lt;b&gt;"
