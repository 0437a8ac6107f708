"""A real pretrained model on real judged pairs, over several splits: the program behind `make demo-real`."""
