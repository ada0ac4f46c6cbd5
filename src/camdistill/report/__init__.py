"""Reports: figures, TensorBoard, callbacks and result files."""
