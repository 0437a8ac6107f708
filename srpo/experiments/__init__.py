"""The paper's tables on the catalogue world: how each row is trained and summarized. `srpo.reproduce` runs them."""
