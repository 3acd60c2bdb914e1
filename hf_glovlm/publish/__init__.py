"""Publishing: licences, the card, the Hub, ONNX graphs and plain CLIP checkpoints of a run."""
