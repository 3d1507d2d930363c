"""A term of a page -> its explanation, which the page shows on hover, touch and focus."""

from markupsafe import Markup, escape

TERMS = {
    "model": "dense: before pruning. pruned: after channels were removed, untrained. finetuned: after recovery.",
    "params": "Number of weights. Fewer weights need less disk and memory.",
    "MACs": "Multiply-accumulates of one pass for one image: the amount of computation. A picture takes many passes.",
    "FID": "Fréchet distance between features of drawn and of real images; lower is better. It is larger on few "
    "images, so only values of one protocol compare.",
    "FID to dense": "The same distance to the dense model's images from the same noise: what pruning changed. The "
    "floor is what two sets of the dense model from different noise are apart.",
    "FID difference": "FID less that of the method that all are compared with, seed by seed.",
    "FID to dense difference": "FID to dense less that of the method that all are compared with, seed by seed.",
    "KID × 10³": "Kernel distance between features of drawn and of real images, times 1000; lower is better, without "
    "the bias that FID has from few images.",
    "precision": "Share of drawn images that look like real ones; 1 is best. On few images, or at 0 or 1, it shows no "
    "differences.",
    "recall": "Share of real images that the model could have drawn; 1 is best. On few images, or at 0 or 1, it shows "
    "no differences.",
    "SSIM": "Structural similarity of a picture and the dense model's from the same noise: 1 is equal, 0 unrelated. "
    "Below 0.9 the difference is visible side by side.",
    "SSIM difference": "SSIM less that of the method that all are compared with, seed by seed.",
    "variant": "A model in another form: an ONNX graph, integer weights, or deep features reused between steps.",
    "on disk": "Size of the file with the weights or the graph.",
    "a step": "Median time of one pass; of a cache, mean over a full pass and those that reuse it.",
    "latency": "Median time of one pass.",
    "±": "Half of the 95 % interval: repeated with other noise, the mean lies within it 19 times in 20.",
    "≈": "The difference from dense lies within its own interval, so it cannot be told from none.",
    "batch": "Images that one pass computes at once.",
    "precision of a pass": "Number format of the computation: float32, tf32 or bfloat16.",
    "mode": "eager: as PyTorch runs it; compiled: by torch.compile.",
    "passes": "How often the pass was timed.",
    "median": "Half of the passes took less time.",
    "p95": "19 of 20 passes took less time.",
    "images/s": "Images per second of one pass; a picture takes as many passes as the sampler has steps.",
    "peak memory": "Weights and activations that are alive at once in an eager pass.",
    "energy": "Joules of the processor or GPU during a pass, for each image of the batch. A picture takes as many "
    "passes as the sampler has steps.",
    "speed-up": "How many times as fast as dense: the median ratio of passes timed in turn, with its 95 % interval. An "
    "interval with 1 in it is no speed-up.",
    "MACs ratio": "MACs of dense over those of the model: the speed-up if time fell with computation.",
    "efficiency": "Speed-up over MACs ratio: 1 means that time falls in proportion to computation.",
    "front": "● no other row has both fewer MACs and a lower FID.",
    "MLflow run": "Id of the record of this compression in MLflow.",
    "finetune steps": "Optimiser steps of the recovery.",
    "seeds": "How many seeds were compressed; each repeats calibration, training and sampling.",
    "protocol": "All settings of a measurement, as one id: sampler, seeds, images, feature extractor, real images.",
    "importance": "How much the loss would change without a weight, by its gradient; channels of low sums are removed.",
    "differs visibly": "SSIM below 0.9, which one sees at a glance with both pictures side by side.",
}
"""Term -> one or two sentences for a reader who is new to it."""


def term(name: str, text: str | None = None) -> Markup:
    """Mark up a term with its explanation.

    Args:
        name: A key of TERMS; another name is returned as it is.
        text: What to show; by default the name.
    """
    shown = escape(name if text is None else text)
    if name not in TERMS:
        return Markup(shown)  # noqa: S704  # escaped
    return Markup('<span class="term" tabindex="0" title="{}">{}</span>').format(TERMS[name], shown)
