"""Results that rest on a model's structure alone are computed once for it."""

from stages.models.complexity import count_macs
from stages.models.groups import find_groups
from stages.models.structure import NUM_STRUCTURES, once_per_structure, structure


def test_weights_do_not_count(make_unet):
    """Models of other weights share the groups, which are searched once."""
    assert find_groups(make_unet(seed=0)) is find_groups(make_unet(seed=1))


def test_everything_else_counts(make_unet, conditional):
    """Widths, size, norm groups, kind of downsampling, family and heads, also those that a cut left."""
    models = [
        make_unet(),
        make_unet(block_out_channels=(8, 16)),
        make_unet(sample_size=16),
        make_unet(norm_num_groups=8),
        make_unet(downsample_type="resnet"),
        make_unet(attention_head_dim=8),
        conditional,
    ]
    before = structure(conditional)
    conditional.down_blocks[1].attentions[0].transformer_blocks[0].attn1.heads = 1

    assert len({structure(model) for model in models}) == len(models)
    assert structure(conditional) != before


def test_a_cached_count_is_that_of_the_model(make_unet):
    """Counts of two sizes, each asked twice in turn: four times the pixels are about four times the work."""
    found = [count_macs(make_unet(sample_size=size)) for size in (8, 16, 8, 16)]

    assert found[:2] == found[2:]
    assert 3.5 < found[1] / found[0] <= 4


def test_an_error_is_not_kept_and_old_results_go(unet, monkeypatch):
    """A failing search is tried again; of many structures the last ones stay."""
    calls = []

    @once_per_structure
    def search(model):
        calls.append(model)
        return 1 // (len(calls) - 1)

    for expected in (ZeroDivisionError, 1, 1):
        try:
            assert search(unet) == expected
        except ZeroDivisionError:
            assert expected is ZeroDivisionError
    assert len(calls) == 2

    keys = iter([*range(NUM_STRUCTURES), "last"])
    monkeypatch.setattr("stages.models.structure.structure", lambda _: next(keys))
    for _ in range(NUM_STRUCTURES + 1):
        search(unet)
    monkeypatch.undo()
    search(unet)
    assert len(calls) == 2 + NUM_STRUCTURES + 2
