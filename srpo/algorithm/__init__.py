"""The paper's mathematics (3.2.1, 4.3.3) as pure functions on tensors and numbers."""
