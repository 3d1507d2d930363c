"""Forms in which a model is deployed: ONNX graph, integer weights, reuse of features between sampling steps."""
