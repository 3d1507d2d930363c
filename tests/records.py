"""Small records of the stages, for tests of those who read them."""

from stages.protocol.costs import Cost, CostsRecord


def make_costs(evaluation, speed_up=1.2, device="cpu"):
    """Costs of an evaluation's models: one eager row each, the dense one at speed-up 1."""
    rows = []
    for name in evaluation.models:
        ratio = 1.0 if name == "dense" else speed_up
        interval = {"speed_up_low": ratio - 0.05, "speed_up_high": ratio + 0.05}
        setting = {"batch": 1, "precision": "float32", "mode": "eager", "device": device}
        rows.append(Cost(model=name, **setting, passes=30, median_ms=2.5, speed_up=ratio, **interval))
    hashes = {name: model.weights_sha256 for name, model in evaluation.models.items()}
    return CostsRecord(weights_sha256=hashes, costs=rows)
