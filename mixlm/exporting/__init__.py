"""Models in the forms of other libraries: sentence-transformers, ONNX."""
