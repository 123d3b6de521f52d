"""A byte-level language model with block-sparse layers: the parts that `train_transformer.py` puts together."""
